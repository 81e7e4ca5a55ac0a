"""Seeking in a manifest of very many samples: seconds to the rows of a random step's batch, and memory.

Writes a manifest of ``--samples`` synthetic rows with the writers that ``isthmus data index`` uses (of shards that are
not there: nothing is read but the manifest), or takes the one that ``--keep FOLDER`` has. Each measurement is a process
of its own that opens the manifest as a training worker does:

- cold: the manifest is dropped from the page cache, the process opens it, draws a random (epoch, step) of the sample
  order and looks up the rows of that batch. ``seek_seconds`` is the worst median, opening included;
  ``cold_cpu_seconds`` is the processor time of the same, which other work on the machine hardly stretches.
- warm: further random steps in the same process; ``again``: the same ones a second time.
- spans: all rows that a worker looks up for a run of the order's spans, 256 at a time as it reads them. ``peak_mb`` is
  the worst peak of resident memory over that before the manifest was opened.

The default writes 10^8 rows in both forms, some 4 GB. 10^9 need some 23 GB with ``--pages-only``, which leaves out
``manifest.parquet``; workers do not open it where there are pages.

    python benchmarks/seek.py --json seek.json
    python benchmarks/seek.py --samples 1000000000 --pages-only --keep /scratch/manifest --json seek.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from isthmus.data.assembly import GROUP_ROWS, table_writer
from isthmus.data.listing import HEADER_FILE, TABLE_FILE
from isthmus.data.manifest import Manifest, Shard, digest_of, header_of
from isthmus.data.order import PADDING, Order
from isthmus.data.pages import PAGES_FILE, PageWriter
from isthmus.data.records import SCHEMA

PER_SHARD = 8192  # divides GROUP_ROWS
BATCHES = (64, 4096)
BLOCK = 512  # of a tar
WINDOW = 256  # rows that a reader looks up together
OTHERS = 10  # warm seeks of a process


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    if options.child:
        print(json.dumps(_CHILDREN[options.child](options)))
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-seek-") as scratch:
        folder = Path(options.keep or scratch)
        figures = {"samples": options.samples} | _made(folder, options.samples, options.pages_only)
        seeks = []
        for batch in BATCHES:
            found = [_child("seek", folder, options.samples, batch, seed) for seed in range(options.rounds)]
            for name in found[0]:
                figures[f"batch_{batch}.{name}"] = round(statistics.median(one[name] for one in found), 4)
            seeks.append(figures[f"batch_{batch}.cold_seconds"])
        peaks = [_child("spans", folder, options.samples, batch, 0) for batch in BATCHES]
    for batch, peak in zip(BATCHES, peaks, strict=True):
        figures |= {f"batch_{batch}.{name}": value for name, value in peak.items()}
    figures |= {
        "load_average": round(os.getloadavg()[0], 1),
        "seek_seconds": max(seeks),
        "peak_mb": max(peak["peak_mb"] for peak in peaks),
    }
    for name, value in figures.items():
        print(f"{name:36} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the manifest


def _made(folder: Path, samples: int, pages_only: bool) -> dict[str, Any]:
    """The manifest in ``folder``, written if it is not there; how long that took and how large it is."""
    header = folder / HEADER_FILE
    seconds = None
    if not header.exists() or json.loads(header.read_bytes())["samples"] != samples:
        started = time.perf_counter()
        _write(folder, samples, pages_only)
        seconds = round(time.perf_counter() - started, 1)
    sizes = {path.suffix[1:]: path.stat().st_size for path in sorted(folder.glob("manifest.*"))}
    return {"write_seconds": seconds} | {f"{name}_mb": round(size / 1e6, 1) for name, size in sizes.items()}


def _write(folder: Path, samples: int, pages_only: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = PageWriter(folder / PAGES_FILE)
    table = None if pages_only else table_writer(folder / TABLE_FILE)
    ends = []
    for start in range(0, samples, GROUP_ROWS):
        rows = _rows(start, min(start + GROUP_ROWS, samples))
        pages.write(rows)
        if table is not None:
            table.write_table(rows, row_group_size=GROUP_ROWS)
        ends.append(_shard_ends(rows))
    if table is not None:
        table.close()
    shards = [
        Shard(f"part-{number // 1000:05d}/shard-{number:06d}.tar", int(end), min(PER_SHARD, left), f"{number:064x}")
        for number, (end, left) in enumerate(zip(np.concatenate(ends), range(samples, 0, -PER_SHARD), strict=True))
    ]
    digest = digest_of(shards, lambda name: _column(name, samples))
    facts = {"bytes": pages.finish(digest), "captioned": samples, "repeated_images": False}
    header = header_of(shards, samples, digest) | {"pages": facts}
    (folder / HEADER_FILE).write_text(json.dumps(header, indent=1), encoding="utf-8")


def _rows(start: int, stop: int) -> pa.Table:
    """Rows ``start`` to ``stop`` - 1: tars of image, caption and JSON, as a download of web pairs makes them."""
    number = np.arange(start, stop)
    columns = _numbers(start, stop)
    count = len(number)
    none = np.full(count, -1)
    columns |= {
        "shard": (number // PER_SHARD).astype(np.int32),
        "key": _keys(number),
        "image_ext": pa.repeat(pa.scalar("jpg"), count),
        "text_ext": pa.repeat(pa.scalar("txt"), count),
        "meta_offset": none,
        "meta_length": none,
        "image_id": pa.nulls(count, pa.int64()),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def _numbers(start: int, stop: int) -> dict[str, Any]:
    """The columns that the digest is made of. ``start`` is the first row of a shard."""
    return {name: column(start, stop) for name, column in _DIGESTED.items()}


def _bits(start: int, stop: int) -> np.ndarray:
    return _hashed(np.arange(start, stop, dtype=np.uint64))


def _ids(start: int, stop: int) -> np.ndarray:
    return (_hashed(_bits(start, stop)) >> np.uint64(1)).astype(np.int64)


def _image_lengths(start: int, stop: int) -> np.ndarray:
    return 8192 + (_bits(start, stop) >> np.uint64(20) & np.uint64(0xFFFF)).astype(np.int64) * 2


def _text_lengths(start: int, stop: int) -> np.ndarray:
    return 20 + (_bits(start, stop) >> np.uint64(8) & np.uint64(0x7F)).astype(np.int64)


def _image_offsets(start: int, stop: int) -> np.ndarray:
    sizes = _in_tar(_image_lengths(start, stop)) + _in_tar(_text_lengths(start, stop))
    begins = np.cumsum(sizes) - sizes
    return begins - begins[::PER_SHARD].repeat(PER_SHARD)[: len(begins)] + BLOCK


def _text_offsets(start: int, stop: int) -> np.ndarray:
    return _image_offsets(start, stop) + _in_tar(_image_lengths(start, stop))


def _no_rows(start: int, stop: int) -> np.ndarray:
    return np.full(stop - start, -1)


_DIGESTED = {
    "id": _ids,
    "image_offset": _image_offsets,
    "image_length": _image_lengths,
    "text_offset": _text_offsets,
    "text_length": _text_lengths,
    "row": _no_rows,
}


def _in_tar(lengths: np.ndarray) -> np.ndarray:
    """Bytes of members with their header and padding."""
    return BLOCK + -(-lengths // BLOCK) * BLOCK


def _column(name: str, samples: int) -> Iterator[np.ndarray]:
    for start in range(0, samples, GROUP_ROWS):
        yield _DIGESTED[name](start, min(start + GROUP_ROWS, samples))


def _shard_ends(rows: pa.Table) -> np.ndarray:
    last = np.minimum(np.arange(PER_SHARD - 1, len(rows) + PER_SHARD - 1, PER_SHARD), len(rows) - 1)
    return rows["text_offset"].to_numpy()[last] + 3 * BLOCK


def _keys(numbers: np.ndarray) -> pa.Array:
    """``000000000`` to ``999999999`` as texts."""
    digits = numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10
    data = (digits + ord("0")).astype(np.uint8).tobytes()
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * 9
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(data))


def _hashed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of uint64: a permutation, so that ids differ but for the bit that is cut off."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------------------------------------ measurements


def _child(what: str, folder: Path, samples: int, batch: int, seed: int) -> dict[str, Any]:
    """The answer of a fresh process, which finds no part of the manifest in the page cache."""
    for path in folder.glob("manifest.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    arguments = ["--child", what, "--keep", str(folder), "--batch", str(batch), "--seed", str(seed)]
    command = [sys.executable, __file__, "--samples", str(samples), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def _seek(options: argparse.Namespace) -> dict[str, float]:
    random = np.random.default_rng(options.seed)
    order = Order(options.samples, options.batch, seed=options.seed)
    steps = random.integers(0, 10 * order.steps_per_epoch, 1 + OTHERS).tolist()
    started, used = time.perf_counter(), time.process_time()
    manifest = Manifest.load(options.keep, verify=False)
    opened = time.perf_counter() - started
    times, cold_cpu = [], 0.0
    for step in [*steps, *steps[1:]]:
        begun = time.perf_counter()
        rows = order.local(step, 0, 1)
        rows = rows[rows != PADDING]
        table = manifest.take(rows)
        times.append(time.perf_counter() - begun)
        cold_cpu = cold_cpu or time.process_time() - used
        assert table["key"].to_pylist() == _keys(rows).to_pylist()
    return {
        "open_seconds": opened,
        "cold_seconds": opened + times[0],
        "cold_cpu_seconds": cold_cpu,
        "warm_seconds": statistics.median(times[1 : 1 + OTHERS]),
        "again_seconds": statistics.median(times[1 + OTHERS :]),
    }


def _spans(options: argparse.Namespace) -> dict[str, float]:
    order = Order(options.samples, options.batch)
    before = _resident_mb()
    started = time.perf_counter()
    manifest = Manifest.load(options.keep, verify=False)
    looked_up, seconds = 0, []
    for number in range(options.spans):
        begun = time.perf_counter()
        first = order.steps_per_epoch // (options.spans + 1) * (number + 1) // order.span * order.span
        rows = np.concatenate([order.local(step, 0, 1) for step in range(first, order.span_end(first))])
        manifest.image_bytes_of(rows)
        rows = np.unique(rows)
        for start in range(0, len(rows), WINDOW):
            manifest.take(rows[start : start + WINDOW]).to_pylist()
        looked_up += len(rows)
        seconds.append(time.perf_counter() - begun)
    return {
        "spans": options.spans,
        "span_rows": looked_up // options.spans,
        "span_seconds": round(statistics.median(seconds), 4),
        "imports_mb": round(before, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, 1),
        "rows_per_second": round(looked_up / (time.perf_counter() - started)),
    }


_CHILDREN = {"seek": _seek, "spans": _spans}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each batch size")
    parser.add_argument("--spans", type=int, default=8, help="spans that the measurement of memory looks up")
    parser.add_argument("--keep", metavar="FOLDER", help="write the manifest there and leave it, or use what is there")
    parser.add_argument("--pages-only", action="store_true", help="leave out manifest.parquet")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    for name in ("--child", "--batch", "--seed"):  # of a measurement's own process
        parser.add_argument(name, type=str if name == "--child" else int, help=argparse.SUPPRESS)
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
