"""The options, the settings of a run made of them, and the files of conf/ that are written from them."""

from dataclasses import fields, replace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hodec.admm.options import AdmmOptions
from hodec.errors import ConfigError, Use
from hodec.experiment.config import write
from hodec.experiment.config.differences import differences
from hodec.experiment.config.groups import CONF, default_option, groups, kinds_of, settings_by_key
from hodec.experiment.config.options import CIFAR_RESNETS
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.own import Target
from hodec.experiment.config.schema import (
    COMBINATIONS,
    Config,
    completed,
    config_of,
    read_config,
    refuse,
    to_yaml,
)
from hodec.methods import METHODS, register
from hodec.models.resnet_cifar import DEPTHS
from hodec.options import Option, settings_of
from hodec.ranks import RULES

# Those that call code of one's own need its name; see test_targets.py.
PRESETS = [
    (group, name)
    for group, presets in groups().items()
    for name, preset in presets.items()
    if name and name != "functions" and not issubclass(preset.option, Target)
]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config_of(plain(compose("config", overrides=list(overrides))))


# --- conf/ and the options


def test_files_are_those_that_the_options_write():
    """``python -m hodec.experiment.config.write`` writes them anew."""
    written = write.files()
    assert [path.name for path, text in written.items() if path.read_text("utf-8") != text] == []
    there = {path for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] not in ("experiment", "hydra")}
    assert there == {path for path in written if path.suffix == ".yaml"}


def test_files_and_classes_have_the_same_defaults():
    assert composed() == Config()


def test_every_method_rule_and_net_has_its_option():
    assert groups()["method"].keys() == {*METHODS, "custom"}
    assert set(DEPTHS) >= set(CIFAR_RESNETS)
    split = {name for name, kind in kinds_of("method").items() if "n_modes" in settings_of(kind)}
    assert split == {"tt", "tt_classical"}


def test_a_method_that_somebody_adds_gets_its_option():
    with register(replace(METHODS["tt"], name="mine", summary="My own.")):
        preset = write.presets()["method"]["mine"]
    assert preset.option(n_modes=3).name == "mine"
    assert write.preset_text(preset).startswith("# My own.\nname: mine ")


@pytest.mark.parametrize(("group", "name"), PRESETS)
def test_each_preset_gives_what_its_file_says(group, name):
    config = composed(f"{group}={name}", *(["data.root=images"] if name == "image_folder" else []), "dense_epochs=1")
    given = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    if name in ("image_folder", "torchvision", "timm"):
        given |= {"root": "images"} if name == "image_folder" else {"name": f"{name}/resnet18"}
    assert config.to_dict()[group] == given


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_values_of_an_experiment_win(path):
    config = composed(f"experiment={path.stem}", "data.root=images")
    given = OmegaConf.to_container(OmegaConf.load(path))
    presets = {key.split("/")[1]: value for entry in given.pop("defaults")[:-1] for key, value in entry.items()}
    if "name" in given.get("model", {}):
        given["model"]["name"] = f"torchvision/{given['model']['name']}"
    effective = config.to_dict()
    assert [key for key in differences(given, effective) if key in set(differences(given, {}))] == []
    assert presets["model"] in (config.model.name, config.model.source)
    assert presets["data"] == config.data.name


def test_an_experiment_seed_wins_over_config_yaml_and_the_command_line_over_both(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\ntt_ranks: {layer1.*: 5}\n")
    check_overrides(["--config-dir", str(tmp_path), "experiment=mine"], CONF)
    search = f"hydra.searchpath=['file://{tmp_path}']"
    assert composed(search, "experiment=mine").seed == 3
    assert composed(search, "experiment=mine").tt_ranks == {"layer1.*": 5}
    assert composed(search, "seed=4", "experiment=mine").seed == 4


def test_every_setting_is_explained_and_says_what_it_allows():
    settings = [one for owners in settings_by_key().values() for one in owners.values()]
    assert len(settings) > 50
    assert [one.key for one in settings if not one.doc] == []
    assert all(one.words() for one in settings)
    assert (
        settings_by_key()["admm.pull"]["default"].words() == "a number above 0 and below 1 | {0: number, epoch: number}"
    )
    assert settings_by_key()["trainer.threads"][""].words() == "null or a whole number at least 1"


def test_torchvision_models_get_their_full_name_once():
    for name in ("resnet50", "torchvision/resnet50"):
        assert composed("model=torchvision", f"model.name={name}").model.name == "torchvision/resnet50"


def test_config_is_frozen():
    config = composed("admm.pull=0.5")
    assert config.admm.pull == 0.5
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]


# --- settings that the chosen option does not have

FOREIGN = [
    (group, name, key.removeprefix(f"{group}."), owners)
    for group in groups()
    for name in kinds_of(group)
    for key, owners in settings_by_key().items()
    if key.startswith(f"{group}.") and name not in owners and name and not issubclass(kinds_of(group)[name], Target)
]


