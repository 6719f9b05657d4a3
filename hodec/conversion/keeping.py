"""Where a converted model keeps its plan, so that it can be saved without naming it again."""

from collections.abc import Mapping

from torch import nn

from hodec.layers.base import FactorizedLayer
from hodec.plan.plan import Plan

PLAN_ATTRIBUTE = "hodec_plan"

# The entry of a Hugging Face config that holds the plan. transformers looks into it before it builds a model, and
# refuses one that names no method: a folder with factors would otherwise load as dense layers with random weights.
CONFIG_ENTRY = "quantization_config"
HOW_TO_LOAD = "this folder holds factorized layers: load it with hodec.from_pretrained(folder)"

# Where a model of Hugging Face says which parameters are one, {parameter: the one that is saved}: its class does, and
# the model itself also of its parts. What the model itself said before is kept under the third name.
DECLARED = ("_tied_weights_keys", "all_tied_weights_keys")
BEFORE = "_hodec_tied_before"


def keep_plan(model: nn.Module, plan: Plan) -> None:
    """Leave the plan on the model, and in the config that ``save_pretrained`` writes if it is one of Hugging Face."""
    setattr(model, PLAN_ATTRIBUTE, plan)
    config = _config_of(model)
    if config is not None:
        setattr(config, CONFIG_ENTRY, config_entry(plan))
        declare_ties(model, plan)


def config_entry(plan: Plan) -> dict[str, object]:
    """What the config of a converted model has under CONFIG_ENTRY."""
    return {"load": HOW_TO_LOAD, PLAN_ATTRIBUTE: plan.to_dict()}


def forget_plan(model: nn.Module) -> None:
    """Undo ``keep_plan``."""
    vars(model).pop(PLAN_ATTRIBUTE, None)
    config = _config_of(model)
    if config is not None and PLAN_ATTRIBUTE in (getattr(config, CONFIG_ENTRY, None) or {}):
        delattr(config, CONFIG_ENTRY)
    for module in model.modules():
        before = vars(module).pop(BEFORE, None)
        if before is not None:
            for key in DECLARED:
                vars(module).pop(key, None)
            vars(module).update(before)


def declare_ties(model: nn.Module, plan: Plan) -> None:
    """Let a model of Hugging Face know which factors are one, in place of the weights that they stand for.

    It writes each once, and makes them one again when it is read.
    """
    made = {
        f"{tie.name}.{path}": f"{name}.{path}"
        for name, layer in plan.items()
        for tie in layer.ties
        for path, _ in model.get_submodule(name).named_parameters()
        if path != "bias"
    }
    for module in model.modules() if made else ():
        declared = {key: getattr(module, key, None) for key in DECLARED}
        if module is not model and not any(declared.values()):
            continue
        vars(module).setdefault(BEFORE, {key: vars(module)[key] for key in DECLARED if key in vars(module)})
        more = made if module is model else {}
        for key, ties in declared.items():
            vars(module)[key] = {**_still_there(module, ties or {}), **more}


def _still_there(module: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """Those of the ties that name no weight of a factorized layer."""

    def is_gone(path: str) -> bool:
        owner, _, leaf = path.rpartition(".")
        try:
            return leaf == "weight" and isinstance(module.get_submodule(owner), FactorizedLayer)
        except AttributeError:  # a pattern
            return False

    return {target: source for target, source in ties.items() if not is_gone(target) and not is_gone(source)}


def _config_of(model: nn.Module) -> object:
    return getattr(model, "config", None) if hasattr(model, "save_pretrained") else None
