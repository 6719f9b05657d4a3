"""The errors a user can cause, by what has to be mended."""


class HodecError(Exception):
    """Base of every error that names a cause and its remedy; the command line turns it into exit code 2."""


class RankError(HodecError):
    """Ranks that do not fit the modes of a tensor."""


class PlanError(HodecError):
    """A plan that cannot be made, read, or applied to this model."""


class ConvertError(HodecError):
    """A layer that cannot be swapped, or a converted model that does not run."""


class ConfigError(HodecError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(HodecError):
    """A data set that is missing, empty or unreadable."""


class TrainingError(HodecError):
    """Training that cannot start as asked, or that broke down (NaN, divergence)."""


class CheckpointError(HodecError):
    """A file that is truncated, altered, or belongs to another model or run."""


def near_matches(given: str, known: "list[str] | tuple[str, ...]", count: int = 3) -> str:
    """Suggestion for a misspelt word: ``' Did you mean: a, b?'``, or ``''`` when nothing is close."""
    import difflib

    close = difflib.get_close_matches(str(given), list(known), n=count, cutoff=0.5)
    return f" Did you mean: {', '.join(close)}?" if close else ""
