"""Tests of hodec/experiment/config/overrides.py and train.py; the pipeline is a stub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from hodec.errors import ConfigError
from hodec.experiment.config.groups import groups
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import Config, config_of

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
EXPERIMENT = "experiment=resnet32_cifar10_65_60"
GROUPS = [*(group for group in groups() if group != "distill"), "experiment"]

# Runs train.py in a process where the pipeline only writes down what it was given; seeds 7 and 8 fail.
STUB = """
import json, runpy, sys, types
from hodec.errors import TrainingError

def run(config, run_dir):
    (run_dir / "seen.json").write_text(json.dumps({"torch": "torch" in sys.modules, "config": config.to_dict()}))
    if config.seed == 7:
        raise TrainingError("NaN in layer1")
    if config.seed == 8:
        raise ValueError("a bug")
    return {"compressed": {"test_accuracy": 0.5}}

class SweepReport:
    def on_multirun_end(self, config, **_):
        print("sweep report of", config.hydra.sweep.dir)
    def __getattr__(self, name):
        return lambda **_: None

for name, member in (("hodec.experiment.pipeline", run), ("hodec.experiment.report.sweep", SweepReport)):
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], member.__name__, member)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config_of(plain(compose("config", overrides=list(overrides))))


def problems(*argv: str, conf: Path = CONF) -> list[str]:
    """Each problem that check_overrides lists; empty when it accepts."""
    try:
        check_overrides(argv, conf)
    except ConfigError as error:
        lines = str(error).split("\n  ")
        return lines[1:] if len(lines) > 1 else lines
    return []


def train(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUB, str(ROOT / "train.py"), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def seen(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("seen.json"))]


# --- the command line


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["model=resnet32", "data=cifar10", "tt_ranks=16"],
        ["model=resnet32", "data=image_folder", "data.root=x", "tt_ranks={layer1.*:9,layer2.*:18,layer3.*:27}"],
        ["-m", "model=resnet20", "admm.rho=1e-4,1e-3,1e-2", "logger=wandb"],
        ["model=torchvision", "model.name=resnet50"],
        ["admm=off"],
        ["-m", "tt_ranks=[8,8],[16,16]", "seed=range(0,3)", "model=glob(resnet2*)"],
        ["hydra.run.dir=x", "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"],
        [EXPERIMENT, "tt_ranks={layer1.*:5}"],
        [EXPERIMENT, "++tt_ranks={layer3.4.conv2:5}"],
        ["admm={rho:0.1,pull:0.5}"],
        ["init=\"runs/epoch=1.pt\""],
        ["--help", "nonsense"],
    ],
)  # fmt: skip
def test_good_command_lines(argv):
    assert problems(*argv) == []


GOOD_VALUES = [
    "admm.pull=0.99", "admm.relax=1.9", "method.n_modes=4", "data.val_fraction=0", "optimizer.retrain_lr=null",
    "distill.weight=1", "include=[layer1.*]", "exclude=[]", "retrain_epochs=0", "admm.update_every=50steps",
    "method.modes={layer1.*:{in:[4,4],out:[4,4]}}", "optimizer.schedule=step", "data.mean=[0.5]", "data.std=[0.5]",
    "data.train_fraction=0.1",
]  # fmt: skip
BAD_VALUES = [
    "admm.pull=0", "admm.relax=1.91", "method.n_modes=5", "data.val_fraction=1", "optimizer.lr=inf",
    "distill.weight=1.1", "include=[[a]]", "retrain_epochs=-1", "admm.update_every=0steps", "tt_ranks=abc",
    "method.modes={layer1.*:{in:[4,4]}}", "optimizer.schedule=exponential", "trainer.threads=0", "admm.tolerance=nan",
    "data.train_fraction=0",
]  # fmt: skip
BAD_ARGUMENTS = {
    "admm.puul=0.5": "admm.puul: no such setting. Did you mean: admm.pull",
    "lr=3": "lr: no such setting. Did you mean: optimizer.lr",
    "modle=resnet32": "modle: no such setting. Did you mean: model",
    "model@x=resnet20": "model@x: no such setting. Did you mean: model",
    "+experiment.x=1": "experiment.x: no such setting",
    "model=resnet31": "model: 'resnet31' given; allowed: custom | resnet110 | resnet20",
    "experiment=resnet32": "experiment: 'resnet32' given; allowed: ",
    "admm=false": "admm: False given; allowed: default | off | paper",
    "model.name=resnet21": "model.name: 'resnet21' given; allowed: ",
    "method.name=ttt": "method.name: an option is chosen by its group: method=ttt",
    "seed=abc": "seed: 'abc' given; allowed: a whole number at least 0",
    "bn_batches=1.5": "bn_batches: 1.5 given; allowed: a whole number",
    "report=maybe": "report: 'maybe' given; allowed: true or false",
    "admm.pull=null": "admm.pull: None given; allowed: a number above 0",
    "include=conv1": "include: 'conv1' given; allowed: null or a list",
    "tt_ranks=0": "tt_ranks: 0 given; allowed: null or a whole number",
    "method.modes=[8,8": "method.modes=[8,8: [ and ] do not match; quote",
    "admm.rho={layer1.*:": "admm.rho={layer1.*:: { and } do not match",
    "init=a=b": "init=a=b: the value holds '='; quote it twice: 'init=\"a=b\"'",
    "data.root='x": "data.root='x: the value cannot be read",
    "resnet32": "resnet32: a setting is written KEY=VALUE. Did you mean: model=resnet32?",
    "9,": "9,: a setting is written KEY=VALUE, quoted for the shell",
    "tt_ranks.layer1.*=8": "tt_ranks.layer1.*: entries are given as a mapping",
    "admm.rho.layer1=8": "admm.rho.layer1: entries are given as a mapping",
    "optimizer.lr=0.1,0.2": "optimizer.lr=0.1,0.2: several values need -m",
    "~trainer": "~trainer: a setting cannot be removed",
    "+data.flip=true": "+data.flip=true: data.flip is there already",
    "++logger=csv": "++logger=csv: logger is there already",
    "distill={wait:1}": "distill.wait: no such setting. Did you mean: distill.weight",
    "hydra/launcher=nothing": "In 'hydra/config': Could not find 'hydra/launcher/nothing'",
}
HYDRA_WORDS = ("struct", "full_key", "object_type", "hydra.cc", "provider=", "Traceback")


