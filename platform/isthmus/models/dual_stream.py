"""Two streams and what fuses them: a compressible image transformer, a text encoder, a fusion encoder.

Shape letters: B rows, S image tokens with prefix, C image width, T text tokens, M text width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.config import CompressionConfig, FusionConfig, TextConfig, TowerConfig, VisionConfig
from isthmus.errors import ConfigError
from isthmus.models.compressible import CompressibleTransformer, Guide, Seen, new_transformer, upper_transformer
from isthmus.models.compression import Step
from isthmus.models.fusion import FusionEncoder, TextEncoder, check_bert, initialise, load_bert
from isthmus.models.noise import number_sites
from isthmus.models.qformer import LanguageHead
from isthmus.models.text import load_bert as read_bert
from isthmus.models.vision import VisionSpec, whole_model


class DualStream(nn.Module):
    """The streams without any loss.

    Args:
        image: compressible transformer on the frozen encoder's tokens.
        config: shape of text and fusion encoder.
        vocab, positions: of the text.
        special: ids of [CLS] and [SEP], which are no words.
        fused: with a fusion encoder.
        head: with a language-model head for masked words.
    """

    def __init__(
        self,
        image: CompressibleTransformer,
        config: FusionConfig,
        vocab: int,
        positions: int,
        special: Iterable[int],
        *,
        fused: bool = True,
        head: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.special = config, tuple(special)
        self.image, self.image_width = image, image.width
        self.text = TextEncoder(config, vocab, positions)
        self.fusion = FusionEncoder(config, self.image_width) if fused else None
        self.lm_head = LanguageHead(self.text.words.weight) if head else None
        initialise(*(part for part in (self.text, self.fusion, self.lm_head) if part is not None))
        # A text vector asks through an image layer's own weights; only where widths differ it needs some of its own.
        self.guide: nn.Module = nn.Identity()
        if image.width != config.width:
            self.guide = nn.Sequential(nn.Linear(config.width, image.width), nn.LayerNorm(image.width))
        number_sites(self)

    def words(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """bool [B, T]: tokens that are neither padding nor special."""
        words_BT = mask_BT.bool()
        for token in self.special:
            words_BT = words_BT & (ids_BT != token)
        return words_BT

    def pooled_text(self, states_BTM: Tensor, mask_BT: Tensor) -> Tensor:
        """One vector for each text, [B, M]."""
        if self.config.text_pool == "first":
            return states_BTM[:, 0]
        return states_BTM.sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)  # states of padding are zero

    def look(
        self,
        trunk_BSC: Tensor,
        steps: Iterable[Step],
        states_BTM: Tensor,
        mask_BT: Tensor,
        guided_B: Tensor | None = None,
    ) -> Seen:
        """Images as their texts let them be seen; ``guided_B`` (bool) leaves the text out of the other rows."""
        guide_BC = self.guide(self.pooled_text(states_BTM, mask_BT))
        return self.image.finish(trunk_BSC, steps, Guide(guide_BC, guided_B))

    def fuse(self, states_BTM: Tensor, mask_BT: Tensor, seen: Seen, noise_B: Tensor | None = None) -> Tensor:
        """The fused [CLS], [B, M]."""
        assert self.fusion is not None
        return self.fusion(states_BTM, mask_BT, seen.tokens_BSC, noise_B, leading=1)[:, 0]


def build_streams(
    vision: VisionConfig,
    tower: TowerConfig,
    compression: CompressionConfig,
    text: TextConfig,
    fusion: FusionConfig,
    spec: VisionSpec,
    tokenizer: Any,
    *,
    head: bool,
    fused: bool = True,
) -> DualStream:
    """The streams with their initial weights, drawn where they are new.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    bert: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    if fusion.init == "text":
        bert, state = read_bert(text.weights)
        check_bert(fusion, bert)
    positions = int(bert.get("max_position_embeddings", 512))
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    image = build_tower(vision, tower, compression, spec)
    streams = DualStream(image, fusion, len(tokenizer), positions, special, fused=fused, head=head)
    if bert:
        load_bert(streams.text, streams.fusion, streams.lm_head, fusion, bert, state)
    return streams


def build_tower(
    vision: VisionConfig, tower: TowerConfig, compression: CompressionConfig, spec: VisionSpec
) -> CompressibleTransformer:
    """The image transformer that is trained: new, or the upper layers of the frozen encoder's own model.

    Raises:
        ConfigError, WeightsError: as :func:`isthmus.models.vision.build_vision`; or it has no layers to give.
    """
    if tower.start == "new":
        return new_transformer(
            compression, spec.width, spec.tokens, layers=tower.layers, width=tower.width, heads=tower.heads,
            feed_forward=tower.feed_forward, class_token=tower.class_token, dropout=tower.dropout,
        )  # fmt: skip
    if vision.final_norm or vision.pool != "none":
        raise ConfigError(
            "method.image.start 'vision' goes on where the frozen layers end, and method.vision closes them with a "
            "norm or a mean.",
            "Set method.vision.final_norm: false and pool: none.",
        )
    with torch.no_grad():
        return upper_transformer(compression, whole_model(vision), vision.layer, spec.tokens)
