"""Reading run folders: whole, unfinished, killed, broken, and of an earlier version."""

import json
import math

import pytest

from hodec.errors import CheckpointError
from hodec.experiment.report.collect import collect, collect_sweep
from hodec.plan.layer import KEYS_OF_VERSION_1
from hodec.plan.plan import Plan

from report_edits import edit  # isort: skip


def test_a_whole_run_is_read(finished):
    run = collect(finished)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (run.finished, run.label) == (True, "run")
    assert [len(run.phase(phase)) for phase in ("pretrain", "admm", "retrain")] == [0, 2, 2]
    assert run.plan == Plan.load(finished / "plan.json")
    assert run.network("truncated").test_accuracy_raw == metrics["truncated"]["test_accuracy_raw"]
    assert run.results.status == metrics["admm"]["status"]
    assert run.primal_residual == metrics["admm"]["primal_residual"]
    assert run.reduction("macs") == metrics["reduction"]["macs"] == pytest.approx(run.plan.reduction["macs"])
    assert run.results.conversion.keys() == run.plan.keys()
    assert run.config["data"]["crop_padding"] == 1


def test_rows_hold_what_was_written(finished):
    first = json.loads((finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    row = collect(finished).epochs[0]
    assert row.values["admm/primal_residual"] == first["admm/primal_residual"]
    assert row.layers == first["admm/layers"]
    assert "phase" not in row.values


def test_a_run_of_the_first_version_is_read(folder):
    """hodec 0.1.0 called a phase a stage, and its plans name three fields otherwise."""
    before = collect(folder)
    names = {new: old for old, new in KEYS_OF_VERSION_1.items()}

    def older(plan):
        plan["version"] = 1
        plan["layers"] = {
            name: {names.get(key, key): value for key, value in layer.items()} for name, layer in plan["layers"].items()
        }

    edit(folder / "plan.json", older)
    edit(folder / "metrics.jsonl", lambda rows: [row.update(stage=row.pop("phase")) for row in rows])
    run = collect(folder)
    assert (run.plan, run.epochs) == (before.plan, before.epochs)


def test_numbers_of_the_config_stay_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("admm: {rho: 1e-3}\n", encoding="utf-8")
    assert collect(tmp_path).config == {"admm": {"rho": 0.001}}


def test_reductions_come_from_the_networks_when_they_are_not_recorded(folder):
    recorded = collect(folder).reduction("params")
    edit(folder / "metrics.json", lambda results: results.pop("reduction"))
    assert collect(folder).reduction("params") == pytest.approx(recorded)
    edit(folder / "metrics.json", lambda results: results["dense"].pop("macs"))
    assert collect(folder).reduction("macs") is None


@pytest.mark.parametrize("tail", [b'{"phase": "admm", "epo', b"\x00\x00\x00", '{"phase": "ü'.encode()[:-1]])
def test_what_a_kill_leaves_in_the_last_line_is_ignored(tail, copied, tmp_path):
    folder = copied(tmp_path / "run", leave_out=("metrics.json",))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    run = collect(folder)
    assert (len(run.epochs), run.finished, run.network("dense").test_accuracy) == (4, False, None)


def test_a_broken_line_further_up_is_an_error_with_its_number(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is broken in line 2 .*Delete that line"):
        collect(folder)


def test_an_epoch_done_again_after_a_resume_counts_once(folder):
    edit(folder / "metrics.jsonl", lambda rows: rows.insert(2, {**rows[1], "train/loss": 1.5}))
    epochs = collect(folder).phase("admm")
    assert [row.epoch for row in epochs] == [0, 1]
    assert epochs[1].values["train/loss"] == 1.5


def test_nan_and_null_are_read(folder):
    edit(folder / "metrics.jsonl", lambda rows: rows[0].update({"train/loss": math.nan, "val/loss": None}))
    row = collect(folder).epochs[0]
    assert math.isnan(row.values["train/loss"])
    assert "val/loss" not in row.values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[0].pop("phase"), "in line 1 .*no phase or no epoch"),
        (lambda rows: rows[0].update(epoch=-1), "no phase or no epoch"),
        (lambda rows: rows[0].update(epoch=0.5), "no phase or no epoch"),
        (lambda rows: rows[0].update({"val/loss": "low"}), "in line 1 .*val/loss = 'low' where a number"),
        (lambda rows: rows[0].update({"admm/layers": [1]}), r"\[1\] is given where an object"),
        (lambda rows: rows.insert(0, [1]), r"in line 1 .*\[1\] is given where an object"),
    ],
)
def test_rows_of_the_wrong_shape_are_named(change, said, folder):
    with pytest.raises(CheckpointError, match=said):
        collect(edit(folder / "metrics.jsonl", change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.update(format="other"), "not a hodec plan"),
        (lambda plan: plan.update(version=4), "version 4 is not one of"),
        (lambda plan: plan["layers"]["layer1.0.conv1"].update(ranks=["8"]), "layer1.0.conv1"),
        (lambda plan: plan.pop("totals"), "totals"),
    ],
)
def test_plans_of_the_wrong_shape_are_named(change, said, folder):
    with pytest.raises(CheckpointError, match=rf"plan\.json is broken \(.*{said}.*Restore it"):
        collect(edit(folder / "plan.json", change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.pop("full"), "has no ranks"),
        (lambda one: one.update(rank=99), "has no ranks"),
        (lambda one: one["at"].pop(), "another number of places"),
        (lambda one: one.update(values=3), "3 is given where a list"),
        (lambda one: one["values"].__setitem__(0, "1"), "0 = '1' where a number"),
    ],
)
def test_spectra_of_the_wrong_shape_are_named(change, said, folder):
    with pytest.raises(CheckpointError, match=rf"spectra\.json is broken \(.*{said}.*Delete it"):
        collect(edit(folder / "spectra.json", lambda content: change(content["layer1.0.conv1"][0])))


