"""The model of the co-optimised method: two sides' tokens in, vectors of a side and what is told of a pair out.

Shape letters: B batch, N tokens of the first side, T of the second, D frozen width, E shared width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contracts import Batch, Comm
from isthmus.errors import ConfigError
from isthmus.losses.cross import agreement_rows, aligned_rows, attended_share_rows, literal_rows
from isthmus.methods.co_optimise_config import CoOptimiseConfig
from isthmus.methods.parts import SeeingModule, in_parts
from isthmus.methods.sides import Side, Tokens
from isthmus.models.crossmodal import CrossModal, Pattern
from isthmus.models.noise import batch_keys, number_sites
from isthmus.models.pairing import MatchHead, PairProjection, pooled


@dataclass(frozen=True)
class Projected:
    """A batch in the shared space: pooled vectors for the contrast, tokens for the cross-attention."""

    first_BE: Tensor
    second_BE: Tensor
    first: Tokens
    second: Tokens


class PairModel(SeeingModule):
    """Projections, cross-attention and matching head of any two sides, without an objective.

    Args:
        config: options.
        first, second: the sides. Their encoders become attributes named by their roles.
        comm: collectives.
        seed: of dropout and random features.
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
        number_sites(*self.children())

    @property
    def contrasts(self) -> bool:
        """Whether pooled vectors have been trained to tell pairs apart."""
        return self.config.alpha > 0

    @property
    def matches(self) -> bool:
        """Whether there is anything that sets a pair's tokens against one another."""
        return self.config.attends or self.itm_head is not None

    # --------------------------------------------------------------------------------------------------- rows and pairs

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


def flat(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Values and mask, as functions of tensors alone take them."""
    return tokens.values_BND, tokens.mask_BN
