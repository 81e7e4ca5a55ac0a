"""BLIP-2, stage 2: queries become the soft prompt of a frozen language model (Li et al. 2023, section 3.3).

Shape letters: B batch, N image tokens, Q queries, T text tokens, M Q-Former width, L language-model width.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isthmus.config import LanguageConfig, MethodConfig, QFormerConfig, RunConfig, VisionConfig
from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Reference, Sample, Stage
from isthmus.errors import ConfigError, WeightsError
from isthmus.losses.language import language_reference
from isthmus.methods.artefact import check_bases, read_bases, read_recipe, read_state
from isthmus.methods.batching import choose_caption, cut_captions, split_caption, stack
from isthmus.methods.blip2_stage1_config import check_heads
from isthmus.methods.parts import SeeingModule, VisionNorm, check_thinning, in_parts, seeded, thinned
from isthmus.models.language import build_language
from isthmus.models.language_base import IGNORED, FrozenLanguage, LossSum
from isthmus.models.noise import batch_keys
from isthmus.models.qformer import QFormer
from isthmus.models.vision import build_vision, describe_vision

log = logging.getLogger(__name__)

NEW = frozenset({"projection.weight", "projection.bias"})
"""What stage 2 has and stage 1 has not."""


class Blip2Stage2Config(MethodConfig):
    """Options of BLIP-2's second stage. Image encoder and Q-Former are the parent's; a stored recipe holds them."""

    name: Literal["blip2_stage2"] = "blip2_stage2"
    vision: VisionConfig | None = Field(None, description="inherited from the parent when not given")
    qformer: QFormerConfig | None = Field(None, description="inherited from the parent when not given")
    language: LanguageConfig = LanguageConfig()
    lm_mean: Literal["global", "rank"] = Field(
        "global",
        description="tokens that the loss averages over; 'rank' is LAVIS's, and depends on the number of ranks",
    )

    projection_init: Literal["linear", "embedding"] = Field(
        "linear",
        description="linear: torch's own, as LAVIS has it; embedding: a soft prompt about as large as the language "
        "model's own word embeddings, which a small model needs to learn in few steps",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Blip2Stage2Config:
        if self.qformer is not None:
            check_heads(self.qformer)
        return self


def resolve(config: Blip2Stage2Config, parent: RunConfig | None) -> Blip2Stage2Config:
    """The configuration with image encoder and Q-Former filled in from the parent's recipe.

    Raises:
        ConfigError: neither the configuration nor a parent gives them, the parent is no stage 1 or 2, or they disagree.
    """
    if parent is None:
        if config.vision is None or config.qformer is None:
            raise ConfigError(
                "The method blip2_stage2 starts from a stage-1 model, and the recipe names no 'parent'.",
                "Add parent: models:/NAME@ALIAS, or give method.vision and method.qformer to start from nothing.",
            )
        return config
    vision, qformer = getattr(parent.method, "vision", None), getattr(parent.method, "qformer", None)
    if vision is None or qformer is None:
        raise ConfigError(
            f"The parent is a '{parent.method.name}' model, which has no Q-Former.", "Name a blip2_stage1 model."
        )
    for field, ours, theirs in (("vision", config.vision, vision), ("qformer", config.qformer, qformer)):
        if ours is not None and ours != theirs:
            raise ConfigError(
                f"method.{field} differs from the parent's.", f"Leave method.{field} out: it is inherited."
            )
    return config.model_copy(update={"vision": vision, "qformer": qformer})


TEXT_MEMBERS = ("ids_BT", "mask_BT", "labels_BT", "prefix_ids_BT", "prefix_mask_BT")
"""Of a batch: what the language model's loss is made of."""


