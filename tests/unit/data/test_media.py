"""Clips and sounds are decoded within limits, and whatever is wrong with one is said."""

from __future__ import annotations

import io
import struct
import wave
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from isthmus.data.media import Limits, container_of, read_frames, read_sound
from isthmus.data.transforms import DecodeError
from isthmus.encoding import encode_clip
from isthmus.testing.clips import clip_bytes, sound_bytes, tone

RATE = 16_000


def peak_hertz(sound_S: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(sound_S * np.hanning(len(sound_S)))).argmax() * RATE / len(sound_S))


def empty_wav() -> bytes:
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    return sink.getvalue()


def mp3_frames(seconds: float, bit_rate: int) -> bytes:
    """A tone's frames alone, without tag and header frame."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as out:
        stream: Any = out.add_stream("libmp3lame", rate=44_100, layout="mono")
        stream.bit_rate = bit_rate
        for start in range(0, round(seconds * 44_100) - 1152, 1152):
            piece = np.ascontiguousarray(tone(440, seconds, 44_100)[:, start : start + 1152])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44_100, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def middles(count: int):
    return lambda seconds: [(n + 0.5) * seconds / count for n in range(count)]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "webm"])
def test_frames_and_the_track_of_a_clip(kind: str) -> None:
    data = clip_bytes(kind, hertz=700, channels=2)
    images, seconds = read_frames(data, middles(4))
    assert seconds == pytest.approx(0.8, abs=0.01)
    greys = [float(np.asarray(image).mean()) for image in images]
    assert greys == pytest.approx([10, 30, 50, 70], abs=3)  # the frames shown at 0.1, 0.3, 0.5 and 0.7 s
    assert images[0].mode == "RGB" and images[0].size == (32, 32)
    sound_S = read_sound(data, RATE, what="clip")
    assert sound_S.dtype == np.float32 and len(sound_S) / RATE == pytest.approx(0.8, abs=0.06)
    assert peak_hertz(sound_S) == pytest.approx(700, abs=5)


@pytest.mark.parametrize(
    ("kind", "rate", "channels"),
    [("wav", 11_025, 1), ("wav", 22_050, 2), ("flac", 44_100, 2), ("mp3", 44_100, 1), ("ogg", 48_000, 2)],
)
def test_sounds_of_odd_rates_and_channels_become_mono_of_one_rate(kind: str, rate: int, channels: int) -> None:
    sound_S = read_sound(sound_bytes(kind, rate=rate, channels=channels), RATE)
    assert len(sound_S) / RATE == pytest.approx(0.8, abs=0.06)
    assert peak_hertz(sound_S) == pytest.approx(440, abs=5)
    assert np.abs(sound_S).max() == pytest.approx(0.3, abs=0.05)  # the mean of equal channels is as loud as each


def test_only_the_first_seconds_are_decoded() -> None:
    assert len(read_sound(sound_bytes(), RATE, seconds=0.25)) == RATE // 4


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_clip_that_was_cut_is_refused(kind: str, share: float) -> None:
    data = clip_bytes(kind)
    data = data[: int(len(data) * share)]
    with pytest.raises(DecodeError, match=r"cut short|no format"):
        read_frames(data, middles(2))
        read_sound(data, RATE, what="clip")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("sound_s", [0.6, 2.4])
def test_tracks_of_different_length_are_whole(kind: str, sound_s: float) -> None:
    """Matroska's header has the length of the longer one alone."""
    frames = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 10, (12, 32, 32, 3))
    data = encode_clip(kind, frames, 10, tone(440, sound_s))
    assert read_frames(data, middles(2))[1] == pytest.approx(1.2, abs=0.02)
    assert len(read_sound(data, RATE, what="clip")) / RATE == pytest.approx(sound_s, abs=0.06)


def test_the_length_of_an_mp3_without_a_header_frame_is_not_guessed() -> None:
    low, high = mp3_frames(0.8, 32_000), mp3_frames(1.6, 160_000)
    sound_S = read_sound(low + high, RATE, limits=Limits(seconds=3.0))  # a guess from the first frame is eight
    assert 2.3 < len(sound_S) / RATE < 2.7


