"""Drawn clips with sound, for which no real set can be fetched: which sound belongs to which clip, and why.

Two of eight objects drift over a noisy ground. Each object comes and goes by a pattern of its own over eight equal
parts of the clip, and has a tone, which is heard exactly while it is seen. So a sound tells which two objects there
are (of 28 pairs) and when each is there (of more than 40,000 pairs of patterns): to find a clip's own sound among many
of the same objects, a model has to relate times. Held-out clips are of pairs of objects that no training clip has.

Shape letters: T frames, H height, W width, S samples, K parts of a clip.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from isthmus.data.shardwriter import Pair, write_shards
from isthmus.data.sources import destination
from isthmus.data.sources.report import FetchReport, SourceReport
from isthmus.encoding import encode_clip
from isthmus.progress import progress

CLIPS = "clips"
PARTS, FRAMES_A_PART, SIDE, RATE = 8, 4, 64, 16_000
FPS = Fraction(25, 2)
PART_SAMPLES = RATE * FRAMES_A_PART * FPS.denominator // FPS.numerator
"""0.32 s."""

_SPRITE, _HELD_PAIRS = 22, 6
_VERSION = 1


@dataclass(frozen=True)
class Kind:
    """An object: what it is called, its colour and shape, and its tone in hertz."""

    name: str
    colour: tuple[int, int, int]
    shape: str
    tone: float


KINDS = tuple(
    Kind(f"{colour} {shape}", rgb, shape, 260.0 * 1.45**number)
    for number, (colour, rgb, shape) in enumerate(
        [
            ("red", (214, 40, 40), "disc"),
            ("green", (46, 160, 67), "square"),
            ("blue", (38, 90, 214), "triangle"),
            ("yellow", (244, 208, 63), "cross"),
            ("white", (250, 250, 250), "disc"),
            ("pink", (240, 130, 180), "square"),
            ("orange", (230, 126, 34), "triangle"),
            ("cyan", (60, 200, 220), "cross"),
        ]
    )
)
"""260 Hz to 3.5 kHz, each 1.45 times the one before."""


@dataclass(frozen=True)
class Drawn:
    """A clip: two objects by number, and in which parts each is there, bool [2, K]."""

    kinds: tuple[int, int]
    seen_2K: np.ndarray

    @property
    def caption(self) -> str:
        """Both objects, by name."""
        return f"a {KINDS[self.kinds[0]].name} and a {KINDS[self.kinds[1]].name}"


def draw_clip(drawn: Drawn, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, H, W, 3] and sound float32 [1, S]; paths, ground and phases are drawn from ``seed``."""
    random = np.random.default_rng(seed)
    frames = PARTS * FRAMES_A_PART
    ground = random.integers(20, 90, 3)
    frames_THWC = (ground + random.integers(-12, 13, (frames, SIDE, SIDE, 1))).astype(np.uint8)
    sound_S = random.normal(0, 0.004, PARTS * PART_SAMPLES)
    for kind, seen_K in zip(drawn.kinds, drawn.seen_2K, strict=True):
        room = SIDE - _SPRITE
        start, speed = random.uniform(0, room, 2), random.uniform(-2.5, 2.5, 2)
        mask = _mask(KINDS[kind].shape)
        for t in np.flatnonzero(np.repeat(seen_K, FRAMES_A_PART)):
            y, x = (room - np.abs((start + speed * t) % (2 * room) - room)).astype(int)  # back from the edges
            frames_THWC[t, y : y + _SPRITE, x : x + _SPRITE][mask] = KINDS[kind].colour
        sound_S += 0.25 * _envelope(seen_K) * _wave(KINDS[kind].tone, len(sound_S), random.uniform(0, 2 * np.pi))
    return frames_THWC, sound_S[None].astype(np.float32)


