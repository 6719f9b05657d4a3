"""The score table: reused for the same weights, net, input and evaluation, and for nothing else."""

import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from small_nets import IMAGE, SmallResNet
from torch import Tensor, nn

from hodec.errors import CheckpointError, ConfigError
from hodec.ranks.greedy.table import ScoreTable, identity, net_of

X = torch.randn(IMAGE)
DENSE = net_of({})
ABOUT = {"weights": "1", "structure": "2", "inputs": "3", "evaluation": "4"}


def accuracy(model: nn.Module, data: Tensor | None = None) -> float:
    return 1.0


def loss(model: nn.Module) -> float:
    return 0.0


def seeded() -> nn.Module:
    torch.manual_seed(3)
    return SmallResNet()


def differing(model: nn.Module, x: Tensor = X, evaluate: object = accuracy, key: str = "") -> set[str]:
    """The parts in which the identity differs from that of the plain one."""
    plain, other = identity(seeded(), X, accuracy), identity(model, x, evaluate, key)
    return {part for part in plain if plain[part] != other[part]}


# -- identity ------------------------------------------------------------------------------------------------------


def test_the_same_net_has_the_same_identity_whatever_its_mode_and_the_numbers_in_the_input():
    assert differing(seeded().eval()) == set()
    assert differing(seeded(), X + 1) == set()


def test_defect_f_weights_and_buffers_count_to_the_last_bit():
    model = seeded()
    with torch.no_grad():
        model.fc.bias[0] = torch.nextafter(model.fc.bias[0], torch.tensor(9.0))
    assert differing(model) == {"weights"}
    model = seeded()
    model.bn1.running_mean += 1
    assert differing(model) == {"weights"}
    assert differing(seeded().double()) == {"weights"}
    assert differing(seeded().bfloat16()) == {"weights"}


def test_defect_f_structure_input_and_evaluation_count():
    model = seeded()
    model.layer1["conv1"].stride = (1, 1)
    assert differing(model) == {"structure"}
    model = seeded()
    model.dropout = nn.Identity()
    assert differing(model) == {"structure"}
    assert differing(seeded(), X[:, :, :8]) == {"inputs"}
    assert differing(seeded(), evaluate=loss) == {"evaluation"}
    assert differing(seeded(), key="val-5000") == {"evaluation"}
    assert differing(seeded(), evaluate=functools.partial(accuracy, data=X)) == set()


def test_models_without_numbers_have_an_identity():
    assert identity(nn.ReLU(), X, accuracy)["weights"]


# -- the file ------------------------------------------------------------------------------------------------------


def test_every_score_is_in_the_file_at_once(tmp_path: Path):
    path = tmp_path / "new" / "scores.json"
    table = ScoreTable(path, ABOUT)
    assert path.exists()
    for net, score in ((DENSE, 0.9), ("conv1: svd 6 x 12 ranks 3 merged", 0.5)):
        table.put(net, score)
        assert ScoreTable(path, ABOUT).get(net) == score
    assert ScoreTable(path, ABOUT).scores == table.scores
    saved = json.loads(path.read_text())["tables"][table.key]
    assert saved == {"about": ABOUT, "scores": {"dense": 0.9, "conv1: svd 6 x 12 ranks 3 merged": 0.5}}


def test_two_processes_keep_each_others_scores(tmp_path: Path):
    path, other_about = tmp_path / "scores.json", ABOUT | {"weights": "changed"}
    ScoreTable(path, ABOUT)
    mine, same, other = ScoreTable(path, ABOUT), ScoreTable(path, ABOUT), ScoreTable(path, other_about)
    mine.put("a", 0.1)
    same.put("b", 0.2)
    other.put("c", 0.3)
    mine.put("d", 0.4)
    assert ScoreTable(path, ABOUT).scores == {"a": 0.1, "b": 0.2, "d": 0.4}
    assert ScoreTable(path, other_about).scores == {"c": 0.3}
    assert mine.get("b") == 0.2


def test_a_file_that_is_damaged_meanwhile_does_not_end_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    table = ScoreTable(tmp_path / "scores.json", ABOUT)
    (tmp_path / "scores.json").write_text("[]")
    table.put(DENSE, 0.9)
    assert table.get(DENSE) == 0.9
    assert "score not saved" in caplog.text


def test_without_a_path_scores_stay_in_memory():
    table = ScoreTable(None, ABOUT)
    table.put(DENSE, 0.25)
    assert table.get(DENSE) == 0.25


def test_defect_f_scores_of_something_else_are_not_used_but_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "scores.json"
    ScoreTable(path, ABOUT).put(DENSE, 0.9)
    with caplog.at_level(logging.WARNING):
        other = ScoreTable(path, ABOUT | {"weights": "changed", "inputs": "changed"})
    assert "weights and inputs differ from the last ones there" in caplog.text
    assert other.get(DENSE) is None
    other.put(DENSE, 0.1)
    assert ScoreTable(path, ABOUT).get(DENSE) == 0.9
    assert ScoreTable(path, other.about).get(DENSE) == 0.1


HEAD = '{"format": "hodec-scores", "version": 2, "tables": '
DAMAGED = {
    "empty": ("", "not readable JSON.*truncated"),
    "cut": ('{"format": "hodec-sc', "not readable JSON.*truncated"),
    "list": ("[]", "is not a score table"),
    "plan": ('{"format": "hodec-plan"}', "is not a score table"),
    "of 0.1.0": ('{"format": "hodec-greedy-scores", "version": 1, "tables": {}}', "version 1, not 2.* 0.1.0 reads"),
    "version": ('{"format": "hodec-scores", "version": 9, "tables": {}}', "version 9, not 2"),
    "no_tables": ('{"format": "hodec-scores", "version": 2}', "is damaged: it has no tables"),
    "no_table": (HEAD + '{"KEY": 3}}', "is damaged: it has no tables"),
    "scores": (HEAD + '{"KEY": {}}}', "is damaged: it has no scores"),
    "text": (HEAD + '{"KEY": {"scores": {"dense": "1"}}}}', "is damaged: dense has score '1'"),
    "nan": (HEAD + '{"KEY": {"scores": {"dense": NaN}}}}', "is damaged: dense has score nan"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_and_left_as_they_are(tmp_path: Path, case: str):
    text, message = DAMAGED[case]
    path = tmp_path / "scores.json"
    text = text.replace("KEY", ScoreTable(None, ABOUT).key)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ScoreTable(path, ABOUT)
    assert path.read_text() == text


def test_a_path_that_cannot_be_written_is_refused_before_any_evaluation(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"table=.* cannot be written"):
        ScoreTable(tmp_path / "file" / "scores.json", ABOUT)


def test_a_full_disk_costs_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    table = ScoreTable(tmp_path / "scores.json", ABOUT)
    table.put(DENSE, 0.5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hodec.ranks.greedy.table.write_json", full)
    table.put("fc: svd", 0.25)
    assert table.get("fc: svd") == 0.25
    assert "score not saved" in caplog.text
    assert ScoreTable(None, ABOUT).key in json.loads((tmp_path / "scores.json").read_text())["tables"]
