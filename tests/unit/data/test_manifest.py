"""Every fault of a shard is reported with its place and reason; a manifest notices when the data has changed."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data import manifest as module
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.scan import sample_id
from isthmus.errors import DataError, StorageError
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar

PAIR = {"a.png": image_bytes(1), "a.txt": b"one\n"}
BLOCK = 512


def test_index_writes_offsets_that_hold_the_bytes(tmp_path: Path) -> None:
    make_dataset(tmp_path, 10, per_shard=4)
    report = index(str(tmp_path))
    assert (report.samples, report.shards, report.problems) == (10, 3, ())
    manifest = Manifest.load(str(tmp_path))
    assert len(manifest) == 10 and manifest.digest == report.digest and manifest.captioned == 10
    row = manifest.table.slice(5, 1).to_pylist()[0]
    data = (tmp_path / manifest.shards[row["shard"]].name).read_bytes()
    assert data[row["image_offset"] : row["image_offset"] + row["image_length"]] == image_bytes(5)
    assert data[row["text_offset"] :].startswith(b"picture number 5\n")
    assert row["id"] == sample_id("shard-00001.tar", "s00005") and row["id"] >= 0


def test_digest_depends_on_content_and_not_on_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_dataset(tmp_path / name, 4)
    make_dataset(tmp_path / "other", 4, start=1)
    digests = [index(str(tmp_path / name)).digest for name in ("one", "two", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_parquet_and_tars_side_by_side(tmp_path: Path) -> None:
    make_dataset(tmp_path, 3)
    make_parquet(tmp_path / "more.parquet", 5)
    assert index(str(tmp_path)).samples == 8
    assert index(str(tmp_path)).samples == 8  # the manifest itself is no shard


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 6 * BLOCK * 8))
def test_a_cut_anywhere_is_reported_and_loses_nothing_silently(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    shard = make_dataset(folder, 6, per_shard=6) / "shard-00000.tar"
    whole = shard.read_bytes()
    cut = min(cut, len(whole) - 1)
    shard.write_bytes(whole[:-cut])
    try:
        report = index(str(folder))
    except DataError as error:
        assert "usable sample" in str(error)
        return
    assert report.problems, f"{cut} bytes are missing and nothing was said"
    assert all(problem.shard == "shard-00000.tar" and problem.reason for problem in report.problems)


def test_every_cut_at_a_member_boundary_is_reported(tmp_path: Path) -> None:
    shard = make_dataset(tmp_path, 4, per_shard=4) / "shard-00000.tar"
    whole = shard.read_bytes()
    for end in range(BLOCK, len(whole), BLOCK):
        shard.write_bytes(whole[:end])
        with contextlib.suppress(DataError):
            assert index(str(tmp_path)).problems, end


@pytest.mark.parametrize(
    ("members", "reason", "kept"),
    [
        ([*PAIR.items(), ("a.png", b"x"), ("a.txt", b"y")], "a second image", 1),
        ([*PAIR.items(), ("b.png", b"x"), ("b.txt", b"y"), ("a.png", b"x")], "occurs a second time", 2),
        ([*PAIR.items(), ("b.png", b""), ("b.txt", b"y")], "the member .png is empty", 1),
        ([*PAIR.items(), ("b.png", b"x"), ("b.txt", b"")], "the member .txt is empty", 1),
        ([*PAIR.items(), ("b.png", b"x"), ("b.txt", b" \n\n")], "no caption", 1),
        ([*PAIR.items(), ("b.png", b"x"), ("b.txt", b"\xff\xfe\xfa")], "not UTF-8", 1),
        ([*PAIR.items(), ("b.png", b"x"), ("b.json", b"{]")], "not valid JSON", 1),
        ([*PAIR.items(), ("b.txt", b"words alone")], "no image", 1),
    ],
)
def test_faults_are_named(tmp_path: Path, members: list, reason: str, kept: int) -> None:
    write_tar(tmp_path / "x.tar", members)
    report = index(str(tmp_path))
    assert report.samples == kept
    assert any(reason in problem.reason for problem in report.problems), report.problems
    assert all(problem.shard == "x.tar" and problem.offset >= 0 for problem in report.problems)
    assert json.loads((tmp_path / "manifest.json").read_text())["problems"]


def test_missing_end_blocks_and_data_behind_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", PAIR, end=False)
    both = write_tar(tmp_path / "b.tar", {"b.png": b"x", "b.txt": b"y"})
    both.write_bytes(both.read_bytes() * 2)
    reasons = {problem.shard: problem.reason for problem in index(str(tmp_path)).problems}
    assert "end-of-archive blocks are missing" in reasons["a.tar"]
    assert "behind the end" in reasons["b.tar"]


def test_long_names_and_folders_inside_the_tar(tmp_path: Path) -> None:
    import io
    import tarfile

    name = "deep/" * 30 + "image.v1"
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for ending, data in ((".png", image_bytes(1)), (".txt", b"caption")):
            info = tarfile.TarInfo(name + ending)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert index(str(tmp_path)).samples == 1
    assert Manifest.load(str(tmp_path)).table["key"][0].as_py() == "deep/" * 30 + "image"


def test_folders_that_hold_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar or \.parquet shards"):
        index(str(tmp_path))
    with pytest.raises(StorageError, match="nothing at"):
        index(str(tmp_path / "missing"))
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 2 shard\(s\).*a\.tar at 0.*b\.tar at 0"):
        index(str(tmp_path))


def test_images_without_captions_are_a_choice(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": image_bytes(0), "b.png": image_bytes(1)})
    with pytest.raises(DataError, match="has no caption"):
        index(str(tmp_path))
    assert index(str(tmp_path), captions="optional").samples == 2
    assert Manifest.load(str(tmp_path)).captioned == 0


def test_collisions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, 2)
    monkeypatch.setattr("isthmus.data.scan.sample_id", lambda shard, key: 7)
    with pytest.raises(DataError, match=r"s00000 and shard-00000\.tar/s00001 have the same id"):
        index(str(tmp_path))


def test_a_manifest_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not indexed"):
        Manifest.load(str(tmp_path))
    make_dataset(tmp_path, 4)
    index(str(tmp_path))
    shard = tmp_path / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"bytes, .* when indexed"):
        Manifest.load(str(tmp_path))
    shard.unlink()
    with pytest.raises(DataError, match="is gone"):
        Manifest.load(str(tmp_path))
    make_dataset(tmp_path, 5)
    before = (tmp_path / "manifest.parquet").read_bytes()
    index(str(tmp_path))
    (tmp_path / "manifest.parquet").write_bytes(before)
    with pytest.raises(DataError, match="do not belong together"):
        Manifest.load(str(tmp_path))


def test_check_finds_flipped_bytes_and_images_that_do_not_decode(tmp_path: Path) -> None:
    make_dataset(tmp_path / "good", 6, per_shard=3)
    index(str(tmp_path / "good"))
    assert check(str(tmp_path / "good")).ok
    write_tar(tmp_path / "bad" / "x.tar", {**PAIR, "b.png": b"not an image", "b.txt": b"words"})
    index(str(tmp_path / "bad"))
    found = check(str(tmp_path / "bad"))
    assert [(p.key, p.shard) for p in found.problems] == [("b", "x.tar")]
    shard = tmp_path / "good" / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 255
    shard.write_bytes(data)
    reasons = [p.reason for p in check(str(tmp_path / "good")).problems]
    assert any("content has changed" in reason for reason in reasons)


def test_list_of_shards_with_the_manifest_elsewhere(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", 6, per_shard=3)
    shards = [str(tmp_path / "data" / f"shard-0000{n}.tar") for n in range(2)]
    assert index(shards, str(tmp_path / "out")).samples == 6
    manifest = Manifest.load(str(tmp_path / "out"))
    assert manifest.url(1) == shards[1]
    with pytest.raises(DataError, match="lacks 'out'"):
        index(shards)


def test_several_folders_and_shards_are_one_data_set(tmp_path: Path) -> None:
    make_dataset(tmp_path / "one", 4, per_shard=2)
    make_parquet(tmp_path / "two" / "deep" / "x.parquet", 3)
    index(str(tmp_path / "one"))  # its own manifest is no shard of another
    urls = [str(tmp_path / "two"), str(tmp_path / "one"), str(tmp_path / "one" / "shard-00001.tar")]
    report = index(urls, str(tmp_path))
    assert (report.samples, report.shards) == (7, 3), "a shard that is named twice counts once"
    names = [shard.name for shard in Manifest.load(str(tmp_path)).shards]
    assert names == ["one/shard-00000.tar", "one/shard-00001.tar", "two/deep/x.parquet"]
    assert index(urls[::-1], str(tmp_path)).digest == report.digest == index(str(tmp_path)).digest
    with pytest.raises(DataError, match=r"lacks 'out'.*--out"):
        index(urls)
    with pytest.raises(DataError, match="is one shard, not a folder"):
        index(urls[2])
    (tmp_path / "three").mkdir()
    with pytest.raises(DataError, match=r"three holds no \.tar or \.parquet shards"):
        index([*urls, str(tmp_path / "three")], str(tmp_path))


def test_shard_names_are_relative(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set" / "part", 2)
    index(str(tmp_path / "set"))
    assert Manifest.load(str(tmp_path / "set")).shards[0].name == "part/shard-00000.tar"
    assert module.VERSION == 1
