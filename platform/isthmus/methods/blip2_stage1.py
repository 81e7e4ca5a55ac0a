"""BLIP-2, stage 1: a Q-Former learns to read a frozen image encoder (Li et al. 2023, section 3.2).

Three losses on four passes over shared weights: contrast (ITC), matching with hard negatives (ITM), image-grounded
captioning (ITG). Shape letters: B batch, N image tokens, D image width, Q queries, T text tokens, M Q-Former width,
E shared width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Reference, Stage
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError
from isthmus.losses.contrastive import Contrast, contrast, contrast_reference
from isthmus.losses.language import IGNORED, language_reference, next_token_count, next_token_sum
from isthmus.losses.matching import Match, Negatives, matching, matching_reference, mine_negatives
from isthmus.methods.batching import CollateCaptions, tokenise
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.parts import (
    PAIRS,
    SeeingModule,
    VisionNorm,
    check_thinning,
    common_length,
    image_ids,
    in_parts,
    seeded,
    texts_of,
    thinned,
)
from isthmus.models.attention import ImageMemory, ImageTokens
from isthmus.models.noise import batch_keys
from isthmus.models.qformer import QFormer, QFormerOutput, load_bert_layers
from isthmus.models.text import load_bert, load_tokenizer
from isthmus.models.vision import build_vision, describe_vision

log = logging.getLogger(__name__)

Losses = tuple[Contrast, Match | None, Tensor | None]
"""ITC, ITM and ITG of a batch; the latter two where this step has them."""


class Blip2Stage1(SeeingModule):
    """Model and objective of stage 1.

    On a step where ``itm_every`` or ``itg_every`` leaves a loss out, the head that only this loss trains runs on one
    row at weight zero. So every trainable parameter has a gradient on every step: optimizers that shard by flat buffers
    see the same set each time, and all ranks agree. The head's optimizer state then decays on those steps, as with any
    zero gradient.

    Args:
        config: options.
        vision: frozen image encoder, or None.
        image_width: D.
        tokenizer: BERT-family tokenizer.
        comm: collectives.
        seed: of the negative draws.
        positions: length of the text position table.
        recompute: gradient checkpointing.
    """

    takes_prompt = False  # captions start from the queries alone

    def __init__(
        self,
        config: Blip2Stage1Config,
        vision: nn.Module | None,
        image_width: int,
        tokenizer: Any,
        comm: Comm,
        seed: int,
        *,
        vocab: int | None = None,
        positions: int = 512,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.comm, self.seed = config, tokenizer, comm, seed
        self.vision = vision
        M, E = config.qformer.width, config.qformer.embed
        self.ln_vision = VisionNorm(image_width)
        self.qformer = QFormer(
            config.qformer,
            image_width,
            vocab if vocab is not None else len(tokenizer),
            head=config.weights.itg > 0,
            positions=positions,
            recompute=recompute,
        )
        self.vision_proj, self.text_proj = nn.Linear(M, E), nn.Linear(M, E)
        self.itm_head = nn.Linear(M, 2) if config.weights.itm > 0 else None
        # Shape [1], not []: DeepSpeed cannot take a parameter without dimensions.
        self.temperature = nn.Parameter(torch.full((1,), config.temperature))
        self.mine = mine_negatives
        self._warned = False

    # ------------------------------------------------------------------------------------------------- training

    def forward(self, batch: Batch) -> LossTerms:
        assert batch.ids_BT is not None and batch.mask_BT is not None
        weights, config = self.config.weights, self.config
        with_itm = self.itm_head is not None and batch.step % config.itm_every == 0
        with_itg = self.qformer.lm_head is not None and batch.step % config.itg_every == 0

        if self.micro_batch is None:
            itc, match, itg = self._whole(batch, with_itm, with_itg)
        else:
            itc, match, itg = self._by_parts(self.micro_batch, batch, with_itm, with_itg)

        total = weights.itc * itc.loss
        parts = {"itc": itc.loss}
        metrics = {
            "temperature": self.temperature.detach()[0],
            "r1_i2t": itc.recall_at_1(itc.i2t_BG),
            "r1_t2i": itc.recall_at_1(itc.t2i_BG),
        }
        idle_1M = self.qformer.queries[0, :1]
        if match is not None:
            total = total + weights.itm * match.loss
            parts["itm"] = match.loss
            metrics |= {f"itm_accuracy_{kind}": value for kind, value in match.accuracy.items()}
        elif self.itm_head is not None:
            total = total + 0.0 * self.itm_head(idle_1M).sum()
        if itg is not None:
            total = total + weights.itg * itg
            parts["itg"] = itg
        elif self.qformer.lm_head is not None:
            total = total + 0.0 * self.qformer.lm_head(idle_1M).sum()
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, metrics)

    def _whole(self, batch: Batch, with_itm: bool, with_itg: bool) -> Losses:
        """All rows at once: each image's keys and values are made once for all passes."""
        memory = self.qformer.remember(self._normalise(self.image_features(batch)), uses=self._uses(with_itm))
        seen = self.qformer(memory, noise_B=self._noise(batch, "image"))
        text_BE = self._text_vectors(batch.ids_BT, batch.mask_BT, self._noise(batch, "text"))
        itc = self._contrast(self._image_vectors(seen), text_BE, batch)
        match = self._match(memory, itc, batch) if with_itm else None
        if not with_itg:
            return itc, match, None
        ids_BT, labels_BT = self._dictation(batch)
        total = self._generate(seen, ids_BT, batch.mask_BT, labels_BT, self._noise(batch, "generation"))
        return itc, match, total / next_token_count(labels_BT, self.comm, self.config.itg_mean)

    def _by_parts(self, rows: int, batch: Batch, with_itm: bool, with_itg: bool) -> Losses:
        """The same with the activations of ``rows`` rows at a time; see :func:`isthmus.methods.parts.in_parts`."""
        features_BND = self.image_features(batch)
        dictated_BT, labels_BT = self._dictation(batch)

        def alone(
            features: Tensor, ids: Tensor, mask: Tensor, dictated: Tensor, labels: Tensor, *noise: Tensor | None
        ) -> tuple[Tensor, ...]:
            seen = self.qformer(self.qformer.remember(self._normalise(features)), noise_B=noise[0])
            vectors = self._image_vectors(seen), self._text_vectors(ids, mask, noise[1])
            if not with_itg:
                return vectors
            return *vectors, self._generate(seen, dictated, mask, labels, noise[2]).unsqueeze(0)

        noise = [self._noise(batch, name) for name in ("image", "text", "generation")]
        image_BQE, text_BE, *totals = in_parts(
            alone, rows, features_BND, batch.ids_BT, batch.mask_BT, dictated_BT, labels_BT, *noise
        )
        itc = self._contrast(image_BQE, text_BE, batch)
        itg = totals[0].sum() / next_token_count(labels_BT, self.comm, self.config.itg_mean) if with_itg else None
        return itc, self._match_by_parts(rows, features_BND, itc, batch) if with_itm else None, itg

    def _noise(self, batch: Batch, *passes: str) -> Tensor | None:
        """Dropout's keys of the rows of passes, which are one below the other, int64 [passes x B]."""
        if not self.training:
            return None
        device = self.temperature.device
        numbers = [PASSES.index(name) for name in passes]
        return torch.cat([batch_keys(self.seed, batch.step, n, len(batch), self.comm, device) for n in numbers])

    def _normalise(self, features_BND: Tensor) -> ImageTokens:
        normal = self.ln_vision(features_BND, self.qformer.queries.dtype)
        return thinned(normal, self.config.qformer.compression)

    def _uses(self, with_itm: bool) -> float:
        """Passes per projected image: with ITM four (once alone, twice with its own image's pairs, once as another's
        negative), over one projection, or two where the negatives come from other ranks as tokens."""
        return 1.0 if not with_itm else 4.0 if self.comm.world_size == 1 else 2.0

    def _image_vectors(self, seen: QFormerOutput) -> Tensor:
        """Unit vectors [B, Q, E]."""
        return F.normalize(self.vision_proj(seen.queries_BQM).float(), dim=-1)

    def _text_vectors(self, ids_BT: Tensor | None, mask_BT: Tensor | None, noise_B: Tensor | None = None) -> Tensor:
        """Unit vectors [B, E]."""
        assert ids_BT is not None and mask_BT is not None
        return F.normalize(self.text_proj(self.qformer.pooled_text(ids_BT, mask_BT, noise_B)).float(), dim=-1)

    def _contrast(self, image_BQE: Tensor, text_BE: Tensor, batch: Batch) -> Contrast:
        return contrast(
            image_BQE,
            text_BE,
            self.temperature.float(),
            batch.valid_B,
            self.comm,
            smoothing=self.config.label_smoothing,
            full_gradient=self.config.itc_gather == "full",
            image_ids_B=image_ids(batch) if self.config.itc_same_image else None,
        )

    def _match(self, memory: ImageMemory, itc: Contrast, batch: Batch) -> Match:
        negatives, ids_3BT, mask_3BT = self._pairs(itc, batch)
        if self.comm.world_size == 1:
            other = memory.rows(negatives.image_B)
        else:
            tokens_BND = self.comm.fetch_rows(memory.image.tokens_BND, negatives.image_B)
            other = self.qformer.remember(replace(memory.image, tokens_BND=tokens_BND), self._uses(True))
        logits_3B2 = self._match_logits(
            ImageMemory.cat([memory, other, memory]), ids_3BT.flatten(0, 1), mask_3BT.flatten(0, 1),
            self._noise(batch, *PAIRS),
        )  # fmt: skip
        return matching(logits_3B2.view(3, -1, 2), negatives.counted_B, self.comm)

    def _match_by_parts(self, rows: int, features_BND: Tensor, itc: Contrast, batch: Batch) -> Match:
        negatives, ids_3BT, mask_3BT = self._pairs(itc, batch)
        other_BND = self.comm.fetch_rows(features_BND, negatives.image_B)

        def pairs(own: Tensor, other: Tensor, ids: Tensor, mask: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
            own_memory, other_memory = (self.qformer.remember(self._normalise(x)) for x in (own, other))
            memory = ImageMemory.cat([own_memory, other_memory, own_memory])
            ids, mask = (x.transpose(0, 1).flatten(0, 1) for x in (ids, mask))
            noise = noise.t().flatten() if noise is not None else None
            return (self._match_logits(memory, ids, mask, noise).view(3, -1, 2).transpose(0, 1),)

        noise = self._noise(batch, *PAIRS)
        noise_B3 = noise.view(3, -1).t() if noise is not None else None
        (logits_B32,) = in_parts(
            pairs, rows, features_BND, other_BND, ids_3BT.transpose(0, 1), mask_3BT.transpose(0, 1), noise_B3
        )
        return matching(logits_B32.transpose(0, 1), negatives.counted_B, self.comm)

    def _pairs(self, itc: Contrast, batch: Batch) -> tuple[Negatives, Tensor, Tensor]:
        """Each row's negatives, and the ids and mask [3, B, T] of own text, own text, and negative text."""
        batch = common_length(batch, self.comm)
        assert batch.ids_BT is not None and batch.mask_BT is not None
        negatives: Negatives = self.mine(*itc.to_mine(), batch.valid_B, self.comm, seed=self.seed, step=batch.step)
        self._warn_without(negatives.counted_B, batch)
        other_ids_BT, other_mask_BT = texts_of(batch, negatives.text_B, self.comm)
        ids_3BT = torch.stack([batch.ids_BT, batch.ids_BT, other_ids_BT])
        return negatives, ids_3BT, torch.stack([batch.mask_BT, batch.mask_BT, other_mask_BT])

    def _warn_without(self, counted_B: Tensor, batch: Batch) -> None:
        """Says once that ITM is left out where no row has anything to be told apart from."""
        if self._warned or bool(counted_B.any()) or not bool(batch.valid_B.any()):
            return
        self._warned = True
        log.warning(
            "step %d: ITM is left out of this batch and counts as 0. All its rows (sample ids %s) belong to one image, "
            "so there is no negative to draw. Use a larger train.global_batch, or data with more images.",
            batch.step,
            sorted(set(batch.sample_ids_B[batch.valid_B].tolist()))[:5],
        )

    def _match_logits(
        self, memory: ImageMemory, ids_BT: Tensor, mask_BT: Tensor, noise_B: Tensor | None = None
    ) -> Tensor:
        """ITM head on every query, averaged: [B, 2]."""
        assert self.itm_head is not None
        seen = self.qformer(memory, ids_BT, mask_BT, leading=self.config.qformer.queries, noise_B=noise_B)
        return self.itm_head(seen.queries_BQM).float().mean(1)

    def _dictation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ITG reads and what it is to predict, [B, T] each."""
        assert batch.ids_BT is not None and batch.mask_BT is not None
        ids_BT = batch.ids_BT.clone()
        ids_BT[:, 0] = self.qformer.dec_id
        return ids_BT, ids_BT.masked_fill((batch.mask_BT == 0) | ~batch.valid_B.unsqueeze(1), IGNORED)

    def _generate(
        self, seen: QFormerOutput, ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor, noise_B: Tensor | None
    ) -> Tensor:
        """ITG on the queries' keys and values of the image pass, summed over tokens."""
        hidden_BTM = self.qformer(None, ids_BT, mask_BT, past=seen.past, noise_B=noise_B).text_BTM
        return next_token_sum(hidden_BTM, labels_BT, self.qformer.logits, smoothing=self.config.label_smoothing)

    # -------------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, Q, E]; the similarity to a text is the largest over Q."""
        return self._image_vectors(self.qformer(self.qformer.remember(self._normalise(features_BND))))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Unit vectors, float32 [B, E]. ``max_length``: tokens kept of a text; the recipe's own by default."""
        ids_BT, mask_BT = self._tokenise([clean_caption(text) for text in texts], max_length)
        return self._text_vectors(ids_BT, mask_BT)

    @torch.no_grad()
    def match(self, features_BND: Tensor, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Logit of 'these belong together', float32 [B].

        Raises:
            ConfigError: the model was trained without ITM.
        """
        return self._judge(features_BND, texts, max_length)[:, 1]

    @torch.no_grad()
    def match_margin(self, features_BND: Tensor, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Log-odds of 'these belong together', float32 [B]. Raises as :meth:`match`."""
        logits_B2 = self._judge(features_BND, texts, max_length)
        return logits_B2[:, 1] - logits_B2[:, 0]

    def _judge(self, features_BND: Tensor, texts: Sequence[str], max_length: int | None) -> Tensor:
        if self.itm_head is None:
            raise ConfigError("This model has no matching head: it was trained with weights.itm 0.", "Use rerank: 0.")
        ids_BT, mask_BT = self._tokenise([clean_caption(text) for text in texts], max_length)
        memory = self.qformer.remember(self._normalise(features_BND))
        return self._match_logits(memory, ids_BT, mask_BT)

    @torch.no_grad()
    def generate(
        self,
        features_BND: Tensor,
        *,
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,  # noqa: ARG002 - without effect on one beam
    ) -> list[str]:
        """Captions by the Q-Former's own decoder, greedily. A weak captioner: it shows what ITG has learnt.

        Raises:
            ConfigError: the model was trained without ITG, or a prompt or beams are asked for.
        """
        if self.qformer.lm_head is None:
            raise ConfigError("This model cannot caption: it was trained with weights.itg 0.", "Caption with stage 2.")
        if num_beams != 1 or any(prompt or ()):
            raise ConfigError("Stage 1's own decoder is greedy and takes no prompt.", "Set num_beams: 1 and no prompt.")
        memory = self.qformer.remember(self._normalise(features_BND))
        rows = self.qformer.greedy(memory, self.tokenizer.sep_token_id, max_new_tokens, min_new_tokens)
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]

    def _tokenise(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = tokenise(self.tokenizer, texts, max_length or self.config.text.max_length)
        return ids_BT.to(self.temperature.device), mask_BT.to(self.temperature.device)


PASSES = ("image", "text", *PAIRS, "generation")
"""Passes of the Q-Former in a step; dropout draws differ between them."""


def references(config: Blip2Stage1Config, vocab: int, global_batch: int) -> Mapping[str, Reference]:
    """Chance and floor of each loss that this configuration computes."""
    out = {"itc": contrast_reference(global_batch, config.label_smoothing)}
    if config.weights.itm > 0:
        out["itm"] = matching_reference()
    if config.weights.itg > 0:
        out["itg"] = language_reference(vocab, config.label_smoothing)
    return out


def build(config: Blip2Stage1Config, context: BuildContext) -> Stage:
    """The stage, from pretrained parts.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    spec = describe_vision(config.vision)
    check_thinning(config.qformer, spec)
    vision = build_vision(config.vision) if context.with_vision else None
    tokenizer = load_tokenizer(config.text.weights)
    bert: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    if config.qformer.init == "text":
        bert, state = load_bert(config.text.weights)
    elif config.qformer.init is not None:
        raise ConfigError(f"qformer.init '{config.qformer.init}' is not known.", "Use 'text' or null.")
    with seeded(context.seed):
        module = Blip2Stage1(
            config,
            vision,
            spec.width,
            tokenizer,
            context.comm,
            context.seed,
            positions=config.qformer.positions or int(bert.get("max_position_embeddings", 512)),
            recompute=context.gradient_checkpointing,
        )
    if bert:
        load_bert_layers(module.qformer, bert, state)
    module.micro_batch = context.micro_batch
    return Stage(
        module=module,
        collate=CollateCaptions(tokenizer, config.text.max_length, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        references=partial(references, config, len(tokenizer) + 1),
        bases=(vision.base,) if vision is not None else (),
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
        needs_image_ids=config.itc_same_image,
    )
