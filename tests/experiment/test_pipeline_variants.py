"""Runs that leave phases out or go other ways: each ends with what it says."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import dense_net, tiny
from train_script import rows

from hodec.errors import CheckpointError
from hodec.experiment import phases, pipeline
from hodec.experiment.data import loaders
from hodec.experiment.data.images import build_data
from hodec.experiment.lit import LitClassifier, evaluate
from hodec.io.tensors import load_tensors
from hodec.models import build_model


def test_no_epochs_at_all_is_direct_truncation(tmp_path):
    metrics = pipeline.run(tiny(dense_epochs=0, retrain_epochs=0), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert metrics["admm"] == {"status": "off", "primal_residual": None}
    assert metrics["seconds"] == {}
    assert metrics["compressed"]["test_accuracy"] == metrics["truncated"]["test_accuracy"]
    assert (tmp_path / "compressed.safetensors").exists()


def test_admm_off_trains_the_dense_net_plainly(tmp_path):
    metrics = pipeline.run(tiny(admm={"name": "off"}, dense_epochs=1, retrain_epochs=0), tmp_path)
    assert [row["phase"] for row in rows(tmp_path)] == ["dense"]
    assert not any(key.startswith("admm") for key in rows(tmp_path)[0])
    assert metrics["admm"]["status"] == "off"


def test_without_validation_split_there_are_no_validation_figures(tmp_path):
    pipeline.run(tiny(data={"val_fraction": 0.0}, dense_epochs=1, retrain_epochs=0), tmp_path)
    (row,) = rows(tmp_path)
    assert "val/accuracy" not in row
    assert "admm/truncated_accuracy" not in row


def test_without_batchnorm_batches_the_statistics_stay(given, tmp_path):
    pipeline.run(tiny(init=given, bn_batches=0, **NO_EPOCHS), tmp_path)
    (dense, truncated) = (load_tensors(path) for path in (given, tmp_path / "phases" / "truncated.safetensors"))
    for name in dense.keys() & truncated.keys():
        torch.testing.assert_close(truncated[name], dense[name], rtol=0, atol=0)


NO_EPOCHS = {"dense_epochs": 0, "retrain_epochs": 0}


@pytest.fixture(scope="module")
def given(finished):
    """A file of trained dense weights."""
    return str(finished[0] / "phases" / "pretrain.safetensors")


@pytest.fixture(scope="module")
def cut(given, tmp_path_factory):
    """Random factors or not -> metrics of a run without epochs, and the nets whose BatchNorm it estimated, before."""
    runs, real = {}, phases.reestimate_batchnorm
    for random_factors in (False, True):
        nets = []
        with pytest.MonkeyPatch.context() as patched:
            noted = lambda net, data, seen=nets: seen.append(copy.deepcopy(net)) or real(net, data)  # noqa: E731
            patched.setattr(phases, "reestimate_batchnorm", noted)
            config = tiny(init=given, random_factors=random_factors, **NO_EPOCHS)
            runs[random_factors] = pipeline.run(config, tmp_path_factory.mktemp("cut")), nets
    return runs


@pytest.mark.parametrize("random_factors", [False, True])
def test_the_raw_accuracy_is_that_of_the_swapped_net_before_its_batchnorm_was_estimated(cut, random_factors):
    metrics, (net,) = cut[random_factors]
    loader = loaders.test_loader(build_data(tiny().data))
    assert metrics["truncated"]["test_accuracy_raw"] == evaluate(net, loader)


def slow(*values):
    """A case whose code another one runs too."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        slow({"optimizer": {"name": "adamw", "lr": 1e-3}}),
        {"trainer": {"precision": "bf16-mixed", "channels_last": True, "gradient_clip_val": 1.0}, "retrain_epochs": 1},
        {"trainer": {"accumulate_grad_batches": 3}, "admm": {"update_every": "1steps", "rho": "balanced"}},
        slow({"method": {"name": "tt_classical", "n_modes": 2}, "tt_ranks": 3, "admm": {"relax": 1.5}}),
        slow({"method": {"execution": "chain", "n_modes": 2}}),
    ],
    ids=["adamw", "bf16", "accumulate", "classical", "chain"],
)
def test_other_settings_run_through(tmp_path, changes):
    metrics = pipeline.run(tiny(**{"dense_epochs": 1, "retrain_epochs": 0, **changes}), tmp_path)
    assert 0 < metrics["reduction"]["params"] < 1
    assert metrics["admm"]["primal_residual"] < 1


