"""Code of one's own by its dotted name: what may be named, how its arguments are checked, what a run makes of it."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from own_package import install, write_package

from hodec import methods, models
from hodec.errors import ConfigError, HodecError, Use
from hodec.experiment import pipeline
from hodec.experiment.config import groups, trust
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import Config, config_of, read_config
from hodec.experiment.main import store_presets
from hodec.ranks import table

OWN = (
    "model=custom", "model._target_=own.code.Net", "+model.width=6", "data=functions", "data.train=own.code.images",
    "data.test=own.code.test_images", "data.batch_size=16", "ranks=custom", "ranks._target_=own.code.Share",
    "+ranks.share=0.4", "method=custom", "method._target_=own.code.PLAIN", "optimizer=custom",
    "optimizer._target_=torch.optim.Adam", "+optimizer.betas=[0.8,0.9]",
    "optimizer.scheduler={_target_:torch.optim.lr_scheduler.StepLR,step_size:1}",
    "trainer.callbacks=[{_target_:own.code.Count,step:10}]", "logger=custom", "logger._target_=own.code.Lines",
)  # fmt: skip
SHORT = (
    "dense_epochs=1", "retrain_epochs=1", "bn_batches=1", "trainer.accelerator=cpu", "trainer.threads=1",
    "report=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """No trust, no package and no method of one test is there in the next."""
    monkeypatch.setenv(trust.VARIABLE, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(methods.METHODS)
    yield
    for name in set(methods.METHODS) - before:
        methods.METHODS.remove(name)
    for name in [name for name in sys.modules if name.split(".")[0] in ("own", "broken")]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder to work in that has the package ``own``."""
    write_package(tmp_path, "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(*argv: str) -> list[str]:
    try:
        check_overrides(trust.take_flag(list(argv)), CONF)
    except ConfigError as error:
        lines = str(error).split("\n  ")
        return lines[1:] if len(lines) > 1 else lines
    return []


def all_of(tree: dict[str, object]) -> list[str]:
    return [error.told(Use.in_hydra) for error in read_config(tree)[1]]


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config_of(plain(compose("config", overrides=list(overrides))))


# --- what may be named


def test_nothing_of_ones_own_is_called_before_the_user_trusts_its_package(own):
    (own / "own" / "__init__.py").write_text("open('trace', 'w')")
    found = problems(*OWN)
    assert len(found) == 7
    for text in found:
        assert "given, code that hodec does not know; allowed: --trust own, if you know it" in text
    assert not (own / "trace").exists(), "the package was imported"
    assert problems("--trust", "own", *OWN) == []
    assert (own / "trace").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "own.code.system", "own.code.os.system", "own.code.os", "own.code.nn.Linear"]
)
def test_trust_in_a_package_is_no_trust_in_what_it_imports(own, name):
    trust.take_flag(["--trust", "own"])
    (text,) = all_of({"model": {"name": "custom", "_target_": name}})
    assert text.startswith(f"model._target_: '{name}' given")
    assert "allowed: --trust " in text


def test_a_settings_file_cannot_give_trust(own):
    path = own / "conf" / "experiment" / "theirs.yaml"
    path.parent.mkdir(parents=True)
    head = "# @package _global_\ndefaults: [override /model: custom]\n"
    path.write_text(head + "model: {_target_: own.code.Net}\ntrust: [own]\n")
    argv = ["--config-dir", str(own / "conf"), "experiment=theirs"]
    refused, unknown = sorted(problems(*argv))
    assert refused.startswith("experiment/theirs.yaml: model._target_: 'own.code.Net' given, code that hodec does not")
    assert unknown.startswith("experiment/theirs.yaml: trust: no such setting")
    path.write_text(head + "model: {_target_: own.code.Net, width: 4}\n")
    assert problems("--trust=own", *argv) == []


def test_an_option_that_yaml_reads_as_false_is_told(own):
    path = own / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    argv = ["--config-dir", str(own / "conf"), "experiment=mine"]
    path.write_text("# @package _global_\ndefaults: [override /admm: off]\n")
    (text,) = problems(*argv)
    assert text.endswith("as YAML reads off, on, yes, no; quote it: 'off'")
    path.write_text("# @package _global_\ndefaults: [override /admm: 'off']\n")
    assert problems(*argv) == []


def test_targets_below_a_target_are_held_to_the_same(own):
    trust.take_flag(["--trust", "own"])
    (text,) = all_of({"model": {"name": "custom", "_target_": "own.code.Net", "width": {"_target_": "os.getpid"}}})
    assert text.startswith("model.width._target_: 'os.getpid' given, code that hodec does not know")