def test_good_values():
    assert problems(*GOOD_VALUES) == []


def test_bad_values_each_name_their_key():
    found = problems(*BAD_VALUES)
    assert len(found) == len(BAD_VALUES)
    for override in BAD_VALUES:
        key = override.split("=")[0]
        assert any(text.startswith(key) and "allowed" in text for text in found), override


def test_methods_to_choose_among_have_to_exist():
    assert problems("ranks=budget", "ranks.methods=[tt,spatial_svd]") == []
    (text,) = problems("ranks=budget", "ranks.methods=[tt,spatial_sdv]")
    assert text.startswith("ranks.methods: a name that is no method; allowed: methods among tt | ")
    (text,) = problems("ranks=budget", "ranks.methods=[]")
    assert text == "ranks.methods: [] given; allowed: null or a list of methods: 'ranks.methods=[tt,spatial_svd]'"


def test_row_23_all_mistakes_are_listed_at_once_and_in_plain_words():
    found = problems(*BAD_ARGUMENTS)
    for argument, beginning in BAD_ARGUMENTS.items():
        assert any(text.startswith(beginning) for text in found), argument
    assert len(found) == len(BAD_ARGUMENTS)
    assert not [text for text in found if any(word in text for word in HYDRA_WORDS)]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--tt_ranks=8"], ["--tt_ranks=8: no such option; a setting has no dashes"]),
        (["seed=1", "-m", "admm.pull=0.1,0.2"], ["admm.pull=0.1,0.2: options such as -m stand"]),
        (["-m", "seed=interval(0,3)"], ["seed=interval(0,3): an interval needs a sweeper"]),
        (["-m", "model=glob(vgg*)"], ["model=glob(vgg*): no value matches"]),
        (["-m", "admm.pull=0.5,1.5,abc"], ["admm.pull: 1.5 given", "admm.pull: 'abc' given"]),
        (["-m", "model=resnet20,resnet21,resnet22"], ["model: 'resnet21' given", "model: 'resnet22' given"]),
        (["-m", "trainer.devices=2"], ["trainer.devices: 2 given with -m"]),
        (["-m", "trainer.num_nodes=2"], ["trainer.num_nodes: 2 given with -m"]),
        (["trainer.strategy=fsdp"], ["trainer.strategy: 'fsdp' given; allowed: auto | ddp"]),
        (["-m", "hydra.verbose=true,false"], ["hydra.verbose=true,false: a setting of Hydra takes one value"]),
        (["admm.rho=1e-3", "admm.rho=1e-2"], ["admm.rho: given 2 times; allowed: once"]),
        (["seed=${nothing}"], ["seed: Interpolation key 'nothing' not found"]),
        (["data=image_folder"], ["data.root: missing; image_folder needs"]),
        (["ranks=budget", "ranks.target=0.3"], ["ranks.target: ranks=budget has no such setting; ranks=ratio, "]),
        (
            ["ranks.macs=0.4", "admm=off", "admm.rho=1"],
            ["ranks.macs: ranks=manual has no", "admm.rho: admm=off has no"],
        ),
        (["-m", "ranks=ratio,vbmf", "ranks.target=0.3"], ["ranks.target: ranks=vbmf has no such setting"]),
        (["-m", "data=fake,digits", "data.fake_size=90"], ["data.fake_size: data=digits has no such setting"]),
        (["ranks=learned", "ranks.metric=latency_ms"], ["ranks.metric: 'latency_ms' given; allowed: macs | params"]),
        (["ranks.name=budget"], ["ranks.name: an option is chosen by its group: ranks=budget"]),
        (["--config-dir", "/nowhere/at/all"], ["--config-dir: '/nowhere/at/all' given; allowed: a folder"]),
        ([EXPERIMENT, "tt_ranks={fc:5}"], ["tt_ranks: the chosen files give no 'fc' to change"]),
    ],
)
def test_bad_command_lines(argv, expected):
    found = problems(*argv)
    assert len(found) == len(expected)
    for text, beginning in zip(found, expected, strict=True):
        assert text.startswith(beginning)
        assert not any(word in text for word in HYDRA_WORDS)