def test_without_dual_the_whole_job_runs_as_a_penalty(tmp_path):
    one = {"dense_epochs": 2, "retrain_epochs": 0}
    metrics = pipeline.run(tiny(**one, admm={"dual": False}), tmp_path / "penalty")
    other = pipeline.run(tiny(**one), tmp_path / "admm")
    assert 0 < metrics["admm"]["primal_residual"] < 1
    assert metrics["admm"]["primal_residual"] != other["admm"]["primal_residual"]


def test_random_factors_know_nothing_of_the_dense_weights(given, cut, tmp_path):
    (first, _), (other, _) = cut[True], cut[False]
    again = pipeline.run(tiny(init=given, random_factors=True, **NO_EPOCHS), tmp_path)
    assert min(first["conversion"].values()) > 0.9
    assert first["weights_sha256"] == again["weights_sha256"]
    assert first["dense"] == other["dense"]
    assert first["weights_sha256"] != other["weights_sha256"]


def test_inputs_of_training_batches_weigh_the_truncation(given, cut, tmp_path):
    plain, aware = cut[False][0], pipeline.run(tiny(init=given, calibration_batches=2, **NO_EPOCHS), tmp_path)
    assert plain["dense"] == aware["dense"]
    # by the weights alone nothing is nearer than the plain truncation
    for name, error in plain["conversion"].items():
        assert aware["conversion"][name] > error


def test_admm_projects_by_inputs_once_there_is_a_trained_net(given, tmp_path, caplog):
    caplog.set_level("INFO", "hodec.experiment.phases")
    settings = {"dense_epochs": 1, "retrain_epochs": 0, "calibration_batches": 1}
    pipeline.run(tiny(init=given, **settings), tmp_path / "trained")
    assert caplog.text.count("data-aware: inputs of") == 2  # for ADMM and for the conversion
    caplog.clear()
    pipeline.run(tiny(**settings), tmp_path / "fresh")
    assert caplog.text.count("data-aware: inputs of") == 1


OFF = {"admm": {"name": "off"}, "dense_epochs": 0}


def test_the_rule_is_built_once_and_not_at_all_for_a_given_plan(finished, tmp_path, monkeypatch):
    rules, real = [], phases.rank_rule
    monkeypatch.setattr(phases, "rank_rule", lambda *args: rules.append(real(*args)) or rules[-1])
    learned = {"tt_ranks": None, "ranks": {"name": "learned", "macs": 0.85}}
    pipeline.run(tiny(dense_epochs=1, retrain_epochs=0, **learned), tmp_path / "learned")
    assert [row["phase"] for row in rows(tmp_path / "learned")] == ["pretrain", "admm"]
    assert len(rules) == 1
    pipeline.run(tiny(plan=str(finished[0] / "plan.json"), **NO_EPOCHS), tmp_path / "given")
    assert rules[1:] == [None]


def test_an_early_stop_is_told(tmp_path):
    metrics = pipeline.run(tiny(admm={"tolerance": 10.0}, dense_epochs=3, retrain_epochs=0), tmp_path)
    assert metrics["admm"]["status"] == "converged"
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(("changes", "phase"), [({}, "admm"), slow({"admm": {"name": "off"}}, "dense")])
def test_one_schedule_goes_through_admm_and_retraining(tmp_path, changes, phase):
    optimizer = {"lr": 0.05, "retrain_lr": None, "joint_schedule": True, "schedule": "linear"}
    pipeline.run(tiny(pretrain_epochs=1, dense_epochs=1, retrain_epochs=3, optimizer=optimizer, **changes), tmp_path)
    seen = [(row["phase"], row["lr"]) for row in rows(tmp_path)]  # at the begin of each epoch
    assert [name for name, _ in seen] == ["pretrain", phase, *["retrain"] * 3]
    assert [rate for _, rate in seen] == pytest.approx([0.05, 0.05, 0.0375, 0.025, 0.0125])


def test_retraining_may_take_its_part_of_the_joint_schedule_lower(tmp_path):
    """At one learning rate the product of factors moves further than a dense weight, so its rate is scaled."""
    optimizer = {"lr": 0.05, "retrain_lr": 0.02, "joint_schedule": True, "schedule": "linear"}
    pipeline.run(tiny(dense_epochs=1, retrain_epochs=3, optimizer=optimizer), tmp_path)
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.05, 0.015, 0.01, 0.005])


