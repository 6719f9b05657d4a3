"""Options of rank rules: one table, the ranges of conf/, and messages in the words of the command line."""

import argparse
import subprocess
import sys

import pytest

from hodec.cli.rule_options import (
    OFFERED,
    REFUSED,
    SETTINGS,
    add_method_options,
    add_rule_options,
    errors_in_flags,
    in_flags,
    method_from,
    rule_from,
)
from hodec.errors import ConfigError, PlanError
from hodec.experiment.config.schema import RULE_NAMES
from hodec.methods import METHODS
from hodec.options import settings_of
from hodec.ranks import RULES, Budget, Manual


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_rule_options(parser)
    add_method_options(parser)
    return parser.parse_args(argv)


def test_every_setting_of_an_offered_rule_has_a_flag():
    names = {setting.name for setting in SETTINGS}
    for rule in OFFERED:
        assert set(settings_of(RULES[rule])) - {"default"} <= names, rule
    assert {*OFFERED, *REFUSED} == set(RULE_NAMES) == set(RULES)


@pytest.mark.parametrize("rule", [name for name in OFFERED if name != "manual"])
def test_every_offered_rule_is_built_without_settings(rule):
    assert rule_from(parsed("--rule", rule)).name == rule


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("[4, 16,16,4]", [4, 16, 16, 4]),
        ("{layer1.*:9,fc:[3,4]}", {"layer1.*": 9, "fc": [3, 4]}),
        ("{/layer1/conv1/Conv:9}", {"/layer1/conv1/Conv": 9}),
    ],
)
def test_ranks_are_written_as_for_train_py(text, value):
    rule = rule_from(parsed("--ranks", text))
    assert isinstance(rule, Manual)
    assert rule.tt_ranks == value


def test_without_a_rule_it_is_budget_at_half_the_macs():
    rule = rule_from(parsed())
    assert isinstance(rule, Budget)
    assert rule.targets == {"macs": 0.5}
    assert rule_from(parsed("--params", "0.3")).targets == {"params": 0.3}
    assert rule_from(parsed("--params", "0.3", "--macs", "0.4")).targets == {"macs": 0.4, "params": 0.3}


def test_settings_arrive_at_the_rule():
    rule = rule_from(
        parsed(*["--rule", "ratio", "--target", "0.3", "--metric", "params", "--round-to", "4", "--max-rank", "64"])
    )
    assert (rule.target, rule.metric) == (0.3, "params")
    assert (rule.round_to, rule.min_rank, rule.max_rank) == (4, 1, 64)
    assert rule_from(parsed("--rule", "vbmf", "--recommendation-ratio", "-0.5")).recommendation_ratio == -0.5
    assert rule_from(parsed("--tolerance", "0.1")).tolerance == 0.1
    for written in ("tt,spatial_svd", "[tt, spatial_svd]"):
        assert rule_from(parsed("--methods", written)).methods == ["tt", "spatial_svd"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--ranks 0", "--ranks: '0' given; allowed: a whole number from 1, a list"),
        ("--ranks 1,2", "--ranks: '1,2' given"),
        ("--ranks null", "--ranks: 'null' given"),
        ("--ranks {a:", "--ranks: '{a:' given"),
        ("--rule manual", "--ranks: missing with --rule manual; allowed: a whole number from 1"),
        ("--macs 2", "--macs: '2' given; allowed: a number above 0 and below 1"),
        ("--macs 1", "--macs: '1' given; allowed: a number above 0 and below 1"),
        ("--params nan", "--params: 'nan' given"),
        ("--rule energy --keep x", "--keep: 'x' given; allowed: a number above 0 and at most 1"),
        (
            "--rule vbmf --recommendation-ratio 2",
            "--recommendation-ratio: '2' given; allowed: a number at least -1 and at most 1",
        ),
        ("--rule ratio --metric flops", "--metric: 'flops' given; allowed: macs | params"),
        ("--round-to 1.5", "--round-to: '1.5' given; allowed: a whole number at least 1"),
        ("--min-rank 4 --max-rank 2", "--max-rank 2 is below --min-rank 4; give --max-rank 4 or more"),
        ("--target 0.5", "--target does not go with --rule budget, which takes --macs, --params"),
        ("--rule amct --keep 1", "--keep does not go with --rule amct, which takes no settings"),
        ("--methods []", "--methods: '[]' given; allowed: tt,spatial_svd,.."),
        ("--rule ratio --methods tt", "--methods does not go with --rule ratio"),
        ("--rule bugdet", "--rule: 'bugdet' given; allowed: manual | ratio"),
        ("--rule greedy", "python train.py ranks=greedy does"),
        ("--rule equal_residual", "python train.py ranks=equal_residual does"),
        ("--rule learned", "python train.py ranks=learned does"),
    ],
)
def test_a_wrong_value_names_the_option_and_what_is_allowed(argv, message):
    with pytest.raises(ConfigError) as error:
        rule_from(parsed(*argv.split()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "null" not in str(error.value).replace("'null'", "")


def test_method_options():
    assert method_from(parsed()) == {"method": "tt", "n_modes": 2, "include": None, "exclude": None}
    given = parsed(*["--method", "svd", "--n-modes", "1", "--include", "a.*", "--include", "b", "--exclude", "c"])
    assert method_from(given) == {"method": "svd", "n_modes": 1, "include": ["a.*", "b"], "exclude": ["c"]}
    for argv, message in (
        (["--method", "tuker"], "--method: 'tuker' given; allowed: " + " | ".join(METHODS)),
        (["--method", ""], "--method: '' given"),
        (["--methods", "tt,svdd"], "--methods: 'svdd' given; allowed: " + " | ".join(METHODS)),
        (
            ["--method", "tt", "--methods", "tt,svd"],
            "--method: 'tt' given together with --methods; allowed: one of the",
        ),
        (["--n-modes", "5"], "--n-modes: '5' given; allowed: a whole number at least 1 and at most 4"),
    ):
        with pytest.raises(ConfigError) as error:
            method_from(parsed(*argv))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("give ranks.macs=0.4, or lower ranks.min_rank", "give --macs 0.4, or lower --min-rank"),
        ("override: 'tt_ranks={conv1:[1, 3]}' or", "override: --ranks '{conv1:[1, 3]}' or"),
        ("set data.image_size=75", "set --image-size 75"),
        ("Choose model=... from", "Choose --model from"),
        ("leave it dense with exclude=[..]", "leave it dense with --exclude GLOB"),
        ("include 'x*' matches no layer", "--include 'x*' matches no layer"),
        ("a file of resnet20's ranks, 3 models", "a file of resnet20's ranks, 3 models"),
    ],
)
def test_messages_in_the_words_of_the_command_line(words, flags):
    assert in_flags(words) == flags
    assert in_flags(flags) == flags
    with pytest.raises(PlanError) as error, errors_in_flags():
        raise PlanError(words)
    assert str(error.value) == flags


def test_help_does_not_wait_for_torch():
    code = "import sys, hodec.cli.rule_options, hodec.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