def test_a_faulty_experiment_file_is_named_with_all_its_faults(tmp_path):
    for source in CONF.rglob("*.yaml"):
        target = tmp_path / source.relative_to(CONF)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text(source.read_text())
    folder = tmp_path / "experiment"
    folder.joinpath("typo.yaml").write_text("# @package _global_\nsede: 3\nadmm: {pull: much, rhoo: 1}\n")
    folder.joinpath("lost.yaml").write_text("seed: 3\n")
    folder.joinpath("broken.yaml").write_text("# @package _global_\nseed: [3\n")
    folder.joinpath("range.yaml").write_text("# @package _global_\nadmm: {pull: 3}\n")
    folder.joinpath("foreign.yaml").write_text("# @package _global_\nranks: {macs: 0.4}\n")
    assert {text.split(";")[0].split(". ")[0] for text in problems("experiment=typo", conf=tmp_path)} == {
        "experiment/typo.yaml: sede: no such setting",
        "experiment/typo.yaml: admm.pull: 'much' given",
        "experiment/typo.yaml: admm.rhoo: no such setting",
    }
    assert "first line must be '# @package _global_'" in problems("experiment=lost", conf=tmp_path)[0]
    assert "broken.yaml" in problems("experiment=broken", conf=tmp_path)[0]
    assert problems("experiment=range", conf=tmp_path)[0].startswith("experiment/range.yaml: admm.pull: 3 given")
    (text,) = problems("experiment=foreign", conf=tmp_path)
    assert text.startswith("experiment/foreign.yaml: ranks.macs: ranks=manual has no such setting; ranks=budget, ")


def test_a_file_of_ones_own_chooses_an_option_by_its_name(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "mine.yaml").write_text("name: budget\nparams: 0.3\n")
    mine = ["--config-dir", str(tmp_path), "ranks=mine"]
    assert problems(*mine) == []
    assert problems(*mine, "ranks.target=0.5")[0].startswith("ranks.target: ranks=budget has no such setting")
    (tmp_path / "ranks" / "mine.yaml").write_text("name: bugdet\n")
    assert problems(*mine)[0].startswith("ranks/mine.yaml: ranks.name: 'bugdet' given; allowed: manual | ")


# --- train.py


def test_a_single_run_from_another_folder(tmp_path):
    done = train(tmp_path, "seed=3", "tt_ranks={layer1.*:9}")
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = seen(tmp_path / "outputs")
    assert record["config"] == composed("seed=3", "tt_ranks={layer1.*:9}").to_dict()
    assert record["torch"] is False, "torch was imported before the pipeline"
    (run_dir,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in run_dir.iterdir()} == {".hydra", "train.log", "seen.json"}


def test_mistakes_end_with_2_before_anything_is_made(tmp_path):
    done = train(tmp_path, "seed=abc", "-x")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: 2 problems in the settings:\n")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seed", "code", "trace"), [(7, 2, False), (8, 1, True)])
def test_a_failing_run_says_so_once(tmp_path, seed, code, trace):
    done = train(tmp_path, f"seed={seed}")
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == trace
    assert trace or len(done.stderr.splitlines()) == 1
    assert "HYDRA_FULL_ERROR" not in done.stderr
    (log,) = tmp_path.rglob("train.log")
    assert log.read_text() == done.stderr


def test_a_sweep_goes_on_after_a_failed_job_and_reports_it(tmp_path):
    done = train(tmp_path, "-m", "seed=6,7,9", "model=torchvision", "model.name=torchvision/resnet18")
    assert done.returncode == 2
    assert [record["config"]["seed"] for record in seen(tmp_path / "multirun")] == [6, 7, 9]
    folders = sorted(path.parent.name for path in tmp_path.rglob("seen.json"))
    assert [name.split("_")[0] for name in folders] == ["0", "1", "2"]
    assert "seed-6" in folders[0]
    assert done.stderr.splitlines()[-1] == "TrainingError: NaN in layer1"
    assert "Traceback" not in done.stderr


def test_a_sweep_ends_with_its_report(tmp_path):
    done = train(tmp_path, "-m", "admm.rho=1e-4,1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sweep report of multirun/" in done.stdout
    assert [record["config"]["admm"]["rho"] for record in seen(tmp_path)] == [1e-4, 1e-3]


def test_help_names_groups_keys_and_examples(tmp_path):
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    assert all(group in done.stdout for group in GROUPS)
    assert "tt_ranks" in done.stdout
    assert "hodec train -m" in done.stdout
    assert "Hydra" not in done.stdout


def test_checking_imports_no_torch():
    code = (
        "import sys; from pathlib import Path; from hodec.experiment.config.overrides import check_overrides; "
        f"check_overrides(['seed=1'], Path({str(CONF)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
