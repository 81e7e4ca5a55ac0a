"""Visual question answering as classification, from a model that was pre-trained with cross-modal guidance.

The question guides the compression of the image and is fused with what is left; the fused [CLS] chooses among the
answers that the training data gives often enough. That the task is treated as classification is said by Cai et al.
(2024); vocabulary, soft targets and loss are the field's habits (Teney et al. 2018), our completion.

Shape letters: B rows, S image tokens, M text width, A answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from isthmus.config import (
    CompressionConfig,
    FusionConfig,
    MethodConfig,
    RunConfig,
    TextConfig,
    TowerConfig,
    VisionConfig,
)
from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Question, Reference, Sample, Stage
from isthmus.data.questions import frequent_answers, plain_answer
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError, WeightsError
from isthmus.losses.counting import GlobalMean, uniform
from isthmus.methods.artefact import check_bases, read_bases, read_recipe, read_state
from isthmus.methods.batching import cut_captions, own_tokenizer, stack, tokenise
from isthmus.methods.guided_parts import draw_guided, pass_keys
from isthmus.methods.parts import SeeingModule, in_parts, seeded
from isthmus.models.dual_stream import DualStream, build_streams
from isthmus.models.text import load_tokenizer
from isthmus.models.vision import build_vision, describe_vision

log = logging.getLogger(__name__)

QUESTION_DRAW = 22
ANNOTATORS = 10
INHERITED = ("vision", "image", "compression", "text", "fusion")
DROPPED = (
    "streams.lm_head.", "image_proj.", "text_proj.", "image_local.", "text_local.", "itm_head.", "relation.",
    "temperature", "local_temperature",
)  # fmt: skip
"""Beginnings of a parent's names that serve its own losses."""


class GuidedVqaConfig(MethodConfig):
    """Options of visual question answering by guided classification. The streams are the parent's."""

    name: Literal["guided_vqa"] = "guided_vqa"
    vision: VisionConfig | None = Field(None, description="inherited from the parent when not given, as the next four")
    image: TowerConfig | None = None
    compression: CompressionConfig | None = None
    text: TextConfig | None = None
    fusion: FusionConfig | None = None
    answers: tuple[str, ...] = Field(
        (), description="the classes; when not given, the training data's frequent answers"
    )
    least_answers: Annotated[int, Field(gt=0)] = Field(9, description="an answer given less often is no class")
    most_answers: Annotated[int, Field(gt=1)] = Field(3129, description="the most frequent ones; VQAv2's habit")


def resolve(config: GuidedVqaConfig, parent: RunConfig | None) -> GuidedVqaConfig:
    """The configuration with the streams filled in from the parent's recipe.

    Raises:
        ConfigError: neither the configuration nor a parent gives them, the parent is of another kind, or they disagree.
    """
    if parent is None:
        if any(getattr(config, name) is None for name in INHERITED):
            raise ConfigError(
                "The method guided_vqa starts from a 'guided' model, and the recipe names no 'parent'.",
                f"Add parent: models:/NAME@ALIAS, or give {', '.join(INHERITED)} to start from nothing.",
            )
        return config
    if parent.method.name not in ("guided", "guided_vqa"):
        raise ConfigError(f"The parent is a '{parent.method.name}' model.", "Name a guided or guided_vqa model.")
    updates = {}
    for name in INHERITED:
        ours, theirs = getattr(config, name), getattr(parent.method, name)
        # How much is dropped may differ: no parameter depends on it.
        if ours is not None and ours != theirs and name != "compression":
            raise ConfigError(f"method.{name} differs from the parent's.", f"Leave method.{name} out: it is inherited.")
        updates[name] = theirs if ours is None else ours
    return config.model_copy(update=updates)


def survey(config: GuidedVqaConfig, urls: Sequence[str]) -> GuidedVqaConfig:
    """The configuration with its answers, from the training data where it names none. Raises DataError: none there."""
    if config.answers:
        return config
    return config.model_copy(update={"answers": frequent_answers(urls, config.least_answers, config.most_answers)})


