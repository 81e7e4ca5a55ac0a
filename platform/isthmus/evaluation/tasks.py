"""The tasks of an evaluation: what the workers found, to figures, facts and one row per image.

N images, C captions, Q query tokens, E shared embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.data.readers import Failure
from isthmus.data.transforms import clean_caption
from isthmus.errors import DataError
from isthmus.evaluation.captioning import permuted, score_captions
from isthmus.evaluation.classification import (
    class_ranks,
    class_vectors,
    classification_intervals,
    classification_metrics,
    prompts,
)
from isthmus.evaluation.intervals import METHOD
from isthmus.evaluation.layouts import Extras
from isthmus.evaluation.matching import matching_metrics
from isthmus.evaluation.pool import Runner
from isthmus.evaluation.retrieval import TIES, Retrieval, Score, candidates, hardest_wrong, look_up, retrieve
from isthmus.evaluation.samples import BulkCaptions
from isthmus.evaluation.sources import Source
from isthmus.evaluation.vqa import score_answers
from isthmus.evaluation.work import Kind, Order, Part

Rows = dict[int, dict[str, Any]]


@dataclass
class TaskResult:
    """Figures, what they were measured under, per-image columns by image id, and what could not be computed and why.

    Attributes:
        files: further files of results by name, as JSON values.
    """

    metrics: dict[str, float]
    facts: dict[str, Any]
    rows: Rows = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


@dataclass
class Held:
    """The images that are evaluated: the first ``limit`` of the source.

    Attributes:
        failures: what could not be read, by id; filled by :meth:`gather`.
    """

    source: Source
    runner: Runner
    config: EvaluateConfig
    failures: dict[int, Failure] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Row numbers of the source."""
        return list(range(min(len(self.source.ids), self.config.limit or len(self.source.ids))))

    def gather(
        self,
        kind: Kind,
        label: str,
        *,
        extras: bool = False,
        rows: Sequence[int] | None = None,
        texts: Sequence[Sequence[str]] = (),
    ) -> Part:
        """One kind of work on all rows, as one part.

        Raises:
            DataError: rows missing or doubled, or not one image can be read.
        """
        order = Order(
            kind, tuple(self.rows if rows is None else rows), tuple(tuple(some) for some in texts), extras=extras
        )
        whole, images, vectors = Part(), list[Tensor](), list[Tensor]()
        for part in self.runner.run(order, label):
            for name in ("ids", "keys", "captions", "extras", "failures", "made", "answers", "scores"):
                getattr(whole, name).extend(getattr(part, name))
            images += [] if part.images is None else [part.images]
            vectors += [] if part.texts is None else [part.texts]
        self.failures |= {failure.id: failure for failure in whole.failures}
        if not whole.ids:
            reason = f" The first: {whole.failures[0].key}: {whole.failures[0].reason}." if whole.failures else ""
            raise DataError(f"None of the samples of {self.source.root} can be read.{reason}", "Check the data set.")
        whole.images = torch.cat(images) if images else None
        whole.texts = torch.cat(vectors) if vectors else None
        return whole


# ------------------------------------------------------------------------------------------------------ retrieval


def retrieval(held: Held) -> TaskResult:
    """Image-to-text and text-to-image retrieval among the held-out pairs; ITC first, then ITM for the best k.

    Raises:
        DataError: an image without a caption, broken embeddings or scores.
    """
    config = held.config
    read = held.gather("embed", "embedding")
    assert read.images is not None and read.texts is not None
    captions, owner_C = _owned(read)
    best = max(len(read.ids), len(captions)) if config.rerank == "all" else config.rerank
    score = _scores_of_candidates(held, read, captions, owner_C, best) if best else None
    found = retrieve(read.images, read.texts, owner_C, score=score, rerank=best)
    facts = {
        "images": len(read.ids),
        "captions": len(captions),
        "captions_per_image": config.captions_per_image,
        "captions_repeated": len(captions) - len(set(captions)),  # equal texts tie, and ties count against the model
        "ties": TIES,
        "rerank": config.rerank,
        "ranked_by": _ranked_by(held),
        "text_max_length": config.text_max_length or "the recipe's",
        "texts": "cleaned as captions are in training (LAVIS's caption processor)",
        **found.intervals(config.seed),
        "ci95": METHOD,
    }
    return TaskResult(found.metrics(), facts, _retrieval_rows(read, captions, owner_C, found))


