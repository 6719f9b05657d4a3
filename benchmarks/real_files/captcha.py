"""Captchas: characters read, and found, in images that are drawn to be hard to read."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.real_files.boxes import Boxes, f1, without_doubles
from benchmarks.real_files.case import Array, Feeds, SampleCase, share_right
from benchmarks.real_files.drawing import font, worn
from benchmarks.real_files.text import spans

# no characters that look like others once they are bent
SIGNS = "23456789abcdefghkmnpqrstuwxyzABCDEFGHJKLMNPRTUVY"


def drawn(
    rng: np.random.Generator, case: SampleCase, size: tuple[int, int], signs: str, rows: int
) -> tuple[Image.Image, Boxes]:
    """Turned characters side by side under lines and dots, and the box of each character's ink."""
    paper = tuple(int(v) for v in rng.integers(205, 256, 3))
    image, boxes = Image.new("RGB", size, paper), []
    step = (size[0] - 12) / len(signs)
    for k, sign in enumerate(signs):
        ink = tuple(int(v) for v in rng.integers(0, 140, 3))
        stamp = Image.new("L", (3 * rows, 3 * rows))
        ImageDraw.Draw(stamp).text((rows, rows), sign, fill=255, font=font(rng, case.cache, rows))
        stamp = stamp.rotate(rng.uniform(-22, 22), resample=Image.Resampling.BICUBIC)
        stamp = stamp.crop(stamp.getbbox())
        free = max(1, size[1] - stamp.height - 4)
        at = int(6 + k * step + max(0, step - stamp.width) * rng.random()), 2 + int(rng.integers(free))
        image.paste(ink, at, stamp)
        boxes.append((*at, at[0] + stamp.width, at[1] + stamp.height))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        ends = [(int(x), int(rng.integers(size[1]))) for x in (rng.integers(size[0] // 3), rng.integers(size[0]))]
        draw.line(ends, fill=tuple(int(v) for v in rng.integers(60, 200, 3)), width=1)
    for _ in range(int(rng.integers(10, 50))):
        at = int(rng.integers(size[0])), int(rng.integers(size[1]))
        draw.point(at, fill=tuple(int(v) for v in rng.integers(0, 200, 3)))
    return worn(rng, image, blur=0.6, noise=8.0), np.array(boxes, dtype=float)


def some_signs(rng: np.random.Generator, least: int, most: int) -> str:
    return "".join(rng.choice(list(SIGNS), int(rng.integers(least, most + 1))))


@dataclass(frozen=True)
class Captcha(SampleCase):
    """ddddocr's recognition: the share of captchas read without an error, capitals or not."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, str]:
        signs = some_signs(rng, 4, 5)
        image, _ = drawn(rng, self, (36 * len(signs), 56), signs, 34)
        grey = image.resize((int(image.width * 64 / image.height), 64), Image.Resampling.LANCZOS).convert("L")
        return {"input1": np.asarray(grey, dtype=np.float32)[None, None] / 255}, signs

    def answer(self, outputs: Sequence[Array]) -> list[int]:
        return spans(outputs[0][:, 0].argmax(-1))

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        alphabet = self.alphabet()
        return share_right([(_latin("".join(alphabet[k] for k in answer)), truth.lower()) for answer, truth in told])

    def alphabet(self) -> list[str]:
        """The characters in the order of the classes: a list in a source file of the package, which is not run."""
        source = (self.package.unpacked(self.cache) / "ddddocr/charsets.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHARSET_BETA":
                held: list[str] = ast.literal_eval(node.value)
                return held
        raise LookupError("the package has no list CHARSET_BETA")


def _latin(text: str) -> str:
    # the package can be told to answer with letters and digits only
    return "".join(sign for sign in text if sign.isascii() and sign.isalnum()).lower()


@dataclass(frozen=True)
class CharacterDetection(SampleCase):
    """ddddocr's detection: F1 of the boxes of characters to be clicked, scattered over an image."""

    side: int = 416

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, Boxes]:
        image, boxes = _scattered(rng, self, (344, 344), some_signs(rng, 3, 6))
        share = self.side / max(image.size)
        small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BILINEAR)
        held = np.full((self.side, self.side, 3), 114, np.float32)
        held[: small.height, : small.width] = np.asarray(small, dtype=np.float32)[..., ::-1]
        return {"images": np.ascontiguousarray(held.transpose(2, 0, 1))[None]}, boxes * share

    def answer(self, outputs: Sequence[Array]) -> Boxes:
        return yolox_boxes(outputs[0][0], self.side)

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        return f1(told)


def yolox_boxes(cells: np.ndarray, side: int, *, least: float = 0.1, most_overlap: float = 0.45) -> Boxes:
    """Boxes of YOLOX's cells (N, 4 + 1 + classes): centre and log size from a grid of strides 8, 16 and 32."""
    grids = [(np.stack(np.meshgrid(*[np.arange(side // s)] * 2), -1).reshape(-1, 2), s) for s in (8, 16, 32)]
    corner = np.concatenate([grid for grid, _ in grids])
    stride = np.concatenate([np.full((len(grid), 1), s) for grid, s in grids])
    middle, half = (cells[:, :2] + corner) * stride, np.exp(cells[:, 2:4]) * stride / 2
    scores = cells[:, 4] * cells[:, 5:].max(-1)
    kept = scores > least
    boxes = np.concatenate([middle - half, middle + half], -1)[kept]
    return without_doubles(boxes, scores[kept], most=most_overlap)


def _scattered(
    rng: np.random.Generator, case: SampleCase, size: tuple[int, int], signs: str
) -> tuple[Image.Image, Boxes]:
    """Characters at random places that do not touch, over a colourful background."""
    # a few random colours, enlarged: the soft patches of a photograph out of focus
    patches = rng.integers(40, 256, (5, 5, 3)).astype(np.uint8)
    image, boxes = Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC), list[tuple[int, ...]]()
    for sign in signs:
        rows = int(rng.integers(44, 72))
        stamp = Image.new("L", (3 * rows, 3 * rows))
        ImageDraw.Draw(stamp).text((rows, rows), sign, fill=255, font=font(rng, case.cache, rows), stroke_width=1)
        stamp = stamp.rotate(rng.uniform(-35, 35), resample=Image.Resampling.BICUBIC)
        stamp = stamp.crop(stamp.getbbox())
        for _ in range(50):
            x, y = (int(rng.integers(2, n - m - 2)) for n, m in zip(size, stamp.size))
            box = (x, y, x + stamp.width, y + stamp.height)
            if all(box[2] + 6 < a or c + 6 < box[0] or box[3] + 6 < b or d + 6 < box[1] for a, b, c, d in boxes):
                dark = np.asarray(image.crop(box).convert("L")).mean() > 127
                low, high = (0, 110) if dark else (150, 256)
                image.paste(tuple(int(v) for v in rng.integers(low, high, 3)), (x, y), stamp)
                boxes.append(box)
                break
    return worn(rng, image), np.array(boxes, dtype=float)