class Blip2Stage2(SeeingModule):
    """Frozen image encoder -> norm -> Q-Former (image pass) -> linear projection -> frozen language model.

    Args:
        config: resolved options.
        vision: frozen image encoder, or None.
        image_width: D.
        language: frozen language model (:mod:`isthmus.models.language`, :mod:`isthmus.models.seq2seq`).
        comm: collectives.
        seed: of the Q-Former's dropout.
        recompute: gradient checkpointing.
    """

    def __init__(
        self,
        config: Blip2Stage2Config,
        vision: nn.Module | None,
        image_width: int,
        language: FrozenLanguage,
        comm: Comm,
        *,
        seed: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        assert config.qformer is not None
        self.config, self.comm, self.seed = config, comm, seed
        self.vision, self.language = vision, language
        self.ln_vision = VisionNorm(image_width)
        self.qformer = QFormer(config.qformer, image_width, None, recompute=recompute)
        self.projection = nn.Linear(config.qformer.width, language.width)
        if config.projection_init == "embedding":
            nn.init.normal_(self.projection.weight, std=language.embedding_rms() / config.qformer.width**0.5)
            nn.init.zeros_(self.projection.bias)

    def train(self, mode: bool = True) -> Blip2Stage2:
        super().train(mode)
        if mode and self.config.language.dropout:
            self.language.train()
        return self

    def soft_prompt(self, features_BND: Tensor, noise_B: Tensor | None = None) -> Tensor:
        """Projected queries [B, Q, L]; ``noise_B`` as in :meth:`isthmus.models.qformer.QFormer.forward`."""
        normal = self.ln_vision(features_BND, self.qformer.queries.dtype)
        memory = self.qformer.remember(thinned(normal, self.qformer.config.compression))
        return self.projection(self.qformer(memory, noise_B=noise_B).queries_BQM)

    def load_stage1(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Starts from a stage-1 (or stage-2) model's tensors: (taken, dropped) names.

        A stage-1 model lacks exactly the projection and holds exactly the text branch beside what is taken; a stage-2
        model holds exactly what is taken.

        Raises:
            WeightsError: the names differ from that in any way, or a shape differs. Nothing is written then.
        """
        parameters = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(("vision.", "language."))
        }
        taken, dropped = sorted(set(state) & set(parameters)), sorted(set(state) - set(parameters))
        missing = set(parameters) - set(state)
        if NEW & set(state):
            new, text = frozenset[str](), frozenset[str]()
        else:
            new, text = NEW, text_branch(len(self.qformer.layers), state)
        faults = {
            "it lacks": missing - new,
            "holds": set(dropped) - text,
            "lacks of the text branch": text - set(dropped),
        }
        if any(faults.values()):
            found = ", ".join(f"{what} {sorted(names)}" for what, names in faults.items() if names)
            raise WeightsError(
                f"The parent does not fit this stage: {found}.",
                "Name a blip2_stage1 or blip2_stage2 model that was trained with the same Q-Former.",
            )
        for name in taken:
            if parameters[name].shape != state[name].shape:
                raise WeightsError(
                    f"The parent's '{name}' is {tuple(state[name].shape)}, and this stage needs "
                    f"{tuple(parameters[name].shape)}.",
                    "Leave method.qformer and method.vision out: they are inherited.",
                )
        with torch.no_grad():
            for name in taken:
                parameters[name].copy_(state[name])
        return taken, dropped

    def forward(self, batch: Batch) -> LossTerms:
        assert batch.labels_BT is not None
        noise_B = None
        if self.training:
            noise_B = batch_keys(self.seed, batch.step, 0, len(batch), self.comm, self.qformer.queries.device)
        features_BND = self.image_features(batch)
        batch = replace(batch, labels_BT=batch.labels_BT.masked_fill(~batch.valid_B.unsqueeze(1), IGNORED))
        if self.micro_batch is None:
            found = self.language.batch_loss(self.soft_prompt(features_BND, noise_B), batch)
        else:
            found = self._by_parts(self.micro_batch, features_BND, batch, noise_B)
        tokens = found.tokens
        if self.config.lm_mean == "global":
            tokens = self.comm.sum(tokens) / self.comm.world_size
        # A rank of padding alone has no tokens of its own, and a sum of zero.
        loss = found.total / tokens.clamp(min=1e-6)
        return LossTerms(loss, {"lm": loss.detach()}, {})

    def _by_parts(self, rows: int, features_BND: Tensor, batch: Batch, noise_B: Tensor | None) -> LossSum:
        """The sum with the activations of ``rows`` rows at a time; see :func:`isthmus.methods.parts.in_parts`."""
        names = [name for name in TEXT_MEMBERS if getattr(batch, name) is not None]

        def sums(features: Tensor, noise: Tensor | None, *texts: Tensor) -> tuple[Tensor, ...]:
            members: dict[str, Any] = dict(zip(names, texts, strict=True))
            part = replace(batch, **members)
            found = self.language.batch_loss(self.soft_prompt(features, noise), part)
            return found.total.unsqueeze(0), found.tokens.unsqueeze(0)

        totals, tokens = in_parts(sums, rows, features_BND, noise_B, *(getattr(batch, name) for name in names))
        return LossSum(totals.sum(), tokens.sum())

    @property
    def own_prompt(self) -> str:
        """The recipe's text between soft prompt and caption."""
        return self.config.language.prompt

    @torch.no_grad()
    def generate(
        self,
        features_BND: Tensor,
        *,
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """One stripped caption per image. ``prompt``: one for all, or one each; the recipe's own when None."""
        captions: list[str] = self.language.generate(
            self.soft_prompt(features_BND),
            prompt=self.own_prompt if prompt is None else prompt,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
        )
        return captions


def text_branch(layers: int, state: Collection[str]) -> frozenset[str]:
    """Names of the stage-1 tensors that serve only its text side or its heads.

    Args:
        layers: of the Q-Former.
        state: the parent's names. A head whose loss had no weight was never there, so of the two heads those count of
            which something is there.
    """
    pairs = ["vision_proj", "text_proj"]
    pairs += [f"qformer.layers.{i}.text_ffn.{part}" for i in range(layers) for part in ("up", "down", "norm")]
    names = {"temperature", "qformer.words.weight", "qformer.positions.weight"}
    if any(name.startswith("itm_head.") for name in state):
        pairs.append("itm_head")
    if any(name.startswith("qformer.lm_head.") for name in state):
        pairs += ["qformer.lm_head.dense", "qformer.lm_head.norm"]
        names.add("qformer.lm_head.bias")
    return frozenset(names | {f"{pair}.{end}" for pair in pairs for end in ("weight", "bias")})


class CollateStage2:
    """Samples -> Batch with the language model's tokens and labels."""

    def __init__(self, language: FrozenLanguage, seed: int) -> None:
        self.language, self.seed = language, seed

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        texts = tuple(choose_caption(sample, self.seed, epoch) for sample in samples)
        prefixes, suffixes = None, list(texts)
        if self.language.splits:
            pairs = [split_caption(t, s.id, self.seed, s.visit_in(epoch)) for t, s in zip(texts, samples, strict=True)]
            prefixes, suffixes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        cut_B = cut_captions(suffixes, self.language.room(), self.language.caption_ids)
        if prefixes is not None:
            cut_B |= cut_captions(prefixes, self.language.config.max_length, self.language.prefix_ids)
        members = stack(samples, step, epoch) | self.language.token_members(suffixes, prefixes)
        return Batch(**members, texts=texts, cut_B=cut_B)


def references(vocab: int, global_batch: int) -> Mapping[str, Reference]:  # noqa: ARG001 - the signature of Stage
    """ln V, the loss of a language model that knows nothing; a pretrained one starts below it."""
    return {"lm": language_reference(vocab)}


def build(config: Blip2Stage2Config, context: BuildContext) -> Stage:
    """The stage, from pretrained parts and, where the context names one, the parent's trained tensors.

    Raises:
        ConfigError: the configuration is not resolved and there is no parent.
        WeightsError: a part does not fit.
    """
    config = resolve(config, read_recipe(context.parent) if context.parent else None)
    assert config.vision is not None and config.qformer is not None
    spec = describe_vision(config.vision)
    check_thinning(config.qformer, spec)
    vision = build_vision(config.vision) if context.with_vision else None
    language = build_language(config.language, bf16=context.bf16, recompute=context.gradient_checkpointing)
    with seeded(context.seed):
        module = Blip2Stage2(
            config,
            vision,
            spec.width,
            language,
            context.comm,
            seed=context.seed,
            recompute=context.gradient_checkpointing,
        )
    module.micro_batch = context.micro_batch
    bases = tuple(part.base for part in (vision, language) if part is not None)
    if context.parent:
        recorded = [base for base in read_bases(context.parent) if base.role == "vision"]
        check_bases(recorded, bases)
        taken, dropped = module.load_stage1(read_state(context.parent))
        log.info("stage 2 takes %d tensors of %s; new: %s", len(taken), context.parent, ", ".join(sorted(NEW)))
        log.info("and leaves out its text branch: %s", ", ".join(dropped) or "none")
    return Stage(
        module=module,
        collate=CollateStage2(language, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        references=partial(references, language.vocab),
        bases=bases,
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
    )