@pytest.mark.parametrize(("group", "name", "key", "owners"), FOREIGN, ids=lambda one: one if type(one) is str else "")
def test_a_setting_of_another_option_is_refused_with_those_that_have_it(group, name, key, owners):
    _, errors = read_config({group: {"name": name, key: next(iter(owners.values())).default}})
    texts = [error.told(Use.in_hydra) for error in errors if f"{group}.{key}: " in str(error)]
    have = ", ".join(f"{group}={owner}" for owner in owners)
    assert texts == [
        f"{group}.{key}: {group}={name} has no such setting; {have} {'has' if len(owners) == 1 else 'have'} it"
    ]


def test_there_are_foreign_settings_of_every_group_with_several_options():
    assert {group for group, *_ in FOREIGN} == {"data", "method", "ranks", "admm", "optimizer", "logger"}
    known = {(group, name, key) for group, name, key, _ in FOREIGN}
    assert known >= {
        ("ranks", "budget", "target"), ("ranks", "manual", "macs"), ("admm", "off", "rho"),
        ("ranks", "greedy", "round_to"), ("ranks", "vbmf", "macs"), ("method", "cp", "n_modes"),
        ("optimizer", "adamw", "momentum"), ("data", "cifar10", "fake_size"),
    }  # fmt: skip


# --- values


def all_of(tree: dict) -> list[str]:
    return [error.told(Use.in_hydra) for error in read_config(tree)[1]]


@pytest.mark.parametrize("ranks", [None, 1, 16, [8, 12], {"layer1.*": 9, "fc": [4]}])
def test_good_ranks(ranks):
    assert Config(tt_ranks=ranks).tt_ranks == ranks


@pytest.mark.parametrize("ranks", [0, -2, "abc", 1.5, 16.0, True, [], [8, 0], [8, "x"], {}, {1: 8}, "", "layer1.*:9"])
def test_bad_ranks_name_key_value_and_remedy(ranks):
    (text,) = all_of({"tt_ranks": ranks})
    assert text.startswith("tt_ranks: ")
    assert repr(ranks) in text
    assert "'tt_ranks={layer1.*:8}'" in text


def test_bad_entries_of_a_mapping_are_named_one_by_one():
    found = all_of({"tt_ranks": {"layer1.*": 0, "layer2.*": 4, "fc": [4, -1]}})
    assert [text.split(" given")[0] for text in found] == ["tt_ranks[layer1.*]: 0", "tt_ranks[fc]: [4, -1]"]


@pytest.mark.parametrize("rho", ["auto", "balanced", 1e-3, 1, {0: 1e-3, 50: 1e-2}, {"layer1.*": 1e-3}])
def test_good_rho(rho):
    assert Config(admm=AdmmOptions(rho=rho)).admm.rho == rho


@pytest.mark.parametrize("rho", ["fast", 0, -1, float("nan"), float("inf"), {}, {0: 0}, {-1: 1}, {0: 1, "a": 1}, [1]])
def test_bad_rho(rho):
    texts = all_of({"admm": {"rho": rho}})
    assert texts
    assert all(text.startswith("admm.rho") for text in texts)


@pytest.mark.parametrize(
    ("interval", "good"),
    [
        (1, 1), ("50steps", 1), ("2epochs", 1), ({0: 1, 9: "50steps"}, 1),
        (0, 0), ("0steps", 0), ("x", 0), ({9: 1}, 0), ({0: 1, 9: "x"}, 0),
    ],
)  # fmt: skip
def test_update_interval(interval, good):
    assert (all_of({"admm": {"update_every": interval}}) == []) == bool(good)


def test_numbers_arrive_in_the_type_of_the_setting():
    config = config_of({"optimizer": {"lr": 1}, "init": 2024, "data": {"mean": [0]}})
    assert (config.optimizer.lr, config.init, config.data.mean) == (1.0, "2024", [0.0])
    assert type(config.optimizer.lr) is float
    for tree in (
        {"seed": 1.0},
        {"report": 1},
        {"seed": True},
        {"include": "a"},
        {"data": {"mean": [True]}},
        {"seed": None},
    ):
        assert len(all_of(tree)) == 1, tree


def test_each_combination_can_be_refused():
    wrong = [
        {"tt_ranks": 4, "ranks": {"name": "energy"}},
        {"ranks": {"name": "learned", "macs": 0.5}, "admm": {"name": "off"}},
        {"ranks": {"name": "budget", "macs": 0.5, "methods": ["tt", "spatial_sdv"]}},
        {"method": {"name": "cp"}, "calibration_batches": 4},
        {"distill": {"features": 1.0}, "trainer": {"compile": True}},
        {"fade_epochs": 11},
        {"fade_epochs": 1, "trainer": {"compile": True}},
        {"optimizer": {"retrain_lr": "auto", "joint_schedule": True}},
        {"optimizer": {"retrain_lr": "auto"}, "trainer": {"devices": 2}},
        {"distill": {"dense": True, "weight": 0.5}},
    ]
    texts = [text for tree in wrong for text in all_of(tree)]
    assert texts == [text for _, text in COMBINATIONS]
    assert all(": " in text and "allowed: " in text for text in texts)