def test_frames_that_change_their_size_are_brought_to_the_first_one_s() -> None:
    def encoded(size: int, first: int) -> list[Any]:
        encoder: Any = av.CodecContext.create("libvpx", "w")
        encoder.width = encoder.height = size
        encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 10)
        packets = []
        for n in range(first, first + 4):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 20 * n, np.uint8), format="rgb24")
            frame.pts = n
            packets += encoder.encode(frame)
        return [*packets, *encoder.encode(None)]

    sink = io.BytesIO()
    with av.open(sink, "w", format="webm") as out:
        stream: Any = out.add_stream("libvpx", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for packet in [*encoded(64, 0), *encoded(32, 4)]:
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            out.mux(packet)
    images, _ = read_frames(sink.getvalue(), middles(8))
    assert {image.size for image in images} == {(64, 64)}
    assert float(np.asarray(images[-1]).mean()) == pytest.approx(140, abs=5)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_a_sound_that_was_cut_is_refused(kind: str) -> None:
    data = sound_bytes(kind, rate=48_000, seconds=1.5)
    with pytest.raises(DecodeError, match="cut short"):
        read_sound(data[: len(data) // 2], RATE)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(DecodeError, match="the clip has no sound track"):
        read_sound(clip_bytes(hertz=None), RATE, what="clip")
    with pytest.raises(DecodeError, match="has no samples: its length is zero"):
        read_sound(empty_wav(), RATE)
    with pytest.raises(DecodeError, match="the sound is empty"):
        read_sound(b"", RATE)
    with pytest.raises(DecodeError, match="no format that is known"):
        read_frames(b"no clip at all, only words", middles(2))
    with pytest.raises(DecodeError, match="has no frames, only sound"):
        read_frames(sound_bytes("ogg"), middles(2))


def test_limits_hold_before_anything_is_decoded() -> None:
    clip, sound = clip_bytes(), sound_bytes()
    for limits, reason in [
        (Limits(bytes=1000), "bytes is larger than the limit of 1000"),
        (Limits(seconds=0.5), "0.8 seconds is longer than the limit of 0.5"),
        (Limits(pixels=32 * 32 - 1), "32x32 pixels is larger than the limit of 1023"),
        (Limits(frames=7), "more than the limit of 7 frames"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            read_frames(clip, middles(2), limits=limits)
    with pytest.raises(DecodeError, match=r"0\.8 seconds is longer than the limit of 0.5"):
        read_sound(sound, RATE, limits=Limits(seconds=0.5))
    with pytest.raises(DecodeError, match="48000 Hz"):
        read_sound(sound, RATE, limits=Limits(rate=44_100))
    read_frames(clip, middles(2), limits=Limits(seconds=0.8, pixels=32 * 32, frames=8))


def test_a_header_that_lies_about_the_seconds_is_counted_out() -> None:
    data = bytearray(clip_bytes("mkv"))
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's duration, in milliseconds
    assert struct.unpack_from(">d", data, at)[0] == pytest.approx(800, abs=60)
    struct.pack_into(">d", data, at, 100.0)
    assert len(read_sound(bytes(data), RATE)) > 0.7 * RATE
    for work in (
        lambda limits: read_sound(bytes(data), RATE, limits=limits),
        lambda limits: read_frames(bytes(data), middles(2), limits=limits),
    ):
        with pytest.raises(DecodeError, match=r"longer than the limit of 0\.5"):
            work(Limits(seconds=0.5))


def test_a_playlist_opens_nothing(tmp_path) -> None:
    """FFmpeg would open what a playlist or a concatenation script names."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip_bytes())
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n", f"ffconcat version 1.0\nfile {secret}\n"):
        assert container_of(text.encode()) == ""
        with pytest.raises(DecodeError, match="no format that is known"):
            read_frames(text.encode(), middles(1))
