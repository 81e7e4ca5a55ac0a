"""A paged manifest is the same manifest: rows, samples, batches and digest; memory stays bounded, faults are named."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.config import DataConfig
from isthmus.contracts import Batch, Sample, Stage, StageModule
from isthmus.data import assembly, reuse
from isthmus.data import manifest as module
from isthmus.data import pages as form
from isthmus.data.assembly import Assembly
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.order import Order
from isthmus.data.pages import PAGES_FILE, Pages, PageWriter
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.records import SCHEMA
from isthmus.data.stream import iter_samples, train_batches
from isthmus.data.transforms import ImageTransform
from isthmus.errors import DataError, StorageError
from isthmus.inference.rows import Ids, Rows
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar

FACTS = {"captioned": 0, "repeated_images": False}


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on every index is as that of a large set, in pages of four rows."""

    def from_now_on() -> None:
        monkeypatch.setattr(assembly, "PAGED_FROM", 0)
        monkeypatch.setattr(form, "PAGE_ROWS", 4)

    monkeypatch.setattr(reuse, "SETTLED_S", -60.0)  # no test waits for a clock
    return from_now_on


def mixed_set(folder: Path) -> Path:
    """Tars and a Parquet file, of which two rows are of one image."""
    make_dataset(folder, 9, per_shard=4)
    rows = [{"key": f"p{n}", "image": image_bytes(n // 2), "caption": f"c{n}", "image_id": n // 2} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "more.parquet")
    return folder


def random_rows(count: int, seed: int) -> pa.Table:
    """Rows of any content that the columns can hold."""
    random = np.random.default_rng(seed)
    limits = np.iinfo(np.int64)
    texts = np.array(["", "jpg", "größer als ein Byte", "x" * 300, "漢字"])
    columns = {}
    for field in SCHEMA:
        if pa.types.is_string(field.type):
            columns[field.name] = pa.array(texts[random.integers(0, len(texts), count)].tolist(), field.type)
        elif field.name == "image_id":
            values = random.integers(limits.min, limits.max, count, endpoint=True)
            columns[field.name] = pa.array(values, field.type, mask=random.random(count) < 0.5)
        else:
            kind = np.iinfo(field.type.to_pandas_dtype())
            columns[field.name] = pa.array(random.integers(kind.min, kind.max, count, endpoint=True), field.type)
    return pa.table(columns, schema=SCHEMA)


def written(path: Path, table: pa.Table, page_rows: int, held: int = 1 << 20) -> Pages:
    writer = PageWriter(path, page_rows)
    together = 3 * page_rows
    for start in range(0, len(table), together):
        writer.write(table.slice(start, together))
    return Pages(str(path), "d" * 64, FACTS | {"bytes": writer.finish("d" * 64)}, held)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 60),
    page_rows=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    held=st.sampled_from([0, 3000, 1 << 20]),
    data=st.data(),
)
def test_any_rows_come_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, page_rows: int, seed: int, held: int, data: st.DataObject
) -> None:
    table = random_rows(count, seed)
    pages = written(tmp_path_factory.mktemp("pages") / PAGES_FILE, table, page_rows, held)
    assert len(pages) == count and pages.schema == SCHEMA and pages.whole().equals(table)
    numbers = data.draw(st.lists(st.integers(0, count - 1), max_size=50)) if count else []
    wanted = table.take(pa.array(numbers, pa.int64()))
    assert pages.take(numbers).equals(wanted)
    assert pages.take(numbers, ["key", "row"]).equals(wanted.select(["key", "row"]))
    start, stop = (data.draw(st.integers(0, count + 2)) for _ in range(2))
    some = pa.Table.from_batches(pages.batches(start, stop), SCHEMA)
    assert some.equals(table.slice(start, max(0, stop - start)))
    assert pages.column("text_offset").tolist() == table["text_offset"].to_pylist()
    assert pickle.loads(pickle.dumps(pages)).take(numbers).equals(wanted)


@pytest.mark.parametrize("number", [-1, 10])
def test_a_row_that_is_not_there_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(IndexError, match="rows 0 to 9"):
        written(tmp_path / PAGES_FILE, random_rows(10, 0), 4).take([3, number])


