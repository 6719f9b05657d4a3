"""Running a net for what it gives: in evaluation mode, without gradients, batch by batch."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hodec.errors import ConfigError, DataError, HodecError, PlanError
from hodec.inputs import Inputs, ModelInput, as_input, required, takes
from hodec.layers.base import same_random_state

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
#: model inputs, or what loaders give: model inputs with labels behind them
Batch = Inputs


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random state are as before afterwards.

    Attention's fused inference path is off, because it hides its matrix products from hooks and counters.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _unfused(), torch.no_grad(), same_random_state(model.parameters()):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


_unfusing = threading.Lock()
_unfused_by: list[bool] = []  # one entry for each that holds the path off, in whatever thread: what it was before


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention's fused path off; the last to leave puts it back, for threads do not leave in the order they came."""
    with _unfusing:
        _unfused_by.append(_unfused_by[0] if _unfused_by else torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _unfusing:
            before = _unfused_by.pop()
            torch.backends.mha.set_fastpath_enabled(before and not _unfused_by)


@contextmanager
def observation(model: nn.Module) -> Iterator[None]:
    """``inference`` in which compiled parts run as written, so that hooks and counters see what they do."""
    with ExitStack() as stack:
        # not by asking for the stance alone, which loads the compiler
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(inference(model))
        yield


def check_module(given: object) -> None:
    """Refuse what is no net, such as the weights of one.

    Raises:
        ConfigError: saying what was given.
    """
    if not isinstance(given, nn.Module):
        hint = "; load these weights into the net first" if isinstance(given, dict) else ""
        raise ConfigError(f"model: a {type(given).__name__} given; allowed: an nn.Module{hint}")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, which renames every layer.

    Raises:
        ConfigError: no module is given.
    """
    check_module(model)
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def plain_name(name: str) -> str:
    """The name of a module or parameter without what ``torch.compile``'s wrapper puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a net by the names they have without ``torch.compile``'s and data-parallel wrappers."""
    while (inner := uncompiled(model.module if isinstance(model, WRAPPERS) else model)) is not model:
        model = inner
    # a compiled part and its wrapper have one name: the part, which comes later, stays
    return {plain_name(name): one for name, one in model.named_modules()}


class InertHook:
    """What a hook that belongs to one module only becomes in a file, or in a copy, of that module."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""


def laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model itself, with its tensors of four axes in this memory format.

    ``Module.to`` gives it to tensors of five axes too, which have no channels-last order of that name, and fails.
    """
    model._apply(lambda x: x.to(memory_format=layout) if x.ndim == 4 else x)
    return model


def settled_input(model: nn.Module, given: Inputs) -> ModelInput:
    """What the model is called with: of a tuple or list, as many arguments as ``forward`` can take.

    Where it does not run with them, those only that it cannot do without: labels behind the inputs may look like an
    optional one. The model is left as it was.

    Raises:
        PlanError: see ``as_input``.
    """
    made = as_input(given, model)
    least = ModelInput(made.args[: required(model)], made.kwargs)
    if isinstance(given, ModelInput) or len(least.args) == len(made.args):
        return made
    return made if _failure(model, made) is None or _failure(model, least) is not None else least


def running_input(model: nn.Module, given: Inputs) -> ModelInput:
    """``settled_input`` that was run.

    Raises:
        PlanError: the model does not run, with what it was given and what its ``forward`` takes.
    """
    made = settled_input(model, given)
    error = _failure(model, made)
    if error is not None:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise PlanError(f"the model does not run on example_input ({made}): {why}{takes(model)}") from error
    return made


def _failure(model: nn.Module, given: ModelInput) -> Exception | None:
    try:
        with observation(model):
            given.run(model)
    except Exception as error:  # whatever a forward pass raises
        return error
    return None


def rereadable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be read several times: those of an iterator, which can be read once, are kept in memory."""
    return list(batches) if isinstance(batches, Iterator) else batches


def run_batches(model: nn.Module, batches: Iterable[Batch], *, count: int | None = None) -> int:
    """Run the model on each batch for what its layers do by the way; returns how many batches there were.

    Args:
        model: in the mode it is to run in.
        batches: model inputs, or tuples whose first ``count`` are the inputs and whose rest (labels) is not used, or
            dicts, of which ``forward`` gets what it takes; they are moved to the model's device.
        count: inputs that the model takes; None: those that its ``forward`` cannot do without.

    Raises:
        DataError: the model does not run on a batch.
    """
    device, used = next((p.device for p in model.parameters()), torch.device("cpu")), 0
    for batch in batches:
        run_on(model, as_input(batch, model, most=required(model) if count is None else count).to(device))
        used += 1
    return used


def run_on(model: nn.Module, given: ModelInput) -> Any:
    """What the model gives for one batch of the data.

    Raises:
        DataError: it does not run, with what it was given and what its ``forward`` takes; errors of memory pass.
    """
    try:
        return given.run(model)
    except (HodecError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a forward pass raises
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DataError(f"the model does not run on a batch of the data ({given}): {why}{takes(model)}") from error
