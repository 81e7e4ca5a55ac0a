"""The objective of the co-optimised method: the losses, their negatives, and the weight of each in the total.

Shape letters: B batch, G global batch, N tokens of the first side, T of the second, E shared width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isthmus.contracts import Batch, Comm, LossTerms
from isthmus.losses.contrastive import Contrast, contrast
from isthmus.losses.counting import GlobalMean
from isthmus.losses.held import held
from isthmus.losses.matching import Match, Negatives, matching, mine_negatives
from isthmus.losses.weighting import LIMIT, DynamicAverage, Uncertainty
from isthmus.methods.co_optimise_config import CoOptimiseConfig
from isthmus.methods.co_optimise_model import PairModel, Projected, flat, unit
from isthmus.methods.sides import Side, Tokens

log = logging.getLogger(__name__)

LARGEST_SCALE = 100.0
"""Of similarities: 1 / temperature never exceeds it (CLIP)."""
WATCHED_EVERY, COLLAPSED, ALIVE = 20, 0.02, 0.05
"""Steps between looks at the cross-attention; the share of the tokens' norm below which it is dead, if it has been
above the other."""


class CoOptimise(PairModel):
    """Model and objective of any two sides.

    Args:
        config: options.
        first, second: the sides. Their encoders become attributes named by their roles.
        comm: collectives.
        seed: of dropout, negative draws and random features.
    """

    def __init__(self, config: CoOptimiseConfig, first: Side, second: Side, comm: Comm, seed: int) -> None:
        super().__init__(config, first, second, comm, seed)
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

    def _given_weights(self) -> dict[str, float]:
        return {"contrast": self.config.alpha, "cross": self.config.beta, "itm": self.config.itm.weight}

    def _read(self, batch: Batch) -> tuple[Tokens, Tokens]:
        """Frozen tokens of both sides; as many on every rank where tokens of other ranks are needed."""
        first, second = (side.read(batch, self.micro_batch) for side in self.sides)
        if self.config.cross.margin or self.itm_head is not None:
            first, second = (x.padded(self.comm.max(x.values_BND.shape[1])) for x in (first, second))
        return first, second

    def bounds(self) -> dict[str, tuple[float, float]]:
        found = {}
        if self.config.alpha > 0:
            found["logit_scale"] = (-math.inf, math.log(LARGEST_SCALE))
        if self.uncertainty is not None:
            found["uncertainty.log_variance"] = (-LIMIT, LIMIT)
        return found

    def _held_scale(self) -> Tensor:
        return held(self.logit_scale, -math.inf, math.log(LARGEST_SCALE)).exp()

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
        own = self._in_parts(self._judge, found.first.values_BND, found.first.mask_BN, *flat(found.second))
        own_rows = dict(zip(self._judged, own, strict=True))
        against: dict[str, Tensor] = {}
        negatives: Negatives | None = None
        if config.cross.margin or self.itm_head is not None:
            negatives = self._negatives(contrasted, batch)
            other = [self._fetched(found.first, negatives.image_B), self._fetched(found.second, negatives.text_B)]
            pairs = [
                self._in_parts(self._judge, *flat(other[0]), *flat(found.second)),
                self._in_parts(self._judge, *flat(found.first), *flat(other[1])),
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

    def _negatives(self, contrasted: Contrast | None, batch: Batch) -> Negatives:
        """Wrong partners of each row: hard ones by the contrast, any with equal chance where there is none."""
        if contrasted is not None:
            logits_and_forbidden = contrasted.to_mine()
        else:
            valid_G = self.comm.gather(batch.valid_B, grad=False)
            own = self.comm.rank * len(batch) + torch.arange(len(batch), device=valid_G.device).unsqueeze(1)
            forbidden_BG = (own == torch.arange(len(valid_G), device=valid_G.device)) | ~valid_G
            logits_BG = torch.zeros(forbidden_BG.shape, device=valid_G.device)
            logits_and_forbidden = logits_BG, logits_BG, forbidden_BG
        return mine_negatives(*logits_and_forbidden, batch.valid_B, self.comm, seed=self.seed, step=batch.step)

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
