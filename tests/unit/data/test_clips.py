"""Shards of clips and sounds: indexed, read by byte range, checked, and made the arrays that a model takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.data.clips import ClipTransform
from isthmus.data.local import to_sample
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.pages import PAGES_FILE
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.data.records import SCHEMA
from isthmus.data.transforms import ImageTransform
from isthmus.testing.clips import clip_bytes, make_clips, make_heard_images, sound_bytes
from isthmus.testing.shards import image_bytes, make_dataset, write_tar

IMAGE = ImageTransform(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=False)


def indexed(folder: Path) -> Manifest:
    assert not index(str(folder)).problems
    return Manifest.load(str(folder))


def raw(manifest: Manifest, row: int) -> RawSample:
    (found,) = read_rows(manifest, [row], sounds=True)
    assert isinstance(found, RawSample)
    return found


@pytest.mark.parametrize("sound", ["", "ogg"])
def test_clips_are_indexed_and_read_by_their_byte_ranges(tmp_path: Path, sound: str) -> None:
    manifest = indexed(make_clips(tmp_path, 5, per_shard=3, sound=sound))
    assert len(manifest) == 5 and manifest.captioned == 5
    sample = raw(manifest, 3)
    assert sample.kind == "mp4" and sample.captions == ("clip number 3",)
    assert sample.image == clip_bytes(hertz=None if sound else 350, seed=3)
    assert sample.sound == (sound_bytes("ogg", hertz=350) if sound else None)
    assert next(iter(read_rows(manifest, [3]))).sound is None  # type: ignore[union-attr]  # read only where it is asked for
    assert check(str(tmp_path)).ok


def test_pairs_that_are_heard_need_no_caption(tmp_path: Path) -> None:
    manifest = indexed(make_heard_images(tmp_path, 3, captions=False))
    assert len(manifest) == 3 and manifest.captioned == 0
    assert raw(manifest, 1).sound == sound_bytes(hertz=250, rate=22_050)
    assert manifest.sound_bytes_of([0, 1]).tolist() == [len(sound_bytes(rate=22_050, hertz=h)) for h in (200, 250)]


def test_the_digest_covers_where_sounds_lie(tmp_path: Path) -> None:
    manifest = indexed(make_heard_images(tmp_path, 2))
    table = manifest.table
    moved = pa.array([offset + 512 for offset in table["audio_offset"].to_pylist()])
    at = table.schema.get_field_index("audio_offset")
    pq.write_table(table.set_column(at, "audio_offset", moved), tmp_path / "manifest.parquet")
    with pytest.raises(Exception, match="do not belong together"):
        Manifest.load(str(tmp_path))


def test_a_set_without_sounds_has_the_manifest_that_it_always_had(tmp_path: Path) -> None:
    manifest = indexed(make_dataset(tmp_path, 6))
    assert manifest.table.schema.names == SCHEMA.names and not manifest.knows_sounds
    state = hashlib.sha256(json.dumps([1, [dataclasses.asdict(shard) for shard in manifest.shards]]).encode())
    for name in ("id", "image_offset", "image_length", "text_offset", "text_length", "row"):
        state.update(manifest.table[name].to_numpy().tobytes())
    assert manifest.digest == state.hexdigest()
    assert manifest.sound_bytes_of([0, 5]).tolist() == [0, 0] and raw(manifest, 4).sound is None
    assert check(str(tmp_path)).ok


def test_a_paged_manifest_holds_sounds_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first sound comes after pages have been written without."""
    monkeypatch.setattr("isthmus.data.assembly.PAGED_FROM", 2)
    monkeypatch.setattr("isthmus.data.assembly.GROUP_ROWS", 2)
    monkeypatch.setattr("isthmus.data.pages.PAGE_ROWS", 2)
    make_dataset(tmp_path / "a", 5)
    make_heard_images(tmp_path / "b", 5)
    manifest = indexed(tmp_path)
    assert (tmp_path / PAGES_FILE).exists() and len(manifest) == 10
    assert raw(manifest, 8).sound == sound_bytes(hertz=350, rate=22_050)
    lengths = manifest.rows.column("audio_length")
    assert (lengths[:5] == -1).all() and (lengths[5:] > 0).all()
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table["audio_length"].fill_null(-1).to_pylist() == lengths.tolist()