def _ranked_by(held: Held) -> str:
    if not held.runner.about().contrasts:
        return "matching alone"
    return "cosine, the best by cosine + matching" if held.config.rerank else "cosine"


def _owned(read: Part) -> tuple[list[str], Tensor]:
    """All captions in a row, and the image row of each, int64 [C]."""
    owner = [n for n, captions in enumerate(read.captions) for _ in captions]
    return [text for captions in read.captions for text in captions], torch.tensor(owner)


def _scores_of_candidates(held: Held, read: Part, captions: Sequence[str], owner_C: Tensor, best: int) -> Score:
    """Every pair that either direction re-ranks, ``best`` of each row, scored once, image by image."""
    assert read.images is not None and read.texts is not None
    keys = candidates(read.images, read.texts, owner_C, best)
    by_image = np.split(keys % len(captions), np.searchsorted(keys, np.arange(1, len(read.ids)) * len(captions)))
    texts = [[captions[c] for c in some] for some in by_image]
    rows = _rows_of(held, read.ids)
    judged = held.gather("match", "re-ranking", rows=rows, texts=texts)
    if judged.ids != read.ids:
        raise DataError("Images could be read for embedding and not for re-ranking.", "Check the store, then repeat.")
    return look_up(keys, np.concatenate([np.asarray(s, np.float32) for s in judged.scores]), len(captions))


def _rows_of(held: Held, ids: Sequence[int]) -> list[int]:
    at = {int(held.source.ids[row]): row for row in held.rows}
    return [at[i] for i in ids]


def _retrieval_rows(read: Part, captions: Sequence[str], owner_C: Tensor, found: Retrieval) -> Rows:
    own: dict[int, list[int]] = {}
    for caption, image in enumerate(owner_C.tolist()):
        own.setdefault(image, []).append(caption)
    return {
        image_id: {
            "key": read.keys[n],
            "captions": [captions[c] for c in own[n]],
            "tr_rank": int(found.tr_rank[n]),
            "ir_ranks": [int(found.ir_rank[c]) for c in own[n]],
            "top_captions": [captions[c] for c in found.top_captions[n].tolist()],
            "top_images": [read.keys[i] for i in found.top_images[own[n][0]].tolist()],
        }
        for n, image_id in enumerate(read.ids)
    }


# ----------------------------------------------------------------------------------------------------- captioning


def captioning(held: Held, written: BulkCaptions | None = None) -> TaskResult:
    """Generated captions (or ``written`` ones) against all captions of their images, and the permuted control.

    Raises:
        DataError: captions and images do not belong together, or an image has no reference.
    """
    config = held.config
    read = held.gather("read" if written else "caption", "captioning")
    references = dict(zip(read.ids, read.captions, strict=True))
    keys = dict(zip(read.ids, read.keys, strict=True))
    made = dict(zip(read.ids, read.made, strict=False))
    if written is not None:
        references = {i: texts for i, texts in references.items() if i not in written.quarantined}
        made = {i: text for i, text in written.captions.items() if i in references or not config.limit}
    scores = score_captions(made, references, meteor=config.meteor, spice_jars=config.spice_jars)
    elsewhere = permuted(made, config.seed)
    control = score_captions(elsewhere, references)
    metrics = {**scores.metrics, **{f"{name}_permuted": value for name, value in control.metrics.items()}}
    rows = {
        i: {
            "key": keys[i],
            "references": list(references[i]),
            "caption": made[i],
            "cider": scores.cider[n],
            "bleu_4": scores.bleu_4[n],
            "rouge_l": scores.rouge_l[n],
            "permuted_caption": elsewhere[i],
            "permuted_cider": control.cider[n],
        }
        for n, i in enumerate(scores.ids)
    }
    facts = _generation_facts(held, references, made, written)
    return TaskResult(metrics, facts, rows, scores.not_computed)


