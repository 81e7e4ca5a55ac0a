"""Bulk vectors of clips, images and their sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from heard_cases import heard_recipe
from isthmus.contracts import Captions
from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import read_rows
from isthmus.errors import ConfigError
from isthmus.inference.embed import SOUNDS, EmbedWork
from isthmus.inference.engine import Engine
from isthmus.testing.clips import clip_bytes, make_clips, make_heard_images, sound_bytes
from isthmus.testing.shards import write_tar
from method_cases import build, moved


def engine_of(modality: str) -> Engine:
    stage = build(heard_recipe(modality), with_vision=True)
    moved(stage.module)
    return Engine(stage.module.eval(), stage.transform, "models:/heard/1")


@pytest.mark.parametrize("modality", ["video-audio", "image-audio"])
def test_every_pair_has_a_vector_of_both_sides_once(modality: str, tmp_path: Path) -> None:
    make = make_clips if modality == "video-audio" else make_heard_images
    index(str(make(tmp_path, 5, per_shard=3)))
    manifest, engine = Manifest.load(str(tmp_path)), engine_of(modality)
    done = EmbedWork(engine, manifest, None, 2, images=True, texts=True).process(range(5))
    seen, heard = done.table.to_pylist(), done.extras[SOUNDS].to_pylist()
    assert [row["id"] for row in seen] == [row["id"] for row in heard] == manifest.ids.tolist()
    assert list(done.extras) == [SOUNDS] and not done.quarantined
    raw = next(iter(read_rows(manifest, [4], sounds=True)))
    arrays = engine.transform.arrays(raw)
    sound = [torch.from_numpy(arrays[name])[None] for name in ("audio_NF", "audio_mask_N")]
    expected = engine.module.embed_sounds(sound[0], sound[1].long())[0].detach().numpy()
    np.testing.assert_allclose(heard[4]["embedding"], expected, atol=1e-5)
    pixels = torch.from_numpy(arrays["pixels_CHW"])[None]
    expected = engine.module.embed_images(engine.module.encode_images(pixels))[0].detach().numpy()
    np.testing.assert_allclose(seen[4]["embeddings"], expected, atol=1e-5)
    assert np.linalg.norm(heard[0]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_heard_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard-00000.tar", {"a.mp4": clip_bytes(), "b.mp4": clip_bytes(hertz=None)})
    index(str(tmp_path))
    manifest = Manifest.load(str(tmp_path))
    done = EmbedWork(engine_of("video-audio"), manifest, None, 2, images=True, texts=True).process([0, 1])
    assert [row["key"] for row in done.table.to_pylist()] == ["a"]
    assert [row["key"] for row in done.extras[SOUNDS].to_pylist()] == ["a"]
    assert [(q.key, q.reason) for q in done.quarantined] == [("b", "the clip has no sound track")]


@pytest.mark.parametrize("images", [True, False])
def test_a_side_that_is_not_asked_for_is_not_missed(images: bool, tmp_path: Path) -> None:
    """Silent clips have vectors to be searched by sound; a broken frame does not silence a sound file."""
    files = {"a.mp4": clip_bytes(hertz=None)} if images else {"a.mp4": clip_bytes()[:900], "a.wav": sound_bytes()}
    write_tar(tmp_path / "shard-00000.tar", files)
    index(str(tmp_path))
    work = EmbedWork(engine_of("video-audio"), Manifest.load(str(tmp_path)), None, 2, images=images, texts=not images)
    done = work.process([0])
    assert not done.quarantined and [row["key"] for row in done.table.to_pylist()] == ["a"]
    assert list(done.extras) == ([] if images else [SOUNDS])


def test_captions_are_refused_with_what_the_model_is_for() -> None:
    with pytest.raises(ConfigError, match=r"writes no captions \(it pairs sounds with what is seen"):
        engine_of("video-audio").require(Captions)
