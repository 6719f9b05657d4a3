"""Reading run folders: whole, unfinished, killed, broken."""

import json
import math

import pytest

from hodec.errors import CheckpointError
from hodec.experiment.report.collect import collect, collect_sweep


def test_a_whole_run_is_read(run_folder, tmp_path):
    run = collect(run_folder(tmp_path / "run"))
    assert run.finished
    assert run.label == "run"
    assert [len(run.phase(phase)) for phase in ("pretrain", "admm", "retrain")] == [12, 24, 16]
    assert run.plan.method == "tt"
    layer = run.plan.layers[-1]
    assert (layer.name, layer.shape, layer.modes_in) == ("layer3.2.conv2", (64, 64, 3, 3), (8, 8))
    assert layer.notes == ("rank 24 clipped to 20 at position 1: the modes allow no more",)
    assert run.network("truncated").accuracy_raw == 0.9417
    assert run.outcome.status == "converged"
    assert run.config["admm"]["pull"] == 0.8


def test_numbers_of_the_config_stay_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("admm: {rho: 1e-3}\n", encoding="utf-8")
    assert collect(tmp_path).config == {"admm": {"rho": 0.001}}


def test_reductions_come_from_the_networks_when_they_are_not_recorded(files_in, tmp_path):
    outcome = {"dense": {"params": 1000}, "compressed": {"params": 200}}
    run = collect(files_in(tmp_path, outcome=outcome))
    assert run.reduction("params") == pytest.approx(0.8)
    assert run.reduction("macs") is None


def test_an_unfinished_run_has_no_outcome(run_folder, tmp_path):
    run = collect(run_folder(tmp_path / "run", finished=False))
    assert not run.finished
    assert run.network("dense").accuracy is None
    assert run.planned_reduction("params") == pytest.approx(0.788, abs=1e-3)