def test_every_fault_of_a_shard_is_found(tmp_path: Path) -> None:
    clip = clip_bytes()
    members = {
        "a.mp4": clip,
        "b.mp4": clip[: len(clip) // 2],
        "c.mp4": clip_bytes(hertz=None),
        "d.png": image_bytes(0),
        "d.wav": sound_bytes(level=0),
        "e.wav": sound_bytes(),
        "f.mp4": clip,
        "f.png": image_bytes(1),
        "g.png": image_bytes(2),
        "g.wav": sound_bytes(),
        "g.mp3": sound_bytes("mp3"),
        "h.mkv": b"",
        "i.webm": b"\x1aE\xdf\xa3 and then nothing that is a clip",
    }
    write_tar(tmp_path / "shard-00000.tar", members)
    report = index(str(tmp_path))
    assert [(p.key, p.reason) for p in report.problems] == [
        ("e", "the sample has no image"),
        ("f", "a second image (.png) of one key; the first one is kept"),
        ("g", "a second sound (.mp3) of one key; the first one is kept"),
        ("h", "the member .mkv is empty"),
    ]
    found = {p.key: p.reason for p in check(str(tmp_path)).problems if p.key not in "efgh"}
    assert sorted(found) == ["b", "c", "d", "i"]
    assert "cut short" in found["b"] and "damaged" in found["i"]
    assert (found["c"], found["d"]) == ("the clip has no sound track", "the sound is silent throughout")


def test_frames_are_uniform_and_in_training_a_function_of_the_seed(tmp_path: Path) -> None:
    manifest = indexed(make_clips(tmp_path, 1, seconds=1.6))
    clip = ClipTransform(IMAGE, frames=4, seconds=10.0)
    found = clip.arrays(raw(manifest, 0), 5)
    assert found["pixels_CHW"].shape == (4, 3, 16, 16) and found["audio_NF"].shape == (62 * 8, 256)
    assert found["audio_mask_N"].sum() == pytest.approx(10 * 8, abs=8)
    greys = (found["pixels_CHW"].mean((1, 2, 3)) * 0.5 + 0.5) * 255
    assert greys.tolist() == pytest.approx([20, 60, 100, 140], abs=3)
    drawn = [clip.augmenting.arrays(raw(manifest, 0), seed)["pixels_CHW"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    for some in drawn:  # each within its own quarter
        part = ((some.mean((1, 2, 3)) * 0.5 + 0.5) * 255 + 3) // 40
        assert part.tolist() == [0, 1, 2, 3]


def test_a_long_clip_gives_its_first_seconds(tmp_path: Path) -> None:
    manifest = indexed(make_clips(tmp_path, 1, seconds=1.6))
    found = ClipTransform(IMAGE, frames=2, seconds=0.8).arrays(raw(manifest, 0), 0)
    assert ((found["pixels_CHW"].mean((1, 2, 3)) * 0.5 + 0.5) * 255).tolist() == pytest.approx([20, 60], abs=3)
    assert found["audio_NF"].shape == (5 * 8, 256) and found["audio_mask_N"].all()


def test_a_sample_of_the_other_modality_and_one_without_sound_are_set_aside(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", 1)
    make_dataset(tmp_path / "images", 1)
    manifests = {name: indexed(tmp_path / name) for name in ("clips", "images")}

    def outcome(name: str, modality: str) -> str:
        transform = ClipTransform(IMAGE, modality=modality, seconds=0.8)  # type: ignore[arg-type]
        found = to_sample(manifests[name], 0, raw(manifests[name], 0), transform, 16)
        return found.reason if isinstance(found, Failure) else "read"

    assert outcome("clips", "video-audio") == "read"
    assert outcome("clips", "image-audio") == "the sample has a clip, which image-audio does not take"
    assert outcome("images", "video-audio") == "the sample has an image, which video-audio does not take"
    assert outcome("images", "image-audio") == "the sample has no sound (.wav, .ogg, .flac, .mp3)"
    assert json.loads((tmp_path / "clips" / "manifest.json").read_text())["samples"] == 1