def _generation_facts(
    held: Held, references: dict[int, tuple[str, ...]], made: dict[int, str], written: BulkCaptions | None
) -> dict[str, Any]:
    config = held.config
    names = ("prompt", "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty")
    settings = {name: getattr(config, name) for name in names}
    if config.prompt is None:
        settings["prompt"] = held.runner.about().prompt
    if written is not None:
        settings = {name: written.facts.get(name) for name in names}
    return {
        "images": len(references),
        "captioned": len(made),
        "references": sum(map(len, references.values())),
        "captions_empty": sum(not text.strip() for text in made.values()),
        "captions_distinct": len(set(made.values())),
        **settings,
        "captions_from": config.captions or "generated for this evaluation",
        "captions_model": written.model if written else "",
        "tokenizer": "isthmus.evaluation.ptb (after PTBTokenizer 3.4.1, lower-cased, punctuation dropped)",
        "cider_documents": "the references of the evaluated images: a subset gives another value",
    }


# ------------------------------------------------------------------------------------------------------------ vqa


def vqa(held: Held) -> TaskResult:
    """Answers to questions, by the official accuracy where there are ten references each, beside the blind prior.

    Raises:
        DataError: no questions, or an id of a question twice.
    """
    config = held.config
    read = held.gather("answer", "answering", extras=True)
    questions = [question for more in read.extras for question in more.questions]
    answers = [answer for some in read.answers for answer in some]
    if not questions:
        raise DataError(
            f"{held.source.root} holds no questions.", "Give layout.kind=vqav2, or 'questions' in the samples' JSON."
        )
    if doubled := [i for i, count in Counter(q.id for q in questions).items() if count > 1]:
        raise DataError(f"{held.source.root} holds the question {doubled[0]} more than once.", "Give each its own id.")
    result = TaskResult(
        {},
        {
            "images": len(read.ids),
            "questions": len(questions),
            "answers_distinct": len(set(answers)),
            "answers_empty": sum(not answer for answer in answers),
            **config.vqa.model_dump(),
            "tokenizer": "official VQA answer normalisation, applied to answers and references",
        },
        files={"answers.json": [{"question_id": q.id, "answer": a} for q, a in zip(questions, answers, strict=True)]},
    )
    each: list[float | None] = [None] * len(questions)
    if not any(q.answers for q in questions):
        result.not_computed["vqa_accuracy"] = "the split's answers are not published: send answers.json to its server"
    else:
        scores = score_answers(questions, answers, held.source.training)
        result.metrics, each = scores.metrics, list(scores.each)
        result.facts["prior"] = scores.prior
        if scores.not_computed:
            result.not_computed["vqa_accuracy"] = scores.not_computed
    score = iter(each)
    for n, image_id in enumerate(read.ids):
        result.rows[image_id] = {
            "key": read.keys[n],
            "questions": [q.text for q in read.extras[n].questions],
            "answers": read.answers[n],
            "answer_scores": [next(score) for _ in read.extras[n].questions],
        }
    return result


# ------------------------------------------------------------------------------------------------- classification


def classification(held: Held) -> TaskResult:
    """Zero-shot classification with an ensemble of prompts.

    Raises:
        DataError: images without a label, or fewer than two classes.
    """
    config = held.config
    read = held.gather("embed_images", "embedding", extras=True)
    assert read.images is not None
    labels = [more.label for more in read.extras]
    if bare := [key for key, label in zip(read.keys, labels, strict=True) if not label]:
        raise DataError(
            f"{len(bare)} images have no class (first {bare[0]}).",
            "Give layout.kind=classes, or 'label' in the samples' JSON.",
        )
    classes = held.source.classes or tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise DataError(f"{held.source.root} holds one class alone.", "Classification needs two.")
    vectors_PE = held.runner.embed_texts(prompts(classes, config.classification.templates))
    classes_KE = class_vectors(vectors_PE, len(classes))
    label_N = torch.tensor([classes.index(label) for label in labels])
    ranks_N, best_N = class_ranks(read.images, classes_KE, label_N)
    facts = {
        "images": len(read.ids),
        "classes": len(classes),
        "classes_from": "the data set's list" if held.source.classes else "the labels of the evaluated images",
        "templates": list(config.classification.templates),
        "ties": TIES,
        "text_max_length": config.text_max_length or "the recipe's",
        **classification_intervals(ranks_N, len(classes)),
        "ci95": METHOD,
    }
    rows = {
        image_id: {
            "key": read.keys[n],
            "label": labels[n],
            "predicted": classes[int(best_N[n])],
            "class_rank": int(ranks_N[n]),
        }
        for n, image_id in enumerate(read.ids)
    }
    return TaskResult(classification_metrics(ranks_N, label_N, len(classes)), facts, rows)


