"""Encoding actors give the cache that one process gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.config import VisionConfig
from isthmus.data import encode
from isthmus.data.features import FeatureCache, build_cache
from isthmus.data.manifest import index
from isthmus.testing.shards import make_dataset, write_tar

pytestmark = pytest.mark.ray


def test_actors_and_one_process_encode_alike(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "data", 70)
    write_tar(tmp_path / "data" / "zz.tar", {"bad.png": b"broken", "bad.txt": b"words"})
    index(str(tmp_path / "data"))
    vision = VisionConfig(name="tf_efficientnet_lite0", weights="random", image_size=64, layer=-1)
    monkeypatch.setattr(encode, "_PART_ROWS", 32)
    report = build_cache(str(tmp_path / "data"), str(tmp_path / "actors"), vision, actors=2, batch=16)
    assert (report.samples, report.failed, report.parts, report.tokens, report.width) == (70, 1, 3, 4, 1280)
    monkeypatch.setattr(encode, "ray_is_up", lambda: False)
    build_cache(str(tmp_path / "data"), str(tmp_path / "here"), vision, batch=16)
    one, two = (FeatureCache.open(str(tmp_path / name)) for name in ("actors", "here"))
    assert one.ids.tolist() == two.ids.tolist() and one.meta.failed == two.meta.failed
    # the same arithmetic with other thread counts: float16 of sums in another order
    np.testing.assert_allclose(one.rows(one.ids), two.rows(two.ids), rtol=5e-3, atol=5e-3)
