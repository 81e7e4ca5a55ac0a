"""Arrays to clips and sounds, by FFmpeg through PyAV: the same arrays give the same bytes with the same library.

Shape letters: T frames, H height, W width, C channels, S samples.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from isthmus.errors import ConfigError


class Codecs(NamedTuple):
    """FFmpeg's names of a container and of what is in it; the sound's sample rate is one that its encoder takes."""

    container: str
    video: str
    audio: str


CODECS = {
    "mp4": Codecs("mp4", "libx264", "aac"),
    "mov": Codecs("mov", "libx264", "aac"),
    "mkv": Codecs("matroska", "libx264", "aac"),
    "webm": Codecs("webm", "libvpx-vp9", "libopus"),
    "wav": Codecs("wav", "", "pcm_s16le"),
    "flac": Codecs("flac", "", "flac"),
    "mp3": Codecs("mp3", "", "libmp3lame"),
    "ogg": Codecs("ogg", "", "libopus"),
}
"""By file name ending."""

_FAST = {"libx264": {"preset": "veryfast"}, "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"}}
_EXACT = {"fflags": "bitexact"}
"""No random numbers and no names of versions in the file."""


def pyav() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Clips and sounds are read and written by PyAV, which is not installed.", "pip install 'isthmus[media]'"
        ) from error
    return av


def encode_clip(
    kind: str, frames_THWC: np.ndarray, fps: int | Fraction, sound_CS: np.ndarray | None = None, rate: int = 48_000
) -> bytes:
    """A clip of uint8 frames, with a sound track where one is given.

    Args:
        kind: ``mp4``, ``mov``, ``mkv`` or ``webm``. sound_CS: float32, one or two channels.
    """
    names, sink = CODECS[kind], io.BytesIO()
    with pyav().open(sink, "w", format=names.container, options=_EXACT) as container:
        video = container.add_stream(names.video, rate=fps)
        video.height, video.width = frames_THWC.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.options = _FAST.get(names.video, {})
        video.codec_context.thread_count = 1  # or the bytes depend on the machine's cores
        audio = _sound_stream(container, names.audio, sound_CS, rate) if sound_CS is not None else None
        for number, frame_HWC in enumerate(frames_THWC):
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            _write_sound(container, audio, sound_CS, rate)
    return sink.getvalue()


def encode_sound(kind: str, sound_CS: np.ndarray, rate: int = 48_000) -> bytes:
    """A sound file, ``wav``, ``flac``, ``mp3`` or ``ogg``, of float32 [C, S] with one or two channels."""
    names, sink = CODECS[kind], io.BytesIO()
    with pyav().open(sink, "w", format=names.container, options=_EXACT) as container:
        _write_sound(container, _sound_stream(container, names.audio, sound_CS, rate), sound_CS, rate)
    return sink.getvalue()


def _sound_stream(container: Any, codec: str, sound_CS: np.ndarray, rate: int) -> Any:
    return container.add_stream(codec, rate=rate, layout="mono" if len(sound_CS) == 1 else "stereo")


def _write_sound(container: Any, stream: Any, sound_CS: Any, rate: int) -> None:
    context = stream.codec_context
    if sound_CS.shape[1]:
        frame = pyav().AudioFrame.from_ndarray(
            np.ascontiguousarray(sound_CS, np.float32), format="fltp", layout=context.layout.name
        )
        frame.sample_rate, frame.pts = rate, 0
        fitted = pyav().AudioResampler(
            format=context.format.name,
            layout=context.layout.name,
            rate=context.sample_rate,
            frame_size=context.frame_size,
        )
        for piece in (*fitted.resample(frame), *fitted.resample(None)):
            container.mux(stream.encode(piece))
    container.mux(stream.encode())
