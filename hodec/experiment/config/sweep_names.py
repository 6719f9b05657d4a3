"""Names of the folders of a sweep's jobs, made from what is swept."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from hodec.experiment.config.arguments import given


def job_folder(number: int, overrides: str, arguments: Sequence[str] | None = None, *, longest: int = 200) -> str:
    """Folder name of one job of a sweep, in characters that need no quotes: ``0_admm.rho-1e-4``.

    It names what is swept; where that is not known, all overrides, the last ones where they are too many for a name.

    Args:
        overrides: of this job, ``admm.rho=1e-4,model=resnet20``, as Hydra joins them.
        arguments: of the whole sweep, by default those of the command line.
        longest: characters of what is named: file systems allow names of 255 bytes.
    """
    swept = _swept(given()[1:] if arguments is None else arguments)
    parts = [part for part in re.split(r",(?=[\w.@/+~]+=)", overrides) if part]
    chosen = [part for part in parts if part.partition("=")[0].lstrip("+~") in swept] or parts
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", ",".join(chosen)).strip("-.")[-longest:].lstrip("-.")
    return f"{number}_{plain}" if plain else str(number)


def _swept(arguments: Sequence[str]) -> set[str]:
    """The keys that are given several values: ``admm.rho=1e-4,1e-3``, ``seed=range(3)``."""
    settings = [one for one in arguments if "=" in one and not one.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(settings)
    except OverrideParseException:  # the checker of the command line names it
        return set()
    return {one.key_or_group for one in parsed if one.is_sweep_override()}