class GuidedVqa(SeeingModule):
    """Streams and a classifier of answers.

    Args:
        config: resolved and surveyed options.
        vision: frozen image encoder, or None.
        streams: compressible transformer, text and fusion encoder.
        tokenizer: BERT-family tokenizer.
        comm: collectives.
        seed: of guidance and dropout.
    """

    def __init__(
        self,
        config: GuidedVqaConfig,
        vision: nn.Module | None,
        streams: DualStream,
        tokenizer: Any,
        comm: Comm,
        seed: int,
    ) -> None:
        super().__init__()
        assert config.fusion is not None and config.compression is not None and config.text is not None
        self.config, self.tokenizer, self.comm, self.seed = config, tokenizer, comm, seed
        self.compression, self.max_length = config.compression, config.text.max_length
        self.vision, self.streams = vision, streams
        M, A = config.fusion.width, len(config.answers)
        self.classifier = nn.Sequential(nn.Linear(M, 2 * M), nn.LayerNorm(2 * M), nn.GELU(), nn.Linear(2 * M, A))

    def forward(self, batch: Batch) -> LossTerms:
        assert batch.ids_BT is not None and batch.targets_BA is not None
        guided_B = draw_guided(self.compression, batch.valid_B, self.seed, batch.step, self.comm)[:, 0]
        noise = [self._noise(batch, name) for name in ("image", "text", "own")]
        given: tuple[Any, ...] = (self.image_features(batch), batch.ids_BT, batch.mask_BT, guided_B, *noise)
        steps = self.streams.image.schedule(batch.step)
        logits = partial(self._logits, steps)
        if self.micro_batch is None:
            logits_BA = logits(*given)
        else:
            (logits_BA,) = in_parts(lambda *rows: (logits(*rows),), self.micro_batch, *given)
        mean = GlobalMean(batch.valid_B, self.comm)
        targets_BA = batch.targets_BA.to(logits_BA.device)
        loss = mean(F.binary_cross_entropy_with_logits(logits_BA, targets_BA, reduction="none").sum(1))
        # A question of another width than the image's attends through 'guide', which nothing reaches while all is kept.
        idle = 0.0 * self.streams.guide(logits_BA.new_zeros(1, self.streams.config.width)).sum()
        with torch.no_grad():
            right_B = targets_BA.gather(1, logits_BA.argmax(1, keepdim=True)).squeeze(1)
            metrics = {"vqa_accuracy": mean(right_B), "vqa_no_known_answer": mean((targets_BA.amax(1) == 0).float())}
            for step in steps:
                metrics[f"tokens_layer_{step.layer}"] = logits_BA.new_tensor(float(step.left))
        return LossTerms(loss + idle, {"vqa": loss.detach()}, metrics)

    def _logits(
        self, steps: Any, features: Tensor, ids: Tensor, mask: Tensor, guided: Tensor | None, *noise: Tensor | None
    ) -> Tensor:
        streams = self.streams
        states = streams.text(ids, mask, noise[1])
        seen = streams.look(streams.image.begin(features, noise[0]), steps, states, mask, guided)
        logits: Tensor = self.classifier(streams.fuse(states, mask, seen, noise[2]))
        return logits.float()

    def _noise(self, batch: Batch, name: str) -> Tensor | None:
        if not self.training:
            return None
        return pass_keys(name, batch, self.seed, self.comm, batch.sample_ids_B.device)

    @torch.no_grad()
    def answer(self, features_BND: Tensor, questions: Sequence[str]) -> list[str]:
        """The most probable of the known answers to each question about its image."""
        texts = [clean_caption(text) for text in questions]
        ids, mask = (x.to(features_BND.device) for x in tokenise(self.tokenizer, texts, self.max_length))
        logits_BA = self._logits(self.streams.image.schedule(), features_BND, ids, mask, None, None, None, None)
        return [self.config.answers[i] for i in logits_BA.argmax(1).tolist()]

    def load_parent(self, state: Mapping[str, Tensor], answers: Sequence[str] = ()) -> list[str]:
        """Starts from the tensors of a guided or guided_vqa model; the names that were taken.

        Args:
            state: the parent's tensors.
            answers: its classes. Its classifier is taken where they are this model's, in the same order.

        Raises:
            WeightsError: it lacks a stream's tensor, holds one that is not known, or shapes differ.
        """
        own = {n: p for n, p in self.named_parameters() if not n.startswith("vision.")}
        same_head = tuple(answers) == tuple(self.config.answers)
        taken = sorted(n for n in own if n in state and (same_head or not n.startswith("classifier.")))
        missing = sorted(n for n in own if n not in state and not n.startswith("classifier."))
        surplus = sorted(n for n in state if n not in own and not n.startswith(DROPPED))
        wrong = [n for n in taken if own[n].shape != state[n].shape]
        if missing or surplus or wrong:
            raise WeightsError(
                f"The parent does not fit this stage: it lacks {missing[:3]}, holds {surplus[:3]}, and of another "
                f"shape are {wrong[:3]}.",
                "Name a guided model, and leave its sections out of the recipe: they are inherited.",
            )
        with torch.no_grad():
            for name in taken:
                own[name].copy_(state[name])
        return taken


