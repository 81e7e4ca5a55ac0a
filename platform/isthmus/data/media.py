"""Frames of clips and samples of sounds, with guards. Decoding is FFmpeg's, by way of PyAV, on bytes in memory.

What FFmpeg opens by itself reaches further than a file: playlists name other files and addresses, and two hundred
decoders read what nobody uses. Here the container is told by its first bytes and named, no protocol may be opened, and
only the codecs of :data:`CODECS` are decoded. Sizes and durations are compared with :class:`Limits` before anything of
that size is allocated, and counted again while decoding, since a header may lie.

Shape letters: S samples of a sound, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from isthmus.data.transforms import MAX_BYTES, DecodeError, Header
from isthmus.encoding import pyav

CODECS = frozenset(
    {
        *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg"),
        *("aac", "mp3", "mp3float", "flac", "opus", "libopus", "vorbis", "libvorbis"),
        *("pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_mulaw"),
    }
)  # fmt: skip
"""Decoders by FFmpeg's names."""

_MOST_CHUNKS = 10_000
_SLACK_S, _SLACK_SHARE = 0.25, 0.05
"""What may be missing of the duration that a file's header names: encoders round it, and pad the last packet."""


@dataclass(frozen=True)
class Limits:
    """What is decoded at most. More than any of these is refused, not cut.

    Attributes:
        bytes: of an encoded file.
        seconds: of a clip or a sound.
        pixels: of one frame, width x height.
        frames: of a clip.
        channels, rate: of a sound.
    """

    bytes: int = MAX_BYTES
    seconds: float = 600.0
    pixels: int = 4096 * 2304
    frames: int = 36_000
    channels: int = 16
    rate: int = 384_000


LIMITS = Limits()


def container_of(data: bytes) -> str:
    """FFmpeg's name of a container by its first bytes; "" for one that is not read."""
    if data[4:8] in (b"ftyp", b"moov", b"wide", b"mdat", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"OggS":
        return "ogg"
    if data[:4] == b"fLaC":
        return "flac"
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xE6 in (0xE2, 0xE4, 0xE6)):
        return "mp3"
    return ""


def read_sound(
    data: bytes, rate: int, *, what: str = "sound", seconds: float | None = None, limits: Limits = LIMITS
) -> np.ndarray:
    """The sound of a sound file, or of a clip's first sound track, float32 [S], channels averaged.

    Args:
        data: the file's bytes.
        rate: samples per second of the answer; whatever the file has is resampled.
        what: what the reasons call the file.
        seconds: only the first so many; the rest is neither decoded nor found to be damaged.

    Raises:
        DecodeError: empty, unknown, without a sound, above a limit, cut short or damaged.
    """
    with _opened(data, what, limits) as container:
        if not container.streams.audio:
            raise DecodeError(f"the {what} has no sound track")
        stream = container.streams.audio[0]
        codec = _allowed(stream, what)
        if not 0 < codec.sample_rate <= limits.rate or not 0 < codec.channels <= limits.channels:
            raise DecodeError(f"the {what} of {codec.sample_rate} Hz and {codec.channels} channels is not read")
        said = _said(container, stream, data)
        _within(said, limits, what)
        wanted = None if seconds is None else round(seconds * rate)
        sound_S, whole = _samples(container, stream, rate, wanted, round(limits.seconds * rate), what)
    if not len(sound_S):
        raise DecodeError(f"the {what} has no samples: its length is zero")
    if whole:
        _not_cut(len(sound_S) / rate, said, what)
    if not np.isfinite(sound_S).all():
        raise DecodeError(f"the {what} holds values that are no numbers")
    return sound_S


