"""Pre-training with cross-modal guidance: text-guided visual compression, local alignment, relational reasoning.

After "Multimodal Pretraining with Cross-Modal Guidance and Alignment" (Cai et al. 2024), of which the abstract alone is
public: that image and text together guide the compression of the visual sequence layer by layer, and that relational
reasoning aligns image tokens with words. Everything else is our completion, from published relatives: ALBEF's streams
and matching (Li et al. 2021), EViT's compression (Liang et al. 2022) with TRIPS's score by text (Jiang et al. 2022),
FILIP's token contrast (Yao et al. 2022), SGRAF's graph (Diao et al. 2021).

One rule keeps the contrast honest: whatever stands for an image alone is compressed without any text. Guided are only
the pairs that are judged together.

Shape letters: B rows, G global rows, K image tokens, T text tokens, S image tokens with prefix, M text width, E shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Reference, Stage
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError
from isthmus.losses.contrastive import Contrast, contrast, contrast_reference
from isthmus.losses.counting import GlobalMean
from isthmus.losses.held import held
from isthmus.losses.language import language_reference
from isthmus.losses.local import local_contrast, pair_similarity, relation, relation_reference
from isthmus.losses.masked import mask_tokens, masked_count, masked_sum
from isthmus.losses.matching import Negatives, matching, matching_reference, mine_negatives
from isthmus.methods.batching import CollateCaptions, tokenise
from isthmus.methods.guided_config import GuidedConfig
from isthmus.methods.guided_parts import draw_guided, pass_keys
from isthmus.methods.parts import PAIRS, SeeingModule, common_length, image_ids, in_parts, seeded, texts_of
from isthmus.models.compressible import Seen
from isthmus.models.compression import Step, overlap
from isthmus.models.dual_stream import DualStream, build_streams
from isthmus.models.relations import RelationalHead
from isthmus.models.text import load_tokenizer
from isthmus.models.vision import build_vision, describe_vision


class Alone(NamedTuple):
    """What comes of rows by themselves. ``trunk_BSC`` and ``states_BTM`` are what pairs are made of."""

    image_BE: Tensor
    text_BE: Tensor
    image_BKE: Tensor
    text_BTE: Tensor
    numbers_BK: Tensor
    mlm_1: Tensor
    trunk_BSC: Tensor
    states_BTM: Tensor


class Pairs(NamedTuple):
    """Of each row its own pair, another image with its text, its image with another text."""

    itm_B32: Tensor
    rel_B3: Tensor
    overlap_B: Tensor


class Guided(SeeingModule):
    """Model and objective.

    Every trainable parameter has a gradient on every step: what a step leaves out runs on one row at weight zero, as in
    BLIP-2's stage 1.

    Args:
        config: options.
        vision: frozen image encoder, or None.
        streams: what is trained.
        tokenizer: BERT-family tokenizer.
        comm: collectives.
        seed: of masks, negatives, guidance and dropout.
    """

    def __init__(
        self, config: GuidedConfig, vision: nn.Module | None, streams: DualStream, tokenizer: Any, comm: Comm, seed: int
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.comm, self.seed = config, tokenizer, comm, seed
        self.vision, self.streams = vision, streams
        weights, M, E, C = config.weights, config.fusion.width, config.fusion.embed, streams.image.width
        self.image_proj, self.text_proj = nn.Linear(C, E), nn.Linear(M, E)
        tokens = weights.loc > 0 or weights.rel > 0
        self.image_local = nn.Linear(C, E) if tokens else None
        self.text_local = nn.Linear(M, E) if tokens else None
        self.itm_head = nn.Linear(M, 2) if weights.itm > 0 else None
        shape = config.relation
        self.relation = RelationalHead(E, shape.width, shape.steps, shape.smoothing) if weights.rel > 0 else None
        # Shape [1], not []: DeepSpeed cannot take a parameter without dimensions.
        self.temperature = nn.Parameter(torch.full((1,), config.temperature))
        self.local_temperature = nn.Parameter(torch.full((1,), config.local_temperature)) if weights.loc > 0 else None

    # ------------------------------------------------------------------------------------------------- training

    def forward(self, batch: Batch) -> LossTerms:
        batch = common_length(batch, self.comm)
        config, weights = self.config, self.config.weights
        steps = self.streams.image.schedule(batch.step)
        judged = self.itm_head is not None or self.relation is not None
        with_pairs = judged and batch.step % config.pairs_every == 0
        with_mlm = self.streams.lm_head is not None and batch.step % config.mlm_every == 0
        features_BND = self.image_features(batch)
        found, count = self._rows(features_BND, batch, steps, with_mlm)
        itc = self._contrast(found, batch)
        total, parts = weights.itc * itc.loss, {"itc": itc.loss}
        metrics = self._facts(itc, steps)
        if self.local_temperature is not None:
            loc = self._local(found, batch)
            total, parts["loc"] = total + weights.loc * loc.loss, loc.loss
            metrics |= {"local_r1_i2t": loc.recall_at_1(loc.i2t_BG), "local_r1_t2i": loc.recall_at_1(loc.t2i_BG)}
        if with_pairs:
            negatives = self._negatives(itc, batch)
            guided_B3 = draw_guided(config.compression, batch.valid_B, self.seed, batch.step, self.comm)
            pairs = self._pair_rows(features_BND, found, negatives, guided_B3, batch, steps)
            total = total + self._judge(pairs, negatives, parts, metrics)
            seen = GlobalMean(guided_B3[:, 0] & negatives.counted_B, self.comm)
            metrics["guided_overlap"] = seen(pairs.overlap_B)
        if with_mlm:
            parts["mlm"] = found.mlm_1.sum() / count
            total = total + weights.mlm * parts["mlm"]
        total = total + self._idle(found, with_pairs, with_mlm)
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, metrics)

    def _rows(self, features_BND: Tensor, batch: Batch, steps: Sequence[Step], with_mlm: bool) -> tuple[Alone, Tensor]:
        """Each row alone, and the number of masked words of all ranks."""
        assert batch.ids_BT is not None and batch.mask_BT is not None
        words_BT = self.streams.words(batch.ids_BT, batch.mask_BT) & batch.valid_B.unsqueeze(1)
        asked = mask_tokens(
            batch.ids_BT, words_BT, int(self.tokenizer.mask_token_id), len(self.tokenizer), seed=self.seed,
            step=batch.step, first_row=self.comm.rank * len(batch), share=self.config.mlm_share,
        )  # fmt: skip
        given = (features_BND, batch.ids_BT, batch.mask_BT, asked.ids_BT, asked.labels_BT)
        noise = [self._noise(batch, name) for name in ("image", "text", "masked", "masked fusion")]
        alone = partial(self._alone, steps, with_mlm)
        count = masked_count(asked.labels_BT, self.comm) if with_mlm else words_BT.sum()
        if self.micro_batch is None:
            return alone(*given, *noise), count
        # What pairs are made of is made anew with them.
        kept = in_parts(lambda *rows: tuple(alone(*rows)[:6]), self.micro_batch, *given, *noise)
        return Alone._make((*kept, features_BND, features_BND)), count

    def _alone(
        self, steps: Sequence[Step], with_mlm: bool, features: Tensor, ids: Tensor, mask: Tensor, read: Tensor,
        labels: Tensor, *noise: Tensor | None,
    ) -> Alone:  # fmt: skip
        streams = self.streams
        trunk = streams.image.begin(features, noise[0])
        seen = streams.image.finish(trunk, steps)  # without a text: this is what the contrast may see
        states = streams.text(ids, mask, noise[1])
        mlm = trunk.new_zeros(1)
        if with_mlm:
            # The image is the unguided one: a choice of tokens by the whole text would tell what is masked.
            assert streams.fusion is not None and streams.lm_head is not None
            hidden = streams.fusion(streams.text(read, mask, noise[2]), mask, seen.tokens_BSC, noise[3])
            mlm = masked_sum(hidden, labels, streams.lm_head).unsqueeze(0)
        return Alone(
            _unit(self.image_proj(seen.pooled)),
            _unit(self.text_proj(streams.pooled_text(states, mask))),
            _tokens(self.image_local, seen.patches),
            _tokens(self.text_local, states),
            seen.numbers_BN,
            mlm,
            trunk,
            states,
        )

    def _pair_rows(
        self, features_BND: Tensor, found: Alone, negatives: Negatives, guided_B3: Tensor, batch: Batch,
        steps: Sequence[Step],
    ) -> Pairs:  # fmt: skip
        """The judged pairs, from what is there already or, in parts, from the start."""
        assert batch.ids_BT is not None and batch.mask_BT is not None
        comm, fusion = self.comm, [self._noise(batch, name) for name in PAIRS]
        noise_B3 = torch.stack([n for n in fusion if n is not None], 1) if self.training else None
        ids_BT, mask_BT = texts_of(batch, negatives.text_B, comm)
        given = (batch.ids_BT, batch.mask_BT, ids_BT, mask_BT, found.numbers_BK, guided_B3, noise_B3)
        if self.micro_batch is None:
            trunk, states = (
                comm.fetch_rows(x, index)
                for x, index in ((found.trunk_BSC, negatives.image_B), (found.states_BTM, negatives.text_B))
            )
            return self._pairs(steps, found.trunk_BSC, trunk, found.states_BTM, states, *given)
        other_BND = comm.fetch_rows(features_BND, negatives.image_B)
        noise = [
            self._noise(batch, name, rows)
            for name, rows in (
                ("image", None),
                ("image", negatives.image_B),
                ("text", None),
                ("text", negatives.text_B),
            )
        ]

        def anew(own: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            keys, rest = rest[:4], rest[4:]
            image, text = self.streams.image.begin, self.streams.text
            trunks = image(own, keys[0]), image(other, keys[1])
            states = text(rest[0], rest[1], keys[2]), text(rest[2], rest[3], keys[3])
            return tuple(self._pairs(steps, *trunks, *states, *rest))

        return Pairs(*in_parts(anew, self.micro_batch, features_BND, other_BND, *noise, *given))

    def _pairs(
        self, steps: Sequence[Step], trunk: Tensor, other_trunk: Tensor, states: Tensor, other_states: Tensor,
        ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor, numbers: Tensor, guided: Tensor,
        noise: Tensor | None,
    ) -> Pairs:  # fmt: skip
        """Three pairs a row, guided by their texts where ``guided`` [B, 3] says so."""
        streams, rows = self.streams, len(trunk)
        text, masks = torch.cat([states, states, other_states]), torch.cat([mask, mask, other_mask])
        seen = streams.look(torch.cat([trunk, other_trunk, trunk]), steps, text, masks, guided.t().flatten())
        itm, rel = trunk.new_zeros(rows, 3, 2), trunk.new_zeros(rows, 3)
        if self.itm_head is not None:
            fused = streams.fuse(text, masks, seen, noise.t().flatten() if noise is not None else None)
            itm = self.itm_head(fused).float().view(3, rows, 2).transpose(0, 1)
        if self.relation is not None:
            words = streams.words(torch.cat([ids, ids, other_ids]), masks)
            rel = self.relation(_tokens(self.image_local, seen.patches), _tokens(self.text_local, text), words)
            rel = rel.view(3, rows).t()
        return Pairs(itm, rel, overlap(seen.numbers_BN[:rows], numbers))

    def _judge(
        self, pairs: Pairs, negatives: Negatives, parts: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> Tensor:
        """The weighted sum of both losses, which go into ``parts``, and what is logged into ``metrics``."""
        total = pairs.itm_B32.sum() * 0.0 + pairs.rel_B3.sum() * 0.0
        if self.itm_head is not None:
            itm = matching(pairs.itm_B32.transpose(0, 1), negatives.counted_B, self.comm)
            total, parts["itm"] = total + self.config.weights.itm * itm.loss, itm.loss
            metrics |= {f"itm_accuracy_{kind}": value for kind, value in itm.accuracy.items()}
        if self.relation is not None:
            rel = relation(pairs.rel_B3.t(), negatives.counted_B, self.comm)
            total, parts["rel"] = total + self.config.weights.rel * rel.loss, rel.loss
            metrics |= {f"rel_accuracy_{kind}": value for kind, value in rel.accuracy.items()}
        return total

    def _idle(self, found: Alone, with_pairs: bool, with_mlm: bool) -> Tensor:
        """Zero, attached to every parameter that this step's losses do not reach."""
        streams, zero = self.streams, found.image_BE.sum() * 0.0
        text_11M = streams.text.embedding_norm(found.image_BE.new_zeros(1, 1, self.config.fusion.width))
        mask_11 = torch.ones(1, 1, dtype=torch.long, device=text_11M.device)
        zero = zero + 0.0 * (found.image_BKE.sum() + found.text_BTE.sum() + streams.guide(text_11M[:, 0]).sum())
        if streams.fusion is not None and not with_mlm and not (with_pairs and self.itm_head is not None):
            image_11C = text_11M.new_zeros(1, 1, streams.image_width)
            zero = zero + 0.0 * streams.fusion(text_11M, mask_11, image_11C).sum()
        if not with_pairs and self.itm_head is not None:
            zero = zero + 0.0 * self.itm_head(text_11M[0]).sum()
        if not with_pairs and self.relation is not None:
            one_11E = found.text_BE[:1].unsqueeze(1)
            zero = zero + 0.0 * self.relation(one_11E, one_11E, mask_11.bool()).sum()
        if not with_mlm and streams.lm_head is not None:
            zero = zero + 0.0 * streams.lm_head(text_11M[0]).sum()
        return zero

    def _noise(self, batch: Batch, name: str, rows_B: Tensor | None = None) -> Tensor | None:
        """Dropout's keys of a pass, int64 [B]; of this rank's rows, or of the global ``rows_B``."""
        if not self.training:
            return None
        return pass_keys(name, batch, self.seed, self.comm, self.temperature.device, rows_B)

    def _contrast(self, found: Alone, batch: Batch) -> Contrast:
        return contrast(
            found.image_BE.unsqueeze(1), found.text_BE, self._held(self.temperature), batch.valid_B, self.comm,
            full_gradient=self.config.itc_gather == "full", image_ids_B=self._image_ids(batch),
        )  # fmt: skip

    def _local(self, found: Alone, batch: Batch) -> Contrast:
        assert batch.ids_BT is not None and batch.mask_BT is not None and self.local_temperature is not None
        return local_contrast(
            found.image_BKE, found.text_BTE, self.streams.words(batch.ids_BT, batch.mask_BT),
            self._held(self.local_temperature), batch.valid_B, self.comm,
            full_gradient=self.config.itc_gather == "full", image_ids_B=self._image_ids(batch),
        )  # fmt: skip

    def _image_ids(self, batch: Batch) -> Tensor | None:
        return image_ids(batch) if self.config.itc_same_image else None

    def _negatives(self, itc: Contrast, batch: Batch) -> Negatives:
        return mine_negatives(*itc.to_mine(), batch.valid_B, self.comm, seed=self.seed, step=batch.step)

    def bounds(self) -> dict[str, tuple[float, float]]:
        learned = ["temperature"] + (["local_temperature"] if self.local_temperature is not None else [])
        return dict.fromkeys(learned, self.config.temperature_range)

    def _held(self, temperature: Tensor) -> Tensor:
        return held(temperature, *self.config.temperature_range)

    def _facts(self, itc: Contrast, steps: Sequence[Step]) -> dict[str, Tensor]:
        device = self.temperature.device
        facts = {
            "temperature": self._held(self.temperature).detach()[0],
            "r1_i2t": itc.recall_at_1(itc.i2t_BG),
            "r1_t2i": itc.recall_at_1(itc.t2i_BG),
        }
        if self.local_temperature is not None:
            facts["local_temperature"] = self._held(self.local_temperature).detach()[0]
        return facts | {f"tokens_layer_{s.layer}": torch.tensor(float(s.left), device=device) for s in steps}

    # -------------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, 1, E]; no text has a say in them."""
        return _unit(self.image_proj(self.streams.image(features_BND).pooled)).unsqueeze(1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Unit vectors, float32 [B, E]. ``max_length``: tokens kept of a text; the recipe's own by default."""
        ids_BT, mask_BT = self._tokenise(texts, max_length)
        return _unit(self.text_proj(self.streams.pooled_text(self.streams.text(ids_BT, mask_BT), mask_BT)))

    @torch.no_grad()
    def match(self, features_BND: Tensor, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Score of 'these belong together', float32 [B]: the guided matching logit, the relational head's logit and the
        unguided similarity of tokens, weighted as ``score`` says.

        Raises:
            ConfigError: the model was trained without ITM.
        """
        ids_BT, mask_BT = self._tokenise(texts, max_length)
        words_BT, states_BTM = self.streams.words(ids_BT, mask_BT), self.streams.text(ids_BT, mask_BT)
        trunk, steps = self.streams.image.begin(features_BND), self.streams.image.schedule()
        seen = self.streams.look(trunk, steps, states_BTM, mask_BT)
        score_B = self._matched(states_BTM, mask_BT, seen)[:, 1]
        weights, local = self.config.score, _tokens(self.text_local, states_BTM)
        if self.relation is not None and weights.relation > 0:
            found_B = self.relation(_tokens(self.image_local, seen.patches), local, words_BT)
            score_B = score_B + weights.relation * found_B
        if self.local_temperature is not None and weights.local > 0:
            plain = self.streams.image.finish(trunk, steps)
            found_B = pair_similarity(_tokens(self.image_local, plain.patches), local, words_BT)
            score_B = score_B + weights.local * found_B
        return score_B

    @torch.no_grad()
    def match_margin(self, features_BND: Tensor, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Log-odds of 'these belong together' by the matching head, float32 [B]. Raises as :meth:`match`."""
        ids_BT, mask_BT = self._tokenise(texts, max_length)
        states_BTM, image = self.streams.text(ids_BT, mask_BT), self.streams.image
        seen = self.streams.look(image.begin(features_BND), image.schedule(), states_BTM, mask_BT)
        logits_B2 = self._matched(states_BTM, mask_BT, seen)
        return logits_B2[:, 1] - logits_B2[:, 0]

    def _matched(self, states_BTM: Tensor, mask_BT: Tensor, seen: Seen) -> Tensor:
        if self.itm_head is None:
            raise ConfigError("This model has no matching head: it was trained with weights.itm 0.", "Use rerank: 0.")
        return self.itm_head(self.streams.fuse(states_BTM, mask_BT, seen)).float()

    def _tokenise(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        cleaned = [clean_caption(text) for text in texts]
        ids_BT, mask_BT = tokenise(self.tokenizer, cleaned, max_length or self.config.text.max_length)
        return ids_BT.to(self.temperature.device), mask_BT.to(self.temperature.device)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def _tokens(linear: nn.Linear | None, x_BSC: Tensor) -> Tensor:
    """Unit vectors of tokens; none where no loss asks for them."""
    return _unit(linear(x_BSC)) if linear is not None else x_BSC[..., :0]


def references(config: GuidedConfig, vocab: int, global_batch: int) -> Mapping[str, Reference]:
    """Chance and floor of each loss that this configuration computes."""
    weights, contrasted = config.weights, contrast_reference(global_batch, 0.0)
    known = {
        "itc": contrasted, "loc": contrasted, "rel": relation_reference(), "itm": matching_reference(),
        "mlm": language_reference(vocab),
    }  # fmt: skip
    return {name: reference for name, reference in known.items() if getattr(weights, name) > 0}


def build(config: GuidedConfig, context: BuildContext) -> Stage:
    """The stage, from pretrained parts.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    spec = describe_vision(config.vision)
    vision = build_vision(config.vision) if context.with_vision else None
    tokenizer = load_tokenizer(config.text.weights)
    with seeded(context.seed):
        streams = build_streams(
            config.vision, config.image, config.compression, config.text, config.fusion, spec, tokenizer,
            head=config.weights.mlm > 0, fused=config.weights.mlm > 0 or config.weights.itm > 0,
        )  # fmt: skip
        module = Guided(config, vision, streams, tokenizer, context.comm, context.seed)
    module.micro_batch = context.micro_batch
    return Stage(
        module=module,
        collate=CollateCaptions(tokenizer, config.text.max_length, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        references=partial(references, config, len(tokenizer)),
        bases=(vision.base,) if vision is not None else (),
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
        needs_image_ids=config.itc_same_image,
    )
