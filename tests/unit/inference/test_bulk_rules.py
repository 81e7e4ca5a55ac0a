"""Rules of bulk jobs that need no cluster: what is borne, how a chunk is taken apart, what makes a job another."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from isthmus.errors import DataError, RegistryError
from isthmus.inference import bulk
from isthmus.inference.commits import Chunk, Job, Ledger
from isthmus.inference.loading import artefact_digest
from isthmus.inference.pool import Done, Pool, _Isolation, _Item
from isthmus.testing.shards import image_bytes, write_tar


@pytest.mark.parametrize(
    ("samples", "share", "borne"), [(1000, 0.01, 10), (60, 0.01, 3), (60, 0.5, 30), (60, 0.0, 0), (10**6, 0.0, 0)]
)
def test_how_many_unreadable_images_a_job_bears(samples: int, share: float, borne: int) -> None:
    assert bulk.allowance(samples, share) == borne
    bulk._refuse_too_many(borne, borne, samples, "out")
    with pytest.raises(DataError, match="max_failed_share"):
        bulk._refuse_too_many(borne + 1, borne, samples, "out")


def test_a_folder_is_indexed_once_and_images_need_no_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", {f"{n}.png": image_bytes(n) for n in range(3)})
    with caplog.at_level(logging.WARNING):
        assert len(bulk.open_data(str(tmp_path))) == 3
    monkeypatch.setattr(bulk, "index", lambda *_, **__: pytest.fail("indexed again"))
    assert len(bulk.open_data(str(tmp_path))) == 3


def _done(rows: range) -> Done:
    return Done(pa.table({"id": pa.array(list(rows), pa.int64())}), ())


def _deaths(pool: Pool, item: _Item, deadly: int) -> int:
    """Runs the retry rule without processes; how many have died when the deadly row alone is accused."""
    queue, deaths = [item], 0
    isolation = _Isolation(item.chunk)
    while queue:
        item = queue.pop(0)
        if item.accused or deadly not in range(item.start, item.stop):
            isolation.add(item, _done(range(0) if item.accused else range(item.start, item.stop)))
            continue
        deaths += 1
        item.deaths += 1
        queue = pool._retry(item) + queue
    found = isolation.joined().table["id"].to_pylist()
    assert found == [row for row in range(item.chunk.start, item.chunk.stop) if row != deadly]
    return deaths


@pytest.mark.parametrize("size", [1, 2, 7, 128])
@pytest.mark.parametrize("where", [0, -1])
def test_a_deadly_row_is_found_in_few_deaths(size: int, where: int, tmp_path: Path) -> None:
    pool = Pool(lambda: None, Ledger(str(tmp_path), Job("x", {})), actors=1, cpus=1, gpus=0)  # type: ignore[arg-type,return-value]
    chunk = Chunk(3, 1000, 1000 + size)
    deaths = _deaths(pool, _Item(chunk, chunk.start, chunk.stop), range(chunk.start, chunk.stop)[where])
    assert deaths <= 2 + (size - 1).bit_length() + 2


def test_a_models_digest_is_of_its_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "recipe.yaml").write_text("name: x")
    assert artefact_digest(str(tmp_path / "one")) == artefact_digest(str(tmp_path / "two"))
    (tmp_path / "two" / "bases.json").write_text("[]")
    assert artefact_digest(str(tmp_path / "one")) != artefact_digest(str(tmp_path / "two"))
    with pytest.raises(RegistryError, match="holds no model"):
        artefact_digest(str(tmp_path))
