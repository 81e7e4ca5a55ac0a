"""Caption scores as the COCO evaluation computes them: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR on request (it needs Java).

The scorers are pycocoevalcap's own classes; the tokens come from :mod:`isthmus.evaluation.ptb` instead of a Java
program. CIDEr's document frequencies are those of the evaluated images: a subset gives another value, and a single
image gives 0.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.ptb import tokenize


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores (natural scale, papers print x100) and each image's share, in the order of ``ids``."""

    metrics: dict[str, float]
    ids: tuple[int, ...]
    cider: tuple[float, ...]
    bleu_4: tuple[float, ...]
    rouge_l: tuple[float, ...]


def score_captions(
    candidates: Mapping[int, str], references: Mapping[int, Sequence[str]], *, meteor: bool = False
) -> CaptionScores:
    """One caption per image against all captions of that image.

    Args:
        candidates: image id -> generated caption; an empty caption scores 0.
        references: image id -> its captions.
        meteor: METEOR too. Off by default: it starts a Java program of 2 GB, which takes up to a minute.

    Raises:
        DataError: the ids are not the same on both sides, or an image has no reference.
        ConfigError: METEOR is asked for and Java is not there.
    """
    _same_images(candidates, references)
    ids = sorted(references)
    given = {i: [tokenize(candidates[i])] for i in ids}
    wanted = {i: [tokenize(text) for text in references[i]] for i in ids}
    return _score(ids, given, wanted, meteor)


def score_tokens(
    candidates: Mapping[int, str], references: Mapping[int, Sequence[str]], *, meteor: bool = False
) -> CaptionScores:
    """:func:`score_captions` for captions that are tokenised already (tokens joined by spaces)."""
    _same_images(candidates, references)
    ids = sorted(references)
    return _score(ids, {i: [candidates[i]] for i in ids}, {i: list(references[i]) for i in ids}, meteor)


def derangement(count: int, seed: int) -> list[int]:
    """A random cycle through 0 .. count-1: no element stays, the same for the same seed (Sattolo's algorithm).

    Raises:
        DataError: fewer than two elements.
    """
    if count < 2:
        raise DataError("The permuted control needs at least two images.", "Evaluate more images.")
    generator, order = random.Random(seed), list(range(count))  # noqa: S311 - no secret
    for last in range(count - 1, 0, -1):
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def permuted(candidates: Mapping[int, str], seed: int) -> dict[int, str]:
    """The same captions, each given to another image: what a captioner scores that never looks at the image."""
    ids = sorted(candidates)
    return {ids[to]: candidates[ids[at]] for at, to in enumerate(derangement(len(ids), seed))}


def _score(ids: list[int], given: dict[int, list[str]], wanted: dict[int, list[str]], meteor: bool) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # The scorers read the captions in the order of the keys and divide by the number of tokens.
    bleu, bleu_each = Bleu(4).compute_score(wanted, given, verbose=0)
    rouge, rouge_each = Rouge().compute_score(wanted, given)
    cider, cider_each = Cider().compute_score(wanted, given)
    metrics = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    metrics |= {"rouge_l": float(rouge), "cider": float(cider)}
    if meteor:
        metrics["meteor"] = _meteor(given, wanted)
    return CaptionScores(
        metrics=metrics,
        ids=tuple(ids),
        cider=tuple(float(v) for v in cider_each),
        bleu_4=tuple(float(v) for v in bleu_each[3]),
        rouge_l=tuple(float(v) for v in np.asarray(rouge_each)),
    )


def _meteor(given: dict[int, list[str]], wanted: dict[int, list[str]]) -> float:
    """METEOR 1.5, a Java program inside pycocoevalcap."""
    if not shutil.which("java"):
        raise ConfigError("METEOR needs Java, and there is no 'java' on the path.", "Install it, or set meteor=false.")
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        value, _ = Meteor().compute_score(wanted, given)
    except (OSError, ValueError) as error:  # no memory for its heap, or a read-only or broken installation
        raise ConfigError(f"METEOR cannot run: {error}.", "Give Java 2 GB of memory, or set meteor=false.") from error
    return float(value)


def _same_images(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    missing, extra = set(references) - set(candidates), set(candidates) - set(references)
    if missing or extra or not references:
        raise DataError(
            f"{len(missing)} of {len(references)} images have no caption and {len(extra)} captions have no image.",
            "Score captions against the data set that they were made for.",
        )
    bare = [i for i, texts in references.items() if not texts]
    if bare:
        raise DataError(f"{len(bare)} images have no reference caption (first id {bare[0]}).", "Choose captioned data.")
