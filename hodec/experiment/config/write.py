"""``python -m hodec.experiment.config.write``: write ``conf/`` and two pages of ``docs/`` from the options.

A test compares, so that the default, the range and the meaning of a setting are said in its class alone.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import yaml

from hodec.experiment.config import reference
from hodec.experiment.config.groups import CONF, Preset, groups
from hodec.experiment.config.options import RunSettings
from hodec.experiment.config.own import CustomMethod, settings_of_method
from hodec.options import Setting, Settings, settings_of

WIDTH = 120  # characters of a line
PAGE_HEAD = """# Settings

Every setting of `hodec train`, as `key=value`; `python -m hodec.experiment.config.write` writes this page.
`hodec plan` and the constructors of the rank rules take the settings of `ranks` under their last name:
`ranks.macs=0.4`, `--macs 0.4`, `Budget(macs=0.4)`.
"""


def presets() -> dict[str, dict[str, Preset]]:
    """Those of ``groups()``, with one for each method that ``hodec.methods`` has now."""
    from hodec.methods import METHODS

    methods = {}
    for name, method in METHODS.items():
        known = groups()["method"].get(name)
        packaged = known.packaged if known else True
        methods[name] = Preset(settings_of_method(method), doc=method.summary or method.source, packaged=packaged)
    own = groups()["method"][CustomMethod.name]
    return {**groups(), "method": {**methods, CustomMethod.name: own}}


def comment(one: Setting) -> str:
    """Meaning and range of a setting, where its type does not say it."""
    plain = one.type in (bool, str, list[str], list[float]) and not one.allowed.choices and not one.allowed.words
    return "; ".join(filter(None, (one.doc, "" if plain else one.words(null=False))))


def scalar(value: object) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()


def lines_of(option: type[Settings], values: Mapping[str, object], *, indent: str = "") -> list[str]:
    """``key: value  # comment`` of each setting; a long comment stands above its line."""
    settings = settings_of(option)
    rows = [(f"{indent}{key}: {scalar(value)}", settings.get(key)) for key, value in values.items()]
    column = max((len(text) for text, _ in rows), default=0) + 2
    lines: list[str] = []
    for text, one in rows:
        words = comment(one) if one else "the option that this file is of"
        if column + 2 + len(words) <= WIDTH:
            lines.append(f"{text:{column}}# {words}")
        else:
            lines += [*textwrap.wrap(words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), text]
    return lines


def summary(preset: Preset) -> str:
    """What a preset is, in one paragraph."""
    text = preset.doc or (preset.option.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def preset_text(preset: Preset) -> str:
    """The file of a preset."""
    head = textwrap.wrap(summary(preset), WIDTH, initial_indent="# ", subsequent_indent="# ")
    return "\n".join([*head, *lines_of(preset.option, preset.tree())]) + "\n"


def config_text(text: str) -> str:
    """``config.yaml`` with its settings written anew; the defaults list above and Hydra's part below stay."""
    head, tail = text.partition("\n\n")[0], text.partition("\nhydra:\n")[2]
    distill = groups()["distill"][""]
    values = {key: one.default for key, one in settings_of(RunSettings).items()}
    top = "\n".join(lines_of(RunSettings, values))
    below = "\n".join(lines_of(distill.option, distill.tree(), indent="  "))
    return f"{head}\n\n{top}\n\n# {summary(distill)}\ndistill:\n{below}\n\nhydra:\n{tail}"


def page() -> str:
    """``docs/settings.md``: a table for each option."""
    parts = [PAGE_HEAD, "\n## General\n\n", table(RunSettings)]
    for group, members in presets().items():
        parts.append(f"\n## {group}\n")
        for name, preset in members.items():
            if not preset.packaged:
                continue
            title = f"`{group}={name}`: " if name else ""
            parts.append(f"\n{title}{summary(preset)}\n")
            changed = ", ".join(f"`{group}.{key}={scalar(value)}`" for key, value in preset.values.items())
            if next(other for other, one in members.items() if one.option is preset.option) == name:
                parts.append(f"\n{table(preset.option)}".rstrip() + "\n")
            if changed:
                parts.append(f"\nIt has {changed}.\n")
    return "".join(parts)


def table(option: type[Settings]) -> str:
    """Key, default, what is allowed and meaning of each setting."""
    rows = [
        f"| `{one.key}` | `{scalar(one.default)}` | {_cell(one.words().replace('text: ', ''))} | {_cell(one.doc)} |"
        for one in settings_of(option).values()
    ]
    return "\n".join(["| setting | default | allowed | |", "|---|---|---|---|", *rows]) + "\n" if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def files(conf: Path = CONF) -> dict[Path, str]:
    """Every file that is written, and its text."""
    found = {
        conf / group / f"{name}.yaml": preset_text(preset)
        for group, members in presets().items()
        for name, preset in members.items()
        if name and preset.packaged
    }
    found[conf / "config.yaml"] = config_text((conf / "config.yaml").read_text("utf-8"))
    found[conf.parent / "docs" / "settings.md"] = page()
    found[conf.parent / "docs" / "reference.md"] = reference.page(table)
    return found


def main() -> None:
    """Write them all."""
    for path, text in files().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
