"""One unit vector for each class, and the file that keeps them.

Maniparambil et al. (2024) average the embeddings of 128 labelled images of a class. Prompts with its name are the other
way here, for classes without labelled images; that and the choice among many labelled images are our completion.

K classes, E width.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.alignment.features import CaptionEncoder, text_facts
from isthmus.alignment.vectors import Embedded, Group, Stored
from isthmus.config import PrototypesConfig, TextConfig, anchored
from isthmus.data.labels import label_of
from isthmus.data.manifest import Manifest
from isthmus.data.names import read_names
from isthmus.data.readers import RawSample, read_rows
from isthmus.errors import ConfigError, DataError
from isthmus.losses.counting import uniform

META = b"isthmus"
LEAST_NORM = 1e-6


@dataclass(frozen=True)
class Prototypes:
    """Classes and their unit vectors.

    Attributes:
        names: of the K classes.
        vectors_KE: float32.
        counts: labelled images, or prompts, that each is the mean of.
        space: what made the vectors: others can be compared with them if the same did. "" where that is not known.
    """

    names: tuple[str, ...]
    vectors_KE: np.ndarray
    counts: tuple[int, ...]
    space: str = ""

    @classmethod
    def load(cls, url: str) -> Prototypes:
        """The file at ``url``: columns class and vector, perhaps count; others may write it too.

        Raises:
            DataError: no such columns, a name twice, or vectors of no or unequal length.
        """
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
            names = tuple(table["class"].to_pylist())
            vectors = np.array(table["vector"].to_pylist(), np.float32)
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{url} holds no prototypes: {error}.", "It needs the columns class and vector.") from error
        if vectors.ndim != 2 or not all(isinstance(name, str) and name for name in names):
            raise DataError(
                f"{url} holds no prototypes: a class without a name, or a vector that is no list of numbers.",
                "Its column class is of texts, its column vector of lists that are equally long.",
            )
        if not names or len(set(names)) < len(names):
            raise DataError(f"{url} holds no class, or one of them twice.", "Give each class one row.")
        facts = json.loads((table.schema.metadata or {}).get(META, b"{}"))
        counts = tuple(table["count"].to_pylist()) if "count" in table.column_names else (0,) * len(names)
        return cls(names, unit(vectors, names), counts, str(facts.get("space", "")))

    def save(self, url: str) -> None:
        """Written whole or not at all."""
        columns = {
            "class": pa.array(self.names, pa.string()),
            "count": pa.array(self.counts, pa.int64()),
            "vector": pa.array(list(self.vectors_KE), pa.list_(pa.float32())),
        }
        table = pa.table(columns).replace_schema_metadata({META: json.dumps({"space": self.space}).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write_bytes(url, sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class PrototypesReport:
    """What was written. ``least`` is the smallest number of images (or prompts) of a class."""

    out: str
    classes: int
    width: int
    made_of: str
    least: int
    most: int


def prototypes(config: PrototypesConfig) -> PrototypesReport:
    """Writes the prototypes of ``config``.

    Raises:
        ConfigError, DataError, RegistryError, WeightsError: names twice, classes without an image, parts missing.
    """
    config = anchored(config)
    if not config.out.endswith(".parquet"):
        raise ConfigError(f"out is {config.out}.", "Prototypes are one file: end its name in .parquet.")
    found = _of_images(config) if config.vectors else _of_prompts(config)
    found.save(config.out)
    return PrototypesReport(
        config.out, len(found.names), found.vectors_KE.shape[1], "labelled images" if config.vectors else "prompts",
        min(found.counts), max(found.counts),
    )  # fmt: skip


def unit(vectors_KE: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Rows of length one.

    Raises:
        DataError: a row of no length, or that is not finite.
    """
    norms = np.linalg.norm(vectors_KE, axis=1, keepdims=True)
    bad = np.flatnonzero(~(norms[:, 0] > LEAST_NORM) | ~np.isfinite(vectors_KE).all(1))
    if len(bad):
        raise DataError(f"The vector of class '{names[bad[0]]}' has no direction.", "Leave the class out, or mend it.")
    out: np.ndarray = (vectors_KE / norms).astype(np.float32)
    return out


def text_space(text: TextConfig) -> str:
    """What vectors of a sentence encoder can be compared with; the length that texts are cut to does not matter."""
    facts = text_facts(text)
    return f"text {facts['text']['weights']} {facts['file']}".rstrip()


