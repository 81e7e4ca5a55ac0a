"""Prototypes and sample vectors without a cluster: prompts, labelled images, an embedding job's output, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.alignment.curate import CurateWork
from isthmus.alignment.features import CaptionEncoder, TextWork, fixed_rows, weights_fact
from isthmus.alignment.prototypes import Prototypes, model_space, prototypes, text_space
from isthmus.alignment.vectors import DECIMALS, Embedded, Group, Stored
from isthmus.config import CurateConfig, PrototypesConfig, TextConfig
from isthmus.data.manifest import Manifest, index
from isthmus.errors import ConfigError, DataError
from isthmus.inference.commits import Job, Ledger, Quarantined, chunks
from isthmus.inference.embed import IMAGE_SCHEMA, TEXT_SCHEMA, TEXTS
from isthmus.testing.backbones import tiny_bert
from isthmus.testing.shards import image_bytes, write_tar

CLASSES = ("cat", "dog", "tree")
SAMPLES, CHUNK, QUERIES, E = 14, 5, 2, 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Fourteen labelled pictures, every third with a second caption."""
    folder, members = tmp_path_factory.mktemp("data"), {}
    for n in range(SAMPLES):
        members[f"s{n:02d}.png"] = image_bytes(n)
        more = f"\na photo of the {CLASSES[n % 3]}" if n % 3 == 0 else ""
        members[f"s{n:02d}.txt"] = f"a {CLASSES[n % 3]} and a house{more}\n".encode()
        members[f"s{n:02d}.json"] = json.dumps({"label": CLASSES[n % 3]}).encode()
    write_tar(folder / "a.tar", members)
    index(str(folder))
    return Manifest.load(str(folder))


