"""The tasks that rank or score pairs: retrieval, classification, matching, and correspondence of sounds.

N images, C captions, P prompts, K classes, E shared embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from isthmus.data.names import read_table
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.classification import (
    class_ranks,
    class_vectors,
    classification_intervals,
    classification_metrics,
    prompts,
)
from isthmus.evaluation.correspondence import avc, similarities
from isthmus.evaluation.held import Held, Rows, TaskResult
from isthmus.evaluation.intervals import METHOD
from isthmus.evaluation.matching import matching_metrics
from isthmus.evaluation.retrieval import RECALLS, TIES, Retrieval, Score, candidates, hardest_wrong, look_up, retrieve
from isthmus.evaluation.work import Part

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


# ------------------------------------------------------------------------------------------------- classification


def classification(held: Held) -> TaskResult:
    """Zero-shot classification with an ensemble of prompts.

    Raises:
        DataError: images without a label, labels without a name, or fewer than two classes.
    """
    config = held.config
    listed = held.source.classes
    names = read_table(config.classification.class_names) if config.classification.class_names else {}
    if names and listed:
        raise DataError(
            "classification.class_names goes with an indexed data set.", "Name a layout's in layout.class_names."
        )
    if twice := next((name for name in names.values() if list(names.values()).count(name) > 1), None):
        raise DataError(
            f"{config.classification.class_names} calls two classes '{twice}'.", "Tell them apart, as 'crane (bird)'."
        )
    labels = _labels(held.gather("read", "reading", extras=True), names, held.source.root, listed)
    classes = listed or tuple(sorted({*names.values()} or {*labels.values()}))
    if len(classes) < 2:
        raise DataError(f"{held.source.root} holds one class alone.", "Classification needs two.")
    read = held.gather("embed_images", "embedding", extras=True)
    assert read.images is not None
    vectors_PE = held.runner.embed_texts(prompts(classes, config.classification.templates))
    classes_KE = class_vectors(vectors_PE, len(classes))
    number = {name: place for place, name in enumerate(classes)}
    label_N = torch.tensor([number[labels[i]] for i in read.ids])
    ranks_N, best_N = class_ranks(read.images, classes_KE, label_N)
    facts = {
        "images": len(read.ids),
        "classes": len(classes),
        "classes_from": "the data set's list"
        if listed
        else "classification.class_names"
        if names
        else "the labels of the evaluated images",
        "templates": list(config.classification.templates),
        "ties": TIES,
        "text_max_length": config.text_max_length or "the recipe's",
        **classification_intervals(ranks_N, len(classes)),
        "ci95": METHOD,
    }
    rows = {
        image_id: {
            "key": read.keys[n],
            "label": labels[image_id],
            "predicted": classes[int(best_N[n])],
            "class_rank": int(ranks_N[n]),
        }
        for n, image_id in enumerate(read.ids)
    }
    return TaskResult(classification_metrics(ranks_N, label_N, len(classes)), facts, rows)


def _labels(read: Part, names: Mapping[str, str], root: str, listed: Sequence[str]) -> dict[int, str]:
    """The class name of each image, by its id."""
    labels = {i: more.label for i, more in zip(read.ids, read.extras, strict=True)}
    if bare := [key for key, label in zip(read.keys, labels.values(), strict=True) if not label]:
        raise DataError(
            f"{len(bare)} images have no class (first {bare[0]}).",
            "Give layout.kind=classes, or 'label' in the samples' JSON.",
        )
    if names:
        if unnamed := sorted({*labels.values()} - names.keys()):
            raise DataError(
                f"classification.class_names has no name for the label '{unnamed[0]}'.", "Name every label of the data."
            )
        return {i: names[label] for i, label in labels.items()}
    if not listed and all(label.isdecimal() for label in labels.values()):
        raise DataError(
            f"The labels of {root} are numbers, which say nothing to a text encoder.",
            "Give classification.class_names, a file with the classes' names in the order of their numbers.",
        )
    return labels


# ------------------------------------------------------------------------------------------------------- matching


def matching(held: Held) -> TaskResult:
    """ITM on hard negatives: each image's first caption against captions that are wrong for it.

    Raises:
        DataError: an image without a caption, without a wrong one, or negatives for some images only.
        ConfigError: negatives would have to be mined, by a model without a contrast.
    """
    asked = held.config.matching.negatives
    read = held.gather("read", "reading", extras=True)
    if bare := [key for key, captions in zip(read.keys, read.captions, strict=True) if not captions]:
        raise DataError(f"The image {bare[0]} has no caption.", "Matching needs one for every image.")
    without = [key for key, more in zip(read.keys, read.extras, strict=True) if not more.negatives]
    mined = asked == "mined" or (asked == "auto" and len(without) == len(read.ids))
    if without and not mined:
        raise DataError(f"{len(without)} images have no 'negatives' (first {without[0]}).", "Give all of them some.")
    if mined and not held.runner.about().contrasts:
        raise ConfigError(
            "The images have no 'negatives', and this model, trained without a contrast, cannot mine any.",
            "Give each sample 'negatives' in its JSON, or leave matching out.",
        )
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


# ------------------------------------------------------------------------------------------------- correspondence


def correspondence(held: Held) -> TaskResult:
    """Sounds and what is seen: the binary question (AVC) and 1-of-N retrieval, both ways.

    Raises:
        DataError: too few pairs, or broken embeddings.
    """
    read = held.gather("embed_heard", "embedding")
    assert read.images is not None and read.sounds is not None
    scores_NN = similarities(read.images, read.sounds)
    asked = avc(scores_NN, read.ids, held.config.correspondence.validation, held.config.seed)
    found = retrieve(read.images, read.sounds, torch.arange(len(read.ids)))
    metrics = {"avc_accuracy": asked.accuracy, "avc_accuracy_chance": 0.5, "avc_auc": asked.auc}
    for name, rank in (("seen_to_heard", found.tr_rank), ("heard_to_seen", found.ir_rank)):
        metrics |= {f"{name}_at_{k}": float((rank <= k).double().mean()) for k in RECALLS}
    metrics |= {f"one_of_n_at_{k}_chance": min(1.0, k / len(read.ids)) for k in RECALLS}
    facts = {
        "pairs": len(read.ids),
        "avc_pairs_tested": 2 * asked.test,
        "avc_clips_for_threshold": asked.validation,
        "avc_threshold": asked.threshold,
        "avc_wrong_partner": "the next pair's sound in an order drawn from (seed, sample id), within the same part",
        "one_of_n": len(read.ids),
        "ties": TIES,
    }
    rows = {
        sample_id: {
            "key": read.keys[n],
            "avc_partner": read.keys[int(asked.partner_N[n])],
            "avc_tested": bool(asked.tested_N[n]),
            "avc_score": float(scores_NN[n, n]),
            "avc_score_of_partner": float(scores_NN[n, int(asked.partner_N[n])]),
            "seen_to_heard_rank": int(found.tr_rank[n]),
            "heard_to_seen_rank": int(found.ir_rank[n]),
        }
        for n, sample_id in enumerate(read.ids)
    }
    return TaskResult(metrics, facts, rows)
