"""The types that flow between the layers. Nothing here knows Ray, DeepSpeed or MLflow.

Shape letters, written as suffixes: B local batch, G global batch (B x world size), N image tokens, Q query tokens,
T text tokens, D vision width, M Q-Former width, E shared embedding, H heads, V vocabulary, L language-model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        id: unique within the data set; a text where the data names none.
        answers: of the annotators, ten in VQAv2; none where they are not published.
        kind, answer_kind: question type and answer type, "" where the file names none.
    """

    id: int | str
    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    answer_kind: str = ""


@dataclass(frozen=True)
class Sample:
    """One pair on its way to a batch: an image and its captions, or what is seen and what is heard.

    Attributes:
        id: int64, unique within the data set's manifest.
        key: the sample's name inside its shard.
        captions: every caption of the image, at least one for training.
        pixels_CHW: float32, transformed, or None when ``features_ND`` is given; of a clip [T, 3, H, W].
        features_ND: the frozen encoder's tokens, float16 or float32, or None.
        image_id: int64, equal for all samples of one image; None means that the image has no other sample.
        visit: how often this run has seen the sample before, which with the seed and the id decides what is drawn for
            it. None: as often as the batch's epoch says, for in one data set all samples are visited equally often.
        audio_NF: patches of the log-mel spectrum of its sound, float32 [Na, 256], or None.
        audio_mask_N: bool [Na], False where the sound had ended.
        questions: about the image; only where the stage asks for them.
    """

    id: int
    key: str
    captions: tuple[str, ...] = ()
    pixels_CHW: np.ndarray | None = None
    features_ND: np.ndarray | None = None
    image_id: int | None = None
    visit: int | None = None
    audio_NF: np.ndarray | None = None
    audio_mask_N: np.ndarray | None = None
    questions: tuple[Question, ...] = ()

    def visit_in(self, epoch: int) -> int:
        """``visit``, in a batch of ``epoch``."""
        return epoch if self.visit is None else self.visit


@dataclass(frozen=True)
class Batch:
    """What a method's forward receives. Optional members are None where a method has no use for them.

    Attributes:
        sample_ids_B: int64.
        valid_B: bool; False marks the padding rows of an epoch's last batch. They count in no loss.
        step: global optimizer step, the same on every rank; keys the counter-based generators.
        epoch: completed passes over the data; where sets of a mixture have passes of their own, as many rows as all of
            them hold are one.
        pixels_BCHW, features_BND: exactly one of the two is given; pixels of clips are [B, T, 3, H, W].
        ids_BT, mask_BT: int64 token ids and 0/1 attention mask, right-padded.
        labels_BT: int64 targets, -100 where no loss is taken.
        prefix_ids_BT, prefix_mask_BT: encoder-side prefix of prefix language modelling.
        texts: the captions as chosen for this epoch, for logging and checks.
        cut_B: bool; True where the caption was longer than the recipe's limit and lost its end.
        image_ids_B: int64; rows of one image have the same. None: every sample is an image of its own.
        audio_BNF, audio_mask_BN: patches of sounds, and 1 where a sound has not ended (int64, as attention masks are).
        targets_BA: float32, how right each known answer is, 0 to 1.
    """

    sample_ids_B: Tensor
    valid_B: Tensor
    step: int = 0
    epoch: int = 0
    pixels_BCHW: Tensor | None = None
    features_BND: Tensor | None = None
    ids_BT: Tensor | None = None
    mask_BT: Tensor | None = None
    labels_BT: Tensor | None = None
    prefix_ids_BT: Tensor | None = None
    prefix_mask_BT: Tensor | None = None
    texts: tuple[str, ...] = ()
    cut_B: Tensor | None = None
    image_ids_B: Tensor | None = None
    audio_BNF: Tensor | None = None
    audio_mask_BN: Tensor | None = None
    targets_BA: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on ``device``; the rest unchanged."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return int(self.sample_ids_B.shape[0])


