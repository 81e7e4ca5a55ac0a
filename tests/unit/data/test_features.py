"""A cache is resumable, refuses to mix, and is read by memory map."""

import json
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.config import VisionConfig
from isthmus.contracts import Base
from isthmus.data import encode
from isthmus.data.clips import ClipTransform
from isthmus.data.encode import fitting
from isthmus.data.features import EncodedBy, FeatureCache, build_cache
from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.transforms import ImageTransform, decode_image
from isthmus.errors import ConfigError, DataError
from isthmus.testing.shards import make_dataset, write_tar


class FakeEncoder(torch.nn.Module):
    """Mean colours of the image's quarters: 4 tokens of width 3."""

    tokens, width, image_size = 4, 3, 8
    built = 0
    digest = "base-1"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        type(self).built += 1
        self.transform = ImageTransform(8)
        self.base = Base("vision", config.weights, self.digest)
        self.scale = 1e6 if config.name == "huge" else 1.0

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels_BCHW, 2).flatten(2).transpose(1, 2) * self.scale


@pytest.fixture(autouse=True)
def fake_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("isthmus.models.vision")
    module.build_vision = FakeEncoder
    module.encode_pixels = lambda encoder, pixels: encoder(pixels)
    monkeypatch.setitem(sys.modules, "isthmus.models.vision", module)
    monkeypatch.setattr(encode, "ray_is_up", lambda: False)
    monkeypatch.setattr(encode, "_chunk_rows", lambda sample_bytes: 4)
    FakeEncoder.built = 0


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    make_dataset(tmp_path / "data", 9, per_shard=5)
    write_tar(tmp_path / "data" / "zz.tar", {"bad.png": b"broken", "bad.txt": b"words"})
    index(str(tmp_path / "data"))
    return str(tmp_path / "data")


def test_features_are_the_encoders_own(dataset: str, tmp_path: Path) -> None:
    report = build_cache(dataset, str(tmp_path / "cache"), VisionConfig(), batch=3)
    assert (report.samples, report.failed, report.parts, report.reused) == (9, 1, 3, 0)
    assert (report.tokens, report.width) == (4, 3) and report.images_per_s > 0
    cache, manifest = FeatureCache.open(str(tmp_path / "cache")), Manifest.load(dataset)
    encoder = FakeEncoder(VisionConfig())
    assert cache.ids.tolist() == manifest.ids[:9].tolist() and len(cache) == 9
    for row, raw in enumerate(read_rows(manifest, range(9))):
        assert isinstance(raw, RawSample)
        pixels = encoder.transform(decode_image(raw.image))
        expected = encoder(torch.from_numpy(pixels[None]))[0].numpy().astype(np.float16)
        sample = cache.get(raw.id)
        assert sample is not None and sample.features_ND is not None
        np.testing.assert_array_equal(sample.features_ND, expected)
        assert sample.key == f"s{row:05d}" and sample.captions == raw.captions == cache.captions(raw.id)
    ids = manifest.ids[[7, 0, 7, 4]]
    gathered = cache.rows(ids)
    assert gathered.shape == (4, 4, 3) and gathered.dtype == np.float16
    np.testing.assert_array_equal(gathered[0], gathered[2])
    np.testing.assert_array_equal(gathered[3], cache.get(int(ids[3])).features_ND)  # type: ignore[union-attr,arg-type]
    bad = int(manifest.ids[9])
    assert cache.get(bad) is None and bad not in cache and cache.meta.failed[0].id == bad
    with pytest.raises(KeyError):
        cache.rows([bad])
    assert cache.get(-1) is None and cache.get(2**62) is None


def test_features_are_mapped_and_not_copied(dataset: str, tmp_path: Path) -> None:
    build_cache(dataset, str(tmp_path / "cache"), VisionConfig())
    cache = FeatureCache.open(str(tmp_path / "cache"))
    features = cache.get(int(cache.ids[0])).features_ND  # type: ignore[union-attr]
    assert features is not None and not features.flags.owndata and not features.flags.writeable
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.rows(again.ids), cache.rows(cache.ids))


