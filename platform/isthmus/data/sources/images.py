"""Making the images ready once, so that decoding them never dominates a later step; and finding near-doubles."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 25_000_000
MIN_SIDE = 16
NEAR_BITS = 6
NEAR_COLOUR = 16.0
"""Two images are near-doubles when at most 6 of the 128 bits of their difference hashes differ and their 8 x 8 colour
thumbnails differ by at most 16 of 255 (root mean square)."""

_BRIGHTER = 2  # grey levels: rounding in an even area is no edge
_EXTENSIONS = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg"}


@dataclass(frozen=True)
class Look:
    """What an image looks like, transparent parts white.

    Attributes:
        identity: digest of its 32 x 32 colour thumbnail: equal for the same picture in other bytes.
        hash_16: difference hash, 128 bits as uint8 [16].
        colours_192: 8 x 8 thumbnail, red, green and blue, uint8 [192].
    """

    identity: str
    hash_16: np.ndarray
    colours_192: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """An image ready to be written.

    Attributes:
        path: file with the bytes to write.
        extension: ending for those bytes.
        look: for finding doubles.
        resized: whether it was scaled down; otherwise the bytes are the package's own.
    """

    path: Path
    extension: str
    look: Look
    resized: bool


def prepare(path: Path, max_side: int) -> Prepared | str:
    """Reads one image, scales it down where it is larger than ``max_side`` (0: never), and hashes it.

    A scaled image replaces the file at ``path`` as a PNG. Returns the reason instead for an image that is unreadable,
    too large to decode sensibly (over 25 million pixels), under 16 pixels on its longest side, or blank.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "image too large"
                if max(image.size) < MIN_SIDE:
                    return "image too small"
                extension = _EXTENSIONS.get(image.format or "")
                image.load()
                resized = bool(max_side) and max(image.size) > max_side
                ready = _scaled(image, max_side) if resized else image
                flat = on_white(ready)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "image unreadable"
    if flat.getcolors(1) is not None:
        return "blank image"
    if resized or extension is None:
        buffer = io.BytesIO()
        ready.save(buffer, "PNG", compress_level=3)
        path.write_bytes(buffer.getvalue())
        extension = "png"
    return Prepared(path, extension, look(flat), resized)


def look(flat: Image.Image) -> Look:
    """What an RGB image without transparency (see :func:`on_white`) looks like."""
    thumbnail = flat.resize((32, 32), Image.Resampling.BOX)
    identity = hashlib.blake2b(thumbnail.tobytes(), digest_size=16).hexdigest()
    colours = np.asarray(thumbnail.resize((8, 8), Image.Resampling.BOX)).reshape(-1)
    return Look(identity, difference_hash(flat), colours)


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, transparent parts white."""
    if "transparency" in image.info or image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def difference_hash(flat: Image.Image) -> np.ndarray:
    """Difference hash in both directions, uint8 [16].

    Bit by bit whether a cell of a 9 x 9 grid is brighter than its left, then than its upper neighbour (N. Krawetz's
    dHash, with columns added): unmoved by scaling and by a change of brightness.
    """
    cells = np.asarray(flat.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    across = cells[:8, 1:] - cells[:8, :-1] > _BRIGHTER
    down = cells[1:, :8] - cells[:-1, :8] > _BRIGHTER
    return np.packbits(np.concatenate([across.ravel(), down.ravel()]))


def near_duplicates(queries: Sequence[Look], others: Sequence[Look]) -> np.ndarray:
    """bool [len(queries)]: whether any of the others is a near-double of the query."""
    if not queries or not others:
        return np.zeros(len(queries), dtype=bool)
    hashes = np.stack([other.hash_16 for other in others])
    colours = np.stack([other.colours_192 for other in others]).astype(np.float32)
    return np.array([_any_near(query, hashes, colours) for query in queries])


def _any_near(query: Look, hashes_N16: np.ndarray, colours_N192: np.ndarray) -> bool:
    close = np.bitwise_count(hashes_N16 ^ query.hash_16).sum(axis=1, dtype=np.int64) <= NEAR_BITS
    difference = colours_N192[close] - query.colours_192.astype(np.float32)
    return bool((np.sqrt(np.square(difference).mean(axis=1)) <= NEAR_COLOUR).any())


def _scaled(image: Image.Image, max_side: int) -> Image.Image:
    """Hamming's window: as free of aliasing as Lanczos' at these factors, at a third of its time."""
    if image.mode not in ("RGB", "RGBA", "L", "LA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("P", "PA") else "RGB")
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.HAMMING)