# ------------------------------------------------------------------------------------------------------- matching


def matching(held: Held) -> TaskResult:
    """ITM on hard negatives: each image's first caption against captions that are wrong for it.

    Raises:
        DataError: an image without a caption, without a wrong one, or negatives for some images only.
    """
    asked = held.config.matching.negatives
    read = held.gather("read", "reading", extras=True)
    if bare := [key for key, captions in zip(read.keys, read.captions, strict=True) if not captions]:
        raise DataError(f"The image {bare[0]} has no caption.", "Matching needs one for every image.")
    without = [key for key, more in zip(read.keys, read.extras, strict=True) if not more.negatives]
    mined = asked == "mined" or (asked == "auto" and len(without) == len(read.ids))
    if without and not mined:
        raise DataError(f"{len(without)} images have no 'negatives' (first {without[0]}).", "Give all of them some.")
    if mined:
        read = held.gather("embed", "embedding")
        negatives = _mined(read)
    else:
        negatives = [list(more.negatives) for more in read.extras]
    texts = [[captions[0], *wrong] for captions, wrong in zip(read.captions, negatives, strict=True)]
    judged = held.gather("judge", "matching", rows=_rows_of(held, read.ids), texts=texts)
    kept = dict(zip(read.ids, texts, strict=True))  # an image that cannot be decoded has been read, not judged
    positives, wrongs = [s[0] for s in judged.scores], [s[1:] for s in judged.scores]
    facts = {
        "images": len(judged.ids),
        "captions": len(judged.ids),
        "negatives": sum(map(len, wrongs)),
        "negatives_from": "the wrong caption that ITC ranks highest for the image" if mined else "the data set",
        "ties": "AUC counts a tie one half; log-odds of 0 are wrong either way",
        "text_max_length": held.config.text_max_length or "the recipe's",
    }
    rows = {
        image_id: {
            "key": judged.keys[n],
            "match_caption": kept[image_id][0],
            "match_negatives": kept[image_id][1:],
            "match_margins": judged.scores[n],
        }
        for n, image_id in enumerate(judged.ids)
    }
    return TaskResult(matching_metrics(positives, wrongs), facts, rows)


def _mined(read: Part) -> list[list[str]]:
    """Of each image, the hardest caption of another one that says something else."""
    assert read.images is not None and read.texts is not None
    captions, owner_C = _owned(read)
    same: dict[str, list[int]] = {}
    for row, text in enumerate(captions):
        same.setdefault(clean_caption(text), []).append(row)
    own = [{clean_caption(text) for text in texts} for texts in read.captions]
    forbidden = [torch.tensor(sorted({row for text in texts for row in same[text]})) for texts in own]
    del owner_C  # an image's own captions are among those that say the same
    found = hardest_wrong(read.images, read.texts, forbidden)
    if alone := [key for key, row in zip(read.keys, found, strict=True) if row is None]:
        raise DataError(f"No caption is wrong for the image {alone[0]}.", "Evaluate images of more than one kind.")
    return [[captions[row]] for row in found if row is not None]


TASKS: dict[str, Callable[[Held], TaskResult]] = {
    "retrieval": retrieval,
    "captioning": captioning,
    "vqa": vqa,
    "classification": classification,
    "matching": matching,
}

__all__ = ["TASKS", "Extras", "Held", "Rows", "TaskResult"]
