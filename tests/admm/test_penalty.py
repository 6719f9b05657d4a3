"""rho and the pull are two names of one choice; every form of the setting gives the rho it says."""

import math
from dataclasses import fields

import pytest

from hodec.admm.options import MODES, AdmmOff, AdmmOptions, AdmmPaper, AdmmSettings
from hodec.admm.penalty import Moment, StepSize, make_penalty
from hodec.admm.updates import Residuals
from hodec.errors import ConfigError, PlanError, Use
from hodec.options import settings_of

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"]
SIZE = StepSize(lr=0.1, momentum=0.9, steps=100)


def ask(penalty, layer="conv1", *, epoch=0, size=SIZE, current=0.0, residuals=None):
    return penalty.rho(Moment(layer, epoch, size, current, residuals))


def residuals(primal, dual):
    return Residuals(gap=primal**2, weight=1.0, move=dual**2, dual_scale=1.0)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("pull", [0.01, 0.3, 0.8, 0.999])
@pytest.mark.parametrize(("lr", "momentum", "steps"), [(0.1, 0.9, 390), (1e-4, 0.0, 7), (0.5, 0.5, 1)])
def test_rho_of_a_pull_has_that_pull(lr, momentum, steps, pull, decoupled):
    size = StepSize(lr, momentum, steps, decoupled)
    assert size.pull(size.rho(pull)) == pytest.approx(pull, rel=1e-9)


def test_the_pull_is_what_repeated_steps_cover():
    """Without momentum the weight covers 1 - (1 - rho lr)^steps of its way."""
    size = StepSize(lr=0.01, momentum=0.0, steps=200)
    assert 1 - (1 - size.lr * size.rho(0.8)) ** 200 == pytest.approx(0.8, abs=0.005)
    exact = StepSize(lr=0.01, momentum=0.0, steps=200, decoupled=True)
    assert 1 - (1 - exact.lr * exact.rho(0.8)) ** 200 == pytest.approx(0.8, rel=1e-9)


def test_the_papers_constant_pulls_weakly():
    """rho = 1e-3 at lr 0.01, 196 steps: a fifth of the way, as measured."""
    assert StepSize(lr=0.01, momentum=0.9, steps=196).pull(1e-3) == pytest.approx(0.0194, rel=0.01)
    assert StepSize(lr=0.1, momentum=0.9, steps=196).pull(1e-3) == pytest.approx(0.178, rel=0.01)


def test_a_decoupled_pull_is_never_more_than_all():
    assert StepSize(lr=1.0, momentum=0.0, steps=3, decoupled=True).pull(50.0) == 1.0


def test_auto_holds_rho_times_lr():
    penalty = make_penalty("auto", pull=0.8, layers=LAYERS)
    rhos = {lr: ask(penalty, size=StepSize(lr, 0.9, 100)) for lr in (0.1, 0.01, 1e-5)}
    assert {round(lr * rho, 12) for lr, rho in rhos.items()} == {round(-math.log(0.2) * 0.1 / 100, 12)}


def test_auto_keeps_its_rho_where_nothing_moves():
    penalty = make_penalty("auto", pull=0.8, layers=LAYERS)
    still = StepSize(lr=0.0, momentum=0.9, steps=100)
    assert ask(penalty, size=still, current=0.7) == 0.7
    assert ask(penalty, size=still) == 0.0


def test_a_number_is_constant():
    penalty = make_penalty(1e-3, pull=0.8, layers=LAYERS)
    for epoch in (0, 50):
        assert ask(penalty, "fc", epoch=epoch, current=9.0, residuals=residuals(1, 1e-3)) == 1e-3


def test_a_schedule_holds_from_its_epochs_on():
    penalty = make_penalty({10: 1e-2, 0: 1e-3}, pull=0.8, layers=LAYERS)
    assert [ask(penalty, epoch=epoch) for epoch in (0, 9, 10, 11)] == [1e-3, 1e-3, 1e-2, 1e-2]


def test_the_last_glob_that_matches_counts():
    penalty = make_penalty({"*": 1.0, "layer1.*": 2.0, "layer1.0.conv2": 3.0}, pull=0.8, layers=LAYERS)
    assert {layer: ask(penalty, layer) for layer in LAYERS} == {
        "conv1": 1.0, "layer1.0.conv1": 2.0, "layer1.0.conv2": 3.0, "fc": 1.0,
    }  # fmt: skip


