"""A BERT cut in two (Li et al. 2021, ALBEF): the lower layers read a text, the upper ones fuse it with image tokens.

The fusion encoder's rows are the text's; every one of its layers cross-attends to the image. Rows are held without
padding (see :mod:`isthmus.models.packing`).

Shape letters: B texts, T text tokens, S image tokens, C image width, M width, R rows without padding, K chosen rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isthmus.config.parts import FusionConfig
from isthmus.errors import WeightsError
from isthmus.models.attention import CrossAttention, ImageTokens, KeyValue, SelfAttention
from isthmus.models.noise import KeyedDropout, subkeys
from isthmus.models.packing import Packing
from isthmus.models.qformer import EPS, INIT_STD, FeedForward, LanguageHead, bert_names


class FusionLayer(nn.Module):
    """Self-attention, cross-attention to an image where it has one, feed-forward network; post-norm throughout."""

    def __init__(self, config: FusionConfig, image_width: int | None) -> None:
        super().__init__()
        M, p = config.width, config.dropout
        self.attention = SelfAttention(M, config.heads, p, EPS)
        self.cross = CrossAttention(M, image_width, config.heads, p, EPS) if image_width is not None else None
        self.ffn = FeedForward(M, config.feed_forward, p)

    def forward(
        self,
        x_RM: Tensor,
        packing: Packing,
        allowed: Tensor,
        kv: KeyValue | None,
        image: ImageTokens | None,
        leading: int | None,
        noise_BT: Tensor | None,
    ) -> tuple[Tensor, Packing]:
        """``leading`` leaves only so many first tokens of each text."""
        x_RM, packing, _ = self.attention(x_RM, packing, allowed, None, leading, noise_BT)
        noise_BT = noise_BT[:, : packing.length] if noise_BT is not None else None
        if self.cross is not None and image is not None:
            x_RM = packing.collect(self.cross(packing.spread(x_RM), image, kv, noise_BT))
        return self.ffn(x_RM, packing.collect_keys(noise_BT)), packing


class TextEncoder(nn.Module):
    """Embeddings and the layers below the fusion encoder.

    Args:
        config: shape.
        vocab, positions: rows of the two tables.
    """

    def __init__(self, config: FusionConfig, vocab: int, positions: int) -> None:
        super().__init__()
        M = config.width
        self.words, self.positions = nn.Embedding(vocab, M), nn.Embedding(positions, M)
        self.embedding_norm, self.dropout = nn.LayerNorm(M, eps=EPS), KeyedDropout(config.dropout)
        self.layers = nn.ModuleList(FusionLayer(config, None) for _ in range(config.text_layers))

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, noise_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, M], zero at padding; ``noise_B``: int64 keys of the texts, for dropout."""
        packing = Packing.of(len(ids_BT), 0, mask_BT)
        noise_BT = token_keys(noise_B, ids_BT.shape[1])
        row_R, place_R = mask_BT.nonzero(as_tuple=True)
        embedded = self.words(ids_BT[row_R, place_R]) + self.positions(place_R)
        x_RM = self.dropout(self.embedding_norm(embedded), packing.collect_keys(noise_BT))
        allowed = mask_BT.bool()[:, None, None, :]
        for layer in self.layers:
            x_RM, packing = layer(x_RM, packing, allowed, None, None, None, noise_BT)
        return packing.spread(x_RM)


class FusionEncoder(nn.Module):
    """The layers that read image tokens."""

    def __init__(self, config: FusionConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, image_width) for _ in range(config.fusion_layers))

    def forward(
        self,
        text_BTM: Tensor,
        mask_BT: Tensor,
        image_BSC: Tensor,
        noise_B: Tensor | None = None,
        leading: int | None = None,
    ) -> Tensor:
        """Hidden states [B, T, M] of texts that have seen their images; with ``leading`` only so many first ones."""
        packing = Packing.of(len(text_BTM), 0, mask_BT)
        noise_BT = token_keys(noise_B, text_BTM.shape[1])
        x_RM, image = packing.collect(text_BTM), ImageTokens(image_BSC)
        allowed = mask_BT.bool()[:, None, None, :]
        for number, layer in enumerate(self.layers):
            kv = layer.cross.project(image)  # type: ignore[union-attr, operator]
            lead = leading if number + 1 == len(self.layers) else None
            x_RM, packing = layer(x_RM, packing, allowed, kv, image, lead, noise_BT)
        return packing.spread(x_RM)


def token_keys(noise_B: Tensor | None, tokens: int) -> Tensor | None:
    """Keys of a text's tokens, int64 [B, T]."""
    if noise_B is None:
        return None
    return subkeys(noise_B.unsqueeze(1), torch.arange(tokens, device=noise_B.device))


def initialise(*parts: nn.Module) -> None:
    """BERT's start: N(0, 0.02), zero biases, norms of one."""
    for part in parts:
        for name, parameter in part.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, INIT_STD)


def load_bert(
    text: TextEncoder,
    fusion: FusionEncoder | None,
    head: LanguageHead | None,
    config: FusionConfig,
    bert: Mapping[str, object],
    state: Mapping[str, Tensor],
) -> None:
    """Starts both encoders from a BERT: its first layers read the text, the next ones fuse. Cross-attention, and a
    prediction head that the weights lack, stay as they are.

    Args:
        text, fusion, head: fresh ones; None is left out.
        config: their shape.
        bert: the BERT configuration's values (``hidden_size`` and so on).
        state: its tensors under BERT's own names.

    Raises:
        WeightsError: sizes or depth do not allow it, or a tensor is missing.
    """
    check_bert(config, bert)
    source = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    target = dict(text.named_parameters())
    for i, layer in enumerate(fusion.layers if fusion is not None else ()):
        target |= {f"layers.{config.text_layers + i}.{name}": p for name, p in layer.named_parameters()}
    if head is not None:
        target |= {f"lm_head.{name}": p for name, p in head.named_parameters() if name != "words"}
    with torch.no_grad():
        layers = config.text_layers + (config.fusion_layers if fusion is not None else 0)
        for theirs, ours in bert_names(layers, head=head is not None).items():
            if theirs not in source:
                if theirs.startswith("cls."):
                    continue
                raise WeightsError(f"The text weights lack the tensor '{theirs}'.", "Give a BERT-family checkpoint.")
            target[ours.replace(".text_ffn.", ".ffn.")].copy_(source[theirs])
        segment = source.get("embeddings.token_type_embeddings.weight")
        if segment is not None:
            text.positions.weight.add_(segment[0])  # BERT adds its first segment row to every token


def check_bert(config: FusionConfig, bert: Mapping[str, object]) -> None:
    """Raises WeightsError where the weights' sizes are not the encoders'."""
    wanted = {
        "hidden_size": ("width", config.width),
        "num_attention_heads": ("heads", config.heads),
        "intermediate_size": ("feed_forward", config.feed_forward),
    }
    wrong = [f"fusion.{ours} {size} against {bert[k]}" for k, (ours, size) in wanted.items() if bert[k] != size]
    depth = config.text_layers + config.fusion_layers
    if depth > int(str(bert["num_hidden_layers"])):
        wrong.append(f"fusion.text_layers + fusion_layers {depth} against {bert['num_hidden_layers']}")
    if wrong:
        raise WeightsError(
            f"The text and fusion encoders cannot start from these text weights: {', '.join(wrong)}.",
            "Set the fusion fields to the text model's sizes, or fusion.init: null for a random start.",
        )
