"""Rule options of the command line: what verbs that make a plan share.

Types, ranges and defaults are those of ``conf/``, as ``hodec.experiment.config.schema`` has them;
SETTINGS only gives them flags. Nothing here imports torch before a rule is built: ``hodec --help`` must
not wait for it.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hodec.errors import ConfigError, HodecError, Use, near_matches
from hodec.experiment.config.schema import RULE_NAMES, Config, Leaf, schema_leaves

if TYPE_CHECKING:
    from hodec.ranks import RankRule


@dataclass(frozen=True)
class Setting:
    """A flag and the setting of ``conf/`` that it gives."""

    flag: str
    key: str
    help: str
    metavar: str = "N"
    words: str = ""  # what is allowed, where that is not what conf/ says

    @property
    def name(self) -> str:
        """The setting's name within its group."""
        return self.key.rpartition(".")[2]

    @property
    def leaf(self) -> Leaf:
        """Its type and range."""
        return schema_leaves()[self.key]

    @property
    def default(self) -> Any:
        """Its value where nothing is given."""
        return reduce(getattr, self.key.split("."), Config())

    @property
    def allowed(self) -> str:
        """What it may be, in words, without the null that no flag can give."""
        words = self.words or re.sub(r"^(null(, | or )|text(: |$))", "", self.leaf.words())
        return in_flags(words)

    def given_in(self, options: argparse.Namespace) -> str | None:
        """What was given for it, as text; None for nothing."""
        text: str | None = getattr(options, self.flag.strip("-").replace("-", "_"))
        return text

    def read(self, text: str) -> Any:
        """The value that ``text`` stands for.

        Raises:
            ConfigError: it stands for none that is allowed.
        """
        value = self._typed(text)
        if value is None or list(self.leaf.allowed.bad_parts(value)):
            raise ConfigError(f"{self.flag}: {text!r} given; allowed: {self.allowed}")
        return value

    def _typed(self, text: str) -> Any:
        """``text`` in the setting's type, None when it is not of that type."""
        try:
            return READERS[self.leaf.kind](text)
        except (ValueError, HydraException):
            return None


def _free_form(text: str) -> Any:
    """A number, list or mapping, written as for train.py; several values of a sweep are none of these."""
    override = OverridesParser.create().parse_override(f"value={text}")
    return None if override.is_sweep_override() else override.value()


def _names(text: str) -> list[str]:
    """Names with commas between them, in brackets or not."""
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


READERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, list[str]: _names, Any: _free_form}

METHOD_LIST = Setting(
    "--methods", "ranks.methods", "instead of --method: each layer takes what loses least", "NAMES", "tt,spatial_svd,.."
)
SETTINGS = (
    Setting("--ranks", "tt_ranks", "ranks by hand", "RANKS"),
    Setting("--target", "ranks.target", "share of each layer's cost to keep"),
    Setting("--metric", "ranks.metric", "the cost that --target is a share of", "NAME", "macs | params"),
    Setting("--keep", "ranks.keep", "share of each unfolding's squared norm to keep"),
    Setting("--calibration", "ranks.calibration", "share of the cut that is given back; below 0 cuts more"),
    Setting("--macs", "ranks.macs", "share of the whole net's multiply-adds to keep"),
    Setting("--params", "ranks.params", "share of the whole net's parameters to keep"),
    Setting("--latency-ms", "ranks.latency_ms", "milliseconds of the whole net for one image on this machine"),
    METHOD_LIST,
    Setting("--tolerance", "ranks.tolerance", "how far below the targets the net may stay, as a share of them"),
    Setting("--round-to", "ranks.round_to", "ranks become multiples of this, rounded up"),
    Setting("--min-rank", "ranks.min_rank", "least rank"),
    Setting("--max-rank", "ranks.max_rank", "greatest rank"),
)
METHOD = Setting("--method", "method.name", "how layers are factorized: tt, tucker, spatial_svd, ..", "NAME")
N_MODES = Setting("--n-modes", "method.n_modes", "modes a side that channels split into")

# Share of the multiply-adds that budget keeps when it is given no target, as in conf/ranks/budget.yaml.
DEFAULT_MACS = 0.5
_TRAIN = "it {}; python train.py ranks={} does, with a data set and trained weights (init=FILE)"
REFUSED = {
    "greedy": _TRAIN.format("evaluates the net on a validation split", "greedy"),
    "tar": _TRAIN.format("evaluates the net on a validation split", "tar"),
    "learned": _TRAIN.format("finds its ranks while ADMM trains the net", "learned"),
}
OFFERED = tuple(name for name in RULE_NAMES if name not in REFUSED)