@dataclass
class LossTerms:
    """A method's answer to one batch.

    Attributes:
        total: scalar to differentiate. Scaled so that the *average over ranks* of the gradients is the gradient of
            the mean over the global batch (local sum x world size / global count): any world size gives one answer.
        parts: detached scalars by name, scaled like ``total``; their average over ranks is the global value.
        metrics: further detached scalars worth logging (accuracies, temperature), averaged over ranks likewise.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Comm(Protocol):
    """The collective operations that losses need. ``world_size`` 1 needs no process group."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, x_B: Tensor, *, grad: bool) -> Tensor:
        """Rows of every rank in rank order, [world_size * B, ...].

        ``grad=False`` gives a constant, also for this rank's own rows and also at world size 1 (the LAVIS rule);
        ``grad=True`` gives a differentiable gather whose backward sums the ranks' gradients of each row.
        All ranks must pass equal shapes.
        """
        ...

    def fetch_rows(self, x_B: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` (int64, [K], global row numbers, K equal on all ranks) of the gathered x, differentiable.

        Moves only what is asked for where the back end can; the result equals ``gather(x, grad=True)[index]``.
        """
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, not differentiable."""
        ...

    def max(self, value: int) -> int:
        """Largest of the ranks' integers."""
        ...


class LocalComm:
    """One process. Keeps the detached/differentiable distinction that several ranks have."""

    rank = 0
    world_size = 1

    def gather(self, x_B: Tensor, *, grad: bool) -> Tensor:
        return x_B if grad else x_B.detach()

    def fetch_rows(self, x_B: Tensor, index: Tensor) -> Tensor:
        return x_B[index]

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def max(self, value: int) -> int:
        return value


@dataclass(frozen=True)
class Base:
    """A frozen pretrained part: referenced by name and digest, never written into a checkpoint.

    Attributes:
        role: ``vision``, ``text`` or ``language``.
        weights: where it came from, as the recipe names it.
        digest: sha256 over its tensors in name order.
    """

    role: str
    weights: str
    digest: str


@dataclass(frozen=True)
class Reference:
    """The two values that a loss is read against.

    Attributes:
        chance: the loss of a model that knows nothing.
        floor: the lowest value the loss can take (label smoothing keeps it above zero).
    """

    chance: float
    floor: float = 0.0


class StageModule(nn.Module):
    """A method's model and losses as the one module that DeepSpeed wraps.

    ``train()`` leaves every sub-module whose parameters are all frozen in eval mode, so that dropout and batch
    statistics of pretrained parts never wake up.
    """

    def forward(self, batch: Batch) -> LossTerms:
        """Losses of one local batch; collective calls inside must be the same on every rank."""
        raise NotImplementedError

    def running_state(self) -> Mapping[str, Tensor]:
        """What a run has counted outside its parameters and later steps depend on, as tensors on the CPU: part of every
        checkpoint. The same on every rank, and of the same names from the start."""
        return {}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where :meth:`running_state` was taken."""

    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Least and greatest value of parameters by name; the training loop puts them back inside after every step."""
        return {}

    def train(self, mode: bool = True) -> StageModule:
        super().train(mode)
        if mode:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self


Collate = Callable[[Sequence[Sample], int, int], Batch]
"""(samples, epoch, step) -> Batch. Chooses one caption of each sample for this visit of it (:meth:`Sample.visit_in`),
tokenises, stacks."""


@dataclass(frozen=True)
class Stage:
    """All that a runtime needs of a method, assembled by its ``build``.

    Attributes:
        module: model + objective; its non-frozen parameters are what is trained and saved.
        collate: makes a Batch of Samples.
        transform: evaluation image transform spec, PIL image -> float32 [3, H, W]; picklable.
        augment: training image transform (image, seed) -> float32 [3, H, W]; the same as
            ``transform`` where nothing is augmented.
        references: (global batch) -> loss part name -> Reference.
        bases: the frozen pretrained parts that this stage stands on.
        image_spec: {"tokens": N, "width": D, "image_size": S}.
        needs_image_ids: whether its loss has to know which rows are of one image; only then are they read.
        needs_questions: whether its samples have to carry their questions; only then are they read.
    """

    module: StageModule
    collate: Collate
    transform: Callable[[Any], np.ndarray]
    augment: Callable[[Any, int], np.ndarray]
    references: Callable[[int], Mapping[str, Reference]]
    bases: tuple[Base, ...]
    image_spec: Mapping[str, int]
    needs_image_ids: bool = False
    needs_questions: bool = False


@runtime_checkable
class Embeds(Protocol):
    """A module that places images and texts in one space. Implemented by StageModules that can retrieve.

    Optional for a method: ``contrasts``, False where this model was trained to match pairs and not to place them.
    """

    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, Q, E]; Q is 1 for single-vector methods."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, E]. Optional for a method: ``max_length``, tokens of a text."""
        ...


@runtime_checkable
class Hears(Protocol):
    """A module that places what is seen and what is heard in one space."""

    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, Q, E]; of clips the features are [B, T, D]."""
        ...

    def embed_sounds(self, audio_BNF: Tensor, mask_BN: Tensor) -> Tensor:
        """Unit vectors, float32 [B, E], of patches [B, Na, 256] and their mask."""
        ...


@runtime_checkable
class Matches(Protocol):
    """A module that scores given image-text pairs jointly (ITM). Optional for a method: ``matches``, False where this
    model was not trained to."""

    def match(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """Logit of 'these belong together', float32 [B]. Optional for a method: ``max_length``, tokens of a text."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A module that decides whether an image and a text belong together (ITM as a classifier)."""

    def match_margin(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """Log-odds of 'these belong together', float32 [B]: above 0 is a yes."""
        ...


@runtime_checkable
class Captions(Protocol):
    """A module that turns images into a soft prompt for its frozen language model."""

    def generate(
        self,
        features_BND: Tensor,
        *,
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """One stripped caption per image; ``prompt`` is one for all of them, or one each; "" is none at all.

        None is the recipe's own, which a method that has one names in its attribute ``own_prompt``. A method whose
        decoder starts from the image alone says so by ``takes_prompt = False``, and raises ConfigError for a prompt.
        """
        ...


def contrasts(module: object) -> bool:
    """Whether a module places what it embeds in one space; see :class:`Embeds`."""
    return bool(getattr(module, "contrasts", True))


def takes_prompt(module: object) -> bool:
    """Whether captions (or answers) of a module may be asked for with a text."""
    return isinstance(module, Answers) or (isinstance(module, Captions) and getattr(module, "takes_prompt", True))


@runtime_checkable
class Answers(Protocol):
    """A module that chooses answers to questions from those it knows."""

    def answer(self, features_BND: Tensor, questions: Sequence[str]) -> list[str]:
        """One answer each, to the questions as they are asked."""
        ...


@runtime_checkable
class Sees(Protocol):
    """A module that holds its frozen image encoder."""

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Frozen image tokens, [B, N, D]."""
        ...


@dataclass(frozen=True)
class BuildContext:
    """What a method's ``build`` is given beside its own configuration.

    Attributes:
        comm: collectives of the group that the module will run in.
        seed: initialisation of the trainable parts and the counter-based generators.
        with_vision: False skips loading the image encoder (features come from a cache).
        parent: directory of an unpacked model that this stage starts from (stage 2's stage 1), or None.
        gradient_checkpointing: recompute activations in backward.
        micro_batch: rows whose activations are held at once; None is all of a rank's.
        bf16: training computes in bfloat16, so a frozen language model may be held in it, at half the bytes.
    """

    comm: Comm = field(default_factory=LocalComm)
    seed: int = 0
    with_vision: bool = True
    parent: str | None = None
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    bf16: bool = False


@dataclass(frozen=True)
class ModelVersion:
    """A registered model.

    Attributes:
        name, version, alias: as in ``models:/name/version`` and ``models:/name@alias``.
        uri: what every other command takes.
        path: local directory of the unpacked artefact, or "" where it has not been fetched.
        lineage: data manifest digest, base digests, parent version, code version.
    """

    name: str
    version: str
    alias: str
    uri: str
    path: str = ""
    lineage: Mapping[str, Any] = field(default_factory=dict)
