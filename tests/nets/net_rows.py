"""What is measured of one net for docs/nets.md: how much of it is seen and reached, and whether each use works."""

import copy
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from net_list import Net
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import hodec
from hodec.compare import distance, outputs_of
from hodec.cost.ops import FORMULAS
from hodec.inference import inference
from hodec.inputs import ModelInput, as_input
from hodec.plan.plan import Plan
from hodec.ranks import Manual, Ratio

METHODS = ("svd", "tt")
CHECKS = ("equal, svd", "equal, tt", "training step", "save, load", "fuse", "ONNX", "torch.export")
FULL = Manual(10**6)  # clipped to the largest ranks of each layer

# Relative distance of outputs and of weights at full rank. Some nets magnify rounding: those are judged in float64.
SAME_OUTPUTS, SAME_WEIGHTS, SAME_OUTPUTS_FLOAT64 = 1e-4, 1e-5, 1e-9

Row = dict[str, Any]


def row_of(name: str, net: Net, folder: Path) -> Row:
    """All that is measured, as JSON: shares 0..1; each check with what it gave, or the reason why it did not work.

    Args:
        folder: for the files that are written and read.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    model, x = net.build().eval(), net.example()
    given = as_input(x, model)
    liven(model, given)
    products = products_of(model, given)
    checks: dict[str, dict[str, str]] = {}
    row: Row = {
        "net": name, "group": net.group, "about": net.about,
        "packages": {each: version(each) for each in ("torch", *net.packages)},
        "reach": {}, "gaps": [], "checks": checks,
    }  # fmt: skip
    for method in METHODS:
        plan = hodec.make_plan(model, FULL, method=method, example_input=x, allow_larger=True)
        small = hodec.convert(model, plan, on_error="skip")
        plan = small.hodec_plan
        row |= {"params": plan.dense_params, "macs": plan.dense_macs, "seen": seen(plan, products)}
        row["reach"][method] = reached(plan, products)
        row["gaps"] = gaps(plan, products)
        checks[f"equal, {method}"] = checked(lambda plan=plan, small=small: equal(model, plan, small, given))
    compress = hodec.make_plan(model, Ratio(0.5), method="tt", example_input=x, allow_larger=True)
    small = hodec.convert(model, compress, on_error="skip")
    checks["training step"] = checked(lambda: training_step(copy.deepcopy(small), net, x))
    checks["save, load"] = checked(lambda: saved(small, net, given, folder))
    checks |= written(small, given, folder)
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def checked(run: Callable[[], str]) -> dict[str, str]:
    """``{"is": what it gave}``, ``{"reason": hodec's words}``, or ``{"fault": ..}`` for an error of another kind."""
    try:
        return {"is": run()}
    except hodec.HodecError as error:
        return {"reason": str(error)}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"}


@torch.no_grad()
def liven(model: nn.Module, x: ModelInput) -> None:
    """Let every weight reach the output: fresh nets start with gains, biases and last layers of zero.

    What is constant gets numbers of its own, and batch norms the statistics of ``x``.
    """
    for name, p in model.named_parameters():
        if p.numel() > 1 and p.std() > 0:
            continue
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif "bias" in name.rpartition(".")[2]:
            nn.init.normal_(p, std=0.1)
        else:
            nn.init.uniform_(p, 0.5, 1.0)
    hodec.reestimate_batchnorm(model, [x])


# -- how much is seen and reached --------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The multiply-adds of a run, apart for products with a weight and products of two activations.

    An activation is what was computed from the input; all else (parameters, tables, what is computed from these) counts
    as a weight. This is independent of how hodec finds the parameter behind a product.
    """

    def __init__(self, inputs: ModelInput) -> None:
        super().__init__()
        self.formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry
        self.kept: list[Tensor] = list(inputs.tensors)  # so that nothing else takes their memory
        self.activations = {memory(x) for x in self.kept}
        self.macs = {"weights": 0, "activations": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, read = func(*args, **(kwargs or {})), tensors((args, kwargs))
        if any(memory(x) in self.activations for x in read):
            changed = [x for x in read[:1] if func._schema.is_mutable]
            self.kept += [*tensors(out), *changed]
            self.activations |= {memory(x) for x in (*tensors(out), *changed)} - {0}
        if formula := self.formulas.get(getattr(func, "overloadpacket", None)):
            by_weight = any(x.ndim > 1 and memory(x) not in self.activations for x in read)
            kind = "weights" if by_weight else "activations"
            self.macs[kind] += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def products_of(model: nn.Module, x: ModelInput) -> dict[str, float]:
    """Multiply-adds for one image, of products with weights and of products of activations."""
    with inference(model), sdpa_kernel(SDPBackend.MATH), Products(x) as found:
        x.run(model)
    return {kind: macs / x.batch for kind, macs in found.macs.items()}


def seen(plan: Plan, products: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Shares of all parameters, and of the multiply-adds in weights, by where the plan has them."""
    skipped = [(params, macs or 0) for params, macs in plan.skipped_costs.values()]
    params = {
        "planned": sum(one.params_before for one in plan.values()),
        "skipped": sum(one for one, _ in skipped),
        "other": sum(plan.other.values()),
    }
    macs = {"planned": sum(one.macs_before for one in plan.values()), "skipped": sum(one for _, one in skipped)}
    return {
        "params": {key: one / plan.dense_params for key, one in params.items()},
        "macs": {key: one / products["weights"] for key, one in macs.items()},
        "macs_in_weights": {"of all": products["weights"] / sum(products.values())},
    }


def reached(plan: Plan, products: Mapping[str, float]) -> dict[str, float]:
    """Shares of all parameters and of the multiply-adds in weights that are factorized."""
    shares = seen(plan, products)
    return {"params": shares["params"]["planned"], "macs": shares["macs"]["planned"]}


def gaps(plan: Plan, products: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each reason for which layers stay dense, with how many there are and their shares; the largest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, reason in plan.skipped.items():
        params, macs = plan.skipped_costs.get(name, (0, None))
        one = found.setdefault(reason, {"reason": reason, "first": name, "layers": 0, "params": 0.0, "macs": 0.0})
        one["layers"] += 1
        one["params"] += params / plan.dense_params
        one["macs"] += (macs or 0) / products["weights"]
    return sorted(found.values(), key=lambda one: (-one["macs"], -one["params"]))


# -- whether it works --------------------------------------------------------------------------------------------------


def compared(made: nn.Module, wanted: nn.Module, x: ModelInput) -> float:
    """The largest relative distance of any output; each must hold numbers that could differ."""
    expected = outputs_of(wanted, x)
    assert expected, "the net gives no tensors"
    assert all(y.numel() and y.isfinite().all() for y in expected), "an output is empty or not finite"
    assert all(y.any() for y in expected if y.is_floating_point()), "an output is zero"  # labels may be
    return distance(outputs_of(made, x), expected)


def figure(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def equal(model: nn.Module, plan: Plan, small: nn.Module, x: ModelInput) -> str:
    """Relative error of the outputs at full rank, where every weight is rebuilt closely too."""
    worst = max(hodec.conversion_errors(model, plan, small).values())
    assert worst < SAME_WEIGHTS, f"a weight is rebuilt with an error of {worst:.1e}"
    error = compared(small, model, x)
    if error < SAME_OUTPUTS:
        return figure(error)
    double, exact = copy.deepcopy(model).double(), x.to(torch.device("cpu"), torch.float64)
    precise = compared(hodec.convert(double, plan), double, exact)
    assert precise < SAME_OUTPUTS_FLOAT64, f"outputs differ by {error:.1e}, in float64 by {precise:.1e}"
    return f"{figure(error)}, in float64 {figure(precise)}"


def training_step(small: nn.Module, net: Net, x: Any) -> str:
    """One step along the gradient: it reaches every factor, is finite, and lowers the loss."""

    def loss() -> Tensor:
        torch.manual_seed(0)  # the same dropout, or choice of boxes
        return net.loss(small.train(), x)

    before = loss()
    before.backward()
    layers = {name: m for name, m in small.named_modules() if isinstance(m, hodec.FactorizedLayer)}
    factors = {f"{name}.{key}": p for name, m in layers.items() for key, p in m.named_parameters() if p.requires_grad}
    dead = [name for name, p in factors.items() if p.grad is None or not p.grad.any()]
    wild = [name for name, p in factors.items() if p.grad is not None and not p.grad.isfinite().all()]
    assert not wild, f"gradients of {wild} are not finite"
    assert not dead, f"no gradient reaches {len(dead)} of {len(factors)} factors, {dead[0]} and others"
    trained = [p for p in small.parameters() if p.grad is not None]
    rate = 0.01 * before.item() / sum(float(p.grad.square().sum()) for p in trained)
    with torch.no_grad():
        for p in trained:
            p -= rate * p.grad
        after = loss()
    assert after < before, f"the loss rises from {before:.6g} to {after:.6g}"
    return f"{before.item():.4g} → {after.item():.4g}"


def saved(small: nn.Module, net: Net, x: ModelInput, folder: Path) -> str:
    """Whether the model is read back without any difference, into a net of other weights."""
    hodec.save(small, folder / "small.safetensors")
    back = hodec.load(folder / "small.safetensors", net.build().eval())
    error = compared(back, small, x)
    assert error == 0, f"outputs differ by {error:.1e}"
    return "same"


def written(small: nn.Module, x: ModelInput, folder: Path) -> dict[str, dict[str, str]]:
    """fuse, and the files made of what it gives."""
    made: list[nn.Module] = []

    def fused() -> str:
        made.append(hodec.fuse(small, example_input=x, target="macs"))
        return figure(compared(made[0], small, x))

    checks = {"fuse": checked(fused)}
    if not made:
        return checks | dict.fromkeys(("ONNX", "torch.export"), checks["fuse"])

    def file(write: Callable[..., Any], ending: str) -> dict[str, str]:
        def with_batch(dynamic: bool) -> str:
            done = write(made[0], folder / f"small{ending}", example_input=x, dynamic_batch=dynamic)
            return figure(done.error) if dynamic else f"{figure(done.error)}, batch fixed"

        free = checked(lambda: with_batch(True))
        fixed = checked(lambda: with_batch(False)) if "is" not in free else free
        return {**free, **fixed}  # where only the fixed one works, with the reason of the other

    return {**checks, "ONNX": file(hodec.to_onnx, ".onnx"), "torch.export": file(hodec.to_program, ".pt2")}
