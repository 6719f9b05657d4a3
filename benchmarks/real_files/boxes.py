"""Boxes (left, top, right, bottom), found beside true ones."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.floating]


def overlap(first: Boxes, second: Boxes) -> Boxes:
    """Intersection over union of each of (M, 4) with each of (N, 4), (M, N)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inner = np.clip(high - low, 0, None).prod(-1)
    area_first, area_second = (np.clip(one[:, 2:] - one[:, :2], 0, None).prod(-1) for one in (first, second))
    return inner / np.maximum(area_first[:, None] + area_second[None] - inner, 1e-9)


def without_doubles(boxes: Boxes, scores: Boxes, *, most: float) -> Boxes:
    """The best boxes (K, 4), of which no two overlap by more than ``most``: non-maximum suppression."""
    left, kept = list(np.argsort(-scores)), []
    while left:
        best = left.pop(0)
        kept.append(best)
        if left:
            shared = overlap(boxes[[best]], boxes[left])[0]
            left = [k for k, share in zip(left, shared) if share <= most]
    return boxes[kept]


def f1(pairs: Iterable[tuple[Boxes, Boxes]], *, least: float = 0.5) -> float:
    """F1 of found boxes: a true box counts as found by the one box that overlaps it most, by at least ``least``."""
    hits = found = wanted = 0
    for boxes, truth in pairs:
        found, wanted = found + len(boxes), wanted + len(truth)
        if len(boxes) and len(truth):
            shared = overlap(boxes, truth)
            while shared.size and shared.max() >= least:
                hits += 1
                row, column = np.unravel_index(shared.argmax(), shared.shape)
                shared = np.delete(np.delete(shared, row, 0), column, 1)
    return 2 * hits / max(found + wanted, 1)
