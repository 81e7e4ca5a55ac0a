"""Small clips and sounds to test with, and a folder of shards that holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from isthmus.encoding import encode_clip, encode_sound
from isthmus.testing.shards import image_bytes, write_tar


def tone(hertz: float, seconds: float = 0.8, rate: int = 48_000, channels: int = 1, level: float = 0.3) -> np.ndarray:
    """float32 [C, S]; ``level`` 0 is silence."""
    wave_S = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave_S[None].astype(np.float32), channels, axis=0)


def clip_bytes(
    kind: str = "mp4",
    *,
    hertz: float | None = 440,
    seconds: float = 0.8,
    size: int = 32,
    seed: int = 0,
    channels: int = 1,
) -> bytes:
    """An encoded clip at 10 frames a second, frame t of the grey 10 t; ``hertz`` None leaves the sound track out."""
    frames = np.arange(round(seconds * 10), dtype=np.uint8)[:, None, None, None] * 10 + np.uint8(seed)
    sound = None if hertz is None else tone(hertz, seconds, channels=channels)
    return encode_clip(kind, np.broadcast_to(frames, (len(frames), size, size, 3)), 10, sound)


def sound_bytes(
    kind: str = "wav",
    *,
    hertz: float = 440,
    seconds: float = 0.8,
    rate: int = 48_000,
    channels: int = 1,
    level: float = 0.3,
) -> bytes:
    """An encoded tone."""
    return encode_sound(kind, tone(hertz, seconds, rate, channels, level), rate)


def make_clips(folder: Path, samples: int, per_shard: int = 8, *, sound: str = "", seconds: float = 0.8) -> Path:
    """Shards of clips, each with a tone of its own: in the clip's track, or in a file of the kind ``sound``."""
    for first in range(0, samples, per_shard):
        members: dict[str, bytes] = {}
        for number in range(first, min(samples, first + per_shard)):
            hertz = 200 + 50 * number
            key = f"c{number:05d}"
            members[f"{key}.mp4"] = clip_bytes(hertz=None if sound else hertz, seconds=seconds, seed=number)
            if sound:
                members[f"{key}.{sound}"] = sound_bytes(sound, hertz=hertz, seconds=seconds)
            members[f"{key}.txt"] = f"clip number {number}\n".encode()
        write_tar(folder / f"shard-{first // per_shard:05d}.tar", members)
    return folder


def make_heard_images(folder: Path, samples: int, per_shard: int = 8, *, captions: bool = True) -> Path:
    """Shards of images, each with a sound file of its own."""
    for first in range(0, samples, per_shard):
        members: dict[str, bytes] = {}
        for number in range(first, min(samples, first + per_shard)):
            key = f"h{number:05d}"
            members[f"{key}.png"] = image_bytes(number)
            members[f"{key}.wav"] = sound_bytes(hertz=200 + 50 * number, rate=22_050)
            if captions:
                members[f"{key}.txt"] = f"picture number {number}\n".encode()
        write_tar(folder / f"shard-{first // per_shard:05d}.tar", members)
    return folder
