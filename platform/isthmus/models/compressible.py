"""A vision transformer whose layers can shorten the sequence of image tokens, guided by a text or not.

The layers are timm's own blocks. A layer that drops nothing runs as timm has it, so at a rate of 1 the whole is timm's
transformer bit for bit. Its lower part may be frozen and lie in the image encoder; this module is what is trained.

Shape letters: B images, S tokens with prefix, N image tokens, D given width, C own width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config import CompressionConfig
from isthmus.errors import ConfigError
from isthmus.models.compression import (
    Step,
    attention_score,
    compress,
    mixed_score,
    progress,
    renumber,
    schedule,
)
from isthmus.models.noise import KeyedDropout, subkeys

ensure_torchvision()
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

EPS = 1e-6  # of a vision transformer's norms
INIT_STD = 0.02


@dataclass(frozen=True)
class Seen:
    """What the transformer makes of images.

    Attributes:
        tokens_BSC: last hidden states, normalised; the prefix (class token and the like) first.
        numbers_BN: int64, which of the image's own tokens stand behind the prefix; -1 for fused ones.
        prefix: so many first ones are no image tokens.
        class_token: the first of those is a class token; they may all be registers.
    """

    tokens_BSC: Tensor
    numbers_BN: Tensor
    prefix: int
    class_token: bool

    @property
    def patches(self) -> Tensor:
        """The tokens behind the prefix, [B, N, C]."""
        return self.tokens_BSC[:, self.prefix :]

    @property
    def pooled(self) -> Tensor:
        """The class token, or the image tokens' mean where there is none, [B, C]."""
        return self.tokens_BSC[:, 0] if self.class_token else self.patches.mean(1)


@dataclass(frozen=True)
class Guide:
    """What steers the choice of tokens: text vectors [B, C], and in which rows (bool; None is all)."""

    text_BC: Tensor
    guided_B: Tensor | None = None

    def rows(self) -> Tensor:
        """bool [B]."""
        return torch.ones_like(self.text_BC[:, 0], dtype=torch.bool) if self.guided_B is None else self.guided_B


