"""The compressed model of a finished run, built again from the run's folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hodec.compare import verified
from hodec.errors import CheckpointError
from hodec.export import checkpoint
from hodec.export.program import Exported
from hodec.inputs import as_input
from hodec.io.atomic import JsonObject


@dataclass(frozen=True)
class RunModel:
    """What a run has made.

    Attributes:
        model: the compressed net, in evaluation mode.
        facts: what the dense net is built from: model, in_channels, num_classes, image_size.
    """

    model: nn.Module
    facts: JsonObject

    def example(self, batch: int = 1) -> Tensor:
        """Seeded noise of the size of the run's images, (batch, channels, height, width)."""
        size = (batch, self.facts["in_channels"], *self.facts["image_size"])
        return torch.randn(size, generator=torch.Generator().manual_seed(0))

    def save(self, path: Path, *, verify: bool) -> Exported:
        """Write factors and plan as ``hodec.load`` reads them; where asked for, read them again and compare.

        Raises:
            CheckpointError: a path with another ending.
            ConvertError: the file gives other outputs.
        """
        checkpoint.save(self.model, path, facts=self.facts)
        if not verify:
            return Exported(path, None)
        again, sizes = checkpoint.load(path).eval(), (2,)
        return Exported(
            path, verified(str(path), again, self.model, as_input(self.example(2)), sizes, allowed=0.0), sizes
        )


def model_of_run(folder: str | Path) -> RunModel:
    """The compressed model of a run.

    Args:
        folder: of a finished run; holds ``compressed.safetensors`` and ``compressed.json``.

    Raises:
        CheckpointError: no finished run, or a file that was altered.
    """
    path = Path(folder) / "compressed.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no compressed.safetensors: it is no folder of a finished run; the same command that "
            "started the run finishes it"
        )
    model = checkpoint.load(path).eval()
    return RunModel(model, checkpoint.facts_of(path, checkpoint.read_structure(path)))
