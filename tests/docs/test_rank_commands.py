"""Every ``tt_ranks`` that README.md, the quickstart, --help and the settings name makes a plan of the default net."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import hodec
from hodec.errors import PlanError
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.config.schema import Config, config_of
from hodec.inputs import as_input
from hodec.models import build_model
from hodec.ranks import Manual

ROOT = Path(__file__).parents[2]
TEXTS = "".join(
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md", "conf/config.yaml")
)
QUOTED = sorted(set(re.findall(r"'tt_ranks=[^']+'", TEXTS)))


def plan_of(ranks):
    import torch

    net = build_model("resnet20", in_channels=1, num_classes=10)
    return hodec.make_plan(net, Manual(ranks), example_input=as_input(torch.zeros(1, 1, 8, 8)))


def test_there_are_commands():
    assert len(QUOTED) >= 2
    assert any("[" in one for one in QUOTED)


@pytest.mark.parametrize("argument", QUOTED)
def test_each_is_accepted_and_makes_a_plan(argument):
    (word,) = shlex.split(argument)
    check_overrides([word], ROOT / "conf")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ranks = OverridesParser.create().parse_override(word).value()
    known = {glob: one for glob, one in ranks.items() if not glob.startswith("layer0")}
    assert plan_of({str(glob): one for glob, one in known.items()})


def test_the_ranks_that_a_refusal_names_are_accepted_as_they_stand():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from hodec.errors import Use

    with pytest.raises(PlanError) as caught:
        plan_of([4, 16, 16, 4])
    (word,) = shlex.split(re.search(r"'tt_ranks=.*'", caught.value.told(Use.in_hydra))[0])
    check_overrides([word], ROOT / "conf")
    ranks = OverridesParser.create().parse_override(word).value()
    config = config_of(
        {**Config().to_dict(), "tt_ranks": yaml.safe_load(yaml.safe_dump({str(k): v for k, v in ranks.items()}))}
    )
    plan = plan_of(config.tt_ranks)
    assert plan["layer3.0.conv2"].ranks == (4, 16, 16, 4)
