"""compress: a trained net made small in one call, without training."""

from collections.abc import Iterable
from itertools import chain

from torch import nn

from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.eligibility import Layers
from hodec.conversion.swap import convert
from hodec.errors import ConfigError
from hodec.formats.roles import Role
from hodec.inference import Batch
from hodec.inputs import Inputs
from hodec.plan.plan import Plan
from hodec.ranks.budget import Budget
from hodec.ranks.planning import make_plan
from hodec.ranks.table import AnyRule

# By these two nets lose least where they are not retrained, see docs/admm.md; linear layers have one form in all.
METHODS = ["spatial_svd", "svd"]


def compress(  # noqa: PLR0913
    model: nn.Module,
    *,
    example_input: Inputs | None = None,
    macs: float | None = None,
    params: float | None = None,
    loader: Iterable[Batch] | None = None,
    rule: AnyRule | None = None,
    method: str | None = None,
    include: Layers | None = None,
    exclude: Layers | None = None,
    on_error: str = "raise",
) -> nn.Module:
    """A factorized copy of a trained net, at a share of its cost; the given net is left as it was::

        small = hodec.compress(net, example_input=x, macs=0.5, loader=loader)
        print(small.hodec_plan)

    It plans and converts. With a ``loader`` each layer keeps its outputs on this data instead of its weights where its
    method can, and BatchNorm's statistics are re-estimated. Nothing is trained: see ``hodec.Admm`` for that.

    Args:
        model: any net, on any device.
        example_input: as ``make_plan`` takes it; by default the loader's first batch.
        macs, params: shares of the net's multiply-adds and parameters to keep; by default ``macs=0.5``.
        loader: some hundred images of the training data, in batches as ``make_plan`` takes them; it is read up to
            three times. An iterator, which can be read once, is kept in memory.
        rule: what chooses the ranks instead of a budget, as in ``make_plan``.
        method: of all layers; by default each takes ``spatial_svd`` or ``svd``, whichever loses less.
        include, exclude: as in ``make_plan``.
        on_error: ``skip`` leaves a layer dense that cannot be swapped, with a warning.

    Returns:
        The net; ``hodec_plan`` is its plan, ``hodec.save`` writes it, ``hodec.fuse`` makes it fast.

    Raises:
        ConfigError: neither an input nor a loader, or a rule together with ``macs`` or ``params``.
        PlanError: nothing to factorize, or a share that no plan reaches.
        ConvertError: the converted net does not run.
    """
    if example_input is None and loader is None:
        raise ConfigError("compress needs example_input, as the model takes it, or a loader of such batches")
    if rule is not None and (macs is not None or params is not None):
        raise ConfigError("compress: macs and params are targets of its own rule; give them to the rule instead")
    batches = list(loader) if loader is not None and iter(loader) is loader else loader
    if example_input is None:
        example_input = next(iter(chain(batches or (), (None,))))
        if example_input is None:
            raise ConfigError("compress: the loader has no batch")
    chosen = rule or Budget(macs=macs, params=params, methods=None if method else METHODS)
    plan = make_plan(
        model, chosen, method=method or METHODS[0], example_input=example_input, include=include, exclude=exclude
    )
    covariances = collect_covariances(model, _whitenable(plan), batches) if batches is not None else None
    small = convert(model, plan, covariances=covariances, on_error=on_error)
    if batches is not None:
        reestimate_batchnorm(small, batches)
    return small


def _whitenable(plan: Plan) -> Plan:
    """The plan of the layers alone whose projection knows covariances of inputs."""
    for name, layer in plan.items():
        if layer.role is not Role.LAYER or not layer.format.mixable(layer.shape, layer.modes):
            plan = plan.without(name)
    return plan
