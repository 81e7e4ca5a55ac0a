"""The sections of a method's parts: encoders, language model, Q-Former, towers. Every field says its unit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isthmus.config.base import Config
from isthmus.config.compression import TokenDropConfig
from isthmus.config.fields import Fraction, Positive, Source


class VisionConfig(Config):
    """A frozen image encoder.

    ``name`` is any timm architecture that yields tokens or a feature map. ``weights`` is ``random`` (seeded),
    ``timm`` (the hub's pretrained weights of that name), ``pkg:NAME`` (a package of the weights catalogue), or a
    path to a ``.safetensors`` or ``.pth`` file.
    """

    name: str = "tf_efficientnet_lite0"
    weights: Source = "pkg:efficientnet-lite0"
    options: dict[str, bool | int | float | str] = Field(
        {}, description="keyword arguments of timm.create_model, for a variant of the architecture, e.g. {depth: 39}"
    )
    image_size: Positive | None = Field(None, description="pixels; the model's own size when not given")
    layer: int = Field(-2, description="which block's output is taken; -2 is the second last (BLIP-2), -1 the last")
    final_norm: bool = Field(False, description="apply the encoder's closing normalisation")
    pool: Literal["none", "mean"] = Field("none", description="mean: one averaged token instead of all")


class TextConfig(Config):
    """A BERT-family text encoder: tokenizer and, where widths allow, initial weights.

    ``weights`` is ``pkg:NAME``, a local directory in Hugging Face layout, or ``hf:ORG/NAME@REVISION``.
    """

    weights: Source = "pkg:all-minilm-l6-v2"
    max_length: Positive = Field(32, description="tokens, including [CLS] and [SEP]")


class LanguageConfig(Config):
    """A frozen language model, decoder-only or T5, in the same notation as :class:`TextConfig`."""

    weights: Source = "pkg:smollm2-135m-instruct"
    max_length: Positive = Field(32, description="tokens, including the end token; see max_length_of")
    max_length_of: Literal["caption", "text"] = Field(
        "caption",
        description="what a decoder-only model's max_length counts: the caption and its end token, or all of the text, "
        "with the begin-of-sequence token and the prompt before them (LAVIS). A T5's sides are each counted whole",
    )
    prompt: str = Field("", description="text between the soft prompt and the caption; takes no loss")
    keep_end: bool | None = Field(
        None,
        description="whether a caption that max_length cuts keeps its end token. Not given: as in LAVIS, where a "
        "decoder-only model's caption loses it and a T5's keeps it",
    )
    opening: Literal["text", "first"] = Field(
        "text",
        description="where the begin-of-sequence token stands: before the text, behind the soft prompt (LAVIS), or "
        "first of all, for a model that keeps its attention sink on it and is thrown off by anything else there",
    )
    dropout: bool = Field(False, description="True wakes the frozen model's dropout in training, as LAVIS does")
    prefix: Literal["drawn", "none"] = Field(
        "drawn",
        description="T5: whether the encoder reads a caption's first words, as many as are drawn for the sample and "
        "epoch, and the decoder predicts the rest (the paper); or the decoder predicts all (LAVIS)",
    )
    t5_activation: Literal["lavis", "checkpoint"] = Field(
        "lavis",
        description="FLAN-T5's gate: lavis is the exact GELU, which released BLIP-2 models were trained with; "
        "checkpoint is the language model's own, the approximation by tanh",
    )


class QFormerConfig(Config):
    """Shape of the Q-Former. The paper's is 12 layers of 768, 12 heads, 32 queries."""

    layers: Positive = 12
    width: Positive = 768
    heads: Positive = 12
    feed_forward: Positive = 3072
    queries: Positive = 32
    cross_every: Positive = Field(2, description="cross-attention in layers 0, n, 2n, ...")
    dropout: Fraction = 0.1
    embed: Positive = Field(256, description="width of the shared image-text space")
    text_pool: Literal["first", "mean"] = Field(
        "first",
        description="what stands for a text in ITC: its [CLS] token (the paper), or the mean of its tokens; that suits "
        "initial weights of a mean-pooled sentence encoder, whose lower layers leave [CLS] alike for all texts",
    )
    positions: Positive | None = Field(
        None, description="rows of the text branch's position table; those of the initial weights, or 512"
    )
    init: str | None = Field("text", description="'text': first layers of the text weights; null: random")
    compression: TokenDropConfig | None = Field(
        None, description="thin out the image tokens that the queries read, before all passes; None reads all"
    )
    init_segment: Literal["drop", "fold"] = Field(
        "drop",
        description="BERT adds its first segment row to every token; the Q-Former has no segments. drop: it is left "
        "out, as in LAVIS; fold: it moves into the positions, and the text branch starts as exactly the given model",
    )


class TowerConfig(Config):
    """The trained vision transformer that can drop tokens, on top of the frozen image encoder."""

    start: Literal["new", "vision"] = Field(
        "new",
        description="new: randomly started layers on the frozen encoder's tokens, of the sizes below; vision: the "
        "layers of method.vision behind its 'layer', with that model's weights and sizes",
    )
    layers: Positive = 4
    width: Positive = 384
    heads: Positive = 6
    feed_forward: Positive = 1536
    class_token: bool = Field(
        True, description="new: a class token in front; else the tokens' mean stands for the image"
    )
    dropout: Fraction = Field(0.1, description="new: of the embedded tokens")


class FusionConfig(Config):
    """A BERT cut in two: layers that read the text, and layers that fuse it with the image."""

    text_layers: Positive = 3
    fusion_layers: Positive = 3
    width: Positive = 384
    heads: Positive = 12
    feed_forward: Positive = 1536
    dropout: Fraction = 0.1
    embed: Positive = Field(256, description="width of the shared image-text space, for wholes and for tokens")
    text_pool: Literal["first", "mean"] = Field(
        "first", description="what stands for a text: its [CLS] token (ALBEF), or the mean of its tokens"
    )
    init: Literal["text"] | None = Field("text", description="'text': the layers of the text weights; null: random")