@pytest.mark.parametrize("name", ["plan.json", "metrics.json"])
def test_files_that_are_cut_off_are_named_with_a_remedy(name, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is broken.*again"):
        collect(folder)


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2\n", "a: \x07"])
def test_a_broken_config_is_named(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.yaml is broken .*again"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "metrics.json", "metrics.jsonl"])
def test_a_folder_in_place_of_a_file_is_an_error(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} (cannot be read|is broken)"):
        collect(tmp_path)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        collect(tmp_path / "none")
    with pytest.raises(CheckpointError, match="so it is no run"):
        collect(tmp_path)
    with pytest.raises(CheckpointError, match="so no runs"):
        collect_sweep(tmp_path)


def test_a_sweep_lists_every_run_in_order_with_what_sets_it_apart(sweep):
    runs = collect_sweep(sweep)
    assert [run.label for run in runs] == [f"admm.rho={rho}" for rho in ("0.001", "0.01", "0.1", "1", "10", "abc")]
    assert [run.folder.name for run in runs] == ["0", "1", "2", "3", "4", "10"]
    assert [run.finished for run in runs] == [True, True, True, False, False, False]
    assert runs[4].problem.startswith("plan.json is broken")
    assert runs[5].problem == "stopped before its config was written"


def test_a_run_that_stopped_before_its_first_epoch_is_listed(copied, tmp_path):
    copied(tmp_path / "0", leave_out=("metrics.json", "metrics.jsonl"))
    assert [run.problem for run in collect_sweep(tmp_path)] == ["stopped before its first epoch ended"]


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        (
            ["- model=resnet32\n", "[]\n"],
            ["model=resnet32", "model=resnet8"],
        ),  # the name of a group left at its default
        (["- tt_ranks=[8,8]\n", "- tt_ranks=[4,4]\n"], ["tt_ranks=[8,8]", "tt_ranks=[4,4]"]),
        (["- seed=0\n", "- seed=0\n"], ["0", "1"]),
        (["- seed=1\n", "- seed=1\n", "- seed=2\n"], ["seed=1 (0)", "seed=1 (1)", "seed=2"]),
        (["- +note=1\n", "[]\n"], ["note=1", "1"]),
    ],
)
def test_labels_are_the_overrides_that_differ(overrides, labels, copied, tmp_path):
    for at, text in enumerate(overrides):
        (copied(tmp_path / str(at)) / ".hydra").mkdir()
        (tmp_path / str(at) / ".hydra" / "overrides.yaml").write_text(text, encoding="utf-8")
    assert [run.label for run in collect_sweep(tmp_path)] == labels
