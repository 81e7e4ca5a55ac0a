"""A subset of a data set: its rows, its ids, and that what reads data sets reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from isthmus import storage
from isthmus.data.features import FeatureCache, build_cache
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.subset import write_subset
from isthmus.errors import DataError
from isthmus.testing.backbones import tiny_vision_config
from isthmus.testing.clips import make_heard_images
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = make_dataset(tmp_path_factory.mktemp("whole"), 24, per_shard=8)
    make_parquet(folder / "table.parquet", 6)
    index(str(folder))
    return Manifest.load(str(folder))


def test_it_holds_the_chosen_rows_in_order_and_reads_them(whole: Manifest, tmp_path: Path) -> None:
    chosen = [29, 3, 17, 1, 24]  # of the first, the third and the last shard
    subset = write_subset(whole, chosen, str(tmp_path / "subset"))
    assert [shard.samples for shard in subset.shards] == [2, 1, 2] and len(subset) == 5
    assert subset.ids.tolist() == whole.ids[np.sort(chosen)].tolist()
    expected, found = (list(read_rows(m, rows)) for m, rows in ((whole, sorted(chosen)), (subset, range(5))))
    assert found == expected and all(isinstance(sample, RawSample) for sample in found)
    assert subset.digest != whole.digest and subset.subset_of == whole.digest
    assert subset.digest == write_subset(whole, sorted(chosen), str(tmp_path / "again")).digest
    assert check(subset.root).ok
    assert [subset.shard_of(row).name for row in (0, 2, 4)] == [whole.url(i) for i in (0, 2, 3)]


def test_a_cache_of_the_whole_set_serves_its_subset_and_no_other(whole: Manifest, tmp_path: Path) -> None:
    build_cache(whole.root, str(tmp_path / "cache"), tiny_vision_config(), actors=0)
    subset = write_subset(whole, range(5), str(tmp_path / "subset"))
    cache = FeatureCache.open(str(tmp_path / "cache"), expect={"manifest_digest": subset.digests})
    assert all(int(i) in cache for i in subset.ids)
    make_dataset(tmp_path / "other", 3, start=50)
    index(str(tmp_path / "other"))
    with pytest.raises(DataError, match="another manifest"):
        FeatureCache.open(
            str(tmp_path / "cache"), expect={"manifest_digest": Manifest.load(str(tmp_path / "other")).digests}
        )


@pytest.mark.parametrize("rows", [[1, 4], [1, 6], [6, 7]])
def test_sounds_come_along(rows: list[int], tmp_path: Path) -> None:
    """Of a set in which some samples have one: all chosen do, some, none."""
    make_heard_images(tmp_path / "data", 6)
    silent = {f"{n}.{kind}": data for n in "ab" for kind, data in (("png", image_bytes(0)), ("txt", b"a dog"))}
    write_tar(tmp_path / "data" / "silent.tar", silent)
    index(str(tmp_path / "data"))
    heard = Manifest.load(str(tmp_path / "data"))
    subset = write_subset(heard, rows, str(tmp_path / "out"))
    found = list(read_rows(subset, range(len(rows)), sounds=True))
    assert [raw.sound for raw in found] == [raw.sound for raw in read_rows(heard, rows, sounds=True)]
    assert check(str(tmp_path / "out")).ok


def test_what_is_no_choice_is_refused(whole: Manifest, tmp_path: Path) -> None:
    for rows in ([], [3, 3]):
        with pytest.raises(DataError, match="each once"):
            write_subset(whole, rows, str(tmp_path / "subset"))
    with pytest.raises(DataError, match="not a subset"):
        write_subset(whole, [1], whole.root)
    with pytest.raises(IndexError):
        write_subset(whole, [len(whole)], str(tmp_path / "subset"))


def test_a_manifest_of_before_images_were_named_can_be_chosen_from(whole: Manifest, tmp_path: Path) -> None:
    make_dataset(tmp_path / "old", 8)
    index(str(tmp_path / "old"))
    table = tmp_path / "old" / "manifest.parquet"
    pq.write_table(pq.read_table(table).drop_columns("image_id"), table)
    subset = write_subset(Manifest.load(str(tmp_path / "old")), [2, 5], str(tmp_path / "subset"))
    assert subset.names_images and subset.image_ids.tolist() == subset.ids.tolist()
    assert storage.exists(str(tmp_path / "subset" / "manifest.json"))
