"""What a sweeper optimises: of the validation split, and in the right direction."""

import math

import pytest

from hodec.errors import ConfigError
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.objectives import value_of
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.config.schema import Config

METRICS = {
    "dense": {"macs": 100, "params": 50, "validation_accuracy": 0.9, "test_accuracy": 0.8},
    "compressed": {"macs": 40, "params": 20, "validation_accuracy": 0.85, "test_accuracy": 0.7, "latency_ms": 2.0},
}


def test_the_objectives_of_a_run():
    assert value_of(METRICS, Config().objective, None) == [0.85]
    assert value_of(METRICS, ["validation_accuracy", "macs"], None) == [0.85, 40.0]
    assert value_of(METRICS, "latency_ms", None) == [2.0]


def test_above_the_limit_accuracy_counts_as_minus_the_excess():
    assert value_of(METRICS, "validation_accuracy", 0.4) == [0.85]
    (outside,) = value_of(METRICS, "validation_accuracy", 0.3)
    assert math.isclose(outside, -0.1)


def test_what_was_not_measured_is_no_number():
    without = {"dense": METRICS["dense"], "compressed": {"macs": 40, "test_accuracy": 0.7}}
    assert value_of(without, "validation_accuracy", None) is None


def test_another_objective_is_refused():
    for wrong in ("test_accuracy", [], ["macs", "macs"], ["macs", "test_accuracy"], 3):
        with pytest.raises(ConfigError, match="objective: .* given; allowed: validation_accuracy | macs"):
            Config(objective=wrong)


BOTH = "objective=[validation_accuracy,macs]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/sweeper=optuna"], "minimize given for validation_accuracy; allowed: maximize"),
        (["hydra/sweeper=optuna", "objective=macs"], ""),
        (["hydra/sweeper=accuracy"], ""),
        (
            ["hydra/sweeper=accuracy", BOTH],
            "maximize given for validation_accuracy, macs; allowed: [maximize,minimize]",
        ),
        (["hydra/sweeper=accuracy_macs", BOTH], ""),
        (["hydra/sweeper=accuracy", "hydra.sweeper.direction=minimize"], "minimize given for validation_accuracy"),
    ],
)
def test_a_sweeper_that_would_search_for_the_worst_run_is_refused(words, said):
    argv = ["-m", *words, "admm.rho=interval(1e-4,1e-1)"]
    if not said:
        check_overrides(argv, CONF)
        return
    with pytest.raises(ConfigError) as caught:
        check_overrides(argv, CONF)
    assert said in str(caught.value)
    assert "hydra/sweeper=accuracy" in str(caught.value)