def read_frames(
    data: bytes, times: Callable[[float], Sequence[float]], *, limits: Limits = LIMITS
) -> tuple[list[Image.Image], float]:
    """Some frames of a clip as RGB images, and its duration in seconds.

    Args:
        data: the file's bytes.
        times: duration in seconds -> ascending times; each gives the frame that is shown then.

    Raises:
        DecodeError: empty, unknown, without frames, above a limit, cut short or damaged.
    """
    start, seconds = _measure(data, limits)
    wanted = list(times(seconds))
    images: list[Image.Image] = []
    with _opened(data, "clip", limits) as container:
        stream = container.streams.video[0]
        # A later header may name another size. FFmpeg counts a frame's padding too, hence the room.
        stream.codec_context.options = {"max_pixels": str(2 * limits.pixels + (1 << 16))}
        shown: Any = None
        for frame in container.decode(stream):
            if frame.width * frame.height > limits.pixels:
                raise _too_wide(frame.width, frame.height, limits)
            at = 0.0 if frame.time is None else frame.time - start
            while shown is not None and len(images) < len(wanted) and at > wanted[len(images)] + 1e-6:
                images.append(_image(shown))
            if len(images) == len(wanted):
                break
            shown = frame
        if shown is None:
            raise DecodeError("no frame of the clip can be decoded")
        images += [_image(shown)] * (len(wanted) - len(images))
    # Recordings of calls change their size on the way; one crop has to fit all frames.
    return [image if image.size == images[0].size else image.resize(images[0].size) for image in images], seconds


def clip_header(data: bytes, limits: Limits = LIMITS) -> Header:
    """Container and size in pixels of a clip; nothing is decoded.

    Raises:
        DecodeError: empty, unknown, without frames, or above a limit.
    """
    with _opened(data, "clip", limits) as container:
        if not container.streams.video:
            raise DecodeError("the clip has no frames, only sound")
        codec = _allowed(container.streams.video[0], "clip")
        return Header(container_of(data).upper(), codec.width, codec.height)


def _measure(data: bytes, limits: Limits) -> tuple[float, float]:
    """(time of the first frame, duration) of a clip by its packets; nothing is decoded."""
    with _opened(data, "clip", limits) as container:
        if not container.streams.video:
            raise DecodeError("the clip has no frames, only sound")
        stream = container.streams.video[0]
        codec = _allowed(stream, "clip")
        if codec.width < 1 or codec.height < 1:
            raise DecodeError("the clip has no area")
        if codec.width * codec.height > limits.pixels:
            raise _too_wide(codec.width, codec.height, limits)
        said = _said(container, stream, data)
        _within(said, limits, "clip")
        first, last, count = None, 0.0, 0
        for packet in container.demux(stream):
            if packet.size == 0 or packet.pts is None:
                continue
            count += 1
            if count > limits.frames:
                raise DecodeError(f"the clip has more than the limit of {limits.frames} frames")
            begin = float(packet.pts * packet.time_base)
            first = begin if first is None else min(first, begin)
            last = max(last, begin + float((packet.duration or 0) * packet.time_base))
        if first is None:
            raise DecodeError("the clip has no frames")
        _within(last - first, limits, "clip")
        _not_cut(last - first, said, "clip")
        return first, last - first


@contextmanager
def _opened(data: bytes, what: str, limits: Limits) -> Iterator[Any]:
    """The container of ``data``; whatever FFmpeg raises inside becomes a :class:`DecodeError`."""
    if not data:
        raise DecodeError(f"the {what} is empty")
    if len(data) > limits.bytes:
        raise DecodeError(f"the {what} of {len(data)} bytes is larger than the limit of {limits.bytes}")
    kind = container_of(data)
    if not kind:
        raise DecodeError(f"the bytes of the {what} are of no format that is known")
    if not _ends(data, kind):
        raise DecodeError(f"the {what} is cut short: its container names more than the {len(data)} bytes there")
    av = pyav()
    try:
        with av.open(
            io.BytesIO(data), format=kind, options={"protocol_whitelist": "none"}, metadata_errors="ignore"
        ) as container:
            yield container
    except DecodeError:
        raise
    except Exception as error:  # FFmpegError, and on hostile bytes ValueError, MemoryError, OverflowError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(f"the {what} is damaged or cut short: {reason}") from error


def _allowed(stream: Any, what: str) -> Any:
    codec = stream.codec_context
    if codec is None or codec.name not in CODECS:
        raise DecodeError(f"the {what} is encoded as {getattr(codec, 'name', 'something unknown')}, which is not read")
    codec.thread_count = 1  # samples are decoded side by side, each by one thread
    return codec


