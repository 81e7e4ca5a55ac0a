"""The tasks of an evaluation: held-out samples through a model, to figures and one row per image.

N images, C captions, B batch, T image tokens, D vision width, Q query tokens, E shared embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.contracts import Captions, Embeds, Matches, Sample
from isthmus.errors import DataError
from isthmus.evaluation.captioning import permuted, score_captions
from isthmus.evaluation.model import Loaded
from isthmus.evaluation.retrieval import TIES, Retrieval, retrieve
from isthmus.evaluation.samples import BulkCaptions, HeldOut
from isthmus.progress import progress

Rows = dict[int, dict[str, Any]]


@dataclass
class TaskResult:
    """Figures, what they were measured under, and per-image columns by image id."""

    metrics: dict[str, float]
    facts: dict[str, Any]
    rows: Rows = field(default_factory=dict)


@torch.inference_mode()
def retrieval(model: Loaded, held_out: HeldOut, config: EvaluateConfig) -> TaskResult:
    """Image-to-text and text-to-image retrieval among the held-out pairs.

    Raises:
        ConfigError: the model has no shared space, or no matching head where re-ranking is asked for.
        DataError: an image without a caption, broken embeddings, missing or doubled samples.
    """
    model.require(Embeds, "retrieval")
    if config.rerank:
        model.require(Matches, "re-ranking")
    read = _embed(model, held_out, config)
    owner_C = torch.tensor(read.owner)
    found = retrieve(
        torch.cat(read.images),
        torch.cat(read.texts),
        owner_C,
        score=_matcher(model, read, config),
        rerank=config.rerank,
    )
    repeats = len(read.captions) - len(set(read.captions))
    facts = {
        "images": len(read.ids),
        "captions": len(read.captions),
        "captions_per_image": config.captions_per_image,
        "captions_repeated": repeats,  # equal texts tie, and ties count against the model
        "ties": TIES,
        "rerank": config.rerank,
    }
    return TaskResult(found.metrics(), facts, _retrieval_rows(read, found))


@torch.inference_mode()
def captioning(
    model: Loaded | None, held_out: HeldOut, config: EvaluateConfig, written: BulkCaptions | None
) -> TaskResult:
    """Generated captions (or ``written`` ones) against all captions of their images, and the permuted control.

    Raises:
        ConfigError: the model writes no captions.
        DataError: captions and images do not belong together, or an image has no reference.
    """
    references: dict[int, tuple[str, ...]] = {}
    keys: dict[int, str] = {}
    made: dict[int, str] = {}
    if written is None:
        assert model is not None
        model.require(Captions, "captioning")
    with progress("captioning", total=len(held_out.rows), unit="images") as tracker:
        vision = model.vision_digest if model else ""
        for group in held_out.groups(model.transform if model else None, images=written is None, vision_digest=vision):
            references |= {s.id: s.captions for s in group}
            keys |= {s.id: s.key for s in group}
            if written is None and model is not None:
                made |= dict(zip([s.id for s in group], _generate(model, group, config), strict=True))
            tracker.advance(len(group))
    if written is not None:
        references = {i: texts for i, texts in references.items() if i not in written.quarantined}
        made = {i: text for i, text in written.captions.items() if i in references or not config.limit}
    scores = score_captions(made, references, meteor=config.meteor)
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
    return TaskResult(metrics, _generation_facts(config, references, made, written), rows)


def _generation_facts(
    config: EvaluateConfig, references: dict[int, tuple[str, ...]], made: dict[int, str], written: BulkCaptions | None
) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in ("prompt", "num_beams", "max_new_tokens", "min_new_tokens")}
    if written is not None:
        settings = {name: written.facts.get(name) for name in settings}
    return {
        "captioned": len(made),
        "references": sum(map(len, references.values())),
        "captions_empty": sum(not text.strip() for text in made.values()),
        "captions_distinct": len(set(made.values())),
        **settings,
        "captions_from": config.captions or "generated for this evaluation",
        "captions_model": written.model if written else "",
        "tokenizer": "isthmus.evaluation.ptb (after PTBTokenizer 3.4.1, lower-cased, punctuation dropped)",
    }


def _generate(model: Loaded, group: Sequence[Sample], config: EvaluateConfig) -> list[str]:
    assert isinstance(model.module, Captions)
    return model.module.generate(
        model.features(group),
        prompt=config.prompt,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        num_beams=config.num_beams,
    )


@dataclass
class _Embedded:
    """Everything retrieval holds in memory. ``features`` only where re-ranking needs the images once more."""

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


def _embed(model: Loaded, held_out: HeldOut, config: EvaluateConfig) -> _Embedded:
    module = model.module
    assert isinstance(module, Embeds)
    read = _Embedded()
    with progress("embedding", total=len(held_out.rows), unit="images") as tracker:
        for group in held_out.groups(model.transform, vision_digest=model.vision_digest):
            features_BTD = model.features(group)
            read.images.append(module.embed_images(features_BTD).float().cpu())
            if config.rerank:
                read.features += list(features_BTD.cpu())
            for sample in group:
                if not sample.captions:
                    raise DataError(f"The image {sample.key} has no caption.", "Retrieval needs one for every image.")
                texts = sample.captions[:1] if config.captions_per_image == "first" else sample.captions
                read.owner += [len(read.ids)] * len(texts)
                read.captions += texts
                read.ids.append(sample.id)
                read.keys.append(sample.key)
            tracker.advance(len(group))
    if not read.ids:
        raise DataError(f"None of the samples of {held_out.manifest.root} can be read.", "Check the data set.")
    for start in range(0, len(read.captions), config.batch):
        read.texts.append(module.embed_texts(read.captions[start : start + config.batch]).float().cpu())
    return read


def _matcher(model: Loaded, read: _Embedded, config: EvaluateConfig) -> Any:
    if not config.rerank:
        return None
    module = model.module
    assert isinstance(module, Matches)

    def score(images: Sequence[int], captions: Sequence[int]) -> Tensor:
        out = []
        for start in range(0, len(images), config.batch):
            rows = slice(start, start + config.batch)
            features = torch.stack([read.features[i] for i in images[rows]]).to(model.device)
            out.append(module.match(features, [read.captions[c] for c in captions[rows]]).float().cpu())
        return torch.cat(out)

    return score


def _retrieval_rows(read: _Embedded, found: Retrieval) -> Rows:
    own: dict[int, list[int]] = {}
    for caption, image in enumerate(read.owner):
        own.setdefault(image, []).append(caption)
    counts = Counter(read.owner)
    assert len(counts) == len(read.ids)
    return {
        image_id: {
            "key": read.keys[n],
            "captions": [read.captions[c] for c in own[n]],
            "tr_rank": int(found.tr_rank[n]),
            "ir_ranks": [int(found.ir_rank[c]) for c in own[n]],
            "top_captions": [read.captions[c] for c in found.top_captions[n].tolist()],
            "top_images": [read.keys[i] for i in found.top_images[own[n][0]].tolist()],
        }
        for n, image_id in enumerate(read.ids)
    }