def clips(count: int, seed: int, *, held: bool) -> Iterator[Pair]:
    """Drawn clips as samples: mp4, every eighth webm.

    Args:
        held: of the pairs of objects that are held out, or of all others.
    """
    pairs = list(itertools.combinations(range(len(KINDS)), 2))
    order = np.random.default_rng([seed, 0]).permutation(len(pairs))
    mine = [pairs[n] for n in (order[:_HELD_PAIRS] if held else order[_HELD_PAIRS:])]
    for number in range(count):
        random = np.random.default_rng([seed, 1 + held, number])
        drawn = Drawn(mine[number % len(mine)], np.stack([_pattern(random) for _ in range(2)]))
        kind = "webm" if number % 8 == 7 else "mp4"
        frames_THWC, sound_1S = draw_clip(drawn, int(random.integers(1 << 62)))
        key = f"clip-{'h' if held else 't'}{number:06d}"
        meta = {"kinds": list(drawn.kinds), "seen": drawn.seen_2K.astype(int).tolist(), "source": CLIPS}
        yield Pair(key, encode_clip(kind, frames_THWC, FPS, sound_1S, RATE), kind, [drawn.caption], meta)


def fetch_clips(out: str, *, limit: int | None, seed: int, heldout: int, shard_size: int) -> FetchReport:
    """Draw clips into ``out``/train and ``out``/heldout; see :func:`isthmus.data.sources.fetch`."""
    started, total = time.monotonic(), limit or 2400
    counts = {"heldout": min(heldout, total // 3)}
    counts["train"] = total - counts["heldout"]
    request = {"version": _VERSION, "name": CLIPS, "seed": seed, "shard_size": shard_size, **counts}
    earlier = destination.record(out)
    if earlier and earlier["request"] == request and destination.all_there(out, earlier["files"]):
        return FetchReport.read({**earlier["report"], "out": out})
    destination.check(out, earlier)
    destination.make_room(out, request)
    files = []
    with progress("drawing clips", total, "clips") as tracker:
        for name in destination.SPLITS:
            made = clips(counts[name], seed, held=name == "heldout")
            for file in write_shards(made, out, folder=name, shard_size=shard_size):
                files.append(file)
                tracker.advance(file.samples)
    report = FetchReport(
        name=CLIPS,
        out=out,
        synthetic=True,
        train=counts["train"],
        heldout=counts["heldout"],
        sources={CLIPS: SourceReport(counts["train"], counts["heldout"], total, {}, 0.0)},
        near_duplicate_share=0.0,
        shared_captions=0,
        bytes=sum(file.size for file in files),
        shards=len(files),
        images={"kept": total, "resized": 0, "max_side": 0},
        licences={CLIPS: "none: drawn by this program"},
        seconds=round(time.monotonic() - started, 1),
    )
    destination.write_record(out, request, [asdict(file) for file in files], asdict(report))
    return report


def _pattern(random: np.random.Generator) -> np.ndarray:
    """bool [K], there in two to six of the parts."""
    seen_K = np.zeros(PARTS, bool)
    seen_K[random.permutation(PARTS)[: random.integers(2, 7)]] = True
    return seen_K


def _mask(shape: str) -> np.ndarray:
    """bool [sprite, sprite]."""
    y, x = np.mgrid[:_SPRITE, :_SPRITE] / (_SPRITE - 1) * 2 - 1
    return {
        "disc": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": abs(x) <= (y + 1) / 2,
        "cross": np.minimum(abs(x), abs(y)) <= 0.3,
    }[shape]


def _envelope(seen_K: np.ndarray) -> np.ndarray:
    """1 while an object is there, 0 while not, over 10 ms from one to the other, float64 [S]."""
    steps_S = np.repeat(seen_K, PART_SAMPLES).astype(float)
    ramp = RATE // 100
    return np.convolve(steps_S, np.ones(ramp) / ramp, mode="same")


def _wave(hertz: float, samples: int, phase: float) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(samples) / RATE + phase)