def _said(container: Any, stream: Any, data: bytes) -> float | None:
    """Seconds that the header names of this track, or None where it names none.

    Matroska names those of the whole file, which another track may fill alone; its end is checked to the byte. For an
    MP3 without a header frame FFmpeg multiplies the first frame's bit rate by the bytes: a guess.
    """
    if "matroska" in container.format.name or (container.format.name == "mp3" and not _counts_its_frames(data)):
        return None
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _counts_its_frames(data: bytes) -> bool:
    """Whether an MP3's first frame is a header with their number (Xing's, LAME's or Fraunhofer's)."""
    start = 0
    if data[:3] == b"ID3" and len(data) > 10:  # a length of four times seven bits
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    first = data[start : start + 1024]
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))


def _within(seconds: float | None, limits: Limits, what: str) -> None:
    if seconds is not None and seconds > limits.seconds:
        raise DecodeError(f"the {what} of {seconds:.1f} seconds is longer than the limit of {limits.seconds:g}")


def _not_cut(found: float, said: float | None, what: str) -> None:
    if said is not None and found < said - max(_SLACK_S, _SLACK_SHARE * said):
        raise DecodeError(f"the {what} is cut short: {found:.2f} of {said:.2f} seconds")


def _too_wide(width: int, height: int, limits: Limits) -> DecodeError:
    return DecodeError(f"the clip of {width}x{height} pixels is larger than the limit of {limits.pixels}")


def _samples(
    container: Any, stream: Any, rate: int, wanted: int | None, most: int, what: str
) -> tuple[np.ndarray, bool]:
    """Float32 [S] at ``rate``, and whether the sound was decoded to its end."""
    resampler: Any = None
    parts: list[np.ndarray] = []
    count = 0

    def take(frame: Any) -> None:
        nonlocal count
        for out in resampler.resample(frame):
            # The mean, not FFmpeg's mix to mono, which adds channels with weights and can be louder than either.
            parts.append(out.to_ndarray().mean(0, dtype=np.float32))
            count += len(parts[-1])

    whole = True
    for frame in container.decode(stream):
        if resampler is None:
            resampler = pyav().AudioResampler(format="fltp", layout=frame.layout, rate=rate)
        take(frame)
        if count > most:
            raise DecodeError(f"the {what} is longer than the limit of {most / rate:g} seconds")
        if wanted is not None and count >= wanted:
            whole = False
            break
    if resampler is not None and whole:
        take(None)
    sound_S = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return sound_S[:wanted], whole


def _image(frame: Any) -> Image.Image:
    """Upright RGB; phones store clips lying, with a note how to turn them."""
    image: Image.Image = frame.to_image()
    turned = round(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turned, expand=True) if turned % 360 else image


def _ends(data: bytes, kind: str) -> bool:
    """Whether a file is all there, as far as its container says how long it is; FFmpeg reads on until bytes run out."""
    if kind == "mov":
        return _chunks_end(data, 0, lambda at: _box(data, at))
    if kind == "wav":
        return _chunks_end(data, 12, lambda at: _riff_chunk(data, at))
    if kind == "ogg":
        at = data.rfind(b"OggS")
        segments = data[at + 26] if at + 27 <= len(data) else 256
        table = data[at + 27 : at + 27 + segments]
        return len(table) == segments and at + 27 + segments + sum(table) <= len(data)
    if kind == "matroska":
        header = _sized(data, 4)
        segment = None if header is None else _sized(data, header + 4)
        return segment is None or segment <= len(data)
    return True


def _chunks_end(data: bytes, at: int, step: Callable[[int], int]) -> bool:
    """Whether chunks, one behind the other, end within the file; of very many the rest is not looked at."""
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(data):
            break
        at += max(8, step(at))
    return at <= len(data)


def _box(data: bytes, at: int) -> int:
    """Bytes of an MP4 box; of size 0 it goes to the end, of size 1 the real one follows."""
    size, long = (int.from_bytes(data[at + begin : at + end], "big") for begin, end in ((0, 4), (8, 16)))
    return {0: len(data) - at, 1: long}.get(size, size)


def _riff_chunk(data: bytes, at: int) -> int:
    """Bytes of a WAV chunk. A recorder that could not go back leaves 0 or the largest number for its samples."""
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] == b"data" and size in (0, 0xFFFFFFFF):
        return len(data) - at
    return min(8 + size + size % 2, max(8 + size, len(data) - at))  # the last padding byte is often left out


def _sized(data: bytes, at: int) -> int | None:
    """Where a Matroska element ends whose size stands at ``at``; None where it has none."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return None if width > 8 or value == (1 << 7 * width) - 1 else at + width + value