def test_a_paged_manifest_is_the_same_manifest(tmp_path: Path, paged: Callable[[], None]) -> None:
    reports = [index(str(mixed_set(tmp_path / "whole")))]
    paged()
    reports.append(index(str(mixed_set(tmp_path / "pages"))))
    assert reports[0] == reports[1]
    whole, pages = (Manifest.load(str(tmp_path / name)) for name in ("whole", "pages"))
    assert isinstance(pages.rows, Pages) and not isinstance(whole.rows, Pages)
    assert pages.table.equals(whole.table) and pages.digest == whole.digest and len(pages) == len(whole) == 12
    assert pq.read_table(tmp_path / "pages" / "manifest.parquet").equals(whole.table), "for everybody else"
    assert (pages.captioned, pages.names_images, pages.repeats_images) == (12, True, True)
    assert (whole.captioned, whole.names_images, whole.repeats_images) == (12, True, True)
    numbers = [11, 0, 5, 5, 9, 10]
    for of, column in (("ids_of", "ids"), ("image_ids_of", "image_ids"), ("image_bytes_of", "image_bytes")):
        for manifest in (whole, pages):
            assert getattr(manifest, of)(numbers).tolist() == getattr(whole, column)[numbers].tolist()
        assert getattr(pages, column).tolist() == getattr(whole, column).tolist()
    shards = [whole.shards[number].name for number in whole.table["shard"].to_pylist()]
    assert [pages.shard_of(row).name for row in range(12)] == shards
    assert list(read_rows(pages, numbers)) == list(read_rows(whole, numbers))
    assert all(isinstance(sample, RawSample) for sample in read_rows(pages, range(12)))
    assert check(str(tmp_path / "pages")).problems == check(str(tmp_path / "whole")).problems == ()


def collate(samples: Sequence[Sample], epoch: int, step: int) -> Batch:
    return Batch(
        sample_ids_B=torch.tensor([s.id for s in samples]),
        valid_B=torch.ones(len(samples), dtype=torch.bool),
        step=step,
        epoch=epoch,
        texts=tuple(s.captions[0] for s in samples),
        pixels_BCHW=torch.from_numpy(np.stack([s.pixels_CHW for s in samples])),  # type: ignore[misc]
        image_ids_B=torch.tensor([s.id if s.image_id is None else s.image_id for s in samples]),
    )


def batches(folder: Path) -> list[Batch]:
    transform = ImageTransform(8)
    spec = {"tokens": 2, "width": 3, "image_size": 8}
    stage = Stage(StageModule(), collate, transform, transform.augment, lambda g: {}, (), spec)
    stage = replace(stage, needs_image_ids=True)
    config, order = DataConfig(train=str(folder)), Order(12, 5, seed=1, pool=4)
    return list(train_batches(config, stage, order, 0, 1, 1, 7, 9, lambda failure: None))