class TokenEmbedding(nn.Module):
    """Frozen encoder's tokens -> linear, norm, positions, a class token in front: the input of a new transformer."""

    def __init__(self, given: int, width: int, tokens: int, class_token: bool, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(given, eps=EPS)
        self.project = nn.Linear(given, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * INIT_STD) if class_token else None
        self.positions = nn.Parameter(torch.randn(1, tokens + class_token, width) * INIT_STD)
        self.dropout = KeyedDropout(dropout)

    def forward(self, features_BND: Tensor, noise_B: Tensor | None = None) -> Tensor:
        x = self.project(self.norm_in(features_BND.to(self.norm_in.weight.dtype)))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        keys = subkeys(noise_B.unsqueeze(1), torch.arange(x.shape[1], device=x.device)) if noise_B is not None else None
        return self.dropout(x + self.positions.to(x.dtype), keys)


class CompressibleTransformer(nn.Module):
    """Blocks that shorten the sequence where ``config`` says.

    Args:
        config: layers, rates, score.
        embed: makes the first block's input of what :meth:`begin` is given; None where that is it already.
        blocks: timm's.
        norm: behind the last block.
        tokens: image tokens at first, without prefix.
        prefix: tokens in front that are never dropped: a class token, registers.
        class_token: the first of them is a class token.

    Raises:
        ConfigError: a layer that is not there, or blocks whose attention cannot be read.
    """

    def __init__(
        self,
        config: CompressionConfig,
        embed: TokenEmbedding | None,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        tokens: int,
        prefix: int,
        class_token: bool,
    ) -> None:
        super().__init__()
        self.config, self.tokens, self.prefix, self.class_token = config, tokens, prefix, class_token
        self.embed, self.blocks, self.norm = embed, nn.ModuleList(blocks), norm
        check_layers(config, len(self.blocks))
        for block in self.blocks:
            if not isinstance(block, Block) or not isinstance(block.attn, Attention):
                raise ConfigError(
                    f"Blocks of the kind {type(block).__name__} cannot be compressed: timm's plain attention "
                    "is needed.",
                    "Name a plain vision transformer in method.vision.name, such as vit_base_patch16_224.",
                )
        if config.look_ahead and not class_token:
            raise ConfigError("compression.look_ahead mixes the text into a class token, and there is none.")

    @property
    def width(self) -> int:
        """C."""
        block: Any = self.blocks[0]
        return int(block.norm1.normalized_shape[0])

    def schedule(self, step: int | None = None) -> tuple[Step, ...]:
        """What each layer drops at a training step; by default once the warm-up is over."""
        return schedule(self.config, self.tokens, 1.0 if step is None else progress(self.config, step))

    @property
    def first(self) -> int:
        """The first layer that drops anything; what lies below is the same for all texts."""
        return min(self.config.layers, default=len(self.blocks))

    def begin(self, features_BND: Tensor, noise_B: Tensor | None = None) -> Tensor:
        """The trunk [B, S, C]: everything below the first layer that drops tokens."""
        x = self.embed(features_BND, noise_B) if self.embed is not None else features_BND
        for block in self.blocks[: self.first]:
            x = block(x)
        return x

    def finish(self, trunk_BSC: Tensor, steps: Iterable[Step], guide: Guide | None = None) -> Seen:
        """The layers above the trunk. Without a guide the result depends on the image alone."""
        x = trunk_BSC
        numbers_BN = torch.arange(x.shape[1] - self.prefix, device=x.device).expand(len(x), -1)
        by_layer = {step.layer: step for step in steps}
        for number in range(self.first, len(self.blocks)):
            step = by_layer.get(number)
            if step is None or step.kept == step.given:
                x = self.blocks[number](x)
                continue
            x, chosen = self._before(x, number, step, guide) if self._ahead else self._inside(x, number, step, guide)
            numbers_BN = renumber(numbers_BN, chosen)
        return Seen(self.norm(x), numbers_BN, self.prefix, self.class_token)

    def forward(self, features_BND: Tensor, guide: Guide | None = None) -> Seen:
        """Both, at the final rates."""
        return self.finish(self.begin(features_BND), self.schedule(), guide)

    @property
    def _ahead(self) -> bool:
        return self.config.place == "before"

    def _inside(self, x: Tensor, number: int, step: Step, guide: Guide | None) -> tuple[Tensor, Tensor]:
        """EViT: attention, then the choice, then the feed-forward network on what is left."""
        block: Any = self.blocks[number]
        seen, image_BN, text_BN = attend_and_score(block, x, self.prefix, self.class_token, guide)
        x = x + block.drop_path1(block.ls1(seen))
        x, chosen = self._shorten(x, step, image_BN, text_BN, guide)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), chosen

    def _before(self, x: Tensor, number: int, step: Step, guide: Guide | None) -> tuple[Tensor, Tensor]:
        """ELIP: the choice, then the whole block; scored by this layer, or by one that a copy has run ahead to."""
        block: Any = self.blocks[number]
        if self.config.look_ahead:
            image_BN, text_BN = self._look_ahead(x, number, guide), None
        else:
            _, image_BN, text_BN = attend_and_score(block, x, self.prefix, self.class_token, guide)
        x, chosen = self._shorten(x, step, image_BN, text_BN, guide)
        return block(x), chosen

    @torch.no_grad()
    def _look_ahead(self, x: Tensor, number: int, guide: Guide | None) -> Tensor:
        ahead = self.config.look_ahead[self.config.layers.index(number) if len(self.config.look_ahead) > 1 else 0]
        x = x.clone()
        if guide is not None:
            mixed = torch.lerp(x[:, 0], guide.text_BC.to(x.dtype), self.config.class_mix)
            x[:, 0] = torch.where(guide.rows().unsqueeze(1), mixed, x[:, 0])
        last = min(number + ahead, len(self.blocks)) - 1
        for block in self.blocks[number:last]:
            x = block(x)
        return attend_and_score(self.blocks[last], x, self.prefix, self.class_token, None)[1]

    def _shorten(
        self, x: Tensor, step: Step, image_BN: Tensor, text_BN: Tensor | None, guide: Guide | None
    ) -> tuple[Tensor, Tensor]:
        scores_BN = mixed_score(image_BN, text_BN, guide.guided_B if guide else None, self.config.balance)
        left, chosen = compress(
            x[:, self.prefix :], scores_BN, step.kept, fuse=self.config.fuse, detach=self.config.detach
        )
        return torch.cat([x[:, : self.prefix], left], 1), chosen