# How messages name settings, and how the command line does.
_WORDS = (
    *((rf"'{re.escape(s.key)}=", f"{s.flag} '") for s in SETTINGS),
    *((rf"(?<![\w.]){re.escape(s.key)}=", f"{s.flag} ") for s in SETTINGS),
    *((rf"(?<![\w.]){re.escape(s.key)}\b(?!\()", s.flag) for s in SETTINGS),
    (r"(?<![\w.])(?:data\.)?image_size=", "--image-size "),
    (r"(?<![\w.])in_channels=", "--in-channels "),
    (r"num_classes \(data=\.\.\.\), or pass allow_new_head=True.*", "--num-classes"),
    (r"(?<![\w.])num_classes=", "--num-classes "),
    (r"(?<![\w.])model=\.\.\.", "--model"),
    (r"(?<![\w.])(model|method)=", r"--\1 "),
    (r"(?<![\w.])ranks=", "--rule "),
    (r"\b(in|ex)clude=\[\.\.\]", r"--\1clude GLOB"),
    (r"(?<![-\w])(in|ex)clude '", r"--\1clude '"),
)


def in_flags(text: str) -> str:
    """A message about settings of ``conf/``, as one about flags: ``ranks.macs=0.4`` becomes ``--macs 0.4``."""
    for pattern, flag in _WORDS:
        text = re.sub(pattern, flag, text)
    return text


@contextmanager
def errors_in_flags() -> Iterator[None]:
    """Raise HodecErrors of what runs within with the names of flags in their message."""
    try:
        yield
    except HodecError as error:
        raise type(error)(in_flags(error.told(Use.in_flags))) from error


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--rule`` and the settings of all rules: those of ``rule_from``."""
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--rule",
        metavar="NAME",
        help=f"what chooses ranks: {' | '.join(OFFERED)} (default: manual with --ranks, else budget)",
    )
    for setting in SETTINGS:
        _add(group, setting)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--method``, ``--n-modes``, ``--include`` and ``--exclude``: those of ``method_from``."""
    group = parser.add_argument_group("layers")
    for setting in (METHOD, N_MODES):
        _add(group, setting)
    for flag, what in (("--include", "layers that may be factorized"), ("--exclude", "layers that stay dense")):
        group.add_argument(flag, metavar="GLOB", action="append", help=f"{what}; can be given several times")


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """One flag. Values are read in ``rule_from``: argparse would say less, in two lines."""
    default = "" if setting.default is None else f" (default: {setting.default})"
    text = "; ".join(filter(None, (setting.help, setting.allowed)))
    group.add_argument(setting.flag, metavar=setting.metavar, help=text + default)


def rule_from(options: argparse.Namespace) -> "RankRule":
    """The rank rule that the options ask for.

    Args:
        options: parsed by a parser with ``add_rule_options``.

    Raises:
        ConfigError: an unknown rule or one that needs training; a setting out of range, or one the rule has not.
    """
    name = _rule_name(options)
    from hodec.ranks import RULES, build_rule

    given = _given(options, name, RULES[name].settings)
    if name == "manual" and "tt_ranks" not in given:
        raise ConfigError(f"--ranks: missing with --rule manual; allowed: {SETTINGS[0].allowed}")
    values = {setting.name: setting.default for setting in SETTINGS} | given
    if name == "budget" and not {"macs", "params", "latency_ms"} & given.keys():
        values["macs"] = DEFAULT_MACS
    with errors_in_flags():
        return build_rule(name, values)


def _given(options: argparse.Namespace, rule: str, takes: Sequence[str]) -> dict[str, Any]:
    """Settings that were given, read; all of them are the rule's."""
    given = {}
    for setting in SETTINGS:
        text = setting.given_in(options)
        if text is None:
            continue
        if setting.name not in takes:
            own = ", ".join(s.flag for s in SETTINGS if s.name in takes) or "no settings"
            raise ConfigError(f"{setting.flag} does not go with --rule {rule}, which takes {own}")
        given[setting.name] = setting.read(text)
    return given


def _rule_name(options: argparse.Namespace) -> str:
    name = options.rule or ("manual" if options.ranks is not None else "budget")
    if name in REFUSED:
        raise ConfigError(f"--rule: {name} is not possible here: {REFUSED[name]}. Allowed: {' | '.join(OFFERED)}")
    if name not in OFFERED:
        raise ConfigError(
            f"--rule: {name!r} given; allowed: {' | '.join(OFFERED)}.{near_matches(name, OFFERED)}".removesuffix(".")
        )
    return str(name)


def method_from(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``make_plan``: ``method``, ``n_modes``, ``include``, ``exclude``.

    Args:
        options: parsed by a parser with ``add_method_options``.

    Raises:
        ConfigError: an unknown method, or a number out of range.
    """
    from hodec.methods import METHODS

    method = given if (given := METHOD.given_in(options)) is not None else METHOD.default
    if given is not None and METHOD_LIST.given_in(options) is not None:
        raise ConfigError(f"--method: {method!r} given together with --methods; allowed: one of the two")
    for setting, name in [
        (METHOD, method),
        *((METHOD_LIST, name) for name in _names(METHOD_LIST.given_in(options) or "")),
    ]:
        if name not in METHODS:
            close = near_matches(name, tuple(METHODS))
            allowed = " | ".join(METHODS)
            raise ConfigError(f"{setting.flag}: {name!r} given; allowed: {allowed}.{close}".removesuffix("."))
    modes = N_MODES.given_in(options)
    n_modes = N_MODES.default if modes is None else N_MODES.read(modes)
    return {"method": method, "n_modes": n_modes, "include": options.include, "exclude": options.exclude}
