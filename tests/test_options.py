"""Options refuse what is out of range when they are made, and each surface reads the same fields."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hodec.errors import ConfigError, Use
from hodec.options import Option, argument, setting, settings_of


@dataclass(frozen=True)
class Toy(Option):
    group: ClassVar[str] = "ranks"
    name: ClassVar[str] = "toy"

    share: float = setting(0.5, "share to keep", above=0, high=1)
    most: int | None = setting(None, "greatest rank", low=1)
    kind: str = setting("macs", choices=("macs", "params"))
    table: object = argument()


def test_fields_are_settings_but_for_what_python_alone_gives():
    settings = settings_of(Toy)
    assert list(settings) == ["share", "most", "kind"]
    assert (settings["share"].doc, settings["share"].words()) == ("share to keep", "a number above 0 and at most 1")
    assert settings["most"].words() == "null or a whole number at least 1"
    assert settings["kind"].words() == "macs | params"
    assert (settings["most"].type, settings["most"].optional, settings["most"].default) == (int, True, None)


def test_a_number_is_read_in_the_type_of_its_setting():
    assert type(Toy(share=1).share) is float
    assert Toy(most=None).values() == {"share": 0.5, "most": None, "kind": "macs"}


WRONG = [
    ("share", 0.0), ("share", 1.5), ("share", float("nan")), ("share", True), ("share", "0.5"), ("share", None),
    ("most", 0), ("most", 1.0), ("kind", "latency"), ("kind", 3),
]  # fmt: skip


@pytest.mark.parametrize(("given", "value"), WRONG)
def test_out_of_range_is_refused_in_the_words_of_each_surface(given, value):
    with pytest.raises(ConfigError, match=f"^{given}: .* given; allowed: ") as error:
        Toy(**{given: value})
    assert error.value.told(Use.in_hydra).startswith(f"ranks.{given}: ")
    assert error.value.told(Use.in_flags).startswith(f"--{given}: ")


def test_a_use_is_quoted_where_a_shell_would_take_it_apart():
    use = Use("ranks.methods", "[tt,svd]")
    assert (use.in_python(), use.in_hydra()) == ("methods=[tt,svd]", "'ranks.methods=[tt,svd]'")
    assert use.in_flags() == "--methods '[tt,svd]'"
    assert Use("ranks.macs", 0.4).in_flags() == "--macs 0.4"
    assert (Use("ranks", "budget").in_flags(), Use("ranks", "budget").in_hydra()) == ("--rule budget", "ranks=budget")
    assert Use("tt_ranks", "{layer1.*:8}").in_flags() == "--ranks '{layer1.*:8}'"
    assert Use("exclude", "[conv1]").in_flags() == "--exclude conv1"
    assert Use("exclude").in_flags() == "--exclude"
