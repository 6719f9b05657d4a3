"""The loops of docs/loops.md run as they stand, and give the same weights, Z and U; each goes on after a kill.

The fast test runs the loops of what the project installs; the slow ones need ``lightning``, ``transformers`` and
``accelerate``: ``uv run --with lightning,transformers,accelerate,jsonargparse[signatures] pytest -m slow ..``.
"""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, LAYERS, batches, new_net, plan_of, samples, sgd
from torch import nn
from torch.testing import assert_close

import hodec

PAGE = (Path(__file__).parents[2] / "docs" / "loops.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))
EPOCHS = 3


class Named(nn.Module):
    """What transformers' Trainer trains: a model that takes keywords and returns its loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        scores = self.net(x)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def quiet_net():
    net = new_net()
    net.dropout.p = 0.0
    return net


def lightning(name):
    module = pytest.importorskip(name)

    def trainer(**options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return module.Trainer(**quiet, enable_checkpointing=False, **options)

    return {"LightningModule": module.LightningModule, "Trainer": trainer}


def transformers(tmp_path):
    package = pytest.importorskip("transformers")
    x, y = samples()
    data = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]

    class InOrder(package.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, self.args.per_device_train_batch_size)

    def arguments(folder, **options):
        return package.TrainingArguments(
            folder,
            **options,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )

    return {"Trainer": InOrder, "TrainingArguments": arguments, "folder": str(tmp_path), "data": data}


def run(block, **given):
    """The names of a block of the page after it ran with a net, its plan, data and three epochs."""
    model = given.pop("model", None) or quiet_net()
    net = getattr(model, "net", model)
    names = {"hodec": hodec, "torch": torch, "F": F, "model": model, "plan": plan_of(net), "loader": batches()}
    names |= {"epochs": EPOCHS, "print": lambda *_: None, **given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(BLOCKS[block], names)
    return names


def state_of(names):
    return getattr(names["admm"], "admm", names["admm"]).states


def assert_same_states(one, other, tolerance=0.0):
    for name in LAYERS:
        assert_close(one[name].z, other[name].z, rtol=0, atol=tolerance)
        assert_close(one[name].u, other[name].u, rtol=0, atol=tolerance)
        assert float(one[name].u.norm()) > 0


def test_the_plain_loop_and_lightning_give_the_same():
    plain, callback = run("plain"), run("lightning", **lightning("pytorch_lightning"))
    assert_same_states(state_of(plain), state_of(callback))
    assert type(callback["compressed"]) is type(plain["compressed"])


@pytest.mark.slow
@pytest.mark.parametrize("block", ["lightning", "transformers", "accelerate", "fabric"])
def test_every_loop_gives_the_same_as_the_plain_one(block, tmp_path):
    given = {}
    if block == "lightning":
        given = lightning("lightning.pytorch")
    if block == "transformers":
        given = {**transformers(tmp_path), "model": Named(quiet_net())}
    if block == "accelerate":
        given = {"Accelerator": pytest.importorskip("accelerate").Accelerator}
    if block == "fabric":
        given = {"Fabric": pytest.importorskip("lightning.fabric").Fabric}
    names = run(block, **given)
    assert_same_states(state_of(run("plain")), state_of(names), tolerance=1e-6)
    with torch.no_grad():
        assert getattr(names["compressed"], "net", names["compressed"])(samples()[0]).shape == (8 * BATCHES, 5)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_transformers_goes_on_from_a_checkpoint(tmp_path):
    package = pytest.importorskip("transformers")
    given = transformers(tmp_path / "whole")
    whole = run("transformers", model=Named(quiet_net()), **given)

    class Kill(package.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if state.global_step == BATCHES:
                raise Killed

    given = transformers(tmp_path / "part")
    given["Trainer"], plain = (
        lambda *a, callbacks, **o: plain(*a, callbacks=[*callbacks, Kill()], **o),
        given["Trainer"],
    )
    with pytest.raises(Killed):
        run("transformers", model=Named(quiet_net()), **given)
    BLOCKS["resumed"] = BLOCKS["transformers"].replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)")
    again = run("resumed", model=Named(quiet_net()), **transformers(tmp_path / "part"))
    assert_same_states(state_of(whole), state_of(again))
    assert_close(again["model"].state_dict(), whole["model"].state_dict(), rtol=0, atol=0)
    (tmp_path / "part" / f"checkpoint-{BATCHES}" / "hodec_admm.pt").unlink()
    again = transformers(tmp_path / "part")
    again["resume"] = str(tmp_path / "part" / f"checkpoint-{BATCHES}")
    BLOCKS["resumed"] = BLOCKS["transformers"].replace(
        "trainer.train()", "trainer.train(resume_from_checkpoint=resume)"
    )
    with pytest.raises(hodec.HodecError, match="has no hodec_admm.pt: give .* resume="):
        run("resumed", model=Named(quiet_net()), **again)


@pytest.mark.slow
def test_transformers_may_have_data_of_unknown_length():
    pytest.importorskip("transformers")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples()[0])

    net, args = quiet_net(), SimpleNamespace(deepspeed=None, fsdp=None, gradient_accumulation_steps=1)
    callback = hodec.AdmmTrainerCallback(plan_of(net))
    given = {"model": net, "optimizer": sgd(net), "train_dataloader": torch.utils.data.DataLoader(Stream())}
    callback.on_train_begin(args, SimpleNamespace(global_step=0), None, **given)
    assert callback.admm.steps_per_epoch is None


@pytest.mark.slow
@pytest.mark.parametrize("block", ["plain", "accelerate", "fabric"])
def test_a_loop_goes_on_from_its_states(block, monkeypatch):
    """Killed after the first epoch; model, optimizer and ADMM are given their states again."""
    packages = {"accelerate": ("accelerate", "Accelerator"), "fabric": ("lightning.fabric", "Fabric")}
    given = {}
    if block in packages:
        package, name = packages[block]
        given = {name: getattr(pytest.importorskip(package), name)}
    whole, part = run(block, **given), run(block, epochs=1, **given)
    saved = {key: part[key].state_dict() for key in ("model", "optimizer", "admm")}
    resumed = "[globals()[key].load_state_dict(saved[key]) for key in saved]\nfor epoch in range(1, epochs):"
    monkeypatch.setitem(BLOCKS, "resumed", BLOCKS[block].replace("for epoch in range(epochs):", resumed))
    again = run("resumed", saved=saved, **given)
    assert_same_states(state_of(whole), state_of(again))
    assert_close(again["model"].state_dict(), whole["model"].state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_each_lightning_goes_on_from_a_checkpoint(name, tmp_path, monkeypatch):
    whole, part = run("lightning", **lightning(name)), run("lightning", epochs=1, **lightning(name))
    part["trainer"].save_checkpoint(tmp_path / "one.ckpt")
    resumed = BLOCKS["lightning"].replace("loader)\ncompressed", "loader, ckpt_path=path)\ncompressed")
    monkeypatch.setitem(BLOCKS, "resumed", resumed)
    again = run("resumed", path=tmp_path / "one.ckpt", **lightning(name))
    assert_same_states(state_of(whole), state_of(again))
    assert_close(again["model"].state_dict(), whole["model"].state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_the_callback_is_one_of_every_lightning_in_use():
    """In one process with both, an instance is accepted by both, and by a command line that is built from types."""
    one, other = pytest.importorskip("pytorch_lightning"), pytest.importorskip("lightning.pytorch")
    made = hodec.admm.lightning.lightning_callback()
    assert issubclass(made, one.Callback)
    assert issubclass(made, other.Callback)


COMMAND_LINE = """
import sys
from {name}.cli import LightningCLI
from {name} import LightningModule
from torch import nn

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

callback = {{"class_path": "hodec.AdmmCallback", "init_args": {{"plan": sys.argv[1], "pull": 0.6}}}}
made = LightningCLI(Classifier, args={{"trainer": {{"callbacks": [callback], "accelerator": "cpu"}}}}, run=False)
found = [one for one in made.trainer.callbacks if type(one).__name__ == "AdmmCallback"]
print([(one._make.keywords["pull"], *one._make.keywords["plan"]) for one in found])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_a_command_line_of_lightning_builds_the_callback(name, tmp_path):
    """Needs jsonargparse beside Lightning: the class is found by its path, the plan by its file."""
    pytest.importorskip("jsonargparse")
    pytest.importorskip(name)
    plan_of(quiet_net()).save(tmp_path / "plan.json")
    command = [sys.executable, "-c", COMMAND_LINE.format(name=name), str(tmp_path / "plan.json")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str([(0.6, *LAYERS)])
