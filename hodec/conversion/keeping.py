"""Where a converted model keeps its plan, so that it can be saved without naming it again."""

from typing import Any

from torch import nn

from hodec.plan.plan import Plan

PLAN_ATTRIBUTE = "hodec_plan"

# The entry of a Hugging Face config that holds the plan. transformers looks into it before it builds a model, and
# refuses one that names no method: a folder with factors would otherwise load as dense layers with random weights.
CONFIG_ENTRY = "quantization_config"
HOW_TO_LOAD = "this folder holds factorized layers: load it with hodec.from_pretrained(folder)"


def keep_plan(model: nn.Module, plan: Plan) -> None:
    """Leave the plan on the model, and in the config that ``save_pretrained`` writes if it is one of Hugging Face."""
    setattr(model, PLAN_ATTRIBUTE, plan)
    config = _config_of(model)
    if config is not None:
        setattr(config, CONFIG_ENTRY, {"load": HOW_TO_LOAD, PLAN_ATTRIBUTE: plan.to_dict()})


def forget_plan(model: nn.Module) -> None:
    """Undo ``keep_plan``."""
    vars(model).pop(PLAN_ATTRIBUTE, None)
    config = _config_of(model)
    if config is not None and PLAN_ATTRIBUTE in (getattr(config, CONFIG_ENTRY, None) or {}):
        delattr(config, CONFIG_ENTRY)


def _config_of(model: nn.Module) -> Any:
    return getattr(model, "config", None) if hasattr(model, "save_pretrained") else None
