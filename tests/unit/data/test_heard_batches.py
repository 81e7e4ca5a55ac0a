"""Batches of clips and images with their sound: a function of the step, from images and from a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heard_cases import heard_recipe
from isthmus.config import DataConfig
from isthmus.contracts import Batch
from isthmus.data.features import FeatureCache, build_cache, read_meta
from isthmus.data.local import LocalRows
from isthmus.data.manifest import index
from isthmus.data.on_ray import _packed, _unpacked
from isthmus.data.order import Order
from isthmus.data.readers import Failure
from isthmus.data.stream import train_batches
from isthmus.data.streamed import Encoding
from isthmus.errors import DataError
from isthmus.testing.backbones import tiny_vision_config
from isthmus.testing.clips import clip_bytes, make_clips, make_heard_images
from isthmus.testing.shards import make_dataset, write_tar
from method_cases import build, recipe

CLIPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_clips(tmp_path_factory.mktemp("clips"), CLIPS, per_shard=4)
    index(str(folder))
    return folder


def run(
    url: Path, steps: range, *, modality: str = "video-audio", rank: int = 0, world: int = 1, samples: int = CLIPS,
    encoding: Encoding | None = None, **data: Any,
) -> tuple[list[Batch], list[Failure]]:  # fmt: skip
    stage, failed = build(heard_recipe(modality)), list[Failure]()
    config = DataConfig(train=str(url), max_failed_share=1.0, **data)
    order = Order(samples, 4, seed=1)
    made = train_batches(config, stage, order, rank, world, steps.start, steps.stop, 9, failed.append, encoding)
    return list(made), failed


def test_a_batch_is_a_function_of_its_step(clips: Path) -> None:
    batches, failed = run(clips, range(4))
    assert not failed and batches[0].pixels_BCHW is not None
    assert batches[0].pixels_BCHW.shape == (4, 3, 3, 32, 32) and batches[0].audio_BNF.shape == (4, 32, 256)
    assert batches[0].audio_mask_BN.dtype == torch.int64 and batches[0].texts[0].startswith("clip number ")
    resumed, _ = run(clips, range(2, 4))
    for first, again in zip(batches[2:], resumed, strict=True):
        assert torch.equal(first.pixels_BCHW, again.pixels_BCHW) and torch.equal(first.audio_BNF, again.audio_BNF)
    halves = [run(clips, range(1), rank=rank, world=2)[0][0] for rank in range(2)]
    assert torch.equal(torch.cat([half.pixels_BCHW for half in halves]), batches[0].pixels_BCHW)
    seen = {int(i): pixels for b in batches[:2] for i, pixels in zip(b.sample_ids_B, b.pixels_BCHW, strict=True)}
    later = {int(i): pixels for b in batches[2:] for i, pixels in zip(b.sample_ids_B, b.pixels_BCHW, strict=True)}
    assert any(not torch.equal(seen[i], later[i]) for i in seen), "each epoch draws its frames anew"


def test_all_frames_of_a_clip_are_drawn_as_the_recipe_says(clips: Path) -> None:
    plain, changed = (run(clips, range(1), **told)[0][0] for told in ({}, {"rand_augment": (3, 9)}))
    assert torch.equal(plain.audio_BNF, changed.audio_BNF) and plain.pixels_BCHW.shape == changed.pixels_BCHW.shape
    assert not torch.equal(plain.pixels_BCHW, changed.pixels_BCHW)


def test_a_cache_holds_what_is_read_without_augmentation(clips: Path, tmp_path: Path) -> None:
    for modality, url in (("video-audio", clips), ("image-audio", make_heard_images(tmp_path / "images", CLIPS))):
        index(str(url))
        stage = build(heard_recipe(modality), with_vision=True)
        out = str(tmp_path / modality)
        vision = tiny_vision_config()
        report = build_cache(str(url), out, vision, actors=0, dtype="float32", clips=stage.transform)  # type: ignore[arg-type]
        assert (report.samples, report.tokens) == (CLIPS, stage.image_spec["tokens"])
        cached, _ = run(url, range(2), modality=modality, placement="cached", cache=out)
        inline, _ = run(url, range(2), modality=modality, augment=False)
        for one, other in zip(cached, inline, strict=True):
            expected = stage.module.encode_images(other.pixels_BCHW)  # type: ignore[operator]
            torch.testing.assert_close(one.features_BND, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(one.audio_BNF, other.audio_BNF) and torch.equal(one.audio_mask_BN, other.audio_mask_BN)
            assert torch.equal(one.sample_ids_B, other.sample_ids_B) and torch.equal(one.valid_B, other.valid_B)
        assert list(read_meta(out).sound) == [32, 256]  # type: ignore[arg-type]
        again = build_cache(str(url), out, vision, actors=0, dtype="float32", clips=stage.transform)  # type: ignore[arg-type]
        assert again.reused == again.parts


def test_encoding_beside_the_trainer_gives_frames_too(clips: Path) -> None:
    inline, _ = run(clips, range(1))
    streamed, _ = run(clips, range(1), placement="streamed", encoding=Encoding(tiny_vision_config()))
    module: Any = build(heard_recipe("video-audio"), with_vision=True).module
    expected = module.encode_images(inline[0].pixels_BCHW)
    torch.testing.assert_close(streamed[0].features_BND, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(streamed[0].audio_BNF, inline[0].audio_BNF)


def test_a_cache_of_other_frames_or_of_none_is_refused(clips: Path, tmp_path: Path) -> None:
    stage = build(heard_recipe("video-audio"))
    transform: Any = stage.transform
    other = replace(transform, seconds=0.32)
    build_cache(str(clips), str(tmp_path / "other"), tiny_vision_config(), actors=0, clips=other)
    with pytest.raises(DataError, match="does not hold the frames and sounds"):
        run(clips, range(1), placement="cached", cache=str(tmp_path / "other"))
    index(str(make_dataset(tmp_path / "images", 8)))
    build_cache(str(tmp_path / "images"), str(tmp_path / "plain"), tiny_vision_config(), actors=0)
    with pytest.raises(DataError, match="does not hold the frames and sounds"):
        run(tmp_path / "images", range(1), placement="cached", cache=str(tmp_path / "plain"), samples=8)
    assert FeatureCache.open(str(tmp_path / "plain")).meta.sound is None
    config = DataConfig(train=str(clips), placement="cached", cache=str(tmp_path / "other"))
    plain = build(recipe("projector", tmp_path))
    with pytest.raises(DataError, match="does not hold the frames and sounds"):
        list(train_batches(config, plain, Order(CLIPS, 4), 0, 1, 0, 1, 0, lambda f: None))


def test_what_cannot_be_heard_or_seen_is_set_aside_by_name(tmp_path: Path) -> None:
    clip = clip_bytes()
    write_tar(
        tmp_path / "shard-00000.tar",
        {"a.mp4": clip, "b.mp4": clip_bytes(hertz=None), "c.mp4": clip[:-200], "d.webm": clip_bytes("webm")},
    )
    index(str(tmp_path))
    batches, failed = run(tmp_path, range(1), samples=4)
    assert {f.key: f.reason.partition(":")[0] for f in failed} == {
        "b": "the clip has no sound track",
        "c": "the clip is cut short",
    }
    assert batches[0].valid_B.sum() == 2 and batches[0].pixels_BCHW.shape[0] == 4


def test_sounds_travel_through_ray_s_rows_unchanged(clips: Path) -> None:
    from isthmus.data.manifest import Manifest
    from isthmus.data.stream import iter_samples

    stage = build(heard_recipe("video-audio"))
    (rows,) = iter_samples(Manifest.load(str(clips)), transform=stage.transform)
    back = _unpacked(_packed(LocalRows(3, (*rows, None))))
    assert back.rows[-1] is None
    for row, other in zip(rows, back.rows, strict=False):
        assert (row.id, row.key, row.captions) == (other.id, other.key, other.captions)  # type: ignore[union-attr]
        for name in ("pixels_CHW", "audio_NF", "audio_mask_N"):
            assert (getattr(row, name) == getattr(other, name)).all()
