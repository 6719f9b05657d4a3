"""Interval: how often Z and U are updated."""

import re
from dataclasses import dataclass

from hodec.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """How often Z and U are updated: every ``count`` epochs or optimizer steps."""

    count: int
    unit: str

    @classmethod
    def parse(cls, text: int | str) -> "Interval":
        """2 or '2epochs': every other epoch; '50steps': every 50 optimizer steps.

        Raises:
            ConfigError: anything else.
        """
        match = re.fullmatch(r"\s*(\d+)\s*(epoch|step|)s?\s*", str(text))
        if not match or int(match[1]) < 1:
            raise ConfigError(f"admm.update_every={text!r} is not allowed: give epochs (1, 2epochs) or steps (50steps)")
        return cls(int(match[1]), match[2] or "epoch")

    def steps(self, steps_per_epoch: float) -> float:
        """Optimizer steps between two updates."""
        return self.count * (steps_per_epoch if self.unit == "epoch" else 1)