@pytest.mark.parametrize("tail", [b'{"phase": "admm", "epo', b"\x00\x00\x00", '{"phase": "ü'.encode()[:-1]])
def test_what_a_kill_leaves_in_the_last_line_is_ignored(tail, run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", phases={"pretrain": 3}, finished=False)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert len(collect(folder).epochs) == 3


def test_a_broken_line_further_up_is_an_error_with_its_number(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", phases={"pretrain": 3}, finished=False)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is broken in line 2 .*Delete line 2"):
        collect(folder)


def test_an_epoch_done_again_after_a_resume_counts_once(files_in, tmp_path):
    rows = [{"phase": "admm", "epoch": epoch, "train/loss": loss} for epoch, loss in [(0, 3), (1, 2), (1, 1.5), (2, 1)]]
    run = collect(files_in(tmp_path, rows=rows))
    assert [(row.epoch, row.values["train/loss"]) for row in run.epochs] == [(0, 3), (1, 1.5), (2, 1)]


def test_nan_and_null_are_read(files_in, tmp_path):
    rows = [{"phase": "admm", "epoch": 0, "train/loss": math.nan, "val/loss": None}]
    (row,) = collect(files_in(tmp_path, rows=rows)).epochs
    assert math.isnan(row.values["train/loss"])
    assert "val/loss" not in row.values


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"epoch": 0}, "no phase or no epoch"),
        ({"phase": "admm", "epoch": -1}, "no phase or no epoch"),
        ({"phase": "admm", "epoch": 0.5}, "no phase or no epoch"),
        ({"phase": "admm", "epoch": 0, "val/loss": "low"}, "in line 1 val/loss = 'low' where a number"),
        ({"phase": "admm", "epoch": 0, "admm/layers": []}, r"admm/layers = \[\] where an object"),
        ([1], "holds a list in line 1"),
    ],
)
def test_rows_of_the_wrong_shape_are_named(row, said, files_in, tmp_path):
    good = {"phase": "admm", "epoch": 1}
    with pytest.raises(CheckpointError, match=said):
        collect(files_in(tmp_path, rows=[row, good]))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"format": "other"}, "not 'hodec-plan'"),
        ({"format": "hodec-plan", "version": 3}, "version 3, known is 2. Update hodec"),
        ({"format": "hodec-plan", "layers": {"a": {"ranks": ["8"]}}}, r"layers\.a\.ranks = \['8'\]"),
        ({"format": "hodec-plan", "layers": {"a": {"params_before": -1}}}, r"layers\.a\.params_before = -1"),
        ({"format": "hodec-plan", "layers": []}, "layers = .* where an object"),
        ([], "a JSON list where an object"),
    ],
)
def test_plans_of_the_wrong_shape_are_named(plan, said, files_in, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        collect(files_in(tmp_path, plan=plan))


@pytest.mark.parametrize("name", ["plan.json", "metrics.json"])
def test_files_that_are_cut_off_are_named_with_a_remedy(name, run_folder, tmp_path):
    folder = run_folder(tmp_path / "run")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is not readable as JSON.*again"):
        collect(folder)


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2\n", "a: \x07"])
def test_a_broken_config_is_named(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        collect(tmp_path)


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be read"):
        collect(tmp_path)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        collect(tmp_path / "none")
    with pytest.raises(CheckpointError, match="so it is no run"):
        collect(tmp_path)
    with pytest.raises(CheckpointError, match="so no runs"):
        collect_sweep(tmp_path)


def test_a_sweep_lists_every_run_in_order_with_what_sets_it_apart(sweep_folder):
    runs = collect_sweep(sweep_folder)
    labels = [run.label for run in runs]
    assert labels == [f"admm.rho={rho}" for rho in ("0.001", "0.01", "0.1", "1", "10", "abc")]
    assert [run.folder.name for run in runs] == ["0", "1", "2", "3", "4", "10"]
    assert [run.finished for run in runs] == [True, True, True, False, False, False]
    assert runs[4].problem.startswith("plan.json is not readable as JSON")
    assert runs[5].problem == "stopped before its config was written"


def test_a_run_that_stopped_before_its_first_epoch_is_listed(files_in, tmp_path):
    files_in(tmp_path / "0", config={"seed": 1})
    assert [run.problem for run in collect_sweep(tmp_path)] == ["stopped before its first epoch ended"]


def labels_of(files_in, folder, *configs):
    for at, config in enumerate(configs):
        files_in(folder / str(at), config=config, rows=[{"phase": "admm", "epoch": 0}])
    return [run.label for run in collect_sweep(folder)]


def test_labels_leave_out_the_run_folder_and_repeated_settings(files_in, tmp_path):
    configs = [
        {"tt_ranks": ranks, "ranks": {"value": ranks}, "paths": {"out": f"{tmp_path}/{at}/models"}, "seed": 0}
        for at, ranks in enumerate(([8, 8], [16, 16]))
    ]
    assert labels_of(files_in, tmp_path, *configs) == ["tt_ranks=[8,8]", "tt_ranks=[16,16]"]


def test_labels_name_the_choice_of_a_group_instead_of_its_details(files_in, tmp_path):
    configs = [{"model": {"name": f"resnet{depth}", "blocks": depth}} for depth in (20, 32)]
    assert labels_of(files_in, tmp_path, *configs) == ["model.name=resnet20", "model.name=resnet32"]


def test_labels_keep_the_details_that_the_name_does_not_tell(files_in, tmp_path):
    configs = [
        {"ranks": {"rule": rule, "keep": keep}} for rule, keep in (("ratio", 0.3), ("ratio", 0.5), ("vbmf", 0.5))
    ]
    assert labels_of(files_in, tmp_path, *configs) == [
        "ranks.rule=ratio, ranks.keep=0.3",
        "ranks.rule=ratio, ranks.keep=0.5",
        "ranks.rule=vbmf, ranks.keep=0.5",
    ]


def test_runs_that_cannot_be_told_apart_are_called_by_their_folders(files_in, tmp_path):
    assert labels_of(files_in, tmp_path, {"seed": 0}, {"seed": 0}) == ["0", "1"]
    twice = labels_of(files_in, tmp_path / "more", {"seed": 0}, {"seed": 0}, {"seed": 1})
    assert twice == ["seed=0 (0)", "seed=0 (1)", "seed=1"]


def test_rows_hold_what_was_written(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", phases={"admm": 2})
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    row = collect(folder).epochs[0]
    assert row.values["admm/primal_residual"] == first["admm/primal_residual"]
    assert row.layers == first["admm/layers"]
    assert "phase" not in row.values
