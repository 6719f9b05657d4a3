"""How files are judged: agreement of outputs, and what may be lost of a score."""

import numpy as np
import pytest

from hodec.calibration.data import InputSpec, load_samples
from hodec.errors import ConfigError
from hodec.onnx_graph.judge import AGREEMENTS, allowed_drop, judge_of, softened, squared_errors


def scores(tokens, classes=5):
    """One sequence (1, steps, classes) that reads as these tokens."""
    return np.eye(classes, dtype=np.float32)[np.array(tokens)][None]


def held(n=8):
    return load_samples({"x": np.zeros((n, 3), np.float32)}, [InputSpec("x", np.dtype("float32"), (1, 3))])


def test_a_drop_is_a_number_or_a_share():
    assert allowed_drop(0.01, 96.0) == 0.01
    assert allowed_drop("0.5%", 96.0) == pytest.approx(0.48)
    assert allowed_drop("1%", -2.0) == pytest.approx(0.02)
    with pytest.raises(ConfigError):
        allowed_drop("nan", 1.0)


@pytest.mark.parametrize(("read", "agreement"), [
    ([0, 1, 0, 0, 2, 0], 1.0),
    ([0, 0, 1, 0, 0, 2], 1.0),  # the same text a step later
    ([0, 1, 1, 0, 2, 0], 1.0),  # a token that lasts two steps
    ([0, 1, 0, 0, 3, 0], 0.5),
    ([0, 1, 0, 1, 2, 0], 0.5),  # one too many
    ([0, 0, 0, 0, 0, 0], 0.0),
])  # fmt: skip
def test_tokens_are_compared_as_they_are_read(read, agreement):
    assert AGREEMENTS["tokens"]([[scores(read)]], [[scores([0, 1, 0, 0, 2, 0])]]) == pytest.approx(agreement)


def test_tokens_without_a_blank_are_compared_step_by_step():
    wanted = [1, 2, 2, 3, 4, 1]
    assert AGREEMENTS["tokens"]([[scores([1, 2, 3, 3, 4, 1])]], [[scores(wanted)]]) == pytest.approx(5 / 6)


def test_errors_are_relative_to_what_varies():
    wanted = [np.array([[101.0, 99.0]]), np.array([[100.0, 100.0]])]
    found = [one + 1.0 for one in wanted]
    (error,) = squared_errors([[one] for one in found], [[one] for one in wanted])
    assert error == pytest.approx(4 / 2)
    assert squared_errors([[wanted[0][:, :1]]], [[wanted[0]]]) == [float("inf")]


@pytest.mark.parametrize(("output", "loss", "words"), [
    (np.eye(4, dtype=np.float32)[:1], None, "top-1 agrees with"),
    (scores([0, 1, 0]), None, "tokens agree with"),
    (3 * scores([0, 1, 0]), None, "outputs are as near"),  # not probabilities: perhaps no scores at all
    (3 * scores([0, 1, 0]), "tokens", "tokens agree with"),
    (np.ones((1, 1), np.float32) * 0.3, None, "outputs are as near"),
    (np.eye(4, dtype=np.float32)[:1], "error", "outputs are as near"),
])  # fmt: skip
def test_outputs_are_compared_as_what_they_look_like(output, loss, words):
    judge = judge_of(lambda feeds: [output], held(), ["y"], loss=loss)
    assert judge.words.startswith(words)
    assert judge.score(lambda feeds: [output]) == 1.0
    assert judge.allowed == pytest.approx(0.05 if "near" in words else 0.01)


def test_a_judge_accepts_what_is_allowed_and_no_number_that_is_none():
    judge = judge_of(lambda feeds: [np.eye(4, dtype=np.float32)[:1]], held(), ["y"], max_drop=0.25)
    assert judge.accepts(0.75)
    assert not judge.accepts(0.74)
    assert not judge.accepts(float("nan"))


def outputs_of(rng, n, wrong):
    """Top-1 scores of n calls, and the same with every ``wrong``-th class another."""
    dense = rng.standard_normal((n, 1, 4)).astype(np.float32)
    worse = dense.copy()
    worse[::wrong] = -dense[::wrong]
    return dense, worse


@pytest.mark.parametrize("settings", [
    {"loss": "top1"}, {"loss": "error", "max_drop": "60%"}, {"loss": "tokens"},
    {"labels": np.arange(20) % 4}, {"evaluate": lambda run: 1.0},
], ids=["top1", "error", "tokens", "labels", "evaluate"])  # fmt: skip
@pytest.mark.parametrize("wrong", [1, 3, 20])
def test_a_file_that_has_lost_stops_early_and_no_other(settings, wrong):
    """What is accepted is judged as by a run on all calls, to the last bit."""
    dense, worse = outputs_of(np.random.default_rng(0), 20, wrong)
    if settings.get("loss") == "tokens":
        dense, worse = dense[:, None], worse[:, None]
    labels = settings.get("labels")
    data = load_samples({"k": np.arange(20.0)}, [InputSpec("k", np.dtype("float32"), (1,))], labels=labels)
    runs = []

    def file_of(outputs):
        return lambda feeds: runs.append(1) or [outputs[int(feeds["k"][0])]]

    for allowed in (0.0, 0.04, 0.3, 0.9):
        asked = {key: one for key, one in settings.items() if key != "labels"}
        judge = judge_of(file_of(dense), data, ["y"], **{**asked, "max_drop": allowed})
        whole = judge.loss(file_of(worse))
        runs.clear()
        found = judge.trial_loss(file_of(worse))
        assert judge.accepts(found.score) == judge.accepts(whole.score)
        assert judge.is_sure(found) == judge.is_sure(whole)
        assert found.score >= whole.score
        if found.is_whole:
            assert found == whole
        else:
            assert len(runs) in (5, 10, 15)
            assert not judge.is_sure(found)


def test_a_file_that_loses_all_runs_a_quarter_of_the_calls():
    dense, worse = outputs_of(np.random.default_rng(0), 8, 1)
    judge = judge_of(lambda feeds: [dense[0]], held(), ["y"], loss="top1", max_drop=0.2)
    runs = []
    found = judge.trial_loss(lambda feeds: runs.append(1) or [worse[0]])
    assert len(runs) == 2
    assert (found.score, found.is_whole) == (0.75, False)


def test_probabilities_count_by_their_logarithms():
    sure = np.array([[0.999, 0.001]])
    assert softened([sure])[0].max() < 0
    plain = np.array([[3.0, -1.0]])
    np.testing.assert_array_equal(softened([plain])[0], plain)


def test_a_score_of_ones_own_is_computed_twice_on_the_dense_file():
    runs = []

    def dense(feeds):
        runs.append(feeds)
        return [np.ones((1, 2), np.float32)]

    judge = judge_of(dense, held(), ["y"], evaluate=lambda run: float(run({"x": np.zeros((1, 3))})["y"].sum()))
    assert len(runs) == len(held()) + 2  # each held-out call once, and the score once more to be sure of it
    assert judge.answers is not None
    assert [one[0].sum() for one in judge.answers.outputs] == [2.0]