def model_space(digest: str) -> str:
    """What vectors of a registered model can be compared with."""
    return f"model {digest}"


def _names(config: PrototypesConfig) -> tuple[str, ...]:
    names = config.classes
    if config.class_file:
        names = read_names(config.class_file)
    stripped = tuple(name.strip() for name in names or () if name.strip())
    if len(set(stripped)) < len(stripped):
        twice = next(name for name in stripped if stripped.count(name) > 1)
        raise ConfigError(f"The class '{twice}' is named twice.", "Name each class once.")
    if names is not None and not stripped:
        raise ConfigError("No class is named.", "Give 'classes' or a 'class_file' with a name a line.")
    return stripped


def _of_prompts(config: PrototypesConfig) -> Prototypes:
    names = _names(config)
    texts = [template.replace("{}", name) for name in names for template in config.templates]
    if config.text is not None:
        vectors, space = CaptionEncoder(config.text, config.batch)(texts), text_space(config.text)
    else:
        vectors, space = _by_model(config, texts)
    means = vectors.reshape(len(names), len(config.templates), -1).mean(1)
    return Prototypes(names, unit(means, names), (len(config.templates),) * len(names), space)


def _by_model(config: PrototypesConfig, texts: list[str]) -> tuple[np.ndarray, str]:
    from isthmus.inference.loading import LoadModel, resolve_model

    assert config.model is not None
    handle = resolve_model(config.model, config.tracking)
    engine = LoadModel(handle, config.tracking, with_vision=False)()
    some = [texts[start : start + config.batch] for start in range(0, len(texts), config.batch)]
    return np.concatenate([engine.embed_texts(part).cpu().numpy() for part in some]), model_space(handle.digest)


def _of_images(config: PrototypesConfig) -> Prototypes:
    assert config.vectors is not None and config.data is not None
    embedded, manifest = Embedded.open(config.vectors, "images"), Manifest.load(config.data)
    if embedded.manifest_digest != manifest.digest:
        raise DataError(f"{config.vectors} is of other data than {config.data}.", "Name the data that was embedded.")
    labels = labelled(manifest)
    names = _names(config) or tuple(sorted({*labels.values()}))
    if missing := sorted({*names} - {*labels.values()}):
        raise DataError(f"{len(missing)} classes have no labelled image (first '{missing[0]}').", "Leave them out.")
    chosen = _chosen(labels, config)
    sums = {name: np.zeros(0) for name in names}
    counts = dict.fromkeys(names, 0)
    for group in Stored(embedded, manifest).read(range(len(manifest))):
        if not isinstance(group, Group):
            continue
        ends = [*group.starts_B[1:].tolist(), len(group.vectors_ME)]
        for i, start, end in zip(group.ids_B.tolist(), group.starts_B.tolist(), ends, strict=True):
            if i in chosen and labels[i] in counts:
                mean = group.vectors_ME[start:end].mean(0, dtype=np.float64)
                sums[labels[i]] = sums[labels[i]] + mean if counts[labels[i]] else mean
                counts[labels[i]] += 1
    if empty := [name for name in names if not counts[name]]:
        raise DataError(f"No image of class '{empty[0]}' could be read.", "Leave the class out, or mend its images.")
    means = np.stack([sums[name] / counts[name] for name in names])
    return Prototypes(names, unit(means, names), tuple(counts.values()), model_space(embedded.model))


def labelled(manifest: Manifest) -> dict[int, str]:
    """Sample id -> the ``label`` or ``class`` of its JSON member, for those that have one.

    Raises:
        DataError: none has.
    """
    out = {}
    for raw in read_rows(manifest, range(len(manifest)), head=1):
        if isinstance(raw, RawSample) and (label := label_of(raw.meta)):
            out[raw.id] = label
    if not out:
        raise DataError(f"{manifest.root} has no labels.", "Give 'label' or 'class' in the samples' JSON.")
    return out


def _chosen(labels: dict[int, str], config: PrototypesConfig) -> set[int]:
    """At most ``per_class`` images of each class, drawn by the seed and the images' ids."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in labels.items():
        by_class[label].append(i)
    kept: set[int] = set()
    for ids in by_class.values():
        draws = uniform(config.seed, np.array(sorted(ids), np.int64))
        kept |= {sorted(ids)[n] for n in np.argsort(draws, kind="stable")[: config.per_class].tolist()}
    return kept
