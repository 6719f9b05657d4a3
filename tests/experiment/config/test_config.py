"""Tests of hodec/experiment/config/schema.py, hodec/experiment/config/values.py and the files of conf/."""

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hodec.errors import ConfigError
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.config.schema import (
    COMBINATIONS,
    AdmmConfig,
    Config,
    DataConfig,
    differences,
    job_folder,
    refuse,
    schema_leaves,
    to_config,
    to_yaml,
    validate,
)

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


# --- conf/ and the schema


def test_files_and_classes_have_the_same_defaults():
    assert composed() == Config()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_each_option_fills_its_group_and_is_valid(group, option):
    config = composed(f"{group}={option}", "data.root=images")
    assert validate(config) == []
    given = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    effective = asdict(getattr(config, group))
    if group == "ranks":  # rules differ in their settings: each file shows those of its own
        effective = {key: value for key, value in effective.items() if key in given}
    assert given.keys() == effective.keys(), "each file shows all keys of its group"
    changed = {"root"} | ({"name"} if option == "torchvision" else set())
    assert {k: v for k, v in given.items() if k not in changed} == {
        k: v for k, v in effective.items() if k not in changed
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_values_of_an_experiment_win(path):
    config = composed(f"experiment={path.stem}", "data.root=images")
    assert validate(config) == []
    given = OmegaConf.to_container(OmegaConf.load(path))
    groups = {key.split("/")[1]: value for entry in given.pop("defaults")[:-1] for key, value in entry.items()}
    if "name" in given.get("model", {}):
        given["model"]["name"] = f"torchvision/{given['model']['name']}"
    effective = asdict(config)
    assert [key for key in differences(given, effective) if key in _dotted(given)] == []
    assert groups["model"] in (config.model.name, config.model.source)
    assert groups["data"] == config.data.name


def _dotted(tree: dict) -> set[str]:
    return set(differences(tree, {}))


def test_an_experiment_seed_wins_over_config_yaml_and_the_command_line_over_both(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\ntt_ranks: {layer1.*: 5}\n")
    check_overrides(["--config-dir", str(tmp_path), "experiment=mine"], CONF)
    search = f"hydra.searchpath=['file://{tmp_path}']"
    assert composed(search, "experiment=mine").seed == 3
    assert composed(search, "experiment=mine").tt_ranks == {"layer1.*": 5}
    assert composed(search, "seed=4", "experiment=mine").seed == 4


def test_every_key_in_conf_is_explained():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text().split("  help:")[0]  # the help is prose
        header = text.index("defaults:") if "defaults:" in text else 0
        body = text[text.index("\n\n", header) :] if header else text
        lines = ["", *body.splitlines()]
        bare = [
            line
            for above, line in itertools.pairwise(lines)
            if ": " in line and "#" not in line and not above.lstrip().startswith("#")
        ]
        assert bare == [], f"{path.relative_to(CONF)}: no comment"


def test_torchvision_models_get_their_full_name_once():
    config = composed("model=torchvision", "model.name=resnet50")
    assert config.model.name == "torchvision/resnet50"
    assert composed("model=torchvision", "model.name=torchvision/resnet50").model.name == "torchvision/resnet50"


def test_config_is_frozen_and_the_schema_is_still_open():
    config = composed("admm.pull=0.5")
    assert config.admm.pull == 0.5
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]


# --- values


@pytest.mark.parametrize("ranks", [None, 1, 16, [8, 12], {"layer1.*": 9, "fc": [4]}])
def test_good_ranks(ranks):
    assert validate(replace(Config(), tt_ranks=ranks)) == []


@pytest.mark.parametrize("ranks", [0, -2, "abc", 1.5, 16.0, True, [], [8, 0], [8, "x"], {}, {1: 8}, "", "layer1.*:9"])
def test_bad_ranks_name_key_value_and_remedy(ranks):
    (text,) = validate(replace(Config(), tt_ranks=ranks))
    assert text.startswith("tt_ranks: ")
    assert repr(ranks) in text
    assert "'tt_ranks={layer1.*:8}'" in text


def test_bad_entries_of_a_mapping_are_named_one_by_one():
    found = validate(replace(Config(), tt_ranks={"layer1.*": 0, "layer2.*": 4, "fc": [4, -1]}))
    assert [text.split(" given")[0] for text in found] == ["tt_ranks[layer1.*]: 0", "tt_ranks[fc]: [4, -1]"]


@pytest.mark.parametrize("rho", ["auto", "balanced", 1e-3, 1, {0: 1e-3, 50: 1e-2}, {"layer1.*": 1e-3}])
def test_good_rho(rho):
    assert validate(replace(Config(), admm=AdmmConfig(rho=rho))) == []


@pytest.mark.parametrize("rho", ["fast", 0, -1, float("nan"), float("inf"), {}, {0: 0}, {-1: 1}, {0: 1, "a": 1}, [1]])
def test_bad_rho(rho):
    (text,) = validate(replace(Config(), admm=AdmmConfig(rho=rho)))
    assert text.startswith("admm.rho")


@pytest.mark.parametrize(
    ("interval", "good"), [(1, 1), ("50steps", 1), ("2epochs", 1), (0, 0), ("0steps", 0), ("2", 0)]
)
def test_update_interval(interval, good):
    assert (validate(replace(Config(), admm=AdmmConfig(update_every=interval))) == []) == bool(good)


def test_each_combination_can_be_refused():
    wrong = [
        composed("tt_ranks=4", "ranks=energy"),
        composed("ranks=energy", "++ranks.methods=[tt,svd]"),
        composed("ranks=learned", "ranks.alpha=0.1", "ranks.macs=0.4"),
        composed("ranks=learned", "admm=off"),
        composed("method=cp", "calibration_batches=4"),
        composed("distill.dense=true", "distill.weight=0.5"),
        composed("distill.model=resnet56", "distill.weight=0.5"),
        composed("optimizer.momentum=0"),
        composed("trainer.precision=16-mixed", "trainer.accelerator=cpu"),
        replace(Config(), data=DataConfig(name="image_folder")),
    ]
    assert [[text for _, text in COMBINATIONS if text in validate(config)] for config in wrong] == [
        [text] for _, text in COMBINATIONS
    ]


def test_what_teaches_the_dense_net_was_trained_before():
    assert validate(composed("distill.dense=true", "distill.weight=0.5", "pretrain_epochs=1")) == []
    assert validate(composed("distill.dense=true", "distill.weight=0.5", "init=net.safetensors")) == []
    assert validate(composed("distill.dense=true", "distill.weight=0.5", "distill.init=net.safetensors")) == []
    assert len(validate(composed("distill.dense=true", "pretrain_epochs=1"))) == 1  # with no share in the loss
    assert len(validate(composed("distill.init=net.safetensors"))) == 1


@pytest.mark.parametrize("ranks", [["ranks.alpha=0.1"], ["ranks.params=0.3"], []])
def test_learned_ranks_have_a_price_or_targets(ranks):
    assert validate(composed("ranks=learned", *ranks)) == []
    assert len(validate(composed("ranks=learned", "ranks.alpha=0.1", "ranks.macs=0.4"))) == 1


def test_every_setting_says_what_it_allows():
    assert len(schema_leaves()) > 50
    assert all(leaf.words() for leaf in schema_leaves().values())
    assert schema_leaves()["admm.pull"].words() == "a number above 0 and below 1"
    assert schema_leaves()["trainer.threads"].words() == "null or a whole number at least 1"


# --- text form


def test_yaml_gives_the_same_settings_back(tmp_path):
    config = composed("tt_ranks={layer1.*:9}", "admm.rho={0:1e-3,5:1e-2}", "init=a b.pt")
    text = to_yaml(config)
    assert OmegaConf.to_container(OmegaConf.create(text)) == asdict(config)
    assert text.index("seed") < text.index("tt_ranks") < text.index("logger")


def test_differences_name_dotted_keys_and_hide_what_is_ignored():
    a, b = asdict(composed()), asdict(composed("seed=1", "admm.rho=0.1", "logger=wandb", "tt_ranks={fc:3}"))
    assert differences(a, b) == ["seed", "tt_ranks", "admm.rho", "logger.name", "tt_ranks.fc"]
    assert differences(a, b, ("logger", "tt_ranks", "see")) == ["seed", "admm.rho"]
    assert differences({"rho": {0: 1.0}, "x": (1,)}, {"rho": {"0": 1}, "x": [1]}) == []
    assert differences({"a": {}}, {"b": None}) == ["a", "b"]


def test_job_folders_need_no_quotes():
    assert job_folder(0, "admm.rho=1e-4") == "0_admm.rho-1e-4"
    assert job_folder(1, "model.name=torchvision/resnet18,tt_ranks={layer1.*:9}").count("/") == 0
    assert job_folder(2, "") == "2"
    assert len(job_folder(3, "x" * 1000)) < 200


def test_refuse_lists_each_problem_once():
    refuse([])
    with pytest.raises(ConfigError, match="^only$"):
        refuse(["only", "only"])
    with pytest.raises(ConfigError, match="2 problems in the settings:\n  a\n  b"):
        refuse(["a", "b"])