@pytest.fixture(scope="module")
def vectors(data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an embedding job of that data leaves; sample 7 could not be read."""
    out = str(tmp_path_factory.mktemp("vectors"))
    facts = {"model": "the model", "manifest": data.digest, "chunk": CHUNK, "images": True, "texts": True}
    ledger = Ledger(out, Job("embed", facts))
    ledger.open()
    ids = data.ids.tolist()
    for chunk in chunks(SAMPLES, CHUNK):
        mine = [n for n in range(chunk.start, chunk.stop) if n != 7]
        images = [
            {"id": ids[n], "key": str(n), "shard": "a.tar", "model": "m", "embeddings": vector(n).tolist()}
            for n in mine
        ]
        said = [
            {"id": ids[n], "caption_index": i, "text": "", "embedding": vector(n)[i].tolist()}
            for n in mine
            for i in range(1 + (n % 3 == 0))
        ]
        aside = [Quarantined(ids[7], "s07", "a.tar", 0, "cut short")] if 7 in range(chunk.start, chunk.stop) else []
        tables = {TEXTS: pa.Table.from_pylist(said[::-1], schema=TEXT_SCHEMA)}  # in any order
        ledger.commit(chunk, pa.Table.from_pylist(images, schema=IMAGE_SCHEMA), aside, tables)
    ledger.close([], {})
    return out


def vector(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((QUERIES, E)) + 3 * np.eye(E)[n % 3]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_prompts_make_prototypes_as_zero_shot_classifiers_are_made(text: TextConfig, tmp_path: Path) -> None:
    out, templates = str(tmp_path / "p.parquet"), ("a photo of a {}", "the {} in the house")
    report = prototypes(PrototypesConfig(out=out, text=text, classes=CLASSES, templates=templates))
    found = Prototypes.load(out)
    assert found.names == CLASSES and found.counts == (2, 2, 2) and found.space == text_space(text)
    assert (report.classes, report.width, report.made_of) == (3, 32, "prompts")
    encode = CaptionEncoder(text, 8)
    mean = encode([template.replace("{}", "dog") for template in templates]).mean(0)
    np.testing.assert_allclose(found.vectors_KE[1], mean / np.linalg.norm(mean), atol=1e-6)
    (tmp_path / "names.txt").write_text("cat\n\n dog \ntree\n")
    prototypes(PrototypesConfig(out=out, text=text, class_file=str(tmp_path / "names.txt"), templates=templates))
    np.testing.assert_array_equal(Prototypes.load(out).vectors_KE, found.vectors_KE)


def test_a_part_without_rows_has_no_vectors() -> None:
    column = pa.chunked_array([pa.array([], pa.list_(pa.float32()))])
    assert fixed_rows(column).shape == (0, 0)


def test_labelled_images_make_prototypes(data: Manifest, vectors: str, tmp_path: Path) -> None:
    out = str(tmp_path / "p.parquet")
    prototypes(PrototypesConfig(out=out, vectors=vectors, data=data.root))
    found = Prototypes.load(out)
    assert found.names == CLASSES and found.space == model_space("the model")
    assert found.counts == (5, 4, 4)  # sample 7, a dog, could not be read
    mean = np.stack([vector(n).mean(0) for n in range(1, SAMPLES, 3) if n != 7]).mean(0)
    np.testing.assert_allclose(found.vectors_KE[1], mean / np.linalg.norm(mean), atol=1e-6)
    few = PrototypesConfig(out=out, vectors=vectors, data=data.root, per_class=2, classes=("cat",))
    prototypes(few)
    assert Prototypes.load(out).counts == (2,)
    first = Prototypes.load(out).vectors_KE
    prototypes(few.model_copy(update={"seed": 5}))
    assert not np.allclose(first, Prototypes.load(out).vectors_KE)  # another choice of images


@pytest.mark.parametrize("side", ["texts", "images"])
def test_stored_vectors_are_read_by_row(data: Manifest, vectors: str, side: str) -> None:
    found = list(Stored(Embedded.open(vectors, side), data).read([3, 4, 5, 7, 9]))
    groups = [g for g in found if isinstance(g, Group)]
    ids, at = data.ids.tolist(), {}
    for group in groups:
        ends = [*group.starts_B[1:].tolist(), len(group.vectors_ME)]
        for i, start, end in zip(group.ids_B.tolist(), group.starts_B.tolist(), ends, strict=True):
            at[ids.index(i)] = group.vectors_ME[start:end]
    assert sorted(at) == [3, 4, 5, 9]
    for n, mine in at.items():
        expected = vector(n) if side == "images" else vector(n)[: 1 + (n % 3 == 0)]
        np.testing.assert_array_equal(np.sort(mine, axis=0), np.sort(expected, axis=0))
    assert [q.id for some in found if isinstance(some, list) for q in some] == [ids[7]]
    scores = groups[0].scores(np.eye(E, dtype=np.float32)[:3])
    np.testing.assert_allclose(scores[0], at[3].max(0)[:3], atol=10.0**-DECIMALS)  # the best of a sample's vectors


def test_equal_vectors_score_alike_wherever_they_stand() -> None:
    """A matrix product rounds a row by its place in the block; ties have to be ties all the same."""
    random = np.random.default_rng(0)
    one, known = random.standard_normal((1, 384)), random.standard_normal((20, 384)).astype(np.float32)
    one = (one / np.linalg.norm(one)).astype(np.float32)
    for count in (1, 5, 64, 600):
        group = Group(np.arange(count), np.repeat(one, count, 0), np.arange(count))
        assert len(np.unique(group.scores(known / 20), axis=0)) == 1


def test_a_chunk_accounts_for_every_row(data: Manifest, vectors: str, tmp_path: Path) -> None:
    known = Prototypes(CLASSES, np.eye(E, dtype=np.float32)[:3], (1, 1, 1))
    config = CurateConfig(
        data=data.root, out=str(tmp_path), prototypes="p", vectors=vectors, top=3, per_class=2, batch=2
    )
    work = CurateWork(Stored(Embedded.open(vectors, "texts"), data), data, known, config)
    done = work.process(range(SAMPLES))
    assert done.table["id"].to_pylist() == [i for n, i in enumerate(data.ids.tolist()) if n != 7]
    assert [q.reason for q in done.quarantined] == ["cut short"]
    assert done.extras["top"]["class"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert done.table["class"].to_pylist()[:3] == list(CLASSES)
    assert len(work.process(()).table) == 0
    narrow = CurateWork(
        Stored(Embedded.open(vectors, "texts"), data), data, Prototypes(("x",), np.ones((1, 4)), (1,)), config
    )
    with pytest.raises(DataError, match="6 values, the prototypes' 4"):
        narrow.process(range(3))


def test_a_samples_text_vector_is_the_mean_over_its_captions(data: Manifest, text: TextConfig) -> None:
    encode = CaptionEncoder(text, 3)
    done = TextWork(encode, data).process([0, 1, 2])
    unit = encode(["a cat and a house", "a photo of the cat", "a dog and a house"])
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(done.table["vector"].to_pylist()[0], unit[:2].mean(0), atol=1e-6)
    np.testing.assert_allclose(done.table["vector"].to_pylist()[1], unit[2], atol=1e-6)
    assert done.table["id"].to_pylist() == data.ids[:3].tolist() and not done.quarantined
    assert len(TextWork(encode, data).process(()).table) == 0


def test_what_does_not_fit_is_refused(data: Manifest, vectors: str, text: TextConfig, tmp_path: Path) -> None:
    out = str(tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"\.parquet"):
        prototypes(PrototypesConfig(out=str(tmp_path / "p"), text=text, classes=CLASSES))
    with pytest.raises(ConfigError, match="'cat' is named twice"):
        prototypes(PrototypesConfig(out=out, text=text, classes=("cat", "dog", "cat")))
    with pytest.raises(DataError, match="no labelled image"):
        prototypes(PrototypesConfig(out=out, vectors=vectors, data=data.root, classes=("cat", "moon")))
    with pytest.raises(ValueError, match="one of 'model', 'text'"):
        PrototypesConfig(out=out, classes=CLASSES)
    with pytest.raises(ValueError, match="cannot be less than 'per_class'"):
        CurateConfig(data="d", out="o", prototypes="p", text=text, top=5, per_class=6)
    with pytest.raises(ValueError, match="one of 'vectors'"):
        CurateConfig(data="d", out="o", prototypes="p")
    pq.write_table(pa.table({"class": ["a", "a"], "vector": [[1.0], [2.0]]}), out)
    with pytest.raises(DataError, match="twice"):
        Prototypes.load(out)
    pq.write_table(pa.table({"class": ["a", "b"], "vector": [[1.0, 0.0], [0.0, 0.0]]}), out)
    with pytest.raises(DataError, match="'b' has no direction"):
        Prototypes.load(out)
    for table, said in (
        ({"class": ["a", "b"], "vector": [1.0, 2.0]}, "no list of numbers"),
        ({"class": ["a", None], "vector": [[1.0], [2.0]]}, "a class without a name"),
        ({"class": ["a", "b"], "vector": [[1.0], [2.0, 3.0]]}, "holds no prototypes"),
    ):
        pq.write_table(pa.table(table), out)
        with pytest.raises(DataError, match=said):
            Prototypes.load(out)
    with pytest.raises(DataError, match="no finished embedding job"):
        Embedded.open(str(tmp_path), "texts")


def test_weights_in_a_file_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"one")
    before = weights_fact(str(tmp_path))
    (tmp_path / "w.safetensors").write_bytes(b"two")
    assert weights_fact(str(tmp_path)) not in ("", before)
    assert weights_fact("pkg:all-minilm-l6-v2") == weights_fact("random") == ""
