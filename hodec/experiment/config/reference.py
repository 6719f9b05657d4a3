"""``docs/reference.md``: every method and every rank rule, from their tables and dataclasses."""

import inspect
from collections.abc import Callable, Iterable

from hodec.formats.layer_types import DENSE_CLASSES
from hodec.methods import METHODS, Method
from hodec.ranks import RULES, RankRule

HEAD = """# Methods and rules, in short

What `hodec.METHODS` and `hodec.ranks.RULES` hold; `python -m hodec.experiment.config.write` writes this page.
Each method's projection drives ADMM, with the ranks of each rule. Which one to take: [choose.md](choose.md).
"""


def page(table: Callable[[type[RankRule]], str]) -> str:
    """The text of the page.

    Args:
        table: the settings of an option as a Markdown table, empty where it has none.
    """
    parts = [HEAD, "\n## Methods\n\nBy the name after `method=`; [methods.md](methods.md) has their formulas.\n\n"]
    parts.append(_markdown(["method", "what it is", "layers", "source"], map(_method_row, METHODS.values())))
    parts.append(
        "\n## Rules\n\nBy the name after `ranks=` or `--rule`; [ranks.md](ranks.md) says how each chooses.\n\n"
    )
    heads = ["rule", "what it gives", "reads trained weights", "runs the net"]
    parts.append(_markdown(heads, map(_rule_row, RULES.values())))
    parts += [_rule_section(rule, table(rule)) for rule in RULES.values()]
    return "".join(parts)


def _markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace(" --- ", "---")


def _method_row(method: Method) -> list[str]:
    """Name, summary, dense layers that it has a layer for, source."""
    layers = ", ".join(dense.__name__ for name, dense in DENSE_CLASSES.items() if name in method.layers)
    return [f"[`{method.name}`](methods.md#{method.name})", method.summary, layers, method.source]


def _rule_row(rule: type[RankRule]) -> list[str]:
    reads = "yes" if rule.reads_weights else "no"
    return [f"[`{rule.name}`](ranks.md#{rule.name})", _first(rule), reads, rule.runs_net or "no"]


def _first(rule: type[RankRule]) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].replace("``", "`").split())


def _rule_section(rule: type[RankRule], settings: str) -> str:
    """Heading, the class, and the settings of a rule."""
    lead = f"`hodec.ranks.{rule.__name__}`. {_first(rule)}"
    return "\n".join(filter(None, [f"\n### {rule.name}\n", f"{lead}\n", settings]))
