"""Small shards to test with: tars and Parquet files of seeded images, whole or with a planted fault."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def image_bytes(seed: int, size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    """An encoded noise image; another seed, another image."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], *, end: bool = True) -> Path:
    """A tar of ``members`` in order (a list may repeat names); ``end=False`` leaves out the end-of-archive blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = list(members.items()) if isinstance(members, Mapping) else list(members)
    with path.open("wb") as sink:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            sink.write(info.tobuf(tarfile.USTAR_FORMAT))
            sink.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        if end:
            sink.write(bytes(2 * tarfile.BLOCKSIZE))
    return path


def make_dataset(
    folder: Path,
    samples: int,
    per_shard: int = 8,
    *,
    start: int = 0,
    kind: str = "png",
    answers: Sequence[str] = (),
) -> Path:
    """A folder of tars with ``samples`` pairs: an image, a main and a second caption, and a JSON with the number; with
    ``answers`` also two questions, of which the first is answered by one of them after the other."""
    for first in range(0, samples, per_shard):
        members: dict[str, bytes] = {}
        for number in range(first, min(samples, first + per_shard)):
            key = f"s{start + number:05d}"
            encoder = "JPEG" if kind in ("jpg", "jpeg") else kind.upper()
            members[f"{key}.{kind}"] = image_bytes(start + number, kind=encoder)
            members[f"{key}.txt"] = f"picture number {start + number}\nnoise {start + number}\n".encode()
            meta: dict[str, object] = {"number": start + number}
            if answers:
                asked = {"question": f"which of {len(answers)}", "answers": [answers[number % len(answers)]]}
                meta["questions"] = [asked, {"question": "is it a picture", "answer": "yes"}]
            members[f"{key}.json"] = json.dumps(meta).encode()
        write_tar(folder / f"shard-{first // per_shard:05d}.tar", members)
    return folder


def make_parquet(path: Path, samples: int, row_group: int = 4) -> Path:
    """A Parquet shard with columns key, image (struct of bytes and path) and captions (list)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"key": f"p{n}", "image": {"bytes": image_bytes(n), "path": None}, "captions": [f"row {n}"], "number": n}
        for n in range(samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path
