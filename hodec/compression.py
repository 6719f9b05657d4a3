"""compress: a trained net made small in one call, without training."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hodec.calibration.input_covariance import InputCovariance, collect_covariances
from hodec.calibration.output_gradients import OutputGradient, TwoSided, collect_output_gradients, two_sided
from hodec.calibration.quality import Agreement, Evaluate, score, split
from hodec.calibration.sequential import fit_to_data
from hodec.conversion.eligibility import Layers
from hodec.conversion.swap import check_on_error, convert
from hodec.errors import ConfigError, DataError, PlanError
from hodec.formats.roles import Role
from hodec.inference import Batch, check_module, rereadable
from hodec.inputs import Inputs
from hodec.plan.plan import Plan
from hodec.ranks import Manual
from hodec.ranks.budget import Budget
from hodec.ranks.planning import make_plan
from hodec.ranks.table import AnyRule

log = logging.getLogger(__name__)

# By these two nets lose least where they are not retrained, see docs/admm.md; linear layers have one form in all.
METHODS = ["spatial_svd", "svd"]
# Where a net keeps what a search found.
REPORT_ATTRIBUTE = "compress_report"
# The search for the smallest share of multiply-adds: halvings between these, so that it ends within 1.5 % of the net.
LEAST_SHARE, HALVINGS = 0.05, 6


@dataclass(frozen=True)
class CompressReport:
    """What a search for an allowed loss found, all of it on held-out data.

    Attributes:
        dense, small: the score of the dense net and of the returned one.
        max_drop: what was allowed between them.
        score: what was measured: ``evaluate``, or ``agreement`` with the dense net.
        tried: share of the multiply-adds kept -> score, in the order of the search.
        held_out: batches that scores were measured on, and on which nothing was fitted.
        seconds: of the whole call.
    """

    dense: float
    small: float
    max_drop: float
    score: str
    tried: tuple[tuple[float, float], ...]
    held_out: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"keeps {self.small:.4g} of {self.dense:.4g} ({self.score} on {self.held_out} held-out batches), at most "
            f"{self.max_drop:g} less allowed; {len(self.tried)} nets tried in {self.seconds:.0f} s"
        )


def compress(  # noqa: PLR0913
    model: nn.Module,
    *,
    example_input: Inputs | None = None,
    macs: float | None = None,
    params: float | None = None,
    data: Iterable[Batch] | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    rule: AnyRule | None = None,
    method: str | None = None,
    include: Layers | None = None,
    exclude: Layers | None = None,
    on_error: str = "raise",
) -> nn.Module:
    """A factorized copy of a trained net, at a share of its cost or within an allowed loss; the given net stays:

        small = hodec.compress(net, example_input=x, macs=0.5)
        small = hodec.compress(net, data=loader, macs=0.5)
        small = hodec.compress(net, data=loader, max_drop=0.01, evaluate=accuracy)
        print(small.hodec_plan, small.compress_report)

    It plans and converts. With ``data`` ranks are chosen by what the net's outputs lose with each layer's, and layers
    are fitted one after the other to keep them (``hodec.fit_to_data``). A backward pass tells what outputs count for;
    nothing is trained, and no label is used: see ``hodec.Admm`` for training.

    Args:
        model: any net, on any device.
        example_input: as ``make_plan`` takes it; by default the first batch of ``data``.
        macs, params: shares of the net's multiply-adds and parameters to keep; by default ``macs=0.5``.
        data: some hundred images of the training data, in batches as ``make_plan`` takes them; augmented ones help.
            Up to 16 batches go through the net together; more are read once for each layer, which takes less memory
            and more time. An iterator, which can be read once, is kept in memory.
        max_drop: how much lower the score may be than the dense net's: the smallest share of multiply-adds is sought
            that stays within it. The last quarter of the batches is held out for that, and nothing is fitted to it.
        evaluate: the score, of a net and batches, higher is better; by default agreement with the dense net: the share
            of equal classes where outputs are (N, classes), else 1 - norm(difference) / norm(dense output).
        rule: what chooses the ranks instead of a budget, as in ``make_plan``.
        method: of all layers; by default each takes ``spatial_svd`` or ``svd``, whichever loses less.
        include, exclude: as in ``make_plan``.
        on_error: ``skip`` leaves a layer dense that cannot be swapped, with a warning.

    Returns:
        The net; ``hodec_plan`` is its plan and ``compress_report`` what a search found (None without ``max_drop``).
        ``hodec.save`` writes it, ``hodec.fuse`` makes it fast.

    Raises:
        ConfigError: neither an input nor data, a rule together with ``macs`` or ``params``, ``max_drop`` without data
            or together with a rule or target, ``evaluate`` without ``max_drop``.
        DataError: too few data to hold some out, or a score that is no number or not the same twice.
        PlanError: nothing to factorize, a share that no plan reaches, or nothing that stays within ``max_drop``.
        ConvertError: the converted net does not run.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = hodec.compress(net, example_input=torch.zeros(1, 64), macs=0.5)
        >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in small.parameters())
        (4810, 2438)
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> small = hodec.compress(net, data=batches, macs=0.5)  # what layers lose of their outputs counts
    """
    check_module(model)
    _check(example_input, data, macs, params, max_drop, evaluate, rule)
    check_on_error(on_error)
    batches = None if data is None else rereadable(data)
    if example_input is None:
        example_input = next(iter(() if batches is None else batches), None)
        if example_input is None:
            raise ConfigError("compress: data has no batch")
    given = _Given(model, example_input, rule, method, include, exclude, on_error)
    if max_drop is None or batches is None:
        seen = given.seen(batches)
        plan, roots = given.plan_for(macs, params, seen), seen.roots
        del seen  # covariances of all layers, which a fit has no use of
        small = given.small(plan, roots, batches)
        setattr(small, REPORT_ATTRIBUTE, None)
        return small
    return _search(given, list(batches), max_drop, evaluate)


def _check(  # noqa: PLR0913, PLR0917
    example_input: Inputs | None,
    data: object,
    macs: float | None,
    params: float | None,
    max_drop: float | None,
    evaluate: Evaluate | None,
    rule: AnyRule | None,
) -> None:
    if example_input is None and data is None:
        raise ConfigError("compress needs example_input, as the model takes it, or data: batches of such inputs")
    target = macs is not None or params is not None
    Budget(macs=macs, params=params)  # refuses shares out of range before data are read
    if rule is not None and target:
        raise ConfigError("compress: macs and params are targets of its own rule; give them to the rule instead")
    if max_drop is None and evaluate is not None:
        raise ConfigError("compress: evaluate is for a search within max_drop; give max_drop, or leave evaluate out")
    if max_drop is None:
        return
    if not max_drop >= 0:
        raise ConfigError(f"compress: max_drop={max_drop!r} given; allowed: a number at least 0, such as 0.01")
    if data is None:
        raise ConfigError("compress: a drop is measured on data; give data together with max_drop")
    if rule is not None or target:
        raise ConfigError("compress: max_drop seeks the share itself; leave macs, params and rule out")


@dataclass(frozen=True)
class _Seen:
    """What data say of layers.

    Attributes:
        covariances: layer -> method -> in what its weight is truncated.
        importances: layer -> how much its relative error counts.
        roots: layer -> how much its outputs count against each other.
    """

    covariances: dict[str, dict[str, TwoSided]]
    importances: dict[str, float]
    roots: dict[str, Tensor]


@dataclass(frozen=True)
class _Given:
    """The net and how it is planned and converted, whatever the share."""

    model: nn.Module
    example_input: Inputs
    rule: AnyRule | None
    method: str | None
    include: Layers | None
    exclude: Layers | None
    on_error: str

    @property
    def methods(self) -> list[str]:
        return [self.method] if self.method else METHODS

    def plan(self, rule: AnyRule, method: str, *, allow_larger: bool = False) -> Plan:
        return make_plan(
            self.model, rule, method=method, example_input=self.example_input,
            include=self.include, exclude=self.exclude, allow_larger=allow_larger,
        )  # fmt: skip

    def seen(self, data: Iterable[Batch] | None) -> _Seen:
        """What data say of the layers whose ranks a budget is to choose by that."""
        found: dict[str, dict[str, InputCovariance]] = {}
        gradients: dict[str, OutputGradient] = {}
        if data is None or self.rule is not None:
            return _Seen({}, {}, {})
        for method in self.methods:
            try:
                plan = self.plan(Manual(1), method, allow_larger=True)
            except PlanError:  # this method has none of the layers
                continue
            gradients = gradients or collect_output_gradients(self.model, plan, data)
            for name, covariance in collect_covariances(self.model, _whitenable(plan), data).items():
                found.setdefault(name, {})[method] = covariance
        importances = {name: one.importance for name, one in gradients.items() if name in found}
        return _Seen(two_sided(found, gradients), importances, {name: one.root for name, one in gradients.items()})

    def plan_for(self, macs: float | None, params: float | None, seen: _Seen) -> Plan:
        """Ranks at a share of the net's cost."""
        own = Budget(
            macs=macs, params=params, methods=self.methods,
            covariances=seen.covariances or None, weights=seen.importances or None,
        )  # fmt: skip
        return self.plan(self.rule or own, self.methods[0])

    def small(self, plan: Plan, roots: Mapping[str, Tensor], data: Iterable[Batch] | None) -> nn.Module:
        """The net at these ranks."""
        near = self.model if data is None else fit_to_data(self.model, plan, data, output_roots=roots)
        return convert(near, plan, on_error=self.on_error)


