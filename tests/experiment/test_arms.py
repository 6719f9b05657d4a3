"""hodec compare: arms over the same seeds, each at its best candidate, and what tells them apart."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny

from hodec.cli import main as cli
from hodec.errors import ConfigError, MachineError, TrainingError
from hodec.experiment import pipeline
from hodec.experiment.arms import race as races
from hodec.experiment.arms import table, trial
from hodec.experiment.arms.race import Arm, choose, race
from hodec.experiment.arms.spec import Candidate, Comparison, check_alike, read_comparison
from hodec.experiment.arms.trial import HITS, Trial
from hodec.linalg.svd import naming

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RACES = sorted([*EXPERIMENTS.glob("*/arms.yaml"), *EXPERIMENTS.glob("*/regimes/*.yaml")])
SHORT = {"dense_epochs": 0, "retrain_epochs": 1, "data": {"epoch_batches": 2}}
RATES = (0.01, 0.05)


def candidates(arm: str, **changes: object) -> list[Candidate]:
    return [
        Candidate(arm, (f"optimizer.retrain_lr={rate}",), tiny(**SHORT, optimizer={**changes, "retrain_lr": rate}))
        for rate in RATES
    ]


COMPARISON = Comparison("sgd", (0, 1), {"sgd": candidates("sgd"), "muon": candidates("muon", name="muon")})


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """The folder of a comparison, what came of it, and how often its report was written."""
    root, reports = tmp_path_factory.mktemp("raced"), []

    def report(arms):
        reports.append({name: len(arm.runs) for name, arm in arms.items()})
        table.write_tables(root, COMPARISON, arms)

    return root, race(COMPARISON, root, report=report), reports


def test_each_arm_chooses_by_validation_and_only_the_choice_is_tested(raced):
    root, arms, reports = raced
    for arm in arms.values():
        best = max(arm.tried, key=lambda one: one.validation)
        assert arm.chosen is best.candidate
        assert [run.seed for run in arm.runs] == [0, 1]
        tested = {path.parent for path in root.rglob(HITS)}
        for one in arm.tried:
            assert (root / one.candidate.folder(0) in tested) == (one.candidate is arm.chosen)
    assert reports == [{"sgd": 1, "muon": 0}, {"sgd": 1, "muon": 1}, {"sgd": 2, "muon": 1}, {"sgd": 2, "muon": 2}]


def test_a_run_of_it_is_the_run_that_train_makes(raced, tmp_path):
    run = raced[1]["muon"].runs[1]
    metrics = pipeline.run(run.candidate.seeded(1), tmp_path / "alone")
    for net in ("truncated", "compressed"):
        assert run.test(net) == metrics[net]["test_accuracy"]
    assert run.validation == metrics["compressed"]["validation_accuracy"]
    assert run.reduction == pytest.approx(metrics["reduction"])


def test_finished_runs_are_read(raced, monkeypatch):
    root, arms, _ = raced
    monkeypatch.setattr(trial, "train_nets", lambda run: pytest.fail("a finished run was repeated"))
    monkeypatch.setattr(races, "_data", lambda one: pytest.fail("images were read"))
    again = race(COMPARISON, root, report=lambda arms: None)
    assert table.rows(again) == table.rows(arms)


def test_one_arm_alone(raced):
    assert list(race(COMPARISON, raced[0], only=["muon"], report=lambda arms: None)) == ["muon"]
    with pytest.raises(ConfigError, match="only: 'muo' given; allowed: an arm. Did you mean: muon"):
        race(COMPARISON, raced[0], only=["muo"], report=lambda arms: None)


def test_the_tables_have_every_run(raced):
    root, arms, _ = raced
    rows = list(csv.DictReader((root / "comparison.csv").open()))
    assert len(rows) == 2 * (len(RATES) - 1 + 2)
    assert sum(bool(row["compressed_test_accuracy"]) for row in rows) == 4
    found = json.loads((root / "comparison.json").read_text())
    assert [run["arm"] for run in found["runs"]] == [row["arm"] for row in rows]
    assert list(found["differences"]) == ["muon"]
    text = (root / "comparison.md").read_text()
    chosen = arms["muon"].chosen.chosen[0].partition("=")[2]
    assert f"| muon | retrain_lr {chosen} |" in text
    assert "seeds 0, 1" in text
    assert (root / "comparison.tex").read_text().count(r"\\") == 3


def known(arm: str, validation: float, seed: int = 0, right: str = "") -> Trial:
    """A trial that has right the images marked by 1."""
    hits = torch.tensor([sign == "1" for sign in right])
    named = {"truncated": hits, "compressed": hits} if right else {}
    return Trial(Candidate(arm, (f"lr={validation}",), tiny()), seed, validation, 1.0, {}, named)


def test_a_candidate_that_broke_down_is_not_chosen():
    broken, sound = known("a", math.nan), known("a", 0.3)
    arm = choose("a", [broken, sound])
    assert arm.chosen is sound.candidate
    assert "nan broke down / 0.3 30.00" in table.cells(Comparison("a", (0,), {}), {"a": arm})[0]
    with pytest.raises(TrainingError, match="arm 'a' broke down with each of its candidates; the first: NaN in layer1"):
        choose("a", [replace(broken, error="NaN in layer1")])


def test_a_seed_that_broke_down_is_in_the_table():
    runs = (known("a", 0.3, 0, "1100"), known("a", math.nan, 1), known("a", 0.3, 2, "1110"))
    row = table.cells(Comparison("b", (0, 1, 2), {}), {"a": Arm([], runs[0].candidate, runs)})[0]
    named = dict(zip(table.HEADS, row, strict=True))
    assert named["by seed, %"] == "50.00 / broke down / 75.00"
    assert named["end, %"] == "62.50 ± 17.68 (2 of 3)"


def test_training_that_breaks_down_is_a_result(tmp_path):
    wild = Candidate("wild", (), tiny(**SHORT, optimizer={"lr": 1e30, "retrain_lr": 1e30}))
    found = trial.run_trial(wild, 0, tmp_path, lambda: races._data(wild), test=True)
    assert math.isnan(found.validation)
    assert "the loss is nan" in found.error
    assert not found.hits
    again = trial.run_trial(wild, 0, tmp_path, lambda: pytest.fail("it was repeated"), test=True)
    assert math.isnan(again.validation)


def test_what_the_machine_lacks_is_no_result(tmp_path, monkeypatch):
    def lacking(run):
        with naming("conv1"):
            raise MemoryError("no room")

    monkeypatch.setattr(trial, "train_nets", lacking)
    one = candidates("a")[0]
    with pytest.raises(MachineError, match="conv1: too little memory to factorize it"):
        trial.run_trial(one, 0, tmp_path, lambda: races._data(one))
    assert not list(tmp_path.rglob(trial.RESULT))


def test_the_paired_interval_is_students():
    found = table.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees, table
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert table.paired([1.0], [2.0]) is None
    assert table.paired([2.0, 3.0], [1.0, 2.0]) is None


def test_differences_are_of_the_same_seeds():
    base = Arm([], known("base", 0).candidate, (known("base", 0, 0, "1100"), known("base", 0, 1, "1000")))
    arm = Arm([], known("arm", 0).candidate, (known("arm", 0, 1, "1110"), known("arm", 0, 0, "1110")))
    assert table.over_seeds(arm, base).mean == pytest.approx((0.25 + 0.5) / 2)
    over = table.over_images(arm, base)
    assert over.mean == pytest.approx((0.25 + 0.5) / 2)
    apart = torch.tensor([0, 0.5, 1, 0])  # of each image, over the seeds
    assert over.high - over.mean == pytest.approx(3.182446 * float(apart.std()) / 2, rel=1e-5)
    lone = Arm([], arm.chosen, (known("arm", 0, 2, "1110"),))
    assert table.over_seeds(lone, base) is None
    assert table.over_images(lone, base) is None


def test_a_choice_at_the_end_of_its_range_is_said():
    tried = [known("a", score) for score in (0.1, 0.2, 0.3)]
    arm = choose("a", tried)
    assert "at the end of its range, and a better one may lie beyond: a." in table.note(
        Comparison("a", (0,), {}), {"a": arm}
    )
    assert not table.at_edge(choose("a", [tried[0], tried[2], tried[1]]))


FILE = """
settings: [data=fake, tt_ranks=4, admm=off, dense_epochs=0, retrain_epochs=2]
seeds: [3, 5]
base: sgd
arms:
  sgd: ["optimizer.retrain_lr=0.01,0.02"]
  projected: [admm=project, dense_epochs=2, retrain_epochs=0]
