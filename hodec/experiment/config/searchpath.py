"""Folders of settings of one's own: ``--config-dir FOLDER`` and ``hydra.searchpath=[FOLDER, pkg://PACKAGE.conf]``.

Files there are settings, which run no code (see ``trust``). Hydra imports the package of a ``pkg://``, which needs the
user's trust.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hodec.errors import ConfigError
from hodec.experiment.config import trust

KEY = "hydra.searchpath="
FILE, PACKAGE = "file://", "pkg://"


def places(config_dir: str | None, overrides: Sequence[str]) -> list[str]:
    """What is searched before hodec's own settings, as Hydra writes it: ``file:///home/me/conf``.

    Args:
        config_dir: the folder of ``--config-dir``.
        overrides: of the command line.

    Raises:
        ConfigError: no folder, or a package that the user does not trust.
    """
    found = [] if config_dir is None else [_folder(config_dir, "--config-dir")]
    for line in overrides:
        if line.startswith(KEY):
            found += map(_place, _values(line))
    return found


def _values(line: str) -> list[str]:
    try:
        value = OverridesParser.create().parse_override(line).value()
    except HydraException:
        value = None
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{line}: cannot be read; allowed: a list of folders: '{KEY}[FOLDER]'")
    return [str(one) for one in value]


def _place(text: str) -> str:
    if not text.startswith(PACKAGE):
        return _folder(text.removeprefix(FILE), KEY[:-1])
    package = text.removeprefix(PACKAGE).replace("/", ".")
    if not trust.allows(package):
        raise ConfigError(f"{KEY[:-1]}: {trust.refusal(package)}")
    return text


def _folder(text: str, key: str) -> str:
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"{key}: {text!r} given; allowed: a folder that exists")
    return f"{FILE}{folder}"


def override(found: Sequence[str]) -> list[str]:
    """The override that makes Hydra search these places."""
    return [f"{KEY}{list(found)}"] if found else []


def folders(found: Sequence[str]) -> list[Path]:
    """Those of the places that are folders."""
    return [Path(one.removeprefix(FILE)) for one in found if one.startswith(FILE)]


def others(lines: Sequence[str]) -> list[str]:
    """The overrides that do not say what is searched."""
    return [line for line in lines if not line.startswith(KEY)]
