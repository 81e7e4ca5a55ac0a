"""Log-mel spectra of sounds, cut into square patches: what an audio encoder reads.

The shape of the input is that of the Audio Spectrogram Transformer (Gong et al. 2021): 16 kHz, windows of 25 ms every
10 ms, 128 mel bands, patches of 16 x 16. What that paper leaves to its library is our completion: a Hann window, a
transform of 1024 points (of 512, some of the lowest of 128 bands would hold no bin at all), the natural logarithm of
the power plus 1e-6, and fixed numbers that bring it near zero.

Shape letters: S samples, F windows, K mel bands, N patches, P values of a patch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

RATE = 16_000
WINDOW, STEP, POINTS = 400, 160, 1024
BANDS, PATCH = 128, 16
PATCH_VALUES = PATCH * PATCH
ROWS = BANDS // PATCH
"""Patches above one another at one time."""

STEP_S = PATCH * STEP / RATE
"""Seconds from one column of patches to the next: 0.16."""

_FLOOR = 1e-6
_CENTRE, _SPREAD = -7.0, 4.0


class Patches(NamedTuple):
    """Of a sound, column by column, the low bands first: float32 values, and bool, False behind its end."""

    values_NP: np.ndarray
    mask_N: np.ndarray


def columns_of(seconds: float) -> int:
    """Whole columns of patches in so many seconds, at least one."""
    return max(1, int(seconds / STEP_S + 1e-9))


def patches(sound_S: np.ndarray, columns: int) -> Patches:
    """The first ``columns`` x 0.16 seconds of a sound as patches [columns * 8, 256]; what is missing is silence."""
    values_FK = log_mel(sound_S)[: columns * PATCH]
    there = -(-len(values_FK) // PATCH)
    out_FK = np.full((columns * PATCH, BANDS), (np.log(_FLOOR) - _CENTRE) / _SPREAD, np.float32)
    out_FK[: len(values_FK)] = values_FK
    values = out_FK.reshape(columns, PATCH, ROWS, PATCH).transpose(0, 2, 1, 3)
    mask_N = np.repeat(np.arange(columns) < there, ROWS)
    return Patches(np.ascontiguousarray(values).reshape(columns * ROWS, PATCH_VALUES), mask_N)


def log_mel(sound_S: np.ndarray) -> np.ndarray:
    """float32 [F, 128] of a sound at 16 kHz; the last window is filled up with silence, so F is at least 1."""
    windows = max(1, 1 + -(-(len(sound_S) - WINDOW) // STEP))
    padded = np.zeros((windows - 1) * STEP + WINDOW, np.float32)
    padded[: min(len(sound_S), len(padded))] = sound_S[: len(padded)]
    frames_FS = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP] * _hann()
    power_F = np.abs(np.fft.rfft(frames_FS, POINTS)) ** 2 / WINDOW
    mel_FK = power_F @ mel_filters()
    return ((np.log(mel_FK + _FLOOR) - _CENTRE) / _SPREAD).astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangles of equal height on the mel scale, 2595 log10(1 + f/700), from 0 to 8 kHz; float64 [513, 128]."""
    edges = 700 * (10 ** (np.linspace(0, _mel(RATE / 2), BANDS + 2) / 2595) - 1)
    bins = np.arange(POINTS // 2 + 1)[:, None] * RATE / POINTS
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling))


def _mel(frequency: float) -> float:
    return 2595 * float(np.log10(1 + frequency / 700))


@functools.cache
def _hann() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