def teachers_of(monkeypatch):
    """Phase -> the teachers that it will have had; instead of training, each phase moves the weights a little."""
    teachers = {}

    def fit_phase(run, phase, module, *, callback):
        teachers[phase] = [copy.deepcopy(teacher.state_dict()) for teacher in module._teacher]
        with torch.no_grad():
            for parameter in module.net.parameters():
                parameter.add_(0.01)
        if callback is not None:  # as Lightning's fit binds it
            callback._admm = callback._make(module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
        return 0.0

    monkeypatch.setattr(phases, "fit_phase", fit_phase)
    return teachers


ALL = {"pretrain_epochs": 1, "dense_epochs": 1, "retrain_epochs": 1}


@pytest.mark.parametrize("admm", [{}, slow({"name": "off"})])
def test_the_pretrained_net_teaches_the_dense_one_too_where_that_is_wanted(tmp_path, monkeypatch, admm):
    teachers = teachers_of(monkeypatch)
    pipeline.run(tiny(distill={"weight": 0.5, "dense": True}, admm=admm, **ALL), tmp_path)
    assert teachers.pop("pretrain") == []
    assert len(teachers) == 2
    kept = load_tensors(tmp_path / "phases" / "pretrain.safetensors")
    for (teacher,) in teachers.values():
        torch.testing.assert_close(dict(teacher), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "expected"), [({"pretrain_epochs": 1}, "pretrain"), ({}, "admm"), ({"distill": {"weight": 0.0}}, None)]
)
def test_the_teacher_is_the_best_dense_net_there_is(tmp_path, monkeypatch, changes, expected):
    """The pretrained one, else the one that ADMM left; none where nothing is distilled."""
    teachers = teachers_of(monkeypatch)
    settings = {"dense_epochs": 1, "retrain_epochs": 1, "distill": {"weight": 0.5}, **changes}
    pipeline.run(tiny(**settings), tmp_path)
    found = teachers.pop("retrain")
    assert not any(teachers.values()), "only retraining is taught"
    assert len(found) == (expected is not None)
    if expected:
        kept = load_tensors(tmp_path / "phases" / f"{expected}.safetensors")
        torch.testing.assert_close(dict(found[0]), kept, rtol=0, atol=0)


def test_another_net_may_teach(tmp_path, monkeypatch):
    file, teachers = tmp_path / "teacher.safetensors", teachers_of(monkeypatch)
    net = build_model("resnet20", in_channels=3, num_classes=4)
    save_file(net.state_dict(), file)
    distill = {"weight": 0.5, "dense": True, "model": "resnet20", "init": str(file)}
    metrics = pipeline.run(tiny(distill=distill, **ALL), tmp_path / "run")
    assert teachers.pop("pretrain") == []
    assert set(teachers) == {"admm", "retrain"}
    for (teacher,) in teachers.values():
        torch.testing.assert_close(dict(teacher), dict(net.state_dict()), rtol=0, atol=0)
    assert metrics["teacher"]["params"] > metrics["pretrained"]["params"]


def test_a_teacher_whose_weights_are_of_another_net_is_refused_before_training(tmp_path):
    file = tmp_path / "teacher.safetensors"
    save_file(build_model("resnet20", in_channels=3, num_classes=4).state_dict(), file)
    with pytest.raises(CheckpointError, match="another model"):
        pipeline.run(tiny(distill={"weight": 0.5, "init": str(file)}), tmp_path / "run")


def test_a_teacher_moves_no_random_number_of_the_run(tmp_path):
    """Only retraining is taught, and there is none: with a teacher and without, the weights are the same."""
    file = tmp_path / "teacher.safetensors"
    save_file(dense_net().state_dict(), file)
    taught, alone = (
        pipeline.run(tiny(dense_epochs=1, retrain_epochs=0, distill=distill), tmp_path / name)
        for name, distill in (("taught", {"weight": 0.5, "init": str(file)}), ("alone", {}))
    )
    assert taught["weights_sha256"] == alone["weights_sha256"]


def test_row_39_operations_that_repeat_themselves_are_asked_for(tmp_path, monkeypatch):
    """What torch has then is another matter, on a GPU: an operation that it lacks is an error of torch's own."""
    seen, real = [], LitClassifier.training_step

    def step(module, batch, index):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(module, batch, index)

    monkeypatch.setattr(LitClassifier, "training_step", step)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it for good
    short = {"dense_epochs": 1, "retrain_epochs": 0, "admm": {"name": "off"}}
    try:
        pipeline.run(tiny(**short, trainer={"deterministic": True}), tmp_path / "asked")
        assert set(seen) == {True}
        seen.clear()
        pipeline.run(tiny(**short), tmp_path / "not asked")
        assert set(seen) == {False}, "the next job of a sweep would have it too"
    finally:
        torch.use_deterministic_algorithms(False)
