"""Which image encoder goes with which text encoder: CKA over a sample of pairs (Maniparambil et al. 2024, section 3.1).

The paper picks the pair with the largest value. Values here come without bias and with it, beside what permuted pairs
give and the number of samples, for the biased value of independent features is near 1 when samples are few.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from isthmus import storage
from isthmus.alignment.cka import Covariance, Kernel, rbf_gram, similarity
from isthmus.alignment.features import Features, cut_warning, image_features, text_features
from isthmus.config import SelectConfig, anchored
from isthmus.data.manifest import Manifest
from isthmus.data.subset import write_subset
from isthmus.errors import DataError
from isthmus.inference.bulk import open_data
from isthmus.models.vision import describe_vision
from isthmus.progress import progress

MOST_GRAM = 5000
"""Samples of which a Gram matrix is held; an RBF kernel of more takes the first so many of the sample."""

PLENTY = 10  # times as many samples as the wider encoder has dimensions: little bias is left
REPORT = "select.json"


@dataclass(frozen=True)
class PairRow:
    """One pair of encoders under one kernel.

    Attributes:
        cka: without bias. permuted, permuted_most: its mean and largest value over permuted pairs.
        biased, biased_permuted: with it.
        n: samples.
    """

    vision: str
    text: str
    kernel: str
    n: int
    cka: float
    permuted: float
    permuted_most: float
    biased: float
    biased_permuted: float


@dataclass(frozen=True)
class SelectReport:
    """What was found; pairs by falling CKA under the first kernel, then those of the other.

    Attributes:
        best_vision, best_text: the pair that comes first.
        samples: pairs that every encoder could read.
        warnings: what the values must not be taken for.
    """

    data: str
    data_digest: str
    best_vision: str
    best_text: str
    samples: int
    seed: int
    seconds: float
    warnings: tuple[str, ...]
    pairs: tuple[PairRow, ...]
    out: str


def select(config: SelectConfig) -> SelectReport:
    """CKA of all pairs; features are taken from ``config.out`` where an earlier run has made them.

    Raises:
        DataError: no data, samples without captions, or too few that every encoder can read.
        ConfigError, WeightsError: an encoder cannot be built.
    """
    started = time.monotonic()
    config = anchored(config)
    whole = open_data(config.data)
    if whole.captioned < len(whole):
        raise DataError(f"{len(whole) - whole.captioned} samples of {config.data} have no caption.", "Index without.")
    for vision in config.vision:
        describe_vision(vision)  # a name that is wrong is told before another encoder has encoded for hours
    sample = draw_sample(whole, config)
    cut = [said for text in config.text if (said := cut_warning(sample, text, config.seed))]
    images = [image_features(sample, vision, config) for vision in config.vision]
    texts = [text_features(sample, text, config) for text in config.text]
    common = shared_ids([*images, *texts], config.data)
    images, texts = (_taken(side, common) for side in (images, texts))
    rows = compare(images, texts, config)
    widths = [found.x_ND.shape[1] for found in (*images, *texts)]
    report = SelectReport(
        data=config.data,
        data_digest=whole.digest,
        best_vision=rows[0].vision,
        best_text=rows[0].text,
        samples=len(common),
        seed=config.seed,
        seconds=round(time.monotonic() - started, 2),
        warnings=(*_lost(len(sample), len(common)), *warnings(rows, widths), *cut),
        pairs=tuple(rows),
        out=config.out,
    )
    storage.write_bytes(storage.join(config.out, REPORT), json.dumps(asdict(report), indent=1).encode())
    return report


def draw_sample(whole: Manifest, config: SelectConfig) -> Manifest:
    """``config.sample`` of the samples as a data set of its own; the same ones for the same data and seed."""
    if len(whole) <= config.sample:
        rows = np.arange(len(whole))
    else:
        rows = np.random.default_rng(config.seed).choice(len(whole), config.sample, replace=False)
    folder = f"{whole.digest[:12]}-{len(rows)}-{config.seed}"
    return write_subset(whole, rows, storage.join(config.out, "sample", folder))


def shared_ids(found: Sequence[Features], data: str) -> np.ndarray:
    """Ids, ascending, that every encoder has a vector of."""
    common = found[0].ids
    for one in found[1:]:
        common = np.intersect1d(common, one.ids, assume_unique=True)
    if len(common) < 4:
        raise DataError(f"Only {len(common)} samples of {data} can be read by all encoders.", "Check the data set.")
    return common


def _taken(found: Sequence[Features], ids: np.ndarray) -> list[Features]:
    """The vectors of ``ids``, under labels that differ."""
    labels = [one.label for one in found]
    named = [f"{n} #{labels[:i].count(n) + 1}" if labels.count(n) > 1 else n for i, n in enumerate(labels)]
    return [Features(n, ids, f.x_ND[np.searchsorted(f.ids, ids)]) for n, f in zip(named, found, strict=True)]


def compare(images: Sequence[Features], texts: Sequence[Features], config: SelectConfig) -> list[PairRow]:
    """Every pair under every kernel: those of the first kernel by falling value, and so on."""
    kinds: dict[str, Callable[[np.ndarray], Kernel]] = {"linear": Covariance, "rbf": rbf_gram}
    most = {"linear": len(images[0].ids), "rbf": MOST_GRAM}
    rows: list[PairRow] = []
    total = len(config.kernels) * len(images) * len(texts)
    with progress("comparing", total=total, unit="pairs") as tracker:
        for name in config.kernels:
            some: list[PairRow] = []
            for image in images:
                kernel = kinds[name](_first(image, most[name], config.seed))
                for text in texts:  # a text's kernel is made again rather than held: Gram matrices are large
                    other = kinds[name](_first(text, most[name], config.seed))
                    found = similarity(kernel, other, permutations=config.permutations, seed=config.seed)
                    values = (found.debiased, found.debiased_permuted, found.debiased_permuted_most)
                    more = (found.biased, found.biased_permuted)
                    some.append(PairRow(image.label, text.label, name, found.samples, *map(_short, (*values, *more))))
                    tracker.advance()
            rows += sorted(some, key=lambda row: -row.cka)
    return rows


def _first(found: Features, most: int, seed: int) -> np.ndarray:
    """At most so many of the samples, drawn by the seed."""
    n = len(found.ids)
    if n <= most:
        return found.x_ND
    return found.x_ND[np.random.default_rng(seed).permutation(n)[:most]]


def _lost(drawn: int, read: int) -> list[str]:
    return [] if read == drawn else [f"{drawn - read} of the {drawn} samples drawn could not be read by all encoders."]


def warnings(rows: Sequence[PairRow], widths: Sequence[int]) -> list[str]:
    """What a reader of the values has to know."""
    said, widest = [], max(widths)
    few = min(row.n for row in rows)
    if few < PLENTY * widest:
        said.append(
            f"n = {few} is less than {PLENTY} times the largest width ({widest}): biased values are inflated. Go by "
            "the values without bias, or take a larger sample."
        )
    near = [row for row in rows if row.biased < 2 * row.biased_permuted]
    if near:
        said.append(
            f"{len(near)} of {len(rows)} biased values are less than twice what permuted pairs give: they say little."
        )
    if lost := [row for row in rows if row.cka <= row.permuted_most]:
        shown = "; ".join(f"{row.vision} with {row.text} ({row.kernel})" for row in lost[:3])
        said.append(f"{len(lost)} of {len(rows)} values are no larger than those of permuted pairs: {shown}.")
    return said


def _short(value: float) -> float:
    return round(value, 6)