@pytest.mark.parametrize(
    ("tree", "beginning"),
    [
        ({"ranks": {"name": "learned", "macs": 0.5, "alpha": 0.1}}, "learned: "),
        ({"ranks": {"name": "ratio", "min_rank": 4, "max_rank": 2}}, "ranks.max_rank=2 is below ranks.min_rank=4"),
        ({"distill": {"model": "resnet56", "weight": 0.5}}, "distill.init: another net"),
        ({"distill": {"init": "net.safetensors"}}, "distill.init: another net"),
        ({"optimizer": {"momentum": 0}}, "optimizer.momentum: 0 given"),
        ({"trainer": {"precision": "16-mixed", "accelerator": "cpu"}}, "trainer.precision: '16-mixed' given"),
        ({"data": {"name": "image_folder"}}, "data.root: missing"),
    ],
)
def test_settings_of_one_option_that_do_not_go_together(tree, beginning):
    (text,) = all_of(tree)
    assert text.startswith(beginning)


def test_what_teaches_the_dense_net_was_trained_before():
    for more in ({"pretrain_epochs": 1}, {"init": "net.safetensors"}):
        assert all_of({"distill": {"dense": True, "weight": 0.5}, **more}) == []
    assert all_of({"distill": {"dense": True, "weight": 0.5, "init": "net.safetensors"}}) == []
    assert len(all_of({"distill": {"dense": True}, "pretrain_epochs": 1})) == 1  # with no share in the loss


@pytest.mark.parametrize("ranks", [["ranks.alpha=0.1", "ranks.macs=null"], ["ranks.params=0.3"], []])
def test_learned_ranks_have_a_price_or_targets(ranks):
    assert composed("ranks=learned", *ranks).ranks.name == "learned"


@pytest.mark.parametrize("kind", [kind for group in groups() for kind in kinds_of(group).values()])
def test_options_are_frozen_dataclasses_whose_constructor_takes_their_settings(kind):
    needed = {"root": "x", "macs": 0.5, "_target_": "own.Code", "train": "own.images", "test": "own.images"}
    given = {key: value for key, value in needed.items() if key in settings_of(kind)}
    option = kind(**given)
    assert kind(**option.values()) == option
    assert {one.name for one in fields(kind)} >= settings_of(kind).keys()
    with pytest.raises(AttributeError):
        option.name = "x"


def test_every_rule_is_an_option_of_its_own_name():
    assert all(issubclass(rule, Option) and rule.name == name for name, rule in RULES.items())
    assert default_option("ranks").name == "manual"


# --- text form


def test_yaml_gives_the_same_settings_back():
    schedules = ["admm.rho={0:1e-3,5:1e-2}", "admm.pull={0: 0.5, 10: 0.9}", "admm.update_every={0: 1, 10: 50steps}"]
    config = composed("tt_ranks={layer1.*:9}", *schedules, "init=a b.pt")
    assert config.admm.pull == {0: 0.5, 10: 0.9}
    assert config.admm.update_every == {0: 1, 10: "50steps"}
    text = to_yaml(config)
    assert config_of(yaml.safe_load(text)) == config
    assert OmegaConf.to_container(OmegaConf.create(text)) == config.to_dict()
    assert text.index("seed") < text.index("tt_ranks") < text.index("logger")


def test_stored_settings_are_completed_by_the_defaults_of_their_own_options():
    stored = composed("optimizer=adamw", "optimizer.lr=0.5").to_dict()
    del stored["optimizer"]["beta1"], stored["trainer"], stored["report"]
    whole = completed(stored)
    assert (whole["optimizer"]["lr"], whole["optimizer"]["beta1"], whole["report"]) == (0.5, 0.9, True)
    assert whole == composed("optimizer=adamw", "optimizer.lr=0.5").to_dict()
    assert completed({"ranks": {"rule": "of old"}, "admm": 3})["ranks"]["rule"] == "of old"


def test_differences_name_dotted_keys_and_hide_what_is_ignored():
    a, b = composed().to_dict(), composed("seed=1", "admm.rho=0.1", "logger=wandb", "tt_ranks={fc:3}").to_dict()
    found = differences(a, b)
    assert [key for key in found if not key.startswith("logger")] == ["seed", "tt_ranks", "admm.rho", "tt_ranks.fc"]
    assert differences(a, b, ("logger", "tt_ranks", "see")) == ["seed", "admm.rho"]
    assert differences({"rho": {0: 1.0}, "x": (1,)}, {"rho": {"0": 1}, "x": [1]}) == []
    assert differences({"a": {}}, {"b": None}) == ["a", "b"]


def test_refuse_lists_each_problem_once():
    refuse([])
    with pytest.raises(ConfigError, match="^only$"):
        refuse(["only", "only"])
    with pytest.raises(ConfigError, match="2 problems in the settings:\n  a\n  b"):
        refuse(["a", "b"])