def test_second_run_does_nothing_and_an_interrupted_one_continues(dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_cache(dataset, str(out), VisionConfig())
    whole = FeatureCache.open(str(out))
    expected = whole.rows(whole.ids).copy()
    built = FakeEncoder.built
    assert build_cache(dataset, str(out), VisionConfig()).reused == 3 and FakeEncoder.built == built
    (out / "cache.json").unlink()
    with pytest.raises(DataError, match="is not finished"):
        FeatureCache.open(str(out))
    (out / "parts" / "part-00001.json").unlink()  # killed between the part and its record
    kept = (out / "parts" / "part-00000.arrow").stat().st_mtime_ns
    assert build_cache(dataset, str(out), VisionConfig()).reused == 2
    assert (out / "parts" / "part-00000.arrow").stat().st_mtime_ns == kept
    (out / "cache.json").unlink()
    (out / "parts" / "part-00002.arrow").write_bytes(b"cut")  # a part that is not what its record says
    assert build_cache(dataset, str(out), VisionConfig()).reused == 2
    cache = FeatureCache.open(str(out))
    np.testing.assert_array_equal(cache.rows(cache.ids), expected)


def test_plans_are_not_mixed(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "cache")
    build_cache(dataset, out, VisionConfig())
    with pytest.raises(DataError, match="dtype differ"):
        build_cache(dataset, out, VisionConfig(), dtype="float32")
    with pytest.raises(DataError, match=r"another plan: vision differ"):
        build_cache(dataset, out, VisionConfig(layer=-1))
    (tmp_path / "cache" / "cache.json").unlink()
    monkeypatch.setattr(FakeEncoder, "digest", "base-2")
    with pytest.raises(DataError, match="encoder_digest differ"):
        build_cache(dataset, out, VisionConfig())
    make_dataset(tmp_path / "data", 12)
    index(dataset)
    with pytest.raises(DataError, match="manifest_digest"):
        build_cache(dataset, out, VisionConfig())


def test_a_cache_of_before_a_setting_existed_is_still_the_same(dataset: str, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    build_cache(dataset, out, VisionConfig())
    for name in ("cache.json", "plan.json"):
        facts = json.loads((tmp_path / "cache" / name).read_text())
        del facts["vision"]["options"]
        (tmp_path / "cache" / name).write_text(json.dumps(facts))
    built = FakeEncoder.built
    assert build_cache(dataset, out, VisionConfig()).reused == 3 and FakeEncoder.built == built
    (tmp_path / "cache" / "cache.json").unlink()
    assert build_cache(dataset, out, VisionConfig()).reused == 3


def test_expectations_are_checked_on_opening(dataset: str, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    build_cache(dataset, out, VisionConfig())
    digest = Manifest.load(dataset).digest
    assert FeatureCache.open(out, expect={"encoder_digest": "base-1", "manifest_digest": digest})
    with pytest.raises(DataError, match="another encoder"):
        FeatureCache.open(out, expect={"encoder_digest": "base-2"})
    manifest, model = Manifest.load(dataset), EncodedBy("base-1", VisionConfig(weights="elsewhere.safetensors"))
    assert FeatureCache.of_model(out, manifest, model) and FeatureCache.of_model(out, manifest, EncodedBy())
    with pytest.raises(DataError, match="another encoder"):
        FeatureCache.of_model(out, manifest, replace(model, digest="base-2"))
    with pytest.raises(DataError, match=r"trained on \(image_size: cache None, model 192, layer: cache -2, model -1\)"):
        FeatureCache.of_model(out, manifest, replace(model, vision=VisionConfig(layer=-1, image_size=192)))
    with pytest.raises(DataError, match="does not hold the frames and sounds"):
        FeatureCache.of_model(out, manifest, replace(model, clips=ClipTransform(ImageTransform(32))))
    with pytest.raises(DataError, match="holds no feature cache"):
        FeatureCache.open(str(tmp_path))
    (tmp_path / "cache" / "parts" / "part-00000.arrow").unlink()
    with pytest.raises(DataError, match="are missing"):
        FeatureCache.open(out)


def test_all_corrupt_and_overflowing_features_are_errors(dataset: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "bad" / "x.tar", {"a.png": b"x", "a.txt": b"y"})
    index(str(tmp_path / "bad"))
    with pytest.raises(DataError, match="None of the 1 images"):
        build_cache(str(tmp_path / "bad"), str(tmp_path / "c1"), VisionConfig())
    with pytest.raises(DataError, match="do not fit float16"):
        build_cache(dataset, str(tmp_path / "c2"), VisionConfig(name="huge"))
    assert build_cache(dataset, str(tmp_path / "c3"), VisionConfig(name="huge"), dtype="float32").samples == 9
    with pytest.raises(DataError, match="dtype 'int8'"):
        build_cache(dataset, str(tmp_path / "c4"), VisionConfig(), dtype="int8")


@pytest.mark.parametrize(
    ("there", "asked", "given"),
    [
        ({"CPU": 8.0}, (2, 1, None), (2, 0.0)),
        ({"CPU": 8.0}, (20, 1, None), (8, 0.0)),
        ({"CPU": 8.0, "GPU": 1.0}, (2, 1, None), (1, 1.0)),
        ({"CPU": 8.0, "GPU": 1.0}, (9, 1, 0.2), (5, 0.2)),
        ({"CPU": 8.0, "GPU": 1.0}, (9, 2, 0), (4, 0)),
    ],
)
def test_no_more_actors_than_there_is_room_for(there: Any, asked: Any, given: Any) -> None:
    """One that finds no room would wait for ever, with a part in its hands."""
    assert fitting(there, *asked, grows=False) == given


def test_an_actor_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="asks for 1 CPUs and 2 GPUs, and the cluster has 8 and 1"):
        fitting({"CPU": 8.0, "GPU": 1.0}, 2, 1, 2, grows=False)
    assert fitting({"memory": 1e9}, 2, 1, None, grows=True) == (1, 0.0), "a head without CPUs, whose nodes are to come"
