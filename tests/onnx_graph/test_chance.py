"""What a loss on some samples says of others."""

import numpy as np
import pytest
from scipy import stats

from hodec.errors import ConfigError
from hodec.onnx_graph import answers, chance
from hodec.onnx_graph.chance import differing, loss_of, needed, recorded
from hodec.onnx_graph.judge import Judge, judge_of

from test_onnx_judge import held  # isort: skip


def file_of(answers):
    """A file that answers call k with ``answers[k]``."""
    return lambda feeds: [np.atleast_1d(answers[int(feeds["k"][0])])]


def mean_of(calls):
    """The mean over calls of what a file answers."""

    def score(run):
        return float(np.mean([np.mean(run({"k": np.array([k])})[0]) for k in range(calls)]))

    return score


def mean_of_rows(samples):
    """The mean of what a file answers to one call of so many samples."""
    return lambda run: float(run({"x": np.zeros((samples, 1))})[0].mean())


def loss(dense, other, *, allowed=1.0, confidence=0.9, score=None):
    score = score or mean_of(len(dense))
    number, wanted = recorded(score, file_of(dense))
    return loss_of(score, file_of(other), number, wanted, allowed=allowed, confidence=confidence)


def test_of_a_mean_over_samples_it_is_the_paired_interval():
    rng = np.random.default_rng(0)
    dense, other = rng.random(chance.PARTS), rng.random(chance.PARTS)
    found = loss(dense, other)
    test = stats.ttest_rel(dense, other)
    wanted = test.confidence_interval(0.8).high  # both sides: 0.9 on one
    assert found.lost == pytest.approx((dense - other).mean())
    assert found.most == pytest.approx(wanted)
    assert found.samples == chance.PARTS


def test_samples_of_one_call_are_exchanged_one_by_one():
    rng = np.random.default_rng(1)
    dense, other = rng.random((2, 24))

    def score(run):
        return float(run({"x": np.zeros((24, 3))})[0].mean())

    number, wanted = recorded(score, lambda feeds: [dense])
    together = loss_of(score, lambda feeds: [other], number, wanted, allowed=1.0, confidence=0.9)
    alone = loss(dense, other)
    assert together.samples == 24
    assert together.most == pytest.approx(alone.most)


def test_the_bound_holds_as_often_as_it_says():
    """A file that answers 5 % of inputs worse and 3 % better: 2 points are lost of all inputs."""
    rng, held_up, score = np.random.default_rng(2), 0, mean_of_rows(400)
    for _ in range(200):
        change = rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.92, 0.03], size=400)
        dense = np.where(change, change < 0, rng.random(400) < 0.8).astype(float)
        number, wanted = recorded(score, lambda feeds, dense=dense: [dense])
        other = lambda feeds, found=dense + change: [found]  # noqa: E731
        held_up += loss_of(score, other, number, wanted, allowed=1.0, confidence=0.9).most >= 0.02
    assert 0.83 <= held_up / 200 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "shares"), [
    (300, {0.01: 0.61, 0.02: 0.31, 0.04: 0.20}),
    (600, {0.01: 0.76, 0.02: 0.59, 0.04: 0.36}),
    (1000, {0.01: 0.91, 0.02: 0.68, 0.04: 0.45}),
    (2000, {0.01: 1.0, 0.02: 0.92, 0.04: 0.70}),
])  # fmt: skip
def test_how_many_samples_it_takes(samples, shares):
    """The table of docs/files.md: how often a file that loses nothing is accepted where 0.01 may be lost."""
    rng = np.random.default_rng(0)
    for differing_share, wanted in shares.items():
        accepted = 0
        for _ in range(400):
            change = rng.choice([-1.0, 0.0, 1.0], p=[differing_share / 2, 1 - differing_share, differing_share / 2],
                                size=samples)  # fmt: skip
            number, kept = recorded(mean_of_rows(samples), lambda feeds: [np.zeros(samples)])
            other = lambda feeds, one=change: [one]  # noqa: E731
            found = loss_of(mean_of_rows(samples), other, number, kept, allowed=0.01, confidence=0.95)
            accepted += found.most is not None and found.most <= 0.01
        assert accepted / 400 == pytest.approx(wanted, abs=0.09)  # three deviations of a share of 400


def test_a_score_that_is_no_mean_has_a_bound_too():
    """F1, of files whose answers are counts: of the size that resampling pairs of samples gives."""
    rng = np.random.default_rng(3)
    truth = rng.integers(1, 9, 160)
    dense, other = (np.minimum(truth, rng.binomial(truth, p)) for p in (0.95, 0.93))

    def of(found, at):
        return 2 * found[at].sum() / (found[at].sum() + truth[at].sum())

    def score(run):
        found = np.array([int(run({"k": np.array([k])})[0][0]) for k in range(160)])
        return float(of(found, slice(None)))

    draws = [rng.integers(160, size=160) for _ in range(2000)]
    wanted = np.quantile([of(dense, at) - of(other, at) for at in draws], 0.9)
    found = loss(dense, other, score=score)
    assert found.most == pytest.approx(wanted, rel=0.35)
    assert found.most > found.lost


