"""A converted model of Hugging Face in a folder: ``save_pretrained`` writes it, ``from_pretrained`` here reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from hodec.conversion.dry_run import put
from hodec.conversion.inner import mend_encoders
from hodec.conversion.keeping import CONFIG_ENTRY, PLAN_ATTRIBUTE, declare_ties, keep_plan
from hodec.conversion.swap import structure
from hodec.errors import CheckpointError
from hodec.io.atomic import JsonObject, read_json
from hodec.plan.plan import Plan


def from_pretrained(folder: str | Path, model_class: type[nn.Module] | None = None, **settings: object) -> nn.Module:
    """The converted model that ``small.save_pretrained(folder)`` wrote, in evaluation mode.

    transformers reads the files, as it does those of dense models.

    Args:
        folder: a local folder with ``config.json``, which holds the plan, and safetensors files.
        model_class: of the dense net; by default the class of transformers that the config names.
        settings: what else ``from_pretrained`` of transformers takes: ``dtype``, ``device_map``, ..

    Raises:
        CheckpointError: no such folder, no plan in it, no class by that name, or tensors that do not fit.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "config of the model")
    entry = config.get(CONFIG_ENTRY)
    if not isinstance(entry, dict) or PLAN_ATTRIBUTE not in entry:
        raise CheckpointError(
            f"{folder}: its config.json holds no plan of hodec, so it is not what save_pretrained of a converted model "
            "wrote: read it with from_pretrained of transformers"
        )
    plan = Plan.from_dict(entry[PLAN_ATTRIBUTE])
    dense = cast(Any, model_class or _class_of(folder, config))
    own = dense.config_class.from_pretrained(folder)
    delattr(own, CONFIG_ENTRY)
    read = _factorizing(dense, plan).from_pretrained
    small, found = read(folder, config=own, output_loading_info=True, **settings)
    if wrong := sorted(
        str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[key]
    ):
        raise CheckpointError(
            f"{folder} does not fit its plan: {len(wrong)} tensors are absent, left over or of another shape, the "
            f"first {wrong[0]}; it was altered, or saved from another model"
        )
    small.__class__ = dense
    keep_plan(small, plan)
    return cast(nn.Module, small.eval())


def _class_of(folder: Path, config: JsonObject) -> Callable[..., nn.Module]:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("transformers is not installed: pip install transformers") from error
    name = (config.get("architectures") or ["no architecture"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(
            f"{folder}: transformers has no class {name}; give it: hodec.from_pretrained(folder, model_class)"
        )
    return cast(Callable[..., nn.Module], found)


def _factorizing(dense: type[nn.Module], plan: Plan) -> Any:
    """The class with planned layers factorized as soon as a net of it is made: transformers then fills in these."""

    def made(self: nn.Module, config: object, *args: object, **kwargs: object) -> None:
        dense.__init__(self, config, *args, **kwargs)
        for name, layers in structure(self, plan).items():
            put(self, name, plan[name], layers)
        mend_encoders(self, plan)
        declare_ties(self, plan)

    return type(dense.__name__, (dense,), {"__init__": made, "__module__": dense.__module__})
