"""Contrast and cross-attention, optimised together (CCACO), between two frozen encoders' token sequences.

Both sides are projected into one space. The contrast pools each side's tokens *before* they meet the other side's: had
pooled vectors been fused with their own partner, they would give the pair away. Cross-attention in both directions then
relates the tokens of a pair. What the method's text leaves open is said in the docstrings as our completion.

Shape of the code, for another pair of modalities: a :class:`isthmus.methods.sides.Side` reads a batch as frozen tokens
[B, N, D] with a mask [B, N], and knows its role, width and encoder. :class:`CoOptimise` takes any two, and knows
nothing of images and texts: its :meth:`~CoOptimise.vectors` and :meth:`~CoOptimise.scores` rank what they are given.
A :class:`Pairing` adds what the runtimes ask for (collate function, transforms, sizes) and the module's class, which
implements the contracts by which its kind of pair is evaluated; ``PAIRINGS`` names it. :class:`ImageText` is one.

Shape letters: B batch, G global batch, N tokens of the first side, T of the second, D frozen width, E shared width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Reference, Stage
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError
from isthmus.losses.contrastive import Contrast, contrast, contrast_reference
from isthmus.losses.counting import GlobalMean
from isthmus.losses.cross import agreement_rows, aligned_rows, attended_share_rows, literal_rows
from isthmus.losses.matching import Match, Negatives, matching, matching_reference, mine_negatives
from isthmus.losses.weighting import DynamicAverage, Uncertainty
from isthmus.methods.co_optimise_config import CoOptimiseConfig
from isthmus.methods.heard import CollateClips, FrameSide, SoundSide, clip_transform_of, frozen_tokens
from isthmus.methods.parts import SeeingModule, in_parts, seeded
from isthmus.methods.projector import CollateTexts
from isthmus.methods.sides import ImageSide, Side, TextSide, Tokens
from isthmus.models.crossmodal import CrossModal, Pattern
from isthmus.models.noise import batch_keys, number_sites
from isthmus.models.pairing import MatchHead, PairProjection, pooled
from isthmus.models.text import build_sentence_encoder
from isthmus.models.vision import build_vision, describe_vision

log = logging.getLogger(__name__)

AUDIO_SEED = 0x5050
"""Sets the start of what is trained in the sides apart from that of the rest."""

LARGEST_SCALE = 100.0
"""Of similarities: 1 / temperature never exceeds it (CLIP)."""
WATCHED_EVERY, COLLAPSED, ALIVE = 20, 0.02, 0.05
"""Steps between looks at the cross-attention; the share of the tokens' norm below which it is dead, if it has been
above the other."""


@dataclass(frozen=True)
class Projected:
    """A batch in the shared space: pooled vectors for the contrast, tokens for the cross-attention."""

    first_BE: Tensor
    second_BE: Tensor
    first: Tokens
    second: Tokens


class CoOptimise(SeeingModule):
    """Model and objective of any two sides.

    Args:
        config: options.
        first, second: the sides. Their encoders become attributes named by their roles.
        comm: collectives.
        seed: of dropout, negative draws and random features.
    """

    def __init__(self, config: CoOptimiseConfig, first: Side, second: Side, comm: Comm, seed: int) -> None:
        super().__init__()
        self.config, self.comm, self.seed = config, comm, seed
        self.sides = (first, second)
        self.vision = None
        for side in self.sides:
            setattr(self, side.role, side.encoder)
        E, widths = config.embed, (first.width, second.width)
        project = partial(PairProjection, widths, E, config.dropout, kind=config.projection, normalise=config.normalise)
        self.projection = project()
        apart = not config.shared and config.alpha > 0 and config.attends
        self.cross_projection = project() if apart else None
        if config.attends:
            kind = config.attention
            pattern = Pattern(kind.kind, kind.top_k, kind.band, kind.features, seed)
            attention = partial(
                CrossModal, E, kind.heads, pattern, projections=kind.projections, zero_init=config.starts_at_zero
            )
            self.first_asks, self.second_asks = attention(), attention()
        self.itm_head = MatchHead(E) if config.itm.weight > 0 else None
        if config.alpha > 0:
            # Shape [1], not []: DeepSpeed cannot take a parameter without dimensions.
            self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)))
        self.terms = [name for name, weight in self._given_weights().items() if weight > 0]
        self.uncertainty = Uncertainty(len(self.terms)) if config.weighting.kind == "uncertainty" else None
        self.average: DynamicAverage | None = None
        if config.weighting.kind == "dwa":
            self.average = DynamicAverage(len(self.terms), config.weighting.temperature, config.weighting.period)
        self._highest = [0.0, 0.0]
        self._warned = False
        number_sites(*self.children())

    @property
    def contrasts(self) -> bool:
        """Whether pooled vectors have been trained to tell pairs apart."""
        return self.config.alpha > 0

    @property
    def matches(self) -> bool:
        """Whether there is anything that sets a pair's tokens against one another."""
        return self.config.attends or self.itm_head is not None

    def _given_weights(self) -> dict[str, float]:
        return {"contrast": self.config.alpha, "cross": self.config.beta, "itm": self.config.itm.weight}

    # ------------------------------------------------------------------------------------------------- training

    def forward(self, batch: Batch) -> LossTerms:
        found = self._project(self._read(batch), batch)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        contrasted = self._contrast(found, batch) if self.contrasts else None
        if contrasted is not None:
            losses["contrast"] = contrasted.loss
            metrics["temperature"] = 1 / self._held_scale().detach()[0]
            metrics["r1_i2t"] = contrasted.recall_at_1(contrasted.i2t_BG)
            metrics["r1_t2i"] = contrasted.recall_at_1(contrasted.t2i_BG)
        if self.matches:
            self._relate(found, contrasted, batch, losses, metrics)
        total, weights = self._weigh(losses, batch)
        metrics |= {f"weight_{name}": weight for name, weight in zip(self.terms, weights, strict=True)}
        return LossTerms(total, {name: loss.detach() for name, loss in losses.items()}, metrics)

    def _read(self, batch: Batch) -> tuple[Tokens, Tokens]:
        """Frozen tokens of both sides; as many on every rank where tokens of other ranks are needed."""
        first, second = (side.read(batch, self.micro_batch) for side in self.sides)
        if self.config.cross.margin or self.itm_head is not None:
            first, second = (x.padded(self.comm.max(x.values_BND.shape[1])) for x in (first, second))
        return first, second

    def _project(self, tokens: tuple[Tokens, Tokens], batch: Batch | None = None) -> Projected:
        first, second = tokens
        dtype = next(self.projection.parameters()).dtype
        parts = self.micro_batch if self.training and batch is not None else None
        noise_B = None
        if self.training and batch is not None and self.config.dropout > 0:
            noise_B = batch_keys(self.seed, batch.step, 0, len(batch), self.comm, first.mask_BN.device)

        def project(x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
            x, y = x.to(dtype), y.to(dtype)
            x_E, y_E = self.projection(x, y, noise)
            vectors = pooled(x_E, x_mask), pooled(y_E, y_mask)
            if self.cross_projection is not None:
                x_E, y_E = self.cross_projection(x, y, noise)
            return *vectors, x_E, y_E

        given = first.values_BND, first.mask_BN, second.values_BND, second.mask_BN, noise_B
        made = project(*given) if parts is None else in_parts(project, parts, *given)
        return Projected(made[0], made[1], Tokens(made[2], first.mask_BN), Tokens(made[3], second.mask_BN))

    def _held_scale(self) -> Tensor:
        # The value is held without cutting its gradient: at the bound, a step back inside stays possible.
        scale = self.logit_scale.float().exp()
        return scale + (scale.clamp(max=LARGEST_SCALE) - scale).detach()

    def _contrast(self, found: Projected, batch: Batch) -> Contrast:
        return contrast(
            unit(found.first_BE).unsqueeze(1),
            unit(found.second_BE),
            1 / self._held_scale(),
            batch.valid_B,
            self.comm,
            smoothing=self.config.label_smoothing,
            full_gradient=self.config.itc_gather == "full",
            symmetric=self.config.symmetric,
        )

    def _relate(
        self,
        found: Projected,
        contrasted: Contrast | None,
        batch: Batch,
        losses: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> None:
        """Adds the losses and metrics of what sets the two sides' tokens of a pair against one another."""
        config, mean = self.config, GlobalMean(batch.valid_B, self.comm)
        own = self._in_parts(self._judge, found.first.values_BND, found.first.mask_BN, *_flat(found.second))
        own_rows = dict(zip(self._judged, own, strict=True))
        against: dict[str, Tensor] = {}
        negatives: Negatives | None = None
        if config.cross.margin or self.itm_head is not None:
            negatives = self._negatives(contrasted, batch)
            other = [self._fetched(found.first, negatives.image_B), self._fetched(found.second, negatives.text_B)]
            pairs = [
                self._in_parts(self._judge, *_flat(other[0]), *_flat(found.second)),
                self._in_parts(self._judge, *_flat(found.first), *_flat(other[1])),
            ]
            against = {name: torch.stack(both) for name, *both in zip(self._judged, *pairs, strict=True)}
        if config.beta > 0:
            rows_B = own_rows["loss"]
            if negatives is not None and config.cross.margin:
                short_2B = (config.cross.margin - own_rows["agreement"] + against["agreement"]).clamp(min=0)
                rows_B = rows_B + short_2B.mean(0) * negatives.counted_B
            losses["cross"] = mean(rows_B)
        if config.attends:
            metrics["agreement"] = mean(own_rows["agreement"].detach())
            for number, name in enumerate(("attended_first", "attended_second")):
                metrics[name] = mean(own_rows[name])
                self._watch(number, metrics[name], batch.step)
        if self.itm_head is not None and negatives is not None:
            logits_3B2 = torch.cat([own_rows["logits"].unsqueeze(0), against["logits"]])
            match: Match = matching(logits_3B2, negatives.counted_B, self.comm)
            losses["itm"] = match.loss
            metrics |= {f"itm_accuracy_{kind}": value for kind, value in match.accuracy.items()}

    @property
    def _judged(self) -> tuple[str, ...]:
        attended = ("loss", "agreement", "attended_first", "attended_second") if self.config.attends else ()
        return (*attended, "logits") if self.itm_head is not None else attended

    def _judge(self, x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor) -> tuple[Tensor, ...]:
        """Of pairs, one row each: what ``_judged`` names."""
        out: list[Tensor] = []
        x_fused, y_fused = x, y
        if self.config.attends:
            x_seen, y_seen = self.first_asks(x, x_mask, y, y_mask), self.second_asks(y, y_mask, x, x_mask)
            out = [self._cross_rows(x_seen, x, x_mask) + self._cross_rows(y_seen, y, y_mask)]
            out += [agreement_rows(y_seen, y, y_mask)]
            out += [attended_share_rows(x_seen, x, x_mask), attended_share_rows(y_seen, y, y_mask)]
            if self.config.itm.reads == "fused":
                x_fused, y_fused = x + x_seen, y + y_seen
        if self.itm_head is not None:
            out.append(self.itm_head(pooled(x_fused, x_mask), pooled(y_fused, y_mask)))
        return tuple(out)

    def _cross_rows(self, seen: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        reduction = self.config.cross.reduction
        if self.config.cross.loss == "literal":
            return literal_rows(seen, mask, reduction)
        return aligned_rows(seen, tokens, mask, reduction)

    def _in_parts(self, judge: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        if self.micro_batch is None or not self.training:
            return judge(*given)
        return in_parts(judge, self.micro_batch, *given)

    def _negatives(self, contrasted: Contrast | None, batch: Batch) -> Negatives:
        """Wrong partners of each row: hard ones by the contrast, any with equal chance where there is none."""
        if contrasted is not None:
            logits = contrasted.i2t_BG.detach(), contrasted.t2i_BG.detach()
            forbidden_BG = contrasted.positives_BG | ~contrasted.valid_G
        else:
            valid_G = self.comm.gather(batch.valid_B, grad=False)
            own = self.comm.rank * len(batch) + torch.arange(len(batch), device=valid_G.device).unsqueeze(1)
            forbidden_BG = (own == torch.arange(len(valid_G), device=valid_G.device)) | ~valid_G
            logits = (torch.zeros(forbidden_BG.shape, device=valid_G.device),) * 2
        return mine_negatives(*logits, forbidden_BG, batch.valid_B, self.comm, seed=self.seed, step=batch.step)

    def _fetched(self, tokens: Tokens, index_B: Tensor) -> Tokens:
        mask_GN = self.comm.gather(tokens.mask_BN, grad=False)
        return Tokens(self.comm.fetch_rows(tokens.values_BND, index_B), mask_GN[index_B])

    def _weigh(self, losses: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """The total, and the weight of each loss in it."""
        given = self._given_weights()
        scaled = [given[name] * losses[name] for name in self.terms]
        if self.uncertainty is not None:
            total, found = self.uncertainty(scaled)
            return total, [given[name] * weight for name, weight in zip(self.terms, found, strict=True)]
        factors = [1.0] * len(scaled)
        if self.config.schedule == "alternate":
            turn = "contrast" if batch.step % 2 == 0 else "cross"
            factors = [float((name == "contrast") == (turn == "contrast")) for name in self.terms]
        if self.average is not None and self.training:
            factors = self.average.weights(batch.step, batch.epoch)
            self.average.add(scaled, self.comm)
        total = torch.stack([factor * loss for factor, loss in zip(factors, scaled, strict=True)]).sum()
        device = total.device
        return total, [
            torch.tensor(factor * given[name], device=device) for name, factor in zip(self.terms, factors, strict=True)
        ]

    def _watch(self, number: int, share: Tensor, step: int) -> None:
        """Says once that the cross-attention has gone silent after it had said something."""
        if not self.training or step % WATCHED_EVERY or self._warned:
            return
        now = float(self.comm.sum(share)) / self.comm.world_size
        self._highest[number] = max(self._highest[number], now)
        if now < COLLAPSED and self._highest[number] >= ALIVE:
            self._warned = True
            asking = ("first", "second")[number]
            log.warning(
                "step %d: the cross-attention of the %s side has collapsed: what it attends to has %.1f %% of the "
                "tokens' norm, and had %.1f %%. cross.loss 'literal' does that by design; use 'aligned'.",
                step, asking, 100 * now, 100 * self._highest[number],
            )  # fmt: skip

    def running_state(self) -> Mapping[str, Tensor]:
        return self.average.state() if self.average is not None else {}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        if self.average is not None:
            self.average.load(state)

    # -------------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def vectors(self, number: int, tokens: Tokens) -> Tensor:
        """Unit vectors of one side's tokens, float32 [B, E].

        Args:
            number: 0 for the first side, 1 for the second.

        Raises:
            ConfigError: the model was trained without the contrast.
        """
        if not self.contrasts:
            raise ConfigError(
                "This model was trained without the contrast (alpha 0), so it has no vectors to compare.",
                "Evaluate it with rerank: all, which ranks by matching alone.",
            )
        dtype = next(self.projection.parameters()).dtype
        projected = self.projection.one(number, tokens.values_BND.to(dtype))
        return unit(pooled(projected, tokens.mask_BN))

    @torch.no_grad()
    def scores(self, first: Tokens, second: Tokens) -> Tensor:
        """How well pairs of tokens belong together, float32 [B]: the matching head's log-odds; or else gamma x how well
        the second side's tokens agree with what they attend to. Of rows in succession that share their first side, as
        in ranking, it is projected once.

        Raises:
            ConfigError: the model has neither.
        """
        if not self.matches:
            raise ConfigError(
                "This model was trained by contrast alone: it has nothing to match with.", "Use rerank: 0."
            )
        projection = self.projection if self.cross_projection is None else self.cross_projection
        dtype = next(projection.parameters()).dtype
        opens_B, run_B = _runs(first.values_BND)
        x = projection.one(0, first.values_BND[opens_B].to(dtype))[run_B]
        y = projection.one(1, second.values_BND.to(dtype))
        rows = dict(zip(self._judged, self._judge(x, first.mask_BN, y, second.mask_BN), strict=True))
        if self.itm_head is None:
            return self.config.gamma * rows["agreement"]
        logits_B2 = rows["logits"].float()
        return logits_B2[:, 1] - logits_B2[:, 0]


def unit(vectors_BE: Tensor) -> Tensor:
    """float32, of length 1."""
    return F.normalize(vectors_BE.float(), dim=-1)


def _runs(values_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Of runs of equal rows: bool [B], True where one opens, and the number of each row's run, int64 [B]."""
    opens_B = torch.ones(len(values_BND), dtype=torch.bool, device=values_BND.device)
    opens_B[1:] = (values_BND[1:] != values_BND[:-1]).flatten(1).any(1)
    return opens_B, opens_B.cumsum(0) - 1


def _flat(tokens: Tokens) -> tuple[Tensor, Tensor]:
    return tokens.values_BND, tokens.mask_BN


class ImageText(CoOptimise):
    """Images and texts, with the contracts by which those are ranked and matched."""

    sides: tuple[ImageSide, TextSide]

    @property
    def memory(self) -> Any:
        """The texts' remembered features."""
        return self.sides[1].memory

    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, 1, E]."""
        return self.vectors(0, self.sides[0].given(features_BND)).unsqueeze(1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, E]."""
        return self.vectors(1, self.sides[1].given([clean_caption(text) for text in texts]))

    def match(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """What re-ranking adds to the cosine, float32 [B]; see :meth:`CoOptimise.scores`."""
        given = self.sides[1].given([clean_caption(text) for text in texts])
        return self.scores(self.sides[0].given(features_BND), given)

    def match_margin(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """Log-odds of 'these belong together', float32 [B].

        Raises:
            ConfigError: the model was trained without a matching head.
        """
        if self.itm_head is None:
            raise ConfigError(
                "This model has no matching head: it was trained with itm.weight 0.", "Rank with it only."
            )
        return self.match(features_BND, texts)


class Heard(CoOptimise):
    """Clips or images and their sounds, with the contract by which those are ranked."""

    sides: tuple[Any, SoundSide]

    def __init__(self, config: CoOptimiseConfig, first: Side, second: Side, comm: Comm, seed: int) -> None:
        super().__init__(config, first, second, comm, seed)
        self.frames = first.learned if isinstance(first, FrameSide) else None

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Frozen tokens: [B, N, D] of images, [B, T, D] of clips [B, T, 3, H, W].

        Raises:
            ConfigError: the module was built without its image encoder.
        """
        if self.vision is None:
            raise ConfigError("This model was loaded without its image encoder.", "Load it with with_vision=True.")
        return frozen_tokens(self.vision, pixels_BCHW, self.micro_batch)

    @torch.no_grad()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors of images or clips, float32 [B, 1, E]."""
        return self.vectors(0, self.sides[0].given(features_BND)).unsqueeze(1)

    @torch.no_grad()
    def embed_sounds(self, audio_BNF: Tensor, mask_BN: Tensor) -> Tensor:
        """Unit vectors of sounds' patches, float32 [B, E]."""
        return self.vectors(1, self.sides[1].given(audio_BNF, mask_BN))


# ------------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True)
class Pairing:
    """A pair of modalities: its sides, its module, and what the runtimes ask of its data. See :class:`Stage`."""

    first: Side
    second: Side
    module: type[CoOptimise]
    collate: Any
    transform: Any
    augment: Callable[[Any, int], Any]
    image_spec: Mapping[str, int]


def image_text(config: CoOptimiseConfig, context: BuildContext) -> Pairing:
    """Images first, texts second."""
    spec = describe_vision(config.vision)
    text = build_sentence_encoder(config.text)
    return Pairing(
        first=ImageSide(build_vision(config.vision) if context.with_vision else None, spec.width),
        second=TextSide(text, config.remembered_texts, context.comm),
        module=ImageText,
        collate=CollateTexts(text.tokenizer, config.text.max_length, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
    )


def heard(config: CoOptimiseConfig, context: BuildContext) -> Pairing:
    """Clips or images first, sounds second."""
    spec = describe_vision(config.vision)
    vision = build_vision(config.vision) if context.with_vision else None
    clips = config.modality == "video-audio"
    with seeded(context.seed ^ AUDIO_SEED):
        first = FrameSide(vision, spec.width, config) if clips else ImageSide(vision, spec.width)
        second = SoundSide(config)
    transform = clip_transform_of(config, spec.transform)
    return Pairing(
        first=first,
        second=second,
        module=Heard,
        collate=CollateClips(),
        transform=transform,
        augment=spec.transform.augment,
        image_spec={
            "tokens": config.frames.count if clips else spec.tokens,
            "width": spec.width,
            "image_size": spec.image_size,
        },
    )


PAIRINGS: dict[str, Callable[[CoOptimiseConfig, BuildContext], Pairing]] = {
    "image-text": image_text,
    "video-audio": heard,
    "image-audio": heard,
}


def references(config: CoOptimiseConfig, global_batch: int) -> Mapping[str, Reference]:
    """Chance and floor of each loss that has them: the literal loss is a norm, and the sums grow with the sides."""
    out: dict[str, Reference] = {}
    if config.alpha > 0:
        out["contrast"] = contrast_reference(global_batch, config.label_smoothing)
    if config.beta > 0 and config.cross.loss == "aligned" and config.cross.reduction == "mean":
        out["cross"] = Reference(2.0 + config.cross.margin)  # attention that says nothing costs 1 a side
    if config.itm.weight > 0:
        out["itm"] = matching_reference()
    return out


def build(config: CoOptimiseConfig, context: BuildContext) -> Stage:
    """The stage, from pretrained parts.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    pairing = PAIRINGS[config.modality](config, context)
    with seeded(context.seed):
        module = pairing.module(config, pairing.first, pairing.second, context.comm, context.seed)
    module.micro_batch = context.micro_batch
    encoders: list[Any] = [side.encoder for side in (pairing.first, pairing.second)]
    return Stage(
        module=module,
        collate=pairing.collate,
        transform=pairing.transform,
        augment=pairing.augment,
        references=partial(references, config),
        bases=tuple(encoder.base for encoder in encoders if hasattr(encoder, "base")),
        image_spec=pairing.image_spec,
    )
