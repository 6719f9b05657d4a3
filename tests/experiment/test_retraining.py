"""The rate of retraining: found by short descents, and a warning where it throws away what conversion has left."""

import copy
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import DATA, dense_net, tiny
from torch import nn
from train_script import rows

from hodec.errors import ConfigError
from hodec.experiment import phases, pipeline, retraining
from hodec.experiment.context import RunContext
from hodec.experiment.data.images import build_data
from hodec.experiment.lit import LitClassifier
from hodec.experiment.loggers import Loggers
from hodec.experiment.run_folder import RunFolder

WARNING = "throws away what conversion has left"
AUTO = {"dense_epochs": 1, "retrain_epochs": 1, "admm": {"name": "off"}}


def context(tmp_path, **changes) -> RunContext:
    config = tiny(**changes)
    return RunContext(config, build_data(config.data), RunFolder(tmp_path), Loggers(), None)


def probed(run: RunContext, net: nn.Module, *, highest: float, scale: float = 1.0) -> retraining.Rate:
    """The rate for a net whose loss is multiplied by ``scale``."""

    class Scaled(LitClassifier):
        def loss(self, scores, x, y):
            return scale * super().loss(scores, x, y)

    def module_at(rate: float) -> LitClassifier:
        return Scaled(copy.deepcopy(net), options={"lr": rate, "momentum": 0.9})

    return retraining.probed_rate(run, module_at, highest=highest)


def test_a_loss_of_a_fourth_has_four_times_the_rate(tmp_path):
    """Plain SGD sees the product of rate and loss alone; 4 is a power of the ladder's factor."""
    run, net = context(tmp_path), dense_net()
    found = probed(run, net, highest=1.0)
    assert found.end is None, "else the ends of the ladder would make it true"
    assert probed(run, net, highest=4.0, scale=0.25) == found._replace(lr=4 * found.lr)


def test_a_rate_that_breaks_the_net_is_not_found(tmp_path):
    assert probed(context(tmp_path), dense_net(), highest=1e4).lr < 1e4 / 2**3


def test_rates_that_the_descents_cannot_tell_apart_are_counted(tmp_path, caplog):
    """A loss of 0 ends alike at every rate."""
    run, net = context(tmp_path, data=replace(DATA, batch_size=6)), dense_net()  # 8 batches, of which 4 score
    with caplog.at_level(logging.INFO):
        flat = probed(run, net, highest=1.0, scale=0.0)
    assert flat.level == flat.probes - 1 == 2
    assert "; 2 of the others are level with it; losses" in caplog.text


def test_losses_are_level_within_twice_the_standard_error_of_their_pairs():
    best = [0.5, 0.9, 0.7, 0.6]
    assert retraining._level([0.6, 0.8, 0.9, 0.6], best)
    assert not retraining._level([0.6, 1.0, 0.9, 0.7], best)
    assert not retraining._level([math.inf] * 4, best)
    assert not retraining._level([0.5], [0.5]), "one batch tells no spread"


@pytest.mark.parametrize(("highest", "end", "probes"), [(1e-3, "highest", retraining.RATES), (1e9, "lowest", 3)])
def test_a_rate_at_an_end_of_those_tried_is_said(tmp_path, caplog, highest, end, probes):
    found = probed(context(tmp_path), dense_net(), highest=highest)
    assert found[:3] == (highest if end == "highest" else highest / 2**7, probes, end)
    assert f"the {end} rate of those tried was the best" in caplog.text


def test_a_run_finds_its_rate_and_trains_by_it(tmp_path):
    config = tiny(**AUTO, optimizer={"lr": 0.1, "retrain_lr": "auto"})
    metrics = pipeline.run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    kept = metrics["retraining"]["lr"]
    assert 3 <= metrics["retraining"]["probes"] <= retraining.RATES
    assert kept in [0.1 / 2**halvings for halvings in range(retraining.RATES)]
    assert rows(tmp_path / "run")[-1]["lr"] == kept
    given = pipeline.run(tiny(**AUTO, optimizer={"lr": 0.1, "retrain_lr": kept}), tmp_path / "given")
    assert given["retraining"] == {"lr": kept, "probes": 0, "end": None, "level": 0}
    assert metrics["weights_sha256"] == given["weights_sha256"], "looking for it leaves no trace"


def test_where_no_rate_can_be_found_is_refused():
    with pytest.raises(ConfigError, match="retrain_lr: auto given with optimizer.joint_schedule=true"):
        tiny(optimizer={"retrain_lr": "auto", "joint_schedule": True})
    with pytest.raises(ConfigError, match="retrain_lr: auto given with several devices"):
        tiny(optimizer={"retrain_lr": "auto"}, trainer={"devices": 2})
    with pytest.raises(ConfigError, match="retrain_lr: auto given with several devices"):
        tiny(optimizer={"retrain_lr": "auto"}, trainer={"num_nodes": 2})
    with pytest.raises(ConfigError, match="'fast' given; allowed: null or auto or a number above 0"):
        tiny(optimizer={"retrain_lr": "fast"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> nn.Module:
    """A net that has something to lose."""
    torch.manual_seed(0)
    run = context(tmp_path_factory.mktemp("dense"), dense_epochs=25, data={"augment": False})
    return phases._trained(run, "dense", dense_net()).net


@pytest.mark.parametrize(("rate", "words"), [(5.0, WARNING), (1e-6, "")])
def test_a_rate_that_throws_away_what_was_left_is_warned_of(trained, tmp_path, caplog, rate, words):
    run = context(tmp_path, dense_epochs=0, retrain_epochs=1, optimizer={"retrain_lr": rate})
    with caplog.at_level(logging.WARNING):
        phases.retrain(run, trained, dense=trained, teacher=nn.Identity())
    said = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert len(said) == bool(words)
    assert all("let optimizer.retrain_lr=auto find it" in text for text in said)