def _search(given: _Given, batches: Sequence[Batch], max_drop: float, evaluate: Evaluate | None) -> nn.Module:
    """The smallest net within the allowed drop, by bisection of the share of multiply-adds."""
    start, measure = time.perf_counter(), evaluate or Agreement(given.model)
    data, held = split(batches, given.model)
    dense = score(measure, given.model, held)
    if (again := score(measure, given.model, held)) != dense:
        raise DataError(f"evaluate gave {dense:.6g} and then {again:.6g} for the same net: fix its seed or its batches")
    seen = given.seen(data)
    low, high, tried = LEAST_SHARE, 1.0, list[tuple[float, float]]()
    best: tuple[nn.Module, float] | None = None
    refused: PlanError | None = None
    for _ in range(HALVINGS):
        share = (low + high) / 2
        try:
            small = given.small(given.plan_for(share, None, seen), seen.roots, data)
        except PlanError as error:
            log.info("at a share of %.3f: %s", share, error)
            low, refused = share, error
            continue
        tried.append((share, score(measure, small, held)))
        log.info("at a share of %.3f of the multiply-adds the score is %.4g, dense %.4g", share, tried[-1][1], dense)
        if dense - tried[-1][1] <= max_drop:
            best, high = (small, tried[-1][1]), share
        else:
            low = share
    if refused is not None and not tried:
        raise refused
    if best is None:
        nearest = max(found for _, found in tried)
        raise PlanError(
            f"compress: nothing pays: no net within {max_drop:g} of the dense net's {dense:.4g} was found; the nearest "
            f"has {nearest:.4g}. Allow a larger max_drop, or train: hodec.Admm"
        )
    small, found = best
    name = "evaluate" if evaluate else "agreement"
    seconds = time.perf_counter() - start
    setattr(small, REPORT_ATTRIBUTE, CompressReport(dense, found, max_drop, name, tuple(tried), len(held), seconds))
    return small


def _whitenable(plan: Plan) -> Plan:
    """The plan of the layers alone whose projection knows covariances of inputs."""
    for name, layer in plan.items():
        if layer.role is not Role.LAYER or not layer.format.mixable(layer.shape, layer.modes):
            plan = plan.without(name)
    return plan
