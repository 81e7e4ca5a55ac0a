"""One vector for each sample and encoder, made by Ray actors, kept under the digest of what it is a function of.

B samples, M captions of them, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.config import SelectConfig, TextConfig, VisionConfig
from isthmus.contracts import Sample
from isthmus.data.features import FeatureCache, build_cache
from isthmus.data.manifest import Manifest
from isthmus.data.stream import iter_samples
from isthmus.errors import DataError
from isthmus.inference.bulk import Resources, allowance, run_bulk, split
from isthmus.inference.commits import PARTS, Job, Quarantined, digest_of
from isthmus.inference.loading import pick_device
from isthmus.inference.pool import Done
from isthmus.inference.rows import Rows

SHOWN = 16  # characters of a digest in a folder's name


@dataclass(frozen=True)
class Features:
    """What one encoder makes of the samples.

    Attributes:
        label: how the encoder is called in results.
        ids: int64 [N], ascending.
        x_ND: float32.
    """

    label: str
    ids: np.ndarray
    x_ND: np.ndarray


def image_features(manifest: Manifest, vision: VisionConfig, config: SelectConfig) -> Features:
    """The mean over all tokens of each image, the class token among them.

    Raises:
        DataError: more images that cannot be decoded than ``max_failed_share`` allows; others as :func:`build_cache`.
    """
    vision = vision.model_copy(update={"pool": "mean"})
    facts = {"vision": vision.model_dump(mode="json"), "file": weights_fact(vision.weights), "data": manifest.digest}
    out = storage.join(config.out, "vision", digest_of(facts)[:SHOWN])
    made = build_cache(
        manifest.root, out, vision, actors=config.actors, batch=config.batch, dtype="float32",
        cpus=config.cpus_per_actor, gpus=config.gpus_per_actor,
    )  # fmt: skip
    if made.failed > (most := allowance(len(manifest), config.max_failed_share)):
        raise DataError(
            f"{made.failed} of {len(manifest)} images cannot be decoded, more than max_failed_share allows ({most}).",
            "`isthmus data check` lists every fault; mend the data or raise max_failed_share.",
        )
    cache = FeatureCache.open(out)
    ids = np.sort(cache.ids)
    return Features(vision_label(vision), ids, cache.rows(ids)[:, 0])


def text_features(manifest: Manifest, text: TextConfig, config: SelectConfig) -> Features:
    """The mean over each sample's captions of their unit vectors. Raises as :func:`run_bulk`."""
    job = Job("text features", {**text_facts(text), "manifest": manifest.digest, "chunk": config.chunk})
    out = storage.join(config.out, "text", job.digest[:SHOWN])
    gpus = config.gpus_per_actor or 0
    work = OpenTextWork(text, manifest.root, config.batch, gpus > 0)
    give = Resources(config.actors, config.cpus_per_actor, gpus, config.max_failed_share)
    run_bulk(f"encoding texts, {text_label(text)}", job, manifest, out, config.chunk, work, give)
    parts = [url for url, _ in storage.list_files(storage.join(out, PARTS), (".parquet",))]
    table = pa.concat_tables([pq.read_table(pa.BufferReader(storage.read_bytes(part))) for part in parts])
    ids, vectors_ND = table["id"].to_numpy(), fixed_rows(table["vector"])
    order = np.argsort(ids)
    return Features(text_label(text), ids[order], vectors_ND[order])


def text_facts(text: TextConfig) -> dict[str, Any]:
    """What a sentence encoder's vectors are a function of."""
    return {"text": text.model_dump(mode="json"), "file": weights_fact(text.weights)}


