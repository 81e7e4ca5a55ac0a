"""Caption scores as the COCO evaluation computes them: BLEU-1..4, ROUGE-L, CIDEr-D, and METEOR and SPICE by Java.

The scorers are pycocoevalcap's own classes; the tokens come from :mod:`isthmus.evaluation.ptb` instead of a Java
program. CIDEr's document frequencies are those of the evaluated images: a subset gives another value, and a single
image gives 0.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import java
from isthmus.evaluation.ptb import tokenize

Meteor = bool | Literal["auto"]


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores (natural scale, papers print x100) and each image's share, in the order of ``ids``.

    ``not_computed`` names the scores that are missing, with the reason.
    """

    metrics: dict[str, float]
    ids: tuple[int, ...]
    cider: tuple[float, ...]
    bleu_4: tuple[float, ...]
    rouge_l: tuple[float, ...]
    not_computed: dict[str, str] = field(default_factory=dict)


def score_captions(
    candidates: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    *,
    meteor: Meteor = False,
    spice_jars: str | None = None,
) -> CaptionScores:
    """One caption per image against all captions of that image.

    Args:
        candidates: image id -> generated caption; an empty caption scores 0.
        references: image id -> its captions.
        meteor: METEOR too, a Java program of 2 GB that takes seconds to a minute; "auto" where it runs.
        spice_jars: folder of SPICE's jars, for SPICE too.

    Raises:
        DataError: the ids are not the same on both sides, or an image has no reference.
        ConfigError: METEOR is demanded (True) and cannot run, or SPICE's jars are not there.
    """
    _same_images(candidates, references)
    ids = sorted(references)
    given = {i: [tokenize(candidates[i])] for i in ids}
    wanted = {i: [tokenize(text) for text in references[i]] for i in ids}
    return _score(ids, given, wanted, meteor, spice_jars)


def score_tokens(
    candidates: Mapping[int, str], references: Mapping[int, Sequence[str]], *, meteor: Meteor = False
) -> CaptionScores:
    """:func:`score_captions` for captions that are tokenised already (tokens joined by spaces)."""
    _same_images(candidates, references)
    ids = sorted(references)
    return _score(ids, {i: [candidates[i]] for i in ids}, {i: list(references[i]) for i in ids}, meteor, None)


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


def _score(
    ids: list[int], given: dict[int, list[str]], wanted: dict[int, list[str]], meteor: Meteor, spice_jars: str | None
) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # The scorers read the captions in the order of the keys and divide by the number of tokens.
    bleu, bleu_each = Bleu(4).compute_score(wanted, given, verbose=0)
    rouge, rouge_each = Rouge().compute_score(wanted, given)
    cider, cider_each = Cider().compute_score(wanted, given)
    metrics = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    metrics |= {"rouge_l": float(rouge), "cider": float(cider)}
    missing = dict[str, str]()
    if meteor:
        try:
            metrics["meteor"] = java.meteor(given, wanted)
        except java.NotComputedError as error:
            if meteor is True:
                raise ConfigError(f"{error.reason}.", "Mend that, or set meteor=auto or meteor=false.") from error
            missing["meteor"] = error.reason
    else:
        missing["meteor"] = "it was not asked for (meteor=auto computes it where Java is)"
    if spice_jars:
        try:
            metrics["spice"] = java.spice(given, wanted, spice_jars)
        except java.NotComputedError as error:
            missing["spice"] = error.reason
    else:
        missing["spice"] = "no spice_jars were given, and none are downloaded"
    return CaptionScores(
        metrics=metrics,
        ids=tuple(ids),
        cider=tuple(float(v) for v in cider_each),
        bleu_4=tuple(float(v) for v in bleu_each[3]),
        rouge_l=tuple(float(v) for v in np.asarray(rouge_each)),
        not_computed=missing,
    )


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
