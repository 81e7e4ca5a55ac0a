"""Samples that are not what they should be: counted, named, set aside, and everything else is trained on once."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import chaos_method
import numpy as np
import pytest
from chaos_help import Report, judge, quarantined
from PIL import Image

from isthmus.data.manifest import index
from isthmus.testing.shards import image_bytes, make_dataset, write_tar
from isthmus.training.driver import fit

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

DEADLY = (13, 13)


def with_sample(folder: Path, key: str, image: bytes, kind: str = "png") -> Path:
    """Data of 22 good samples and one more."""
    make_dataset(folder, 22)
    write_tar(folder / "zz.tar", {f"{key}.{kind}": image, f"{key}.txt": b"a picture"})
    index(str(folder))
    return folder


def train(ground: Path, name: str, folder: Path, **options: Any) -> Any:
    fit(chaos_method.recipe(ground, name, data=str(folder), train={"steps": 9}, **options), progress=False)
    return judge(ground, name, data=str(folder), steps=9, bad=frozenset(quarantined(ground, name)))


@pytest.mark.fault("corrupt JPEG")
def test_a_corrupt_image(ground: Path, control: str, report: Report, tmp_path: Path) -> None:
    whole = image_bytes(99, size=(200, 150), kind="JPEG")
    found = train(ground, "corrupt", with_sample(tmp_path, "corrupt", whole[: len(whole) // 2], "jpg"))
    assert list(quarantined(ground, "corrupt")) == ["corrupt"]
    report.add("corrupt JPEG", found, note=quarantined(ground, "corrupt")["corrupt"])


def bomb(side: int) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels of one bit, some 24,000 times smaller than what it unfolds to."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = bytes(1 + -(-side // 8))  # its filter, 0 too, and the pixels
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.fault("decompression bomb")
def test_a_decompression_bomb(ground: Path, control: str, report: Report, tmp_path: Path) -> None:
    packed = bomb(15_300)
    assert len(packed) < 40_000 and np.prod((15_300, 15_300, 3)) > 700e6
    found = train(ground, "bomb", with_sample(tmp_path, "bomb", packed))
    reason = quarantined(ground, "bomb")["bomb"]
    assert "pixels" in reason
    report.add("decompression bomb", found, note=f"{len(packed) / 1e3:.0f} kB that unfold to 702 MB: {reason}")


def dies(image: Any, seed: int) -> Any:
    """An augmentation that ends the process at one image, as a fault in a decoder's C code would."""
    if image.size == DEADLY:
        os.abort()
    from isthmus.models.vision import describe_vision

    return describe_vision(chaos_method.tiny_vision_config()).transform.augment(image, seed)


@pytest.mark.fault("sample that aborts its process")
def test_an_image_that_aborts_its_process(ground: Path, control: str, report: Report, tmp_path: Path) -> None:
    import dataclasses

    import ray.cloudpickle

    from isthmus.methods import METHODS

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    picture = io.BytesIO()
    Image.new("RGB", DEADLY).save(picture, "PNG")
    folder = with_sample(tmp_path, "deadly", picture.getvalue())

    def build(config: Any, context: Any) -> Any:
        return dataclasses.replace(chaos_method.build_chaos(config, context), augment=dies)

    METHODS["chaos"] = dataclasses.replace(chaos_method.SPEC, build=build)
    try:
        found = train(ground, "deadly", folder)
    finally:
        METHODS["chaos"] = chaos_method.SPEC
    assert "ended the process" in quarantined(ground, "deadly")["deadly"]
    report.add("sample that aborts its process", found, note=quarantined(ground, "deadly")["deadly"])


@pytest.mark.fault("tar cut at a member boundary")
def test_a_tar_that_is_cut_at_a_member_boundary(ground: Path, control: str, report: Report, tmp_path: Path) -> None:
    make_dataset(tmp_path, 24)
    shard = tmp_path / "shard-00001.tar"
    data = shard.read_bytes()
    boundary = next(o for o in range(len(data) // 2 // 512 * 512, len(data), 512) if data[o : o + 6] == b"s00013")
    shard.write_bytes(data[:boundary])
    seen = index(str(tmp_path))
    [problem] = [problem for problem in seen.problems if problem.shard == shard.name and "cut short" in problem.reason]
    found = train(ground, "boundary", tmp_path)
    assert seen.samples == 24 - 3 and problem.offset == boundary
    report.add("tar cut at a member boundary", found, note=f"the index says: {problem.reason} (byte {problem.offset})")


@pytest.mark.fault("shard cut after it was indexed")
def test_a_shard_that_was_cut_after_it_was_indexed(ground: Path, control: str, report: Report, tmp_path: Path) -> None:
    from isthmus.errors import DataError

    make_dataset(tmp_path, 24)
    index(str(tmp_path))
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"shard-00001\.tar.*when indexed") as refused:
        train(ground, "late", tmp_path)
    report.add("shard cut after it was indexed", note=f"refused before anything starts: {refused.value.problem}")