def weights_fact(weights: str) -> str:
    """sha256 of a local file or folder of weights; "" for notations that are pinned by themselves."""
    path = Path(weights)
    if weights in ("random", "timm") or weights.startswith(("pkg:", "hf:")) or not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fixed_rows(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of equal length as [rows, length]."""
    if not len(column):
        return np.empty((0, 0), np.float32)
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    return flat.to_numpy().reshape(len(column), -1)


def vision_label(vision: VisionConfig) -> str:
    """A short name of an image encoder."""
    size = f"@{vision.image_size}" if vision.image_size else ""
    own = vision.weights == "timm" or vision.weights.startswith("pkg:")
    return f"{vision.name}{size}" if own else f"{vision.name}{size} ({vision.weights.rsplit('/', 1)[-1]})"


def text_label(text: TextConfig) -> str:
    """A short name of a text encoder."""
    return text.weights.rsplit("/", 1)[-1].removeprefix("pkg:")


@dataclass(frozen=True)
class OpenTextWork:
    """Opens encoder and data inside an actor; picklable."""

    text: TextConfig
    data: str
    batch: int
    gpu: bool = False

    def __call__(self) -> TextWork:
        return TextWork(CaptionEncoder(self.text, self.batch, pick_device(self.gpu)), Manifest.load(self.data))


class CaptionEncoder:
    """A frozen sentence encoder on a device, ``batch`` texts at a time.

    Attributes:
        width: D.
    """

    def __init__(self, text: TextConfig, batch: int, device: str = "cpu") -> None:
        from isthmus.models.text import build_sentence_encoder

        self._encoder = build_sentence_encoder(text).to(device)
        self._batch, self._device, self.width = batch, device, self._encoder.width

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [len(texts), D]. Texts of like length are encoded together."""
        import torch
        import torch.nn.functional as F

        from isthmus.data.transforms import clean_caption

        out = np.empty((len(texts), self.width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), self._batch):
            some = order[start : start + self._batch]
            ids_BT, mask_BT = self._encoder.tokenize([clean_caption(texts[i]) for i in some])
            with torch.inference_mode():
                pooled_BD = self._encoder(ids_BT.to(self._device), mask_BT.to(self._device))[1]
            out[some] = F.normalize(pooled_BD.float(), dim=-1).cpu().numpy()
        return out


class TextWork:
    """Rows of the manifest -> the mean vector of each row's captions."""

    def __init__(self, encode: CaptionEncoder, manifest: Manifest) -> None:
        self._encode, self._manifest, self._rows = encode, manifest, Rows(manifest)

    def process(self, rows: Sequence[int]) -> Done:
        """One vector for each readable row, in manifest order."""
        samples, aside = read_captions(self._manifest, rows)
        ids = [sample.id for sample in samples]
        self._rows.complete(rows, ids, aside)
        vectors_MD = self._encode([text for sample in samples for text in sample.captions])
        starts = np.cumsum([0, *(len(sample.captions) for sample in samples)])
        means = [vectors_MD[a:b].mean(0).tolist() for a, b in pairwise(starts.tolist())]
        columns = {"id": pa.array(ids, pa.int64()), "vector": pa.array(means, pa.list_(pa.float32()))}
        return Done(pa.table(columns), tuple(aside))

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up."""
        return self._rows.blame(row, reason)


def read_captions(manifest: Manifest, rows: Sequence[int]) -> tuple[list[Sample], list[Quarantined]]:
    """The captioned samples of ``rows`` without their images, and the others."""
    samples, aside = list[Sample](), list[Quarantined]()
    for group in iter_samples(manifest, rows=list(rows)):
        good, bad = split(group)
        samples += good
        aside += bad
    bare = {sample.id for sample in samples if not sample.captions}
    if bare:
        at = dict(zip(manifest.ids_of(rows).tolist(), rows, strict=True))
        aside += [Rows(manifest).blame(at[i], "it has no caption") for i in sorted(bare)]
    return [sample for sample in samples if sample.id not in bare], aside


LOOKED_AT, BEARABLE = 1000, 0.01
"""Samples whose captions are counted in tokens; the share of them that may be cut without a word."""


def cut_warning(manifest: Manifest, text: TextConfig, seed: int) -> str | None:
    """A sentence where more than one in a hundred captions is longer than the encoder reads; of a drawn thousand."""
    from isthmus.data.transforms import clean_caption
    from isthmus.methods.batching import cut_captions
    from isthmus.models.text import load_tokenizer

    count = min(LOOKED_AT, len(manifest))
    rows = np.sort(np.random.default_rng(seed).choice(len(manifest), count, replace=False)).tolist()
    samples, _ = read_captions(manifest, rows)
    captions = [clean_caption(caption) for sample in samples for caption in sample.captions]
    tokenizer = load_tokenizer(text.weights)
    cut = cut_captions(captions, text.max_length, lambda caption: tokenizer(caption, verbose=False)["input_ids"])
    if not captions or int(cut.sum()) <= BEARABLE * len(captions):
        return None
    return (
        f"{text_label(text)}: {int(cut.sum()):,} of {len(captions):,} sampled captions are longer than "
        f"{text.max_length} tokens and are read as far as that. Raise the encoder's max_length."
    )
