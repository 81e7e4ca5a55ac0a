"""The model's side of an evaluation: rows of the data in, vectors, captions, answers or scores out.

The same code runs in the driver's process and in every Ray actor. Rows go through the model in groups of ``batch``
that begin at multiples of ``batch``, so that a result does not depend on how many workers there are.

B images, N image tokens, D vision width, Q query tokens, E shared embedding, P pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.contracts import Answers, Captions, Embeds, Hears, Judges, Matches, Sample, contrasts
from isthmus.data.prefetch import map_ahead
from isthmus.data.readers import Failure
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.layouts import Extras, Question
from isthmus.evaluation.model import Loaded
from isthmus.evaluation.sources import Entry, Source
from isthmus.evaluation.vqa import ask

T = TypeVar("T")
Kind = Literal["read", "embed", "embed_images", "embed_heard", "caption", "answer", "match", "judge"]


@dataclass
class Part:
    """What became of some rows. Lists run parallel to ``ids``; those that a kind of work does not fill are empty.

    Attributes:
        ids, keys, captions, extras: of the images that could be read.
        failures: the others.
        images: unit vectors, float32 [B, Q, E].
        texts: unit vectors of all captions of all images, float32 [C, E].
        sounds: unit vectors of all sounds, float32 [B, E].
        made: captions. answers: one per question. scores: one per text asked for.
    """

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    extras: list[Extras] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    images: Tensor | None = None
    texts: Tensor | None = None
    sounds: Tensor | None = None
    made: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """A piece of work.

    Attributes:
        rows: of the source.
        texts: those that each row is scored with; only for ``match`` and ``judge``.
        extras: whether questions, labels and negatives are read.
    """

    kind: Kind
    rows: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...] = ()
    extras: bool = False


class Worker:
    """A loaded model and an open source.

    Args:
        model: None where only captions are read.
        source: the data.
        config: anchored; batch size, generation settings.
    """

    def __init__(self, model: Loaded | None, source: Source, config: EvaluateConfig) -> None:
        self.model, self.source, self.config = model, source, config

    def run(self, order: Order) -> Iterator[Part]:
        """The parts of an order, one per group of ``batch`` rows; images are read ahead by threads.

        Raises:
            ConfigError: the method cannot do this kind of work.
        """
        size = self.config.batch
        starts = range(0, len(order.rows), size)
        transform = self.model.transform if self.model else None

        def read(start: int) -> list[Entry]:
            return self.source.read(
                order.rows[start : start + size],
                transform,
                images=order.kind != "read",
                extras=order.extras,
            )

        for start, entries in zip(starts, map_ahead(read, starts, threads=2, depth=1), strict=True):
            texts = dict(zip(order.rows[start : start + size], order.texts[start : start + size], strict=False))
            yield self._part(order.kind, order.rows[start : start + size], entries, texts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [len(texts), E], on the CPU."""
        module = self._module(Embeds, "embedding")
        size = self.config.batch
        pieces = [module.embed_texts(texts[i : i + size], **self._length()) for i in range(0, len(texts), size)]
        return torch.cat(pieces).float().cpu()

    @torch.inference_mode()
    def _part(
        self, kind: Kind, rows: Sequence[int], entries: Sequence[Entry], texts: dict[int, tuple[str, ...]]
    ) -> Part:
        good = [
            (row, sample, more) for row, (sample, more) in zip(rows, entries, strict=True) if isinstance(sample, Sample)
        ]
        part = Part(
            ids=[sample.id for _, sample, _ in good],
            keys=[sample.key for _, sample, _ in good],
            captions=[sample.captions for _, sample, _ in good],
            extras=[more for _, _, more in good],
            failures=[item for item, _ in entries if isinstance(item, Failure)],
        )
        if not good or kind == "read":
            return part
        assert self.model is not None
        features_BND = self.model.features([sample for _, sample, _ in good])
        if kind == "embed_heard":
            module = self._module(Hears, "correspondence")
            part.images = module.embed_images(features_BND).float().cpu()
            part.sounds = module.embed_sounds(*self.model.sounds([sample for _, sample, _ in good])).float().cpu()
        elif kind in ("embed", "embed_images"):
            module = self._module(Embeds, "embedding")
            alike = not contrasts(self.model.module)  # then all have one vector, and matching alone ranks them
            part.images = torch.ones(len(good), 1, 1) if alike else module.embed_images(features_BND).float().cpu()
            if kind == "embed":
                part.texts = self._embed_captions(part, alike)
        elif kind == "caption":
            part.made = self._caption(features_BND)
        elif kind == "answer":
            part.answers = self._answer(features_BND, [more.questions for more in part.extras])
        else:
            part.scores = self._score(kind, features_BND, [texts[row] for row, _, _ in good])
        return part

    def _embed_captions(self, part: Part, alike: bool) -> Tensor:
        for key, captions in zip(part.keys, part.captions, strict=True):
            if not captions:
                raise DataError(f"The image {key} has no caption.", "Retrieval needs one for every image.")
        asked = self.config.captions_per_image
        most = {"first": 1, "all": None}[asked] if isinstance(asked, str) else asked
        part.captions = [captions[:most] for captions in part.captions]
        texts = [text for captions in part.captions for text in captions]
        return torch.ones(len(texts), 1) if alike else self.embed_texts(texts)

    def _caption(self, features_BND: Tensor) -> list[str]:
        config = self.config
        made = self._module(Captions, "captioning").generate(
            features_BND,
            prompt=config.prompt,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
        )
        return _as_many(made, len(features_BND))

    def _answer(self, features_BND: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[str]]:
        if self.model is not None and isinstance(self.model.module, Answers):
            return self._choose(self.model.module, features_BND, questions)
        vqa, module = self.config.vqa, self._module(Captions, "vqa")

        def write(features_PND: Tensor, prompts: list[str]) -> list[str]:
            made = module.generate(
                features_PND,
                prompt=prompts,
                max_new_tokens=vqa.max_new_tokens,
                min_new_tokens=vqa.min_new_tokens,
                num_beams=vqa.num_beams,
                length_penalty=vqa.length_penalty,
            )
            return _as_many(made, len(prompts))

        asked = [[ask(question.text, vqa) for question in some] for some in questions]
        return self._of_pairs(write, features_BND, asked)

    def _choose(
        self, module: Answers, features_BND: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[str]]:
        """Answers from a closed set: the question goes in as it is, ``vqa``'s prompt and beams have no say."""

        def choose(features_PND: Tensor, texts: list[str]) -> list[str]:
            return _as_many(module.answer(features_PND, texts), len(texts))

        return self._of_pairs(choose, features_BND, [[question.text for question in some] for some in questions])

    def _score(self, kind: Kind, features_BND: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        if kind == "match":
            score: Any = self._module(Matches, "re-ranking").match
        else:
            score = self._module(Judges, "matching").match_margin

        def judge(features_PND: Tensor, some: list[str]) -> list[float]:
            found: list[float] = score(features_PND, some, **self._length()).float().tolist()
            return found

        return self._of_pairs(judge, features_BND, texts)

    def _of_pairs(
        self, do: Callable[[Tensor, list[str]], list[T]], features_BND: Tensor, texts: Sequence[Sequence[str]]
    ) -> list[list[T]]:
        """What ``do`` makes of every image with each of its texts, ``batch`` pairs at a time."""
        pairs = [(i, text) for i, some in enumerate(texts) for text in some]
        made: list[T] = []
        for start in range(0, len(pairs), self.config.batch):
            images, asked = zip(*pairs[start : start + self.config.batch], strict=True)
            made += do(features_BND[list(images)], list(asked))
        rest = iter(made)
        return [[next(rest) for _ in some] for some in texts]

    def _module(self, kind: type, task: str) -> Any:
        assert self.model is not None
        self.model.require(kind, task)
        return self.model.module

    def _length(self) -> dict[str, int]:
        return {"max_length": self.config.text_max_length} if self.config.text_max_length else {}


def check(model: Loaded, config: EvaluateConfig) -> None:
    """Refuses tasks that the model's method cannot do, before anything is encoded.

    Raises:
        ConfigError: the module lacks a task's protocol, or takes no text length and one is asked for.
    """
    needs: dict[str, list[tuple[type, str]]] = {
        "retrieval": [(Embeds, "retrieval")] + ([(Matches, "re-ranking")] if config.rerank else []),
        "captioning": [] if config.captions else [(Captions, "captioning")],
        "vqa": [] if isinstance(model.module, Answers) else [(Captions, "vqa")],
        "classification": [(Embeds, "classification")],
        "correspondence": [(Hears, "correspondence")],
        "matching": [(Judges, "matching")] + ([(Embeds, "mining")] if config.matching.negatives == "mined" else []),
    }
    for task in config.tasks:
        for kind, what in needs[task]:
            model.require(kind, what)
    placed = {
        "retrieval": config.rerank != "all",
        "classification": True,
        "correspondence": True,
        "matching": needs["matching"][1:] != [],
    }
    if not contrasts(model.module) and (refused := [task for task in config.tasks if placed.get(task)]):
        raise ConfigError(
            f"{model.uri} cannot do {refused[0]} so: it was trained to match pairs, without a contrast.",
            "Retrieval goes with rerank: all, on few enough images; matching with the data's own negatives.",
        )
    if config.rerank and "retrieval" in config.tasks and not getattr(model.module, "matches", True):
        raise ConfigError(
            f"{model.uri} was trained by contrast alone: it has nothing to re-rank with.", "Set rerank: 0."
        )
    if config.text_max_length and isinstance(model.module, Embeds) and not _takes_length(model.module):
        raise ConfigError(f"{model.uri} fixes the length of its texts by its recipe.", "Leave text_max_length out.")


def _takes_length(module: Embeds) -> bool:
    return "max_length" in inspect.signature(module.embed_texts).parameters


def tokenizers(model: Loaded) -> str:
    """The model's own tokenizers by class and vocabulary, for the record."""
    module = model.module
    owners = {"text": module, "sentence": getattr(module, "text", None), "language": getattr(module, "language", None)}
    found = {role: getattr(owner, "tokenizer", None) for role, owner in owners.items() if owner is not None}
    said = [f"{role} {type(t).__name__} of {len(t)}" for role, t in found.items() if t is not None]
    return ", ".join(said)


def _as_many(texts: Sequence[str], wanted: int) -> list[str]:
    if len(texts) != wanted:
        raise DataError(f"The model gave {len(texts)} texts for {wanted} prompts.", "This is a fault of the method.")
    return [text.strip() for text in texts]