def attend_and_score(
    block: Any, x_BSC: Tensor, prefix: int, class_token: bool, guide: Guide | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block's attention as timm computes it, and what the image tokens are worth: to the class token (to all image
    tokens where there is none), and to the text, which asks through the block's own norm and query weights.

    Returns:
        the attention's output [B, S, C]; scores [B, N] of the image and, with a guide, of the text.
    """
    attn, y = block.attn, block.norm1(x_BSC)
    B, S, _ = y.shape
    gate = attn.gate(y).sigmoid() if getattr(attn, "gate", None) is not None else None
    query, key, value = _heads(attn, attn.qkv(y))
    query, key = attn.q_norm(query), attn.k_norm(key)
    drop = attn.attn_drop.p if attn.training else 0.0
    seen = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
    seen = attn.norm(seen.transpose(1, 2).reshape(B, S, -1))
    seen = attn.proj_drop(attn.proj(seen if gate is None else seen * gate))
    asking = query[:, :, :1] if class_token else query[:, :, prefix:]
    image_BN = attention_score(asking, key)[:, prefix:]
    text_BN = None
    if guide is not None:
        text_query, _, _ = _heads(attn, attn.qkv(block.norm1(guide.text_BC.to(x_BSC.dtype).unsqueeze(1))))
        text_BN = attention_score(attn.q_norm(text_query), key[:, :, prefix:])
    return seen, image_BN, text_BN


def _heads(attn: Any, qkv_BSx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, S, _ = qkv_BSx.shape
    query, key, value = qkv_BSx.reshape(B, S, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def check_layers(config: CompressionConfig, depth: int) -> None:
    """Raises ConfigError where a layer that should drop tokens is not among ``depth``."""
    if config.layers and max(config.layers) >= depth:
        raise ConfigError(
            f"compression.layers names layer {max(config.layers)}, and the trained transformer has {depth}, from 0.",
            "Name layers that are there; those of a frozen encoder do not count.",
        )


def new_transformer(
    config: CompressionConfig, given: int, tokens: int, *, layers: int, width: int, heads: int, feed_forward: int,
    class_token: bool, dropout: float,
) -> CompressibleTransformer:  # fmt: skip
    """A small transformer on the tokens of any frozen encoder, randomly started."""
    norm: Any = partial(nn.LayerNorm, eps=EPS)
    blocks = [Block(width, heads, feed_forward / width, qkv_bias=True, norm_layer=norm) for _ in range(layers)]
    for block in blocks:
        for part in block.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=INIT_STD)
                nn.init.zeros_(part.bias)
    embed = TokenEmbedding(given, width, tokens, class_token, dropout)
    return CompressibleTransformer(config, embed, blocks, norm(width), tokens, int(class_token), class_token)


def upper_transformer(config: CompressionConfig, model: nn.Module, layer: int, tokens: int) -> CompressibleTransformer:
    """The blocks of a timm transformer behind ``layer`` (counted from the end, as in a recipe), and its last norm
    (none, where the model has one for the mean of its tokens alone).

    Args:
        model: with the weights that are started from; its blocks become this module's.
        tokens: of the image, with prefix.

    Raises:
        ConfigError: not a plain vision transformer, or nothing lies behind ``layer``.
    """
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"'{type(model).__name__}' is no plain vision transformer, so its upper layers cannot be trained and "
            "compressed.",
            "Set method.image.start to 'new': a new transformer on the encoder's tokens.",
        )
    if layer == -1:
        raise ConfigError(
            "method.vision.layer is -1, so no layer is left to be trained.",
            "Count back to the last layer that is to stay frozen: -7 of twelve trains the last six.",
        )
    prefix, blocks = int(model.num_prefix_tokens), list(model.blocks.children())[layer + 1 :]
    class_token = model.cls_token is not None
    return CompressibleTransformer(config, None, blocks, model.norm, tokens - prefix, prefix, class_token)