def test_answers_in_another_number_are_no_pairs():
    calls = iter([4, 5])

    def score(run):
        return float(np.mean([run({"k": np.array([k % 4])})[0] for k in range(next(calls))]))

    found = loss(np.ones(4), np.ones(4), score=score)
    assert found.most is None


def test_answers_too_large_for_memory_are_kept_on_the_disk(monkeypatch):
    rng = np.random.default_rng(0)
    dense, other = rng.random(40), rng.random(40)
    wanted = loss(dense, other, allowed=1.0)
    monkeypatch.setattr(answers, "MEMORY", 8 * 20)
    assert loss(dense, other, allowed=1.0) == wanted
    assert wanted.most is not None


@pytest.mark.parametrize("memory", [0, 2**20])
def test_answers_come_back_as_they_were(monkeypatch, memory):
    monkeypatch.setattr(answers, "MEMORY", memory)
    kept = answers.Answers()
    given = [
        [np.arange(6, dtype=np.float16).reshape(2, 3), np.array(3)],
        [np.zeros((0, 4), np.float32), np.array(["a", None], object)],
        [np.arange(12.0).reshape(3, 4).T],
    ]
    for each in given:
        kept.append(each)
    kept[0][0][:] = -1  # a score may work in what it is given
    for found, wanted in zip(kept, given, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_answers_without_room_are_no_pairs(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers.Answers, "append", full)
    assert loss(np.ones(4), np.ones(4)).most is None


def test_nothing_more_is_asked_of_a_file_that_loses_too_much():
    found = loss(np.ones(40), np.zeros(40), allowed=0.5)
    assert (found.lost, found.most) == (1.0, None)


def test_samples_without_a_difference_show_how_few_others_can_have_one():
    assert loss(np.ones(40), np.ones(40)).is_even
    assert differing(230, 0.9) <= 0.01 < differing(228, 0.9)
    assert needed(0.01, 0.9) == 230
    assert (1 - differing(12, 0.9)) ** 12 == pytest.approx(0.1)


@pytest.mark.parametrize("together", [False, True])
def test_a_part_that_loses_one_sample_and_wins_another_is_a_difference(together):
    dense, other = np.zeros((2, 160))
    for first in range(0, 160, 10):  # the first two of each part
        dense[first] = other[first + 1] = 1
    found = loss(dense, other)
    if together:
        number, wanted = recorded(mean_of_rows(160), lambda feeds: [dense])
        found = loss_of(mean_of_rows(160), lambda feeds: [other], number, wanted, allowed=1.0, confidence=0.9)
    assert found.lost == 0
    assert not found.is_even
    deviation = np.std(dense - other, ddof=1) / 160**0.5
    assert 0.5 * deviation < found.most / stats.t.ppf(0.9, 15) < 2 * deviation


def judge(dense, allowed):
    score = mean_of(len(dense))
    return Judge("of a test", score, *[recorded(score, file_of(dense))[0], allowed],
                 answers=recorded(score, file_of(dense))[1])  # fmt: skip


def test_a_judge_is_sure_where_the_bound_is_allowed():
    dense = np.ones(400)
    one = judge(dense, 0.01)
    few, many = (np.where(np.arange(400) < n, 0.0, 1.0) for n in (1, 4))  # wrong answers
    assert one.is_sure(one.loss(file_of(few)))
    four = one.loss(file_of(many))
    assert four.lost == pytest.approx(0.01)  # all that may be lost, so that others lose more as often as not
    assert not one.is_sure(four)
    assert one.sure(file_of(many)) == pytest.approx(one.dense - four.most)


def test_where_chance_cannot_be_told_a_part_is_left():
    one = Judge("of a test", lambda run: 0.0, 1.0, 0.1)
    for score, sure in ((0.93, True), (0.91, False)):
        found = Judge("of a test", lambda run, score=score: score, 1.0, 0.1).loss(lambda feeds: [])
        assert found.most is None
        assert one.is_sure(found) == sure


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_a_confidence_that_is_none(confidence):
    with pytest.raises(ConfigError, match="allowed: 0.5 to below 1"):
        judge_of(lambda feeds: [np.eye(4, dtype=np.float32)[:1]], held(), ["y"], confidence=confidence)


def test_what_is_said_of_other_inputs():
    one = judge(np.ones(100), 0.01)
    (said,) = one.chance(one.loss(file_of(np.ones(100))))
    assert said == (
        "none of 100 samples scores otherwise than dense, so at most 3.0% of inputs like them do (95% confidence): "
        "299 such samples would show that no more than 0.01 do"
    )
    worse = np.ones(100)
    worse[3] = 0.5
    (said,) = one.chance(one.loss(file_of(worse)))
    assert said.startswith("loss: 0.005 on 100 samples, at most 0.0")
    assert said.endswith("on inputs like them (95% confidence); 0.01 may be lost")
    assert one.chance(one.loss(file_of(np.zeros(100)))) == ()
