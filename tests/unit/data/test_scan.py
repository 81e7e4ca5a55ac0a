"""What a tar holds is indexed or reported: layouts as img2dataset writes them, and archives cut at every place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.data.manifest import Manifest, check, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.scan import Scan, scan_shard
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar

BLOCK = 512


def img2dataset(folder: Path, kind: str = "jpg") -> Path:
    """A tar of two pairs as img2dataset writes it, with its table and its figures beside it."""
    members: dict[str, bytes] = {}
    for n in range(2):
        key = f"00000000{n}"
        meta = {"url": f"https://example.org/{n}.jpg", "caption": f"caption {n}", "key": key, "status": "success"}
        members[f"{key}.{kind}"] = image_bytes(n)
        members[f"{key}.json"] = json.dumps({**meta, "error_message": None, "width": 32, "height": 24}).encode()
        members[f"{key}.txt"] = f"caption {n}".encode()
    write_tar(folder / "00000.tar", members)
    (folder / "00000_stats.json").write_text("{}")
    return folder


def samples_of(folder: Path) -> list[RawSample]:
    manifest = Manifest.load(str(folder))
    found = list(read_rows(manifest, range(len(manifest))))
    assert all(isinstance(sample, RawSample) for sample in found)
    return [sample for sample in found if isinstance(sample, RawSample)]


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "png", "webp"])
def test_a_tar_of_img2dataset_with_its_table_beside_it(tmp_path: Path, kind: str) -> None:
    img2dataset(tmp_path, kind)
    rows = [{"url": f"https://example.org/{n}.jpg", "caption": "c", "key": str(n)} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    report = index(str(tmp_path))
    assert (report.samples, report.shards, report.passed_over, report.problems) == (2, 1, 1, ())
    first, second = samples_of(tmp_path)
    assert first.captions == ("caption 0",) and second.image == image_bytes(1)
    assert first.meta["status"] == "success" and first.meta["width"] == 32
    make_parquet(tmp_path / "00000.parquet", 3)  # one that holds images is a shard, whatever its name
    report = index(str(tmp_path))
    assert (report.samples, report.shards, report.passed_over) == (5, 2, 0)


def test_caption_and_class_members(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"x", "a.caption": b"one\ntwo\n", "a.cls": b"7",
        "b.jpg": b"x", "b.txt": b"text", "b.caption": b"not this", "b.cls": b"0",
        "c.jpg": b"x", "c.caption": b"c", "c.json": b'{"n": 1}', "c.cls": b"8",
        "d.jpg": b"x", "d.cls": b"9",
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    report = index(str(tmp_path))
    assert [(p.key, "no caption" in p.reason) for p in report.problems] == [("d", True)]
    found = {s.key: (s.captions, s.meta) for s in samples_of(tmp_path)}
    assert found == {
        "a": (("one", "two"), {"class": "7"}),
        "b": (("text",), {"class": "0"}),
        "c": (("c",), {"n": 1}),
    }
    assert index(str(tmp_path), captions="optional").problems == ()
    assert samples_of(tmp_path)[3].meta == {"class": "9"}


def test_links_sparse_files_and_foreign_formats_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            if kind != tarfile.REGTYPE:
                info.size = 0
            tar.addfile(info, io.BytesIO(data))

        add("a.png", image_bytes(0))
        add("b.png", kind=tarfile.LNKTYPE, target="a.png")
        add("c.png", kind=tarfile.SYMTYPE, target="a.png")
        add("d.heic")
        add("folder", kind=tarfile.DIRTYPE)
        add("e.npy")
        add("f.png", image_bytes(1))
    report = index(str(tmp_path), captions="optional")
    assert report.samples == 2
    reasons = {problem.key: problem.reason for problem in report.problems}
    assert set(reasons) == {"b", "c", "d"}
    assert "a link to a.png" in reasons["b"] and "a link to a.png" in reasons["c"]
    assert "kind .heic are not read" in reasons["d"]


def whole_and_cut(shard: Path, end: int, whole: bytes) -> tuple[Scan, list[str]]:
    shard.write_bytes(whole[:end])
    scan = scan_shard(str(shard), shard.name, need_captions=True)
    return scan, [sample["key"] for sample in scan.samples]


@pytest.mark.parametrize("kind", ["ustar", "gnu with long names", "pax"])
def test_a_cut_anywhere_loses_no_sample_in_silence(tmp_path: Path, kind: str) -> None:
    """Every cut at a block, and one inside of each: what is not whole is reported, at its place, and what is whole is
    still there, byte for byte."""
    shard = tmp_path / "x.tar"
    keys = ["a", "b", "c"] if kind == "ustar" else [letter * 120 for letter in "abc"]
    members = {f"{key}{end}": data for key in keys for end, data in ((".png", image_bytes(1)), (".txt", b"one\ntwo"))}
    if kind == "ustar":
        write_tar(shard, members)
    else:
        with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = shard.read_bytes()
    full = scan_shard(str(shard), shard.name, need_captions=True)
    assert [sample["key"] for sample in full.samples] == keys and not full.problems
    data_ends = [sample["text_offset"] + sample["text_length"] for sample in full.samples]
    archive_ends = -(-data_ends[-1] // BLOCK) * BLOCK
    cuts = [at + more for at in range(0, archive_ends + 2 * BLOCK, BLOCK) for more in (0, 1, 511)]
    for end in (cut for cut in cuts if cut < archive_ends + 2 * BLOCK):
        scan, kept = whole_and_cut(shard, end, whole)
        intact = [sample for sample, needs in zip(full.samples, data_ends, strict=True) if needs <= end]
        assert scan.samples == intact, (kind, end)
        assert scan.problems, f"cut at {end} of {len(whole)} and nothing was said"
        assert all(problem.offset <= end and problem.reason for problem in scan.problems)
        if len(kept) < len(keys):
            first_lost = data_ends[len(kept) - 1] if kept else 0
            assert max(problem.offset for problem in scan.problems) >= first_lost // BLOCK * BLOCK
        assert not any("behind the end" in problem.reason for problem in scan.problems)


def test_a_cut_inside_a_member_is_told_from_one_between_members(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.png": image_bytes(0), "a.txt": b"one", "b.png": image_bytes(1)})
    whole = shard.read_bytes()
    pair = 2 * BLOCK + -(-len(image_bytes(0)) // BLOCK) * BLOCK + BLOCK

    def reasons(end: int) -> list[str]:
        return [problem.reason for problem in whole_and_cut(shard, end, whole)[0].problems]

    inside = reasons(pair + BLOCK + 100)
    assert inside == [f"b.png is cut short: 100 of {len(image_bytes(1))} bytes"]
    between = reasons(pair)
    assert between == ["the end-of-archive blocks are missing: the archive may have been cut short here"]
    header = reasons(pair + 100)
    assert len(header) == 1 and "damaged or cut tar header" in header[0]


def test_a_header_nested_without_end_is_a_fault_of_the_shard(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, BLOCK
    good = write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.txt": b"y"}, end=False).read_bytes()
    (tmp_path / "x.tar").write_bytes(good + (info.tobuf(tarfile.GNU_FORMAT) + b"n" * BLOCK) * 3000)
    report = index(str(tmp_path))
    assert report.samples == 1 and "damaged or cut tar header" in report.problems[0].reason


def test_check_finds_what_the_index_left_out(tmp_path: Path) -> None:
    pair = {"a.png": image_bytes(1), "a.txt": b"one"}
    write_tar(tmp_path / "twice.tar", [*pair.items(), ("b.png", image_bytes(2)), ("b.txt", b"two"), *pair.items()])
    write_tar(tmp_path / "empty.tar", {**pair, "b.png": b"", "b.txt": b"words"})
    write_tar(tmp_path / "poor.tar", {**pair, "b.png": image_bytes(3)})
    write_tar(tmp_path / "endless.tar", pair, end=False)
    cut = write_tar(tmp_path / "cut.tar", {**pair, "b.png": image_bytes(4)})
    cut.write_bytes(cut.read_bytes()[:-1500])
    make_parquet(tmp_path / "fine.parquet", 3)
    (tmp_path / "nothing.tar").write_bytes(b"")
    left_out = index(str(tmp_path)).problems
    found = check(str(tmp_path))
    assert not found.ok and found.problems == left_out
    assert {problem.shard.partition(".")[0] for problem in left_out} == {
        "twice", "empty", "poor", "endless", "cut", "nothing",
    }  # fmt: skip
    index(str(tmp_path), captions="optional")
    assert not any("no caption" in problem.reason for problem in check(str(tmp_path)).problems)


def test_check_names_the_row_of_a_parquet_image_that_does_not_decode(tmp_path: Path) -> None:
    rows = [{"key": f"k{n}", "image": image_bytes(n) if n != 2 else b"no image", "caption": "c"} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    index(str(tmp_path))
    assert [(p.offset, p.key) for p in check(str(tmp_path)).problems] == [(2, "k2")]


@pytest.mark.parametrize("end", [0, 700, 5120])
def test_check_after_a_shard_was_cut(tmp_path: Path, end: int) -> None:
    shard = make_dataset(tmp_path, 4, per_shard=4) / "shard-00000.tar"
    index(str(tmp_path))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:end])
    problems = check(str(tmp_path)).problems
    assert f"the content has changed ({end} bytes, {len(whole)} indexed)" in problems[0].reason
    lost = {problem.key for problem in problems if "index it again" in problem.reason}
    assert lost == {f"s0000{n}" for n in range(4)} - ({"s00000"} if end >= 5120 else set())


def test_questions_stand_for_a_caption(tmp_path: Path) -> None:
    asked = json.dumps({"questions": [{"question": "what colour", "answers": ["red"]}]}).encode()
    members = {"a.png": image_bytes(0), "a.json": asked, "b.png": image_bytes(1), "b.json": b'{"questions": []}'}
    write_tar(tmp_path / "a.tar", members)
    report = index(str(tmp_path))
    assert [problem.key for problem in report.problems] == ["b"], "which has neither"
    manifest = Manifest.load(str(tmp_path))
    assert (len(manifest), manifest.captioned) == (1, 0)
    assert samples_of(tmp_path)[0].meta["questions"][0]["answers"] == ["red"]
