"""What a file answered, call by call."""

import math
import weakref
from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile

import numpy as np

from hodec.export.runtime import Array

# Bytes of answers of one file that stay in memory.
MEMORY = 2**29


class Answers:
    """The outputs of one call after another: some in memory, the others in a file that has no name and goes with this.

    They are copies, in and out: a score may work in the arrays that it is given.
    """

    def __init__(self) -> None:
        self._room, self._file = MEMORY, TemporaryFile()  # noqa: SIM115  # closed below
        weakref.finalize(self, self._file.close)
        self._calls: list[list[Array] | list[tuple[int, np.dtype[np.generic], tuple[int, ...]]]] = []

    def append(self, outputs: Sequence[Array]) -> None:
        """Keep what a call gave.

        Raises:
            OSError: the disk is full.
        """
        self._room -= sum(one.nbytes for one in outputs)
        if self._room >= 0 or any(one.dtype.hasobject for one in outputs):
            self._calls.append([one.copy() for one in outputs])
            return
        places = []
        for one in outputs:
            places.append((self._file.seek(0, 2), one.dtype, one.shape))
            self._file.write(one.tobytes())
        self._file.flush()
        self._calls.append(places)

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, k: int) -> list[Array]:
        """What call k gave.

        Raises:
            IndexError: there was no such call.
        """
        return [one.copy() if isinstance(one, np.ndarray) else self._read(*one) for one in self._calls[k]]

    def __iter__(self) -> Iterator[list[Array]]:
        return (self[k] for k in range(len(self)))

    def _read(self, place: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        self._file.seek(place)
        return np.ndarray(shape, dtype, bytearray(self._file.read(math.prod(shape) * dtype.itemsize)))
