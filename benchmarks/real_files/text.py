"""Text lines and pages: recognition, detection, and which way up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.real_files.boxes import Boxes, f1
from benchmarks.real_files.case import Array, Feeds, SampleCase, share_right
from benchmarks.real_files.drawing import chw, colours, font, phrase, text_line, worn

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LINE_HEIGHT = 48  # rows of a line for PaddleOCR's recognition and line classifier


def spans(best: Sequence[int]) -> list[int]:
    """Labels of a CTC output: runs of the same class are one, and class 0 is no label."""
    return [int(one) for k, one in enumerate(best) if one and (k == 0 or one != best[k - 1])]


def fitted(image: Image.Image, width: int) -> np.ndarray:
    """A line at 48 rows, at most ``width`` columns and filled up with zeros to that, (1, 3, 48, width)."""
    columns = min(width, int(np.ceil(LINE_HEIGHT * image.width / image.height)))
    small = image.resize((columns, LINE_HEIGHT), Image.Resampling.BILINEAR)
    padded = np.zeros((1, 3, LINE_HEIGHT, width), np.float32)
    padded[0, :, :, :columns] = chw(small, mean=HALF, std=HALF)
    return padded


@dataclass(frozen=True)
class Recognition(SampleCase):
    """PaddleOCR's recognition: a line of text into characters; the score is the share of lines without an error."""

    width: int = 320

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, str]:
        text = phrase(rng, int(rng.integers(1, 4)))
        image = text_line(rng, self.cache, text)
        # the package widens the input for long lines; a line wider than it would be squeezed
        width = max(self.width, int(LINE_HEIGHT * image.width / image.height))
        return {"x": fitted(image, width)}, text

    def answer(self, outputs: Sequence[Array]) -> list[int]:
        return spans(outputs[0][0].argmax(-1))

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        alphabet = ["", *self.alphabet(), " "]
        return float(np.mean([_same("".join(alphabet[k] for k in answer), truth) for answer, truth in told]))

    def alphabet(self) -> list[str]:
        """The characters, which the file carries in its metadata."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        held = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        characters: str = held.get_modelmeta().custom_metadata_map["character"]
        return characters.splitlines()


def _same(read: str, truth: str) -> bool:
    # words are told apart by their letters: the net was not trained to tell how wide a gap is
    return read.replace(" ", "") == truth.replace(" ", "")


@dataclass(frozen=True)
class LineDirection(SampleCase):
    """Whether a line of text is upside down."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, int]:
        image = text_line(rng, self.cache, phrase(rng, int(rng.integers(1, 4))))
        turned = int(rng.integers(2))
        return {"x": fitted(image.rotate(180) if turned else image, 192)}, turned

    def answer(self, outputs: Sequence[Array]) -> int:
        return int(outputs[0][0].argmax())

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        return share_right(told)


@dataclass(frozen=True)
class PageDirection(SampleCase):
    """Which of four ways a page lies."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, int]:
        page, _ = drawn_page(rng, self, (int(rng.integers(480, 640)), int(rng.integers(640, 860))))
        quarter = int(rng.integers(4))
        page = page.rotate(-90 * quarter, expand=True)
        share = 256 / min(page.size)
        page = page.resize((round(page.width * share), round(page.height * share)), Image.Resampling.LANCZOS)
        left, top = (page.width - 224) // 2, (page.height - 224) // 2
        return {
            "x": chw(page.crop((left, top, left + 224, top + 224)), mean=IMAGENET[0], std=IMAGENET[1])[None]
        }, quarter

    def answer(self, outputs: Sequence[Array]) -> int:
        return int(outputs[0][0].argmax())

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        return share_right(told)


@dataclass(frozen=True)
class Detection(SampleCase):
    """PaddleOCR's text detection on pages of separate lines; F1 of boxes that overlap the true ones by half."""

    side: int = 736

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, Boxes]:
        page, boxes = drawn_page(rng, self, (self.side, self.side), apart=True)
        return {"x": chw(page, mean=HALF, std=HALF)[None]}, boxes

    def answer(self, outputs: Sequence[Array]) -> Boxes:
        return found_lines(outputs[0][0, 0])

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        return f1(told)


def found_lines(shares: np.ndarray, *, text: float = 0.3, least: float = 0.5, grow: float = 1.6) -> Boxes:
    """Boxes (K, 4) around connected areas of a map of text (H, W), grown as the areas were shrunk for training."""
    labels, _ = ndimage.label(shares > text)
    boxes = []
    for k, part in enumerate(ndimage.find_objects(labels), 1):
        rows, columns = part
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) < 3 or shares[part][labels[part] == k].mean() < least:
            continue
        edge = grow * height * width / (2 * (height + width))
        boxes.append((columns.start - edge, rows.start - edge, columns.stop + edge, rows.stop + edge))
    return np.array(boxes, dtype=float).reshape(-1, 4)


def drawn_page(
    rng: np.random.Generator, case: SampleCase, size: tuple[int, int], *, apart: bool = False
) -> tuple[Image.Image, Boxes]:
    """A page of text and the box of each line; with ``apart`` lines stand alone, as on a form."""
    ink, paper = colours(rng)
    page, boxes = Image.new("RGB", size, paper), []
    if apart:
        # soft patches, as of a sheet that lies in the sun and in shadows
        spots = np.array(paper) + rng.normal(0, 28, (4, 4, 3))
        page = Image.fromarray(np.clip(spots, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        ink = tuple(int(i + rng.uniform(0.2, 0.7) * (p - i)) for i, p in zip(ink, paper))
    draw, y = ImageDraw.Draw(page), int(rng.integers(16, 50))
    rows = int(rng.integers(13, 24))
    face = font(rng, case.cache, rows)
    while y < size[1] - 60:
        if apart or rng.random() < 0.15:
            rows = int(rng.integers(11, 34))
            face = font(rng, case.cache, rows)
        x = int(rng.integers(12, size[0] // 3)) if apart else size[0] // 12
        words = int(rng.integers(1, 4)) if apart else int(rng.integers(3, 11))
        text = phrase(rng, words)
        while face.getlength(text) > size[0] - x - 12 and " " in text:
            text = text.rsplit(" ", 1)[0]
        draw.text((x, y), text, fill=ink, font=face)
        left, top, right, bottom = draw.textbbox((x, y), text, font=face)
        edge = rows / 8  # people who label pages leave a margin around the ink
        boxes.append((left - edge, top - edge, right + edge, bottom + edge))
        y += int(rows * (rng.uniform(1.9, 3.2) if apart else rng.uniform(1.3, 1.5)))
    return worn(rng, page, noise=28.0 if apart else 14.0), np.array(boxes, dtype=float)