def test_training_and_bulk_jobs_never_hold_whole_columns(
    tmp_path: Path, paged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(str(mixed_set(tmp_path / "whole")))
    expected = batches(tmp_path / "whole")
    paged()
    index(str(mixed_set(tmp_path / "pages")))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a whole column was read")

    for name in ("whole", "column", "batches"):
        monkeypatch.setattr(Pages, name, refuse)
    for one, two in zip(expected, batches(tmp_path / "pages"), strict=True):
        assert torch.equal(one.pixels_BCHW, two.pixels_BCHW) and one.texts == two.texts  # type: ignore[arg-type]
        assert torch.equal(one.sample_ids_B, two.sample_ids_B) and torch.equal(one.valid_B, two.valid_B)
        assert torch.equal(one.image_ids_B, two.image_ids_B)  # type: ignore[arg-type]
    assert {len(set(batch.image_ids_B.tolist())) for batch in expected} != {5}  # type: ignore[union-attr]
    manifest, whole = (Manifest.load(str(tmp_path / name)) for name in ("pages", "whole"))
    read = [sample for group in iter_samples(manifest, batch=5) for sample in group]
    assert [sample.id for sample in read] == whole.ids.tolist()
    rows, ids = Rows(manifest), whole.ids.tolist()
    assert Ids(manifest)[2:7].tolist() == ids[2:7] and rows.ids([8, 1]) == [ids[8], ids[1]]
    assert rows.shards([ids[10], ids[1]], range(12)) == ["shard-00001.tar", "more.parquet"]
    rows.complete(range(12), ids, ())


def test_what_a_reader_keeps_is_bounded(tmp_path: Path) -> None:
    rows, page_rows, most = 40_960, 512, 700_000
    pages = written(tmp_path / PAGES_FILE, random_rows(rows, 0), page_rows, most)
    assert pa.Table.from_batches(pages.batches(0, page_rows)).nbytes * 4 < most, "several pages fit"
    before = pa.total_allocated_bytes()
    peak = 0
    for start in range(0, rows, 1000):
        pages.take(range(start, min(start + 1000, rows)))
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert 0 < pages.held_bytes <= most
    assert peak < 3 * most < pages.whole().nbytes / 2
    pages.take(np.arange(0, rows, page_rows))  # a row of every page at once
    assert pages.held_bytes <= most


def test_what_is_used_stays_and_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = written(tmp_path / PAGES_FILE, random_rows(40, 0), 4)
    read: list[int] = []
    real = Pages._fetch

    def noting(self: Pages, page: int) -> object:
        read.append(page)
        return real(self, page)

    monkeypatch.setattr(Pages, "_fetch", noting)
    for numbers in ([0, 3, 39], [39, 2, 1], [4]):
        pages.take(numbers)
    assert sorted(read) == [0, 1, 9]


def test_an_index_of_many_rows_holds_a_group_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "PAGED_FROM", 2000)
    monkeypatch.setattr(assembly, "GROUP_ROWS", 1024)
    shards = 40
    before, peak = pa.total_allocated_bytes(), 0
    with Assembly(str(tmp_path)) as rows:
        for shard in range(shards):
            rows.add(random_rows(1000, shard), shard)
            peak = max(peak, pa.total_allocated_bytes() - before)
        rows.complete()
        size = rows.rows * random_rows(1000, 0).nbytes // 1000
        assert rows.paged and rows.rows == shards * 1000 and peak < size / 4
        facts, table = rows.write("0" * 64)
    assert table == b"" and facts["pages"]["bytes"] == (tmp_path / PAGES_FILE).stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGES_FILE, "manifest.parquet"], "no scratch is left"
    pages = Pages(str(tmp_path / PAGES_FILE), "0" * 64, facts["pages"])
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert pages.whole().equals(table) and table["shard"].to_pylist() == np.arange(shards).repeat(1000).tolist()
    assert table.slice(7000, 1000).drop(["shard"]).equals(random_rows(1000, 7).drop(["shard"]))


@pytest.mark.parametrize("shard", [0, 1])
def test_equal_ids_are_found_among_many_rows(tmp_path: Path, paged: Callable[[], None], shard: int) -> None:
    paged()
    table = random_rows(9, 1)
    twin = table.slice(4, 1)
    with Assembly(str(tmp_path)) as rows:
        rows.add(table, 0)
        rows.add(pa.concat_tables([random_rows(3, 2), twin]) if shard else twin, shard)
        rows.complete()
        assert [(row["shard"], row["id"]) for row in rows.twins()] == [(s, twin["id"][0].as_py()) for s in (0, shard)]
    assert list(tmp_path.iterdir()) == [], "what was not written is thrown away"


def test_a_set_that_grows_and_shrinks(
    tmp_path: Path, paged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 8, per_shard=4)
    first = index(str(tmp_path))
    paged()
    whole = Manifest.load(str(tmp_path))
    assert not isinstance(whole.rows, Pages), "a manifest of before is read as it is"
    again = index(str(tmp_path))
    assert again.digest == first.digest and again.reused == 2 and (tmp_path / PAGES_FILE).exists()
    make_parquet(tmp_path / "more.parquet", 3)
    more = index(str(tmp_path))
    assert more.reused == 2 and more.samples == 11
    grown = Manifest.load(str(tmp_path)).table
    assert index(str(tmp_path), fresh=True).digest == more.digest and index(str(tmp_path)).reused == 3
    monkeypatch.setattr(assembly, "PAGED_FROM", 11)
    assert index(str(tmp_path)).reused == 3 and not (tmp_path / PAGES_FILE).exists()
    assert Manifest.load(str(tmp_path)).table.equals(grown)
    assert "pages" not in json.loads((tmp_path / "manifest.json").read_text())