def test_a_callback_of_hydra_may_be_of_a_trusted_package():
    argv = ["+hydra.callbacks.x={_target_: own.code.Callback}"]
    assert problems(*argv)[0].startswith("hydra.callbacks.x._target_: 'own.code.Callback' given")
    assert problems("--trust", "own", *argv) == []


@pytest.mark.parametrize(
    ("argv", "rest", "told"),
    [
        (["--trust", "own", "seed=1"], ["seed=1"], ["own"]),
        (["seed=1", "--trust=own,two.three"], ["seed=1"], ["own", "two.three"]),
        (["--trust", "own", "--trust", "two"], [], ["own", "two"]),
        (["--trust", "seed=1"], ["seed=1"], []),
        (["-m", "--trust"], ["-m"], []),
    ],
)
def test_the_flag(argv, rest, told):
    assert trust.take_flag(argv) == rest
    assert (trust.packages(), trust.trusted()) == (told, not told)
    assert trust.take_flag(trust.flags()) == []
    assert (trust.packages(), trust.trusted()) == (told, not told)


def test_the_flag_takes_names_of_packages_only():
    with pytest.raises(ConfigError, match="--trust: 'a/b' given; allowed: names of packages"):
        trust.take_flag(["--trust=a/b"])


# --- names and arguments


def test_every_mistake_is_told_at_once_with_what_was_perhaps_meant(own):
    (own / "own" / "broken.py").write_text("import no_such_package")
    found = problems(
        "--trust", "own", "model=custom", "model._target_=own.code.Nett", "data=datamodule",
        "data._target_=own.code.Images", "+data.batchsize=3", "ranks=custom", "ranks._target_=own.code.Share",
        "+ranks.share=2", "method=custom", "method._target_=own.code.Net", "optimizer=custom",
        "optimizer._target_=torch.optim.Adam", "+optimizer.beta=[0.8,0.9]", "logger=custom",
        "logger._target_=own.broken.Logger", "trainer.callbacks=[{_target_:own.code.Count}]",
        "optimizer.scheduler={_target_:torch.optim.lr_scheduler.StepLR,step:1}",
    )  # fmt: skip
    expected = [
        "model._target_: 'own.code.Nett' given; own.code has no 'Nett'. Did you mean: Net",
        "data.batchsize: Images has no such argument. Did you mean: batch_size?",
        "ranks.share: 2 given; allowed: a number above 0 and at most 1",
        "method._target_: 'own.code.Net' given; allowed: a hodec.methods.Method",
        "optimizer.beta: Adam has no such argument. Did you mean: betas?",
        "optimizer.scheduler.step: StepLR has no such argument. Did you mean: step_size",
        "optimizer.scheduler.step_size: missing; StepLR needs it",
        "trainer.callbacks[0].step: missing; Count needs it",
        "logger._target_: 'own.broken.Logger' given; importing own.broken needs no_such_package",
    ]
    for beginning in expected:
        assert any(text.startswith(beginning) for text in found), beginning
    assert len(found) == len(expected)


STEP = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"model": {"name": "custom"}}, "model._target_: '' given; allowed: the dotted name"),
        ({"data": {"name": "functions", "test": "own.code.images"}}, "data.train: '' given; allowed: the dotted name"),
        ({"ranks": {"name": "custom", "_target_": "name"}}, "ranks._target_: 'name' given; allowed: the dotted name"),
        (
            {"model": {"name": "custom", "_target_": "nowhere.Net"}},
            "model._target_: 'nowhere.Net' given; there is",
        ),
        ({"trainer": {"callbacks": [3]}}, "trainer.callbacks[0]: 3 given; allowed: null or a list of mappings"),
        (
            {"optimizer": {"scheduler": {"step_size": 1}}},
            "optimizer.scheduler: {'step_size': 1} given; allowed: ",
        ),
        ({"optimizer": {"scheduler": STEP, "warmup_epochs": 1}}, "optimizer.scheduler: given together with a warm-up"),
        ({"model": {"_target_": "own.code.Net"}}, "model._target_: model=resnet20 has no such setting; model=custom h"),
    ],
)
def test_one_mistake(own, tree, expected):
    trust.take_flag(["--trust", "own,nowhere"])
    (text,) = all_of(tree)
    assert text.startswith(expected)


def test_an_argument_is_added():
    (text,) = problems("optimizer=custom", "optimizer._target_=torch.optim.Adam", "optimizer.eps=1e-6")
    assert text == "optimizer.eps: an argument of one's own is added: +optimizer.eps=1e-6"