def soft_target(count: int, annotators: int) -> float:
    """How right an answer is that ``count`` of ``annotators`` gave: 0.3 for each of ten, at most 1 (Teney et al.).
    Other numbers of annotators are scaled to ten."""
    return min(0.3 * count * ANNOTATORS / annotators, 1.0) if annotators else 0.0


class CollateQuestions:
    """Samples -> Batch: one of each sample's questions, drawn for the visit, and soft targets of its answers."""

    def __init__(self, tokenizer: Any, max_length: int, seed: int, answers: Sequence[str]) -> None:
        self.tokenizer, self.max_length, self.seed = own_tokenizer(tokenizer), max_length, seed
        self.number = {answer: i for i, answer in enumerate(answers)}

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        asked = [self._choose(sample, epoch) for sample in samples]
        texts = tuple(clean_caption(question.text) for question in asked)
        ids_BT, mask_BT = tokenise(self.tokenizer, texts, self.max_length)
        cut_B = cut_captions(texts, self.max_length, lambda text: self.tokenizer(text, verbose=False)["input_ids"])
        targets_BA = torch.zeros(len(samples), len(self.number))
        for row, question in zip(targets_BA, asked, strict=True):
            given = [plain_answer(answer) for answer in question.answers]
            for answer in set(given) & self.number.keys():
                row[self.number[answer]] = soft_target(given.count(answer), len(given))
        members = stack(samples, step, epoch)
        members["valid_B"] &= torch.tensor([bool(question.answers) for question in asked])
        return Batch(**members, ids_BT=ids_BT, mask_BT=mask_BT, targets_BA=targets_BA, texts=texts, cut_B=cut_B)

    def _choose(self, sample: Sample, epoch: int) -> Question:
        if not sample.questions:
            return Question(0, "")
        u = float(uniform(self.seed, sample.visit_in(epoch), sample.id, QUESTION_DRAW))
        return sample.questions[int(u * len(sample.questions))]


def references(answers: int, global_batch: int) -> Mapping[str, Reference]:  # noqa: ARG001 - the signature of Stage
    """A ln 2: every answer as likely as not."""
    return {"vqa": Reference(answers * math.log(2))}


def build(config: GuidedVqaConfig, context: BuildContext) -> Stage:
    """The stage, from pretrained parts and, where the context names one, the parent's trained tensors.

    Raises:
        ConfigError: the configuration is not resolved, or names no answers.
        WeightsError: a part does not fit.
    """
    parent = read_recipe(context.parent) if context.parent else None
    config = resolve(config, parent)
    if not config.answers:
        raise ConfigError("method.answers is empty.", "Train on data whose samples have 'questions' with 'answers'.")
    assert config.vision and config.image and config.compression and config.text and config.fusion
    spec = describe_vision(config.vision)
    vision = build_vision(config.vision) if context.with_vision else None
    tokenizer = load_tokenizer(config.text.weights)
    with seeded(context.seed):
        streams = build_streams(
            config.vision, config.image, config.compression, config.text, config.fusion, spec, tokenizer, head=False
        )
        module = GuidedVqa(config, vision, streams, tokenizer, context.comm, context.seed)
    module.micro_batch = context.micro_batch
    bases = (vision.base,) if vision is not None else ()
    if context.parent and parent is not None:
        check_bases([base for base in read_bases(context.parent) if base.role == "vision"], bases)
        taken = module.load_parent(read_state(context.parent), getattr(parent.method, "answers", ()))
        head = "its classifier among them" if any(n.startswith("classifier.") for n in taken) else "new: the classifier"
        log.info("guided_vqa takes %d tensors of %s; %s", len(taken), context.parent, head)
    return Stage(
        module=module,
        collate=CollateQuestions(tokenizer, config.text.max_length, context.seed, config.answers),
        transform=spec.transform,
        augment=spec.transform.augment,
        references=partial(references, len(config.answers)),
        bases=bases,
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
        needs_questions=True,
    )