def damaged(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_torn_or_foreign_file_is_named_with_its_mend(tmp_path: Path, paged: Callable[[], None]) -> None:
    paged()
    for name, start in (("one", 0), ("two", 20)):
        make_dataset(tmp_path / name, 9, start=start)
        index(str(tmp_path / name))
    path, mend = tmp_path / "one" / PAGES_FILE, rf"Run `isthmus data index {tmp_path / 'one'}` again"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(DataError, match=rf"has {len(good) - 100} bytes, {len(good)} when it was written\. {mend}"):
        Manifest.load(str(tmp_path / "one"))
    path.write_bytes(bytes(len(good)))
    with pytest.raises(DataError, match=rf"does not end as such a file does\. {mend}"):
        Manifest.load(str(tmp_path / "one"))
    other = (tmp_path / "two" / PAGES_FILE).read_bytes()
    path.write_bytes(other)
    header = tmp_path / "one" / "manifest.json"
    said = header.read_text()
    header.write_text(said.replace(f'"bytes": {len(good)}', f'"bytes": {len(other)}'))
    with pytest.raises(DataError, match=rf"is of another index \(\w{{12}}, not \w{{12}}\)\. {mend}"):
        Manifest.load(str(tmp_path / "one"))
    header.write_text(said)
    path.unlink()
    with pytest.raises(StorageError, match=r"manifest\.pages"):
        Manifest.load(str(tmp_path / "one"))
    index(str(tmp_path / "one"))
    assert path.read_bytes() == good, "the mend"


def test_a_damaged_page_is_noticed_when_it_is_read_and_mended(tmp_path: Path, paged: Callable[[], None]) -> None:
    paged()
    make_dataset(tmp_path, 12, per_shard=6)
    digest = index(str(tmp_path)).digest
    path = tmp_path / PAGES_FILE
    good = path.read_bytes()
    damaged(path, 20)
    manifest = Manifest.load(str(tmp_path))
    assert manifest.take([4, 11])["key"].to_pylist() == ["s00004", "s00011"]
    with pytest.raises(DataError, match=r"is damaged between the bytes 0 and \d+\. Run `isthmus data index"):
        manifest.take([4, 3])
    report = index(str(tmp_path))
    assert report.digest == digest and path.read_bytes() == good


@pytest.mark.parametrize(("behind", "what"), [(30, "has a damaged end"), (0, "has a damaged list of pages")])
def test_a_damaged_end_is_noticed_at_once(tmp_path: Path, paged: Callable[[], None], behind: int, what: str) -> None:
    paged()
    index(str(make_dataset(tmp_path, 9)))
    path = tmp_path / PAGES_FILE
    damaged(path, path.read_bytes().index(b'{"digest"') - 1 + behind)
    with pytest.raises(DataError, match=what):
        Manifest.load(str(tmp_path))


def test_pages_in_the_wrong_place_are_noticed(tmp_path: Path) -> None:
    """Two pages of one length that changed places, as a store that mixes up parts of an upload would make them."""
    table = random_rows(4, 0)
    writer = PageWriter(tmp_path / PAGES_FILE, 4)
    writer.write(table)
    writer.write(table)
    pages = Pages(str(tmp_path / PAGES_FILE), "d" * 64, {"bytes": writer.finish("d" * 64)})
    assert pages.take([4]).equals(pages.take([0]))
    first, second = (int(n) for n in np.diff(pages._starts))
    assert first == second, "or this says nothing"
    data = (tmp_path / PAGES_FILE).read_bytes()
    (tmp_path / PAGES_FILE).write_bytes(data[first : 2 * first] + data[:first] + data[2 * first :])
    with pytest.raises(DataError, match="is damaged between"):
        Pages(pages.url, pages.digest, {"bytes": len(data)}).take([0])


def test_facts_of_images_and_captions_need_no_rows(tmp_path: Path, paged: Callable[[], None]) -> None:
    paged()
    write_tar(tmp_path / "x.tar", {"a.png": image_bytes(0), "b.png": image_bytes(1), "b.txt": b"words"})
    index(str(tmp_path), captions="optional")
    manifest = Manifest.load(str(tmp_path))
    assert (len(manifest), manifest.captioned, manifest.repeats_images, manifest.names_images) == (2, 1, False, True)
    assert json.loads((tmp_path / "manifest.json").read_text())["pages"] == {
        "bytes": (tmp_path / PAGES_FILE).stat().st_size,
        "captioned": 1,
        "repeated_images": False,
    }


def test_a_header_that_belongs_to_other_pages_is_refused(tmp_path: Path, paged: Callable[[], None]) -> None:
    paged()
    index(str(make_dataset(tmp_path, 9)))
    header = tmp_path / module.HEADER_FILE
    header.write_text(header.read_text().replace('"samples": 8', '"samples": 7'))
    with pytest.raises(DataError, match=r"manifest\.json and manifest\.pages of .* do not belong together"):
        Manifest.load(str(tmp_path))
