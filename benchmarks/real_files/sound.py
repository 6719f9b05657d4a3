"""Sounds: where somebody speaks, and which notes are played."""

import io
import shutil
import subprocess
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from scipy import signal

from benchmarks.real_files.case import Array, Case, Feeds, Run, SampleCase, session
from benchmarks.real_files.drawing import phrase
from benchmarks.real_files.fetch import NotThere

RATE = 16000  # samples a second that the net of voice activity takes
CHUNK, CONTEXT = 512, 64
VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb+f4", "en-us+m3", "de", "fr", "es+f1", "it", "pt+m5")
AUDIBLE = 0.05  # share of a clip's loudest chunk above which its speech counts as speech
SILENT = 0.002  # and below which it counts as none; what is between is not scored


@cache
def spoken(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Speech of a synthesiser at 16 kHz, (samples,), within -1 and 1.

    Raises:
        NotThere: espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise NotThere("espeak-ng is not installed, which speaks the sentences: apt-get install espeak-ng")
    what = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), text]
    with wave.open(io.BytesIO(_finished(subprocess.run(what, capture_output=True, check=True).stdout))) as file:
        frames = np.frombuffer(file.readframes(10**9), np.int16).astype(np.float32) / 32768
        return signal.resample_poly(frames, RATE, file.getframerate()).astype(np.float32)


def _finished(content: bytes) -> bytes:
    # a wave written to a pipe has no length in its head, as it was not known yet
    size = len(content) - 44
    return content[:4] + (size + 36).to_bytes(4, "little") + content[8:40] + size.to_bytes(4, "little") + content[44:]


def noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise of loudness 1: white to brown, or the hum of a machine with some of it."""
    shape = np.maximum(np.arange(count // 2 + 1), 8) ** -rng.uniform(0, 1.0)
    random = np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * shape, count)
    random /= random.std()
    if rng.random() < 0.4:
        base, time = rng.uniform(45, 180), np.arange(count) / RATE
        hum = sum(np.sin(2 * np.pi * base * k * time + rng.uniform(0, 6)) / k for k in range(1, 7))
        random = 0.6 * random + 0.8 * hum / np.std(hum)
    return random


@dataclass(frozen=True)
class Voice(Case):
    """Silero's voice activity: the area under the ROC curve over chunks of 32 ms; the net carries its state along."""

    seconds: float = 8.0

    def clip(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Samples, and per chunk 1 for speech, 0 for none and -1 for neither."""
        count = int(self.seconds * RATE) // CHUNK * CHUNK
        clean, at = np.zeros(count, np.float32), int(rng.uniform(0.3, 1.2) * RATE)
        while at < count:
            voice = VOICES[rng.integers(len(VOICES))]
            said = spoken(phrase(rng, int(rng.integers(2, 5))), voice, *map(int, rng.integers((120, 30), (190, 71))))
            said = said[: count - at]
            clean[at : at + len(said)] += said
            at += len(said) + int(rng.uniform(0.5, 2.0) * RATE)
        loud = np.sqrt((clean.reshape(-1, CHUNK) ** 2).mean(1))
        truth = np.where(loud > AUDIBLE * loud.max(), 1, np.where(loud < SILENT * loud.max(), 0, -1))
        level = np.sqrt((clean**2).mean()) * 10 ** (-rng.uniform(0, 18) / 20)
        mixed = clean + level * noise(rng, count)
        return (mixed * rng.uniform(0.1, 0.9) / np.abs(mixed).max()).astype(np.float32), truth

    def chunks(self, run: Run, samples: np.ndarray) -> tuple[list[Feeds], list[float]]:
        """Inputs and answers of one clip, chunk by chunk."""
        state, before = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
        given, told = [], []
        for chunk in samples.reshape(-1, CHUNK):
            feeds = {"input": np.concatenate([before, chunk])[None], "state": state, "sr": np.array(RATE, np.int64)}
            share, state = run(feeds)
            before = chunk[-CONTEXT:]
            given.append(feeds)
            told.append(float(share[0, 0]))
        return given, told

    def feeds(self, seed: int, n: int) -> list[Feeds]:
        """Chunks from all over some clips, with the states that the dense file has there."""
        rng, run = np.random.default_rng(seed), session(self.path)
        clips = [self.chunks(run, self.clip(rng)[0])[0] for _ in range(max(1, n // 32))]
        every = [feeds for clip in clips for feeds in clip]
        return [every[k] for k in sorted(rng.choice(len(every), n, replace=False))]

    def score(self, run: Run, seed: int, n: int) -> float:
        shares, truths = list[float](), list[int]()
        for samples, truth in _clips(self, seed, n):
            shares += self.chunks(run, samples)[1]
            truths += truth.tolist()
        return area_under_curve(np.array(shares), np.array(truths))


@lru_cache(maxsize=2)
def _clips(case: Voice, seed: int, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [case.clip(rng) for _ in range(n)]


def area_under_curve(shares: np.ndarray, truth: np.ndarray) -> float:
    """Chance that a positive has a greater share than a negative; ties count half."""
    if not np.isfinite(shares).all():
        return 0.0
    positive, negative = shares[truth == 1], np.sort(shares[truth == 0])
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / (2 * len(negative)))


NOTE_RATE, NOTE_SAMPLES, NOTE_FRAMES = 22050, 43844, 172
LOWEST = 27.5  # Hz of the first of the 88 keys
NOTE_THRESHOLD = 0.3  # share above which the package takes a frame for a note


@dataclass(frozen=True)
class Notes(SampleCase):
    """Basic Pitch: which of 88 notes sound in each frame of two seconds; F1 over frames and notes."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, np.ndarray]:
        sound, truth = np.zeros(NOTE_SAMPLES), np.zeros((NOTE_FRAMES, 88), bool)
        fade, strength = rng.uniform(0.6, 2.5), rng.uniform(0.3, 0.8)
        for _ in range(int(rng.integers(3, 9))):
            key, length = int(rng.integers(15, 68)), rng.uniform(0.25, 0.9)
            first = rng.uniform(0, 2 - length)
            start, stop = int(first * NOTE_RATE), min(NOTE_SAMPLES, int((first + length) * NOTE_RATE))
            sound[start:stop] += _tone(LOWEST * 2 ** (key / 12), stop - start, fade, strength)
            truth[int(first * NOTE_FRAMES / 2) : int((first + length) * NOTE_FRAMES / 2), key] = True
        sound += rng.normal(0, 0.003 * rng.random(), NOTE_SAMPLES)
        sound *= rng.uniform(0.2, 0.9) / np.abs(sound).max()
        return {"serving_default_input_2:0": sound.astype(np.float32)[None, :, None]}, truth

    def answer(self, outputs: Sequence[Array]) -> np.ndarray:
        # of the outputs in the file's order (onsets, notes, contours) the second has the notes
        return np.asarray(outputs[1][0] > NOTE_THRESHOLD)

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        hits = sum(int((found & truth).sum()) for found, truth in told)
        return 2 * hits / max(1, sum(int(found.sum() + truth.sum()) for found, truth in told))


def _tone(pitch: float, count: int, fade: float, strength: float) -> np.ndarray:
    """A plucked string: overtones that fade, the higher the sooner."""
    time = np.arange(count) / NOTE_RATE
    parts = [k for k in range(1, 13) if k * pitch < 0.45 * NOTE_RATE]
    tone = sum(
        strength ** (k - 1) * np.exp(-fade * k**0.5 * time) * np.sin(2 * np.pi * k * pitch * time) for k in parts
    )
    edge = min(count // 2, 200)
    ramp = np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / edge)
    return np.asarray(tone * ramp)
