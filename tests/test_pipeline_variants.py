"""Runs that leave stages out or go other ways: each ends with what it says."""

import pytest
from tiny_runs import tiny
from train_script import rows

from hodec import pipeline


def test_no_epochs_at_all_is_direct_truncation(tmp_path):
    metrics = pipeline.run(tiny(dense_epochs=0, retrain_epochs=0), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert metrics["admm"] == {"status": "off", "primal_residual": None}
    assert metrics["seconds"] == {}
    assert metrics["compressed"]["test_accuracy"] == metrics["truncated"]["test_accuracy"]
    assert (tmp_path / "compressed.safetensors").exists()


def test_admm_off_trains_the_dense_net_plainly(tmp_path):
    metrics = pipeline.run(tiny(admm={"enabled": False}, dense_epochs=1, retrain_epochs=0), tmp_path)
    assert [row["stage"] for row in rows(tmp_path)] == ["dense"]
    assert not any(key.startswith("admm") for key in rows(tmp_path)[0])
    assert metrics["admm"]["status"] == "off"


def test_without_validation_split_there_are_no_validation_figures(tmp_path):
    pipeline.run(tiny(data={"val_fraction": 0.0}, dense_epochs=1, retrain_epochs=0), tmp_path)
    (row,) = rows(tmp_path)
    assert "val/accuracy" not in row
    assert "admm/truncated_accuracy" not in row


def test_without_batchnorm_batches_the_statistics_stay(tmp_path):
    metrics = pipeline.run(tiny(bn_batches=0, dense_epochs=1, retrain_epochs=0), tmp_path)
    assert metrics["truncated"]["test_accuracy"] == metrics["truncated"]["test_accuracy_raw"]


SMALL_DIGITS = {"image_size": None, "val_fraction": 0.9}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "adamw", "lr": 1e-3}},
        {"trainer": {"precision": "bf16-mixed", "channels_last": True, "gradient_clip_val": 1.0}},
        {"trainer": {"accumulate_grad_batches": 3}, "admm": {"update_every": "1steps", "rho": "balanced"}},
        {"method": {"name": "tt_classical", "n_modes": 2}, "tt_ranks": 3, "admm": {"relax": 1.5}},
        {"method": {"execution": "chain", "n_modes": 2}, "data": {"name": "digits", **SMALL_DIGITS}},
    ],
    ids=["adamw", "bf16", "accumulate", "classical", "chain digits"],
)
def test_other_settings_run_through(tmp_path, changes):
    metrics = pipeline.run(tiny(dense_epochs=1, retrain_epochs=1, **changes), tmp_path)
    assert 0 < metrics["reduction"]["params"] < 1
    assert metrics["admm"]["primal_residual"] < 1


def test_without_dual_the_whole_job_runs_as_a_penalty(tmp_path):
    metrics = pipeline.run(tiny(dense_epochs=2, retrain_epochs=0, admm={"dual": False}), tmp_path / "penalty")
    other = pipeline.run(tiny(dense_epochs=2, retrain_epochs=0), tmp_path / "admm")
    assert 0 < metrics["admm"]["primal_residual"] < 1
    assert metrics["admm"]["primal_residual"] != other["admm"]["primal_residual"]


def test_random_factors_know_nothing_of_the_dense_weights(tmp_path):
    settings = {"pretrain_epochs": 1, "retrain_epochs": 1, "random_factors": True, **OFF}
    first, again = (pipeline.run(tiny(**settings), tmp_path / name) for name in ("first", "again"))
    assert min(first["conversion"].values()) > 0.9
    assert first["weights_sha256"] == again["weights_sha256"]
    assert first["truncated"]["test_accuracy_raw"] == again["truncated"]["test_accuracy_raw"]
    other = pipeline.run(tiny(**{**settings, "random_factors": False}), tmp_path / "other")
    assert first["dense"] == other["dense"]
    assert first["weights_sha256"] != other["weights_sha256"]


def test_inputs_of_training_batches_weigh_the_truncation(tmp_path):
    plain, aware = (
        pipeline.run(tiny(pretrain_epochs=1, retrain_epochs=0, metric_batches=n, **OFF), tmp_path / str(n))
        for n in (0, 2)
    )
    assert plain["dense"] == aware["dense"]
    # by the weights alone nothing is nearer than the plain truncation
    for name, error in plain["conversion"].items():
        assert aware["conversion"][name] > error


def test_admm_projects_by_inputs_once_there_is_a_trained_net(tmp_path, caplog):
    caplog.set_level("INFO", "hodec.stages")
    pipeline.run(tiny(pretrain_epochs=1, retrain_epochs=0, metric_batches=1), tmp_path / "trained")
    assert caplog.text.count("data-aware: inputs of") == 3  # for ADMM, for the conversion, for its raw accuracy
    caplog.clear()
    pipeline.run(tiny(retrain_epochs=0, metric_batches=1), tmp_path / "fresh")
    assert caplog.text.count("data-aware: inputs of") == 2


OFF = {"admm": {"enabled": False}, "dense_epochs": 0}


def test_an_early_stop_is_told(tmp_path):
    metrics = pipeline.run(tiny(admm={"tolerance": 10.0}, dense_epochs=3, retrain_epochs=0), tmp_path)
    assert metrics["admm"]["status"] == "converged"
    assert len(rows(tmp_path)) == 1
