"""Curation by actors of a cluster: the same choice as without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from isthmus.alignment.curate import CHOICE, curate
from isthmus.alignment.features import CaptionEncoder
from isthmus.alignment.prototypes import Prototypes, prototypes
from isthmus.config import CurateConfig, PrototypesConfig
from isthmus.data.manifest import Manifest, index
from isthmus.testing.backbones import tiny_bert
from isthmus.testing.shards import make_dataset

pytestmark = pytest.mark.ray


def test_actors_curate(ray_cluster: Any, tmp_path: Path) -> None:
    data, text, file = make_dataset(tmp_path / "data", 9), tiny_bert(tmp_path / "bert"), str(tmp_path / "c.parquet")
    index(str(data))
    prototypes(PrototypesConfig(out=file, text=text, classes=("picture", "noise")))
    config = CurateConfig(
        data=str(data), out=str(tmp_path / "out"), prototypes=file, text=text, chunk=5, per_class=3, top=9, actors=1,
        cpus_per_actor=0.5,
    )  # fmt: skip
    report = curate(config)
    assert (report.samples, report.chosen, report.unreadable, report.full) == (9, 6, 0, 2)
    captions = [[f"picture number {n}", f"noise {n}"] for n in range(9)]
    encode, known = CaptionEncoder(text, 4), Prototypes.load(file)
    scores = {
        i: (encode(c) @ known.vectors_KE.T).max(0) for i, c in zip(Manifest.load(str(data)).ids, captions, strict=True)
    }
    first = known.names.index(report.classes[0].name)
    best = sorted(scores, key=lambda i: (-scores[i][first], i))[:3]
    table = pq.read_table(tmp_path / "out" / CHOICE).to_pylist()
    assert [row["id"] for row in table if row["class"] == known.names[first]] == best
