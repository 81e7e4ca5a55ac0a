"""Options of the co-optimised method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from isthmus.config import Config, MethodConfig, TextConfig, VisionConfig

Count = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0)]
IN_TIME = ("video-audio",)
HEARD = ("video-audio", "image-audio")
"""Pairs of modalities whose second side is a sound."""
"""Pairs of modalities whose two sides are sequences over one stretch of time."""


class AttentionConfig(Config):
    """Cross-attention between the two sides' tokens. ``projections: false`` on one head is the method's text to the
    letter: Q is one side's tokens, K and V are the other's."""

    kind: Literal["full", "top_k", "banded", "favor"] = Field(
        "full",
        description="which keys a query looks at: all; the best top_k; those within 'band' of its place in time; all "
        "in linear time by random features (FAVOR+)",
    )
    heads: Count = 8
    projections: bool = Field(True, description="learned query, key, value and output maps; false has none, one head")
    zero_init: bool | None = Field(
        None,
        description="the output map starts at zero, so that fused tokens start as the plain ones. Not given: yes, but "
        "not with cross.loss 'literal', which could never leave zero",
    )
    top_k: Count = 8
    band: Count = Field(8, description="keys to either side of a query's place")
    features: Count = Field(256, description="favor: random features of a head")


class CrossConfig(Config):
    """The loss of the cross-attention."""

    loss: Literal["aligned", "literal"] = Field(
        "aligned",
        description="literal: |fused - plain|^2 as the method's text has it, which switches the attention off; "
        "aligned: what a token gathers from the other side is to reproduce the token (our completion)",
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="over a pair's tokens and channels; literally 'sum'")
    margin: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="above 0, aligned also asks that a pair's sides agree by so much more than either does with a hard "
        "wrong partner of the batch (mean cosine of tokens and their context)",
    )


class MatchConfig(Config):
    """A matching head (ITM): a classifier of right and wrong pairs, on hard negatives where there is a contrast."""

    weight: Weight = Field(0.0, description="0: none")
    reads: Literal["fused", "pooled"] = Field(
        "fused",
        description="pooled tokens of both sides behind the cross-attention, or before it (concatenation + MLP)",
    )


class WeightingConfig(Config):
    """How alpha x contrast, beta x cross and the matching loss become one."""

    kind: Literal["fixed", "uncertainty", "dwa"] = Field(
        "fixed", description="sum; learned uncertainty (Kendall et al. 2018); dynamic weight average (Liu et al. 2019)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(2.0, description="dwa: evenness of the weights")
    period: Count | None = Field(None, description="dwa: steps that count as an epoch; the data's own if not given")


class AudioConfig(Config):
    """The sound's side: a transformer over patches of the log-mel spectrum, trained from nothing with the rest.

    There are no pretrained audio weights without a model hub. 16 kHz, 128 mel bands, 25 ms every 10 ms, patches of
    16 x 16 (Gong et al. 2021).
    """

    seconds: Annotated[float, Field(ge=0.16, le=60)] = Field(
        10.0, description="of a sound, from its start, that are heard; whole columns of 0.16 s"
    )
    width: Count = 192
    layers: Annotated[int, Field(ge=0)] = 4
    heads: Count = 4


class FramesConfig(Config):
    """A clip's frames: each is the mean of a frozen encoder's patches; a small transformer reads their sequence."""

    count: Count = Field(8, description="frames of a clip, uniform in time; in training drawn, each in its own part")
    width: Count = 192
    layers: Annotated[int, Field(ge=0)] = Field(2, description="0: positions alone")
    heads: Count = 4


class CoOptimiseConfig(MethodConfig):
    """Options of contrast and cross-attention, optimised together."""

    least_batch: ClassVar[int] = 2

    name: Literal["co_optimise"] = "co_optimise"
    modality: Literal["image-text", "video-audio", "image-audio"] = Field(
        "image-text", description="what the pairs are of"
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = Field(TextConfig(), description="of image-text alone")
    audio: AudioConfig = Field(AudioConfig(), description="of video-audio and image-audio alone")
    frames: FramesConfig = Field(FramesConfig(), description="of video-audio alone")
    embed: Count = Field(512, description="width of the shared space")
    projection: Literal["linear", "mlp"] = Field(
        "linear",
        description="into the shared space: one map, as written; or a residual MLP of one hidden layer behind it",
    )
    normalise: bool = Field(True, description="frozen tokens pass a layer norm without parameters first")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the frozen tokens' channels")
    alpha: Weight = Field(1.0, description="weight of the contrast; 0 leaves it out")
    beta: Weight = Field(1.0, description="weight of the cross-attention's loss; 0 leaves it out")
    shared: bool = Field(
        True,
        description="strategy 2: contrast and cross-attention read the same projected tokens, so each one's gradient "
        "shapes the other's; false gives each its own",
    )
    schedule: Literal["joint", "alternate"] = Field(
        "joint", description="strategy 1: one loss of both; or the two take turns, step by step"
    )
    attention: AttentionConfig = AttentionConfig()
    cross: CrossConfig = CrossConfig()
    itm: MatchConfig = MatchConfig()
    weighting: WeightingConfig = WeightingConfig()
    symmetric: bool = Field(True, description="contrast both ways; false: images look for texts alone, as written")
    itc_gather: Literal["detached", "full"] = "full"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(ge=0.01)] = Field(0.07, description="initial; learned, and never below 0.01")
    gamma: Weight = Field(
        1.0, description="re-ranking without a matching head: cosine + gamma x how well a pair's sides agree"
    )
    remembered_texts: Annotated[int, Field(ge=0)] = Field(
        50_000, description="distinct captions whose frozen token features each process keeps"
    )

    @property
    def attends(self) -> bool:
        """Whether there is cross-attention at all."""
        return self.beta > 0 or (self.itm.weight > 0 and self.itm.reads == "fused")

    @property
    def starts_at_zero(self) -> bool:
        """Whether the output map of the attention starts at zero."""
        given = self.attention.zero_init
        return self.cross.loss == "aligned" if given is None else given

    @model_validator(mode="after")
    def _something_to_learn(self) -> CoOptimiseConfig:
        if not (self.alpha or self.beta or self.itm.weight):
            raise ValueError("alpha, beta and itm.weight are all 0: there is nothing to learn")
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> CoOptimiseConfig:
        attention = self.attention
        if attention.projections and self.embed % attention.heads:
            raise ValueError(f"embed {self.embed} does not divide among attention.heads {attention.heads}")
        if not attention.projections and attention.zero_init:
            raise ValueError("attention.zero_init is of the output map, and attention.projections: false has none")
        if attention.kind == "banded" and self.modality not in IN_TIME:
            raise ValueError(f"attention.kind 'banded' is for two sides in time, and {self.modality} has none")
        if attention.zero_init and self.beta and self.cross.loss == "literal" and not self._matches_fused:
            raise ValueError(
                "cross.loss 'literal' is zero with no gradient where attention.zero_init holds: nothing is learnt"
            )
        return self

    @model_validator(mode="after")
    def _widths_divide(self) -> CoOptimiseConfig:
        for name, section in (("audio", self.audio), ("frames", self.frames)):
            if section.width % section.heads:
                raise ValueError(f"{name}.width {section.width} does not divide among {name}.heads {section.heads}")
        return self

    @property
    def _matches_fused(self) -> bool:
        return self.itm.weight > 0 and self.itm.reads == "fused"

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> CoOptimiseConfig:
        if self.cross.margin and (self.cross.loss == "literal" or not self.beta):
            raise ValueError("cross.margin is a part of the loss 'aligned' with beta above 0")
        if self.schedule == "alternate" and not (self.alpha and self.attends):
            raise ValueError("schedule 'alternate' needs a contrast and a cross-attention that take turns")
        if self.schedule == "alternate" and self.weighting.kind != "fixed":
            raise ValueError("schedule 'alternate' goes with weighting.kind 'fixed': it is a weighting of its own")
        return self
