"""The log-mel spectrum against its formula, and the patches against the spectrum."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.data.spectrum import BANDS, columns_of, log_mel, mel_filters, patches

RATE = 16_000


def reference(sound_S: np.ndarray, frame: int) -> np.ndarray:
    """One window by the sums of the definition, in float64: nothing of NumPy's transform, nothing of our filters."""
    window = np.zeros(400)
    part = sound_S[160 * frame : 160 * frame + 400]
    window[: len(part)] = part
    window *= np.sin(np.pi * np.arange(400) / 400) ** 2
    angle = 2 * np.pi * np.outer(np.arange(513), np.arange(400)) / 1024
    power = ((np.cos(angle) @ window) ** 2 + (np.sin(angle) @ window) ** 2) / 400
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130)
    hertz = [700 * (10 ** (m / 2595) - 1) for m in mel]
    out = []
    for band in range(128):
        left, top, right = hertz[band : band + 3]
        total = 0.0
        for bin, value in enumerate(power):
            f = bin * 16000 / 1024
            total += value * max(0.0, min((f - left) / (top - left), (right - f) / (right - top)))
        out.append((np.log(total + 1e-6) + 7) / 4)
    return np.array(out)


def test_every_band_hears_something() -> None:
    assert (mel_filters().sum(0) > 0).all() and mel_filters().shape == (513, BANDS)


def test_the_spectrum_is_the_formula() -> None:
    sound_S = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    found_FK = log_mel(sound_S)
    assert found_FK.shape == (5, BANDS) and found_FK.dtype == np.float32  # ceil((1000 - 400) / 160) + 1
    for frame in (0, 4):
        np.testing.assert_allclose(found_FK[frame], reference(sound_S, frame), atol=2e-5)


def test_a_tone_stands_in_its_band_and_silence_in_none() -> None:
    wave_S = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    band = 2595 * np.log10(1 + 1000 / 700) / (2595 * np.log10(1 + 8000 / 700)) * 129 - 1
    assert log_mel(wave_S.astype(np.float32))[10].argmax() == pytest.approx(band, abs=1)
    assert np.ptp(log_mel(np.zeros(RATE, np.float32))) == 0


def test_patches_are_the_spectrum_cut_up_with_a_mask() -> None:
    sound_S = np.random.default_rng(1).normal(0, 0.1, RATE // 2).astype(np.float32)
    values_FK = log_mel(sound_S)  # 49 windows: three columns and one window of a fourth
    found = patches(sound_S, 6)
    assert found.values_NP.shape == (48, 256) and found.mask_N.tolist() == [True] * 32 + [False] * 16
    np.testing.assert_array_equal(found.values_NP[8 + 2].reshape(16, 16), values_FK[16:32, 32:48])
    np.testing.assert_array_equal(found.values_NP[24].reshape(16, 16)[0], values_FK[48, :16])
    assert np.ptp(found.values_NP[32:]) == 0
    assert patches(sound_S, 2).mask_N.all() and columns_of(10.0) == 62 and columns_of(0.16) == 1
