"""Settings: random overrides of the command line and random trees of a settings file; checked, never run."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hypothesis import strategies as st

from fuzz_plans import edited  # isort: skip
from hodec.errors import ConfigError, Use
from hodec.experiment.config.differences import differences
from hodec.experiment.config.groups import CONF, groups, settings_by_key
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import Config, completed, config_of, read_config, to_yaml

VALUES = [
    "0", "1", "-1", "2", "3", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "1e30", "99999999999999999999", "true",
    "false", "null", "", "x", "''", "'a b'", "[]", "[1]", "[1,2]", "[a,b]", "[[1]]", "{}", "{a:1}", "{layer1.*:8}",
    "{a:{b:1}}", "{layer1.*:[4,8],x:0}", "auto", "cpu", "gpu", "tt", "cp", "cp3", "budget", "learned", "manual",
    "off", "sgd", "muon", "1,2", "a,b,c", "range(1,3)", "choice(1,2)", "interval(0,1)", "glob(*)", "${seed}",
    "${nope}", "${oc.env:HOME}", "${oc.env:NOPE}", "resnet20", "resnet9", "torchvision/resnet50", "/nowhere",
    "../x", "a=b", "[1", "{a", "(", "ü", "\\", "'", '"', "a:b", "a#b", "$x", "%d", "~", "*",
    "!!python/name:os.system", "0x10", "1_000", "010", "2026-01-01",
]  # fmt: skip
KEYS = sorted(settings_by_key())
ODD_KEYS = [
    "", "x", "seeed", "admm.roh", "data.x.y", "hydra.run.dir", "hydra.x", "hydra/launcher", "hydra/sweeper", "model.x",
    "a b", "admm", "_target_", "admm._target_", "defaults", "tt_ranks.layer1", "distill", "logger.also", "ü", "1",
    "hydra.job.chdir", "hydra.mode", "package@x", "model@admm", "experiment",
]  # fmt: skip
FLAGS = [
    "-m",
    "--multirun",
    "--help",
    "--config-dir",
    "--config-dir=/nowhere",
    "--cfg",
    "job",
    "--x",
    "-x",
    "-cd",
    "--",
]


def draw_argument(draw: random.Random) -> str:
    """One argument of the command line; most are of a setting that there is."""
    act = draw.random()
    if act < 0.05:
        return draw.choice(FLAGS)
    if act < 0.25:
        group = draw.choice(sorted(groups()))
        return f"{group}={draw.choice([*groups()[group], *groups()[group], *VALUES])}"
    key, value = draw.choice(KEYS if act < 0.9 else ODD_KEYS), draw.choice(VALUES)
    if draw.random() < 0.05:
        return draw.choice(
            [key, f"~{key}", f"{key}:{value}", f"{key}=={value}", value, f"={value}", f"{key} = {value}"]
        )
    if key in KEYS and draw.random() < 0.7:
        value = json.dumps(next(iter(settings_by_key()[key].values())).default, default=str)
    return f"{draw.choice(['', '', '', '', '', '', '', '+', '++'])}{key}={value}"


def check_overrides_of(data: st.DataObject, folder: Path) -> str:
    """A command line: accepted and composed, or every mistake in one error."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    argv = [draw_argument(draw) for _ in range(draw.choice([1, 1, 2, 3, 5]))]
    check_overrides(argv, CONF)
    if any(word.startswith(("-", "hydra")) for word in argv):
        return "accepted, with flags"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = config_of(plain(compose("config", overrides=argv)))
    check_config(config)
    return "accepted"


def check_config(config: Config) -> None:
    """Settings that were accepted are written and read as they are."""
    tree = yaml.safe_load(to_yaml(config))
    again = config_of(tree)
    assert again == config or "nan" in json.dumps(config.to_dict())
    assert not differences(completed(tree), again.to_dict())


@cache
def default_text() -> str:
    """The settings that a run has when nothing is given, as JSON."""
    return json.dumps(Config().to_dict())


def check_trees(data: st.DataObject, folder: Path) -> str:
    """A tree of settings with one to three edits, as a file has them."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    tree: Any = json.loads(default_text())
    for _ in range(draw.choice([0, 0, 1])):
        group = draw.choice(sorted(groups()))
        tree[group] = json.loads(json.dumps(groups()[group][draw.choice(sorted(groups()[group]))].tree(), default=str))
    for _ in range(draw.choice([1, 1, 2, 3])):
        tree = edited(tree, draw)
    config, errors = read_config(tree)
    if config is None:
        assert errors
        texts = [error.told(Use.in_hydra) for error in errors]
        assert all("\n" not in text and text for text in texts), texts
        raise ConfigError(texts[0])
    check_config(config)
    return "accepted"
