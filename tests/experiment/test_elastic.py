"""A run goes on with another number of devices where each step keeps its images."""

import pytest
import torch

from hodec.errors import CheckpointError, ConfigError
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import train_loader
from hodec.experiment.elastic import goes_on
from hodec.experiment.pipeline import open_folder

from tiny_runs import tiny  # isort: skip


def run_on(devices: int, batch_size: int, **more):
    return tiny(trainer={"accelerator": "cpu", "devices": devices, **more}, data={"batch_size": batch_size})


def test_the_same_images_a_step_go_on_and_others_are_refused(tmp_path, caplog):
    open_folder(run_on(1, 16), tmp_path)
    caplog.set_level("INFO")
    open_folder(run_on(2, 8), tmp_path)
    assert "goes on in 2 processes with batches of 8, where it had 1 with 16: each step has the same 16" in caplog.text
    open_folder(run_on(2, 4, num_nodes=2), tmp_path)  # the folder's settings are now those of the last start
    with pytest.raises(ConfigError, match=r"32 images in 2 processes, .* has 16: give batch_size=8, or begin"):
        open_folder(run_on(2, 16), tmp_path)
    with pytest.raises(ConfigError, match=r"give a number of devices that divides 16"):
        open_folder(run_on(3, 5), tmp_path)
    with pytest.raises(ConfigError, match=r"differ in data\.batch_size"):
        open_folder(run_on(2, 7, num_nodes=2), tmp_path)


def test_other_settings_are_not_covered():
    settings = {"trainer": {"devices": 1, "num_nodes": 1}, "data": {"batch_size": 8}}
    assert not goes_on([], settings, settings)
    assert not goes_on(["data.batch_size"], settings, {**settings, "data": {"batch_size": 4}})
    assert not goes_on(["trainer.devices", "seed"], settings, settings)
    module = {"trainer": {"devices": 2, "num_nodes": 1}, "data": {"name": "datamodule"}}
    assert not goes_on(["trainer.devices"], {**module, "trainer": {"devices": 1, "num_nodes": 1}}, module)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_loader_goes_on_within_an_epoch_for_other_processes(processes: int):
    one, many = tiny(data={"batch_size": 8}), tiny(data={"batch_size": 8 // processes})
    data = build_data(one.data)
    first = train_loader(data, seed=0)
    batches = iter(first)
    seen = [next(batches)[1] for _ in range(2)]
    state, rest = first.state_dict(), torch.cat([labels for _, labels in batches])
    assert state["batch"] == len(seen)
    parts = []
    for rank in range(processes):
        loader = train_loader(build_data(many.data), seed=0, rank=rank, world_size=processes)
        loader.load_state_dict(state)
        parts.append([labels for _, labels in loader])
    dealt = [torch.stack(step, dim=1).flatten() for step in zip(*parts, strict=True)]
    assert torch.equal(torch.cat(dealt), rest)
    other = train_loader(build_data(many.data), seed=0, rank=0, world_size=1)
    with pytest.raises(CheckpointError, match="with other batches: batch"):
        other.load_state_dict(state)