def test_layers_named_by_numbers_are_layers():
    """nn.Sequential calls its layers '0', '2', ..: as text they are no epochs."""
    penalty = make_penalty({"0": 1.0, "2": 2.0}, pull=0.8, layers=["0", "2"])
    assert ask(penalty, "2", epoch=0) == 2.0


def test_balanced_starts_at_the_pull_and_follows_the_residuals():
    penalty = make_penalty("balanced", pull=0.5, layers=LAYERS)
    first = ask(penalty)
    assert SIZE.pull(first) == pytest.approx(0.5)
    assert ask(penalty, current=0.3) == 0.3
    assert ask(penalty, current=0.3, residuals=residuals(0.5, 0.01)) == 0.6
    assert ask(penalty, current=0.3, residuals=residuals(0.01, 0.5)) == 0.15
    assert ask(penalty, current=0.3, residuals=residuals(0.1, 0.05)) == 0.3


def test_balanced_keeps_its_pull_through_a_warm_up():
    penalty = make_penalty("balanced", pull=0.5, layers=LAYERS)
    at_first = penalty.rho(Moment("fc", 0, StepSize(lr=1e-3, momentum=0.9, steps=100), first=True))
    later = penalty.rho(Moment("fc", 0, SIZE, at_first, first=True))
    assert SIZE.pull(later) == pytest.approx(0.5)
    assert penalty.rho(Moment("fc", 0, StepSize(lr=0.0, momentum=0.9, steps=100), later, first=True)) == later


def test_only_forms_that_follow_the_pull_may_move_the_weight_itself():
    kinds = {rho: make_penalty(rho, pull=0.8, layers=LAYERS).follows_pull for rho in ("auto", "balanced", 1e-3)}
    assert kinds == {"auto": True, "balanced": True, 1e-3: False}


BAD_RHO = [
    0, -1.0, math.nan, math.inf, True, "1e-3", "atuo", [], {}, [1e-3], {0: 0}, {"*": -1}, {"*": "x"}, {5: 1e-3},
    {0: 1e-3, "conv1": 1e-2}, {"conv1": 1e-2, 0: 1e-3}, {0: 1e-3, -1: 1.0}, {True: 1.0},
]  # fmt: skip


@pytest.mark.parametrize("rho", BAD_RHO)
def test_what_is_no_rho_is_refused_in_one_error_that_says_what_is_allowed(rho):
    with pytest.raises(ConfigError, match=r"^rho.* given; allowed: auto \| balanced \| a number above 0") as error:
        AdmmOptions(rho=rho)
    assert error.value.told(Use.in_hydra).startswith("admm.rho")


@pytest.mark.parametrize("key", ["rho", "update_every"])
def test_none_is_no_setting(key):
    with pytest.raises(ConfigError, match=f"{key}: None given"):
        AdmmOptions(**{key: None})


def test_globs_that_leave_a_layer_out_are_refused():
    with pytest.raises(ConfigError, match="^rho: no glob matches conv1, fc"):
        make_penalty({"layer1.*": 1e-3}, pull=0.8, layers=LAYERS)


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(PlanError, match=r"^rho 'layr1\.\*' matches no layer"):
        make_penalty({"*": 1e-3, "layr1.*": 1e-2}, pull=0.8, layers=LAYERS)


@pytest.mark.parametrize("pull", [0, 1, -0.5, 1.5, math.nan])
def test_a_pull_outside_its_range_is_refused(pull):
    with pytest.raises(ConfigError, match="pull: .* above 0 and below 1"):
        AdmmOptions(pull=pull)


def test_keyword_arguments_are_the_options():
    options = {f.name: f.type for kind in MODES.values() for f in fields(kind)}
    assert AdmmSettings.__annotations__ == {"mode": str, **options}


def test_the_paper_is_a_constant_rho_without_an_early_stop():
    given = {key: one.default for key, one in settings_of(AdmmPaper).items()}
    assert given == {key: one.default for key, one in settings_of(AdmmOptions).items()} | {
        "rho": 1e-3,
        "tolerance": 0.0,
    }
    assert {key: one.default for key, one in settings_of(AdmmOff).items()} == {"switch_below": None}
