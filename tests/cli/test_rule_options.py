"""Flags of rank rules and methods: made from their classes, with their ranges, in the words of the command line."""

import argparse

import pytest

from hodec.cli.rule_options import (
    OFFERED,
    add_method_options,
    add_rule_options,
    decided_flags,
    method_flags,
    method_from,
    parse,
    rule_flags,
    rule_from,
)
from hodec.errors import ConfigError, HodecError, Use
from hodec.experiment.config.groups import kinds_of, method_names
from hodec.methods import METHODS
from hodec.options import settings_of
from hodec.ranks import RULES, Budget, Manual


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_rule_options(parser)
    add_method_options(parser)
    return parser.parse_args(argv)


def refused(call, *argv) -> str:
    with pytest.raises(HodecError) as error:
        call(parsed(*argv))
    return error.value.told(Use.in_flags)


def test_every_setting_of_an_offered_rule_has_a_flag():
    flags = rule_flags()
    assert flags.keys() == set(OFFERED) == RULES.keys() - {"greedy", "equal_residual", "learned"}
    for name, own in flags.items():
        settings = {"tt_ranks"} if name == "manual" else settings_of(RULES[name]).keys()
        assert {one.name for one in own.values()} == settings
        assert decided_flags() >= tuple(own) or set(own) <= set(decided_flags())


@pytest.mark.parametrize("rule", [name for name in OFFERED if name != "manual"])
def test_every_offered_rule_is_built_without_settings(rule):
    assert type(rule_from(parsed("--rule", rule))).__name__.lower() in (rule, "ascend")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("[4, 16,16,4]", [4, 16, 16, 4]),
        ("{layer1.*:9,layer2.*:[4,8,8,4]}", {"layer1.*": 9, "layer2.*": [4, 8, 8, 4]}),
        ("{ layer[12].* : 9, fc: [3,4] }", {"layer[12].*": 9, "fc": [3, 4]}),
        ("{/layer1/conv1/Conv:9}", {"/layer1/conv1/Conv": 9}),
        ("{'a:0,b':9}", {"a:0,b": 9}),
    ],
)
def test_ranks_are_written_as_for_hodec_train(text, value):
    rule = rule_from(parsed("--ranks", text))
    assert isinstance(rule, Manual)
    assert rule.tt_ranks == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2", -2), ("0.5", 0.5), ("auto", "auto"), ("true", True), ("{}", {}), ("[]", []),
     ("{a:{in:[4,4],out:[8]}}", {"a": {"in": [4, 4], "out": [8]}})],
)  # fmt: skip
def test_values_are_read_as_hydra_reads_them(text, value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert parse(text) == value == OverridesParser.create().parse_override(f"key={text}").value()


@pytest.mark.parametrize("text", ["", "1,2", "[1,2", "{a:1", "{a}", "[a]]", "null", "'a", "[1,]"])
def test_what_stands_for_no_value(text):
    with pytest.raises(ValueError):
        parse(text)


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
        ("--params nan", "--params: 'nan' given"),
        ("--rule energy --keep x", "--keep: 'x' given; allowed: a number above 0 and at most 1"),
        ("--rule vbmf --recommendation-ratio 2", "--recommendation-ratio: '2' given; allowed: a number at least -1"),
        ("--rule ratio --metric flops", "--metric: 'flops' given; allowed: macs | params"),
        ("--round-to 1.5", "--round-to: '1.5' given; allowed: a whole number at least 1"),
        ("--min-rank 4 --max-rank 2", "--max-rank 2 is below --min-rank 4; give --max-rank 4 or more"),
        ("--methods []", "--methods: '[]' given; allowed: a list of methods"),
        ("--rule bugdet", "--rule: 'bugdet' given; allowed: manual | ratio"),
        ("--rule greedy", "--rule: greedy is not possible here: it evaluates the net on a validation split"),
        ("--rule equal_residual", "hodec train ranks=equal_residual does"),
        ("--rule learned", "it finds its ranks while ADMM trains the net; hodec train ranks=learned does"),
    ],
)
def test_a_wrong_value_names_the_option_and_what_is_allowed(argv, message):
    text = refused(rule_from, *argv.split())
    assert message in text
    assert "\n" not in text
    assert "null" not in text.replace("'null'", "")


FOREIGN = [
    (chooser, name, flag, one)
    for chooser, flags in (("--rule", rule_flags()), ("--method", method_flags()))
    for name, own in flags.items()
    for flag, one in {flag: one for others in flags.values() for flag, one in others.items()}.items()
    if flag not in own
]


@pytest.mark.parametrize(("chooser", "name", "flag", "one"), FOREIGN, ids=lambda one: one if type(one) is str else "")
def test_a_flag_of_another_rule_or_method_is_refused_with_those_that_have_it(chooser, name, flag, one):
    text = refused(rule_from if chooser == "--rule" else method_from, chooser, name, flag, "1")
    assert text.startswith(f"{flag} does not go with {chooser} {name}, which takes ")
    flags = rule_flags() if chooser == "--rule" else method_flags()
    assert text.endswith(f"; {chooser} {' | '.join(n for n, own in flags.items() if flag in own)} has it")


def test_method_options():
    assert method_from(parsed()) == {"method": "tt", "include": None, "exclude": None}
    given = parsed(*["--method", "tt", "--n-modes", "1", "--include", "a.*", "--include", "b", "--exclude", "c"])
    assert method_from(given) == {"method": "tt", "n_modes": 1, "include": ["a.*", "b"], "exclude": ["c"]}
    assert method_names() == list(kinds_of("method"))[:-1]
    assert set(method_names()) == METHODS.keys()
    for argv, message in (
        (["--method", "tuker"], "--method: 'tuker' given; allowed: tt | "),
        (["--method", ""], "--method: '' given"),
        (["--methods", "tt,svdd"], "--methods: 'svdd' given; allowed: tt | "),
        (["--method", "tt", "--methods", "tt,svd"], "--method: 'tt' given together with --methods; allowed: one of"),
        (["--n-modes", "5"], "--n-modes: '5' given; allowed: a whole number at least 1 and at most 4"),
        (["--execution", "fast"], "--execution: 'fast' given; allowed: auto | chain | merged"),
    ):
        assert message in refused(method_from, *argv)


def test_errors_are_of_settings():
    with pytest.raises(ConfigError):
        rule_from(parsed("--macs", "7"))