def test_settings_of_ones_own_are_written_and_read_again(own):
    trust.take_flag(["--trust", "own"])
    config = composed(*OWN)
    tree = config.to_dict()
    assert tree["model"] == {"name": "custom", "_target_": "own.code.Net", "width": 6}
    assert tree["ranks"] == {"name": "custom", "_target_": "own.code.Share", "share": 0.4}
    assert tree["method"] == {"name": "custom", "_target_": "own.code.PLAIN", "execution": "auto"}
    assert config_of(yaml.safe_load(yaml.safe_dump(tree))) == config


# --- folders of settings


def test_folders_that_hydra_searches(tmp_path, monkeypatch):
    (tmp_path / "conf" / "ranks").mkdir(parents=True)
    (tmp_path / "conf" / "ranks" / "mine.yaml").write_text("name: budget\nparams: 0.3\n")
    monkeypatch.chdir(tmp_path)
    assert problems(f"hydra.searchpath=[{tmp_path / 'conf'}]", "ranks=mine") == []
    assert problems("hydra.searchpath=[file://conf]", "ranks=mine", "ranks.target=1")[0].startswith(
        "ranks.target: ranks=budget"
    )
    assert problems("hydra.searchpath=[nowhere]")[0].startswith("hydra.searchpath: 'nowhere' given; allowed: a folder")
    assert problems("hydra.searchpath=conf")[0].startswith("hydra.searchpath=conf: cannot be read; allowed: a list")
    assert "--trust own" in problems("hydra.searchpath=[pkg://own.conf]")[0]


# --- entry points


def test_an_installed_package_offers_choices(tmp_path, monkeypatch):
    install(tmp_path, "own")
    monkeypatch.syspath_prepend(tmp_path)
    caches = [groups.groups, groups.settings_by_key, trust.entry_targets, models._offered, table._offered]
    fresh = methods.Methods([methods.METHODS[name] for name in methods.METHODS])
    monkeypatch.setattr(methods, "METHODS", fresh)
    try:
        for one in caches:
            one.cache_clear()
        store_presets()
        argv = (
            "model=own_net",
            "data=own_images",
            "+data.batch_size=8",
            "ranks=share",
            "ranks.share=0.3",
            "method=plain",
        )
        assert problems(*argv) == []
        config = composed(*argv)
        assert (config.ranks.share, config.method.name, config.data.arguments) == (0.3, "plain", {"batch_size": 8})
        net = models.build_model("own_net", in_channels=2, num_classes=3, image_size=8)
        assert net.fc.out_features == 3
        assert problems("model=own_nett")[0].endswith("Did you mean: own_net?")
    finally:
        table.RULES.pop("share", None)
        monkeypatch.undo()
        for one in caches:
            one.cache_clear()
        for group, name in (("model", "own_net"), ("data", "own_images"), ("ranks", "share"), ("method", "plain")):
            ConfigStore.instance().repo.get(group, {}).pop(f"{name}.yaml", None)


# --- a run of it all


def test_a_run_of_ones_own_code(own):
    trust.take_flag(["--trust", "own"])
    config = composed(*OWN, *SHORT)
    metrics = pipeline.run(config, own / "run")
    from own.code import Count

    assert Count.epochs == 20, "one epoch in each of two phases"
    assert (own / "run" / "lines.txt").read_text() == "0\n1\nsuccess"
    assert metrics["model"] == {"name": "own.code.Net"}
    assert metrics["data"] == {"name": "functions", "classes": 4, "images": {"train": 56, "validation": 8, "test": 32}}
    assert metrics["compressed"]["params"] < metrics["dense"]["params"]
    assert pipeline.run(config, own / "run") == metrics, "a finished run is only read"


def test_what_a_target_makes_has_to_fit(own):
    trust.take_flag(["--trust", "own"])
    module = {"name": "functions", "train": "own.code.images", "test": "own.code.test_images"}
    for tree, text in (
        (
            {"model": {"name": "custom", "_target_": "own.code.images"}, "data": module},
            "makes a tuple; allowed: a ",
        ),
        ({"model": {"name": "custom", "_target_": "own.code.Flat"}, "data": module}, r"gives \(2, 1\) for 2 images"),
        ({"data": {**module, "train": "own.code.pixels"}}, "an image is torch.uint8"),
        ({"data": {**module, "train": "own.code.Images"}}, "returns a Images; allowed: a filled torch Dataset"),
    ):
        with pytest.raises(HodecError, match=text):
            pipeline.run(config_of({"report": False, **tree}), own / "run")
        (own / "run").rename(own / str(len(list(own.iterdir()))))