"""


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "arms.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "arms.yaml"


def test_a_file_is_read_as_hydra_reads_a_sweep(tmp_path):
    found = read_comparison(written(tmp_path, FILE), ["tt_ranks=3"])
    assert (found.base, found.seeds) == ("sgd", (3, 5))
    sgd, projected = found.arms["sgd"], found.arms["projected"]
    assert [one.chosen for one in sgd] == [("optimizer.retrain_lr=0.01",), ("optimizer.retrain_lr=0.02",)]
    assert [one.config.optimizer.retrain_lr for one in sgd] == [0.01, 0.02]
    assert [one.folder(5) for one in sgd][1] == Path("sgd/optimizer.retrain_lr-0.02_seed-5")
    assert [(one.config.admm.name, one.config.tt_ranks, one.config.seed) for one in projected] == [("project", 3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("path", RACES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_comparisons_of_the_experiments_are_read(path):
    """Slow: each candidate of each arm is composed."""
    found = read_comparison(path, ["data.root=images", "init=net.safetensors"])
    assert found.base in found.arms
    assert len(found.seeds) >= 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("base: sgd", "base: sgdd", "base: 'sgdd' given; allowed: an arm. Did you mean: sgd"),
        ("seeds: [3, 5]", "seeds: 3", "seeds: 3 given; allowed: a list of whole numbers from 0"),
        ("seeds: [3, 5]", "seeds: [3, 5, 5]", "seeds: [3, 5, 5] given; allowed: each once, as equal seeds make equal"),
        ("base: sgd\n", "", "is no comparison: it has to have settings, seeds, base, arms, and nothing else"),
        ("[data=fake", "[seed=1, data=fake", "seed: given in a comparison, which has seeds and folders of its own"),
        ('["optimizer', '[data, "optimizer', "arms: allowed: NAME: [SETTING=VALUE, ..] for each"),
        ("retrain_lr=0.01", "retrian_lr=0.01", "arm 'sgd': optimizer.retrian_lr: no such setting"),
        ("retrain_lr=0.01,0.02", "retrain_lr=0.01,fast", "'fast' given; allowed: null or auto or a number above 0"),
        ("tt_ranks=4", '"tt_ranks=[4"', "tt_ranks=[4: [ and ] do not match"),
        ("=0.01,0.02", "=interval(0.01,0.02)", "an interval given|an interval needs a sweeper"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said_before_work_starts(tmp_path, old, new, words):
    assert old in FILE
    with pytest.raises(ConfigError) as raised:
        read_comparison(written(tmp_path, FILE.replace(old, new, 1)))
    assert any(one in str(raised.value) for one in words.split("|"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dense_epochs": 1}, "is 1 in arm 'sgd' and 2 in arm 'other'; allowed: the same number of steps"),
        ({"data": {"batch_size": 8}}, "the arms 'sgd' and 'other' differ in data; allowed: one data"),
        ({"trainer": {"num_nodes": 2}}, "trainer.num_nodes: 2 given; allowed in a comparison: 1"),
        ({"trainer": {"devices": 2}}, "trainer.devices: 2 given; allowed in a comparison: 1"),
        ({"init": "net.pt"}, "the arms 'sgd' and 'other' differ in init; allowed: one init"),
    ],
)
def test_arms_differ_in_nothing_but_how_they_train(changed, words):
    other = Candidate("other", (), tiny(**SHORT | changed))
    with pytest.raises(ConfigError, match=words):
        check_alike(Path("arms.yaml"), {"sgd": COMPARISON.arms["sgd"], "other": [other]})


def test_the_verb_ends_with_the_table(raced, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hodec.experiment.arms.spec.read_comparison", lambda path, settings: COMPARISON)
    assert cli.main(["compare", "arms.yaml", "seed=0", "-o", str(raced[0]), "--only", "sgd", "--only", "muon"]) == 0
    assert capsys.readouterr().out.startswith("| arm | chosen | tried, validation % |")
    monkeypatch.undo()
    assert cli.main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml is not readable as YAML" in capsys.readouterr().err


def test_the_verb_speaks_of_its_own_settings(raced, monkeypatch, capsys):
    other = Comparison("sgd", (0,), {"sgd": candidates("sgd", momentum=0.5)})
    monkeypatch.setattr("hodec.experiment.arms.spec.read_comparison", lambda path, settings: other)
    assert cli.main(["compare", "arms.yaml", "-o", str(raced[0])]) == 2
    told = capsys.readouterr().err
    assert "holds a run with other settings (they differ in optimizer.momentum)" in told
    assert "or another folder: -o FOLDER" in told
