"""Text as pictures: words, fonts of public packages, and the flaws of scans and photographs."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.real_files.fetch import Package

OFL = "SIL OFL 1.1"
FONT_PACKAGES = (
    Package("font-source-sans-pro", "0.0.1", OFL),
    Package("font-source-serif-pro", "0.0.1", OFL),
    Package("font-hanken-grotesk", "0.0.2", OFL),
    Package("font-manrope", "0.0.2", OFL),
    Package("font-caladea", "0.0.2", "Apache-2.0"),
)
# weights so thin or so heavy that no invoice is set in them, and a file that holds many weights at once
STRANGE = ("ExtraLight", "Black", "VariableFont")

WORDS = tuple(
    """
    account address amount animal answer april august balance before between bottle bridge building business
    camera center change chapter city client color common company contact copper corner country credit customer
    date december delivery department description detail discount doctor document due east electric engine
    equipment evening exchange expected family february figure filter finance flower following forest garden
    general glass green grocery group hardware harbour history holiday hospital house import include industry
    information invoice island item january journey july june kitchen label language learning letter library
    limited machine manager march market material measure member method minute model monday month morning mountain
    music nature network north november number october offer office order original package paper partner payment
    people period phone picture place please point position power present price print problem product project
    public purchase quality quantity question rate receipt record reference region report result river road sales
    sample saturday school season second section september service sheet shipping signal silver simple single
    social south special standard station storage street student summer sunday supply surface system table tax
    temperature thank thursday ticket time total track travel tuesday unit university update value vehicle village
    volume warehouse water weather wednesday week weight west window winter wood world year yellow
    """.split()  # noqa: SIM905
)


@cache
def font_files(cache: Path) -> tuple[Path, ...]:
    """Fonts to draw with, in a fixed order.

    Raises:
        NotThere: a package cannot be had.
    """
    found = [path for package in FONT_PACKAGES for path in package.unpacked(cache).rglob("*.[to]tf")]
    named = {path.stem: path for path in sorted(found, key=lambda path: (path.stem, path.suffix))}
    return tuple(path for stem, path in sorted(named.items()) if not any(word in stem for word in STRANGE))


def font(rng: np.random.Generator, cache: Path, size: int) -> ImageFont.FreeTypeFont:
    files = font_files(cache)
    return ImageFont.truetype(str(files[rng.integers(len(files))]), size)


def phrase(rng: np.random.Generator, words: int) -> str:
    """Words, numbers, amounts, dates and codes, with single spaces."""
    return " ".join(_word(rng) for _ in range(words))


def _word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.62:
        word = WORDS[rng.integers(len(WORDS))]
        return word.capitalize() if rng.random() < 0.3 else word.upper() if rng.random() < 0.1 else word
    if kind < 0.76:
        return str(rng.integers(1, 100000))
    if kind < 0.86:
        return f"{rng.integers(0, 2000)}.{rng.integers(0, 100):02d}"
    if kind < 0.93:
        return f"{rng.integers(1, 29):02d}/{rng.integers(1, 13):02d}/{rng.integers(1990, 2030)}"
    return "".join(rng.choice(list("ABCDEFGHJKLMNPRSTUVWXYZ"), 2)) + f"-{rng.integers(100, 10000)}"


def colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper: dark on light, one time in eight light on dark."""
    ink, paper = rng.integers(0, 90, 3), rng.integers(195, 256, 3)
    pair = tuple(int(v) for v in ink), tuple(int(v) for v in paper)
    return pair if rng.random() < 0.875 else pair[::-1]


def text_line(rng: np.random.Generator, cache: Path, text: str) -> Image.Image:
    """One line of text, cropped with a margin, with noise and blur as of a photograph."""
    size = int(rng.integers(24, 44))
    face, (ink, paper) = font(rng, cache, size), colours(rng)
    left, top, right, bottom = face.getbbox(text)
    pad = [int(v) for v in rng.integers(2, 9, 4)]
    image = Image.new("RGB", (int(right - left) + pad[0] + pad[1], int(bottom - top) + pad[2] + pad[3]), paper)
    ImageDraw.Draw(image).text((pad[0] - left, pad[2] - top), text, fill=ink, font=face)
    return worn(rng, image.rotate(rng.normal(0, 0.5), resample=Image.Resampling.BICUBIC, fillcolor=paper))


def worn(rng: np.random.Generator, image: Image.Image, *, blur: float = 0.9, noise: float = 14.0) -> Image.Image:
    """The picture out of focus and grainy, each by a random share of the most."""
    image = image.filter(ImageFilter.GaussianBlur(blur * rng.random()))
    values = np.asarray(image, dtype=np.float32)
    values = values + rng.normal(0, noise * rng.random(), values.shape)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def chw(image: Image.Image, *, mean: Sequence[float], std: Sequence[float], bgr: bool = True) -> np.ndarray:
    """The picture as (3, H, W) float32, scaled to 1, less ``mean``, over ``std``."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32)[..., :: -1 if bgr else 1] / 255
    return np.ascontiguousarray(((values - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1), dtype=np.float32)
