"""The recipe of pre-training with cross-modal guidance (:mod:`isthmus.methods.guided`)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from isthmus.config import CompressionConfig, Config, FusionConfig, MethodConfig, TextConfig, TowerConfig, VisionConfig
from isthmus.config.bounds import check_range

Every = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0)]


class GuidedWeights(Config):
    """What each loss counts in the total. A weight of 0 leaves the loss and the parameters that only it trains out."""

    itc: Annotated[float, Field(gt=0.0)] = 1.0
    loc: Weight = 1.0
    rel: Weight = 1.0
    itm: Weight = 1.0
    mlm: Weight = 1.0


class RelationConfig(Config):
    """The relational head; the defaults are SGRAF's."""

    width: Annotated[int, Field(gt=0)] = 256
    steps: Annotated[int, Field(gt=0)] = Field(3, description="rounds of messages between the nodes")
    smoothing: Annotated[float, Field(gt=0)] = Field(9.0, description="sharpness of a word's attention to image tokens")


class ScoreConfig(Config):
    """What a pair's score is made of when retrieval re-ranks: the matching logit plus these."""

    relation: Weight = Field(0.5, description="times the relational head's logit")
    local: Weight = Field(1.0, description="times the unguided similarity of tokens and words")


class GuidedConfig(MethodConfig):
    """Options of pre-training with cross-modal guidance."""

    least_batch: ClassVar[int] = 2

    name: Literal["guided"] = "guided"
    vision: VisionConfig = VisionConfig()
    image: TowerConfig = TowerConfig()
    compression: CompressionConfig = CompressionConfig(layers=(1, 2, 3))
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    relation: RelationConfig = RelationConfig()
    weights: GuidedWeights = GuidedWeights()
    score: ScoreConfig = ScoreConfig()
    pairs_every: Every = Field(1, description="matching and relation are computed at every k-th step, at full weight")
    mlm_every: Every = Field(1, description="masked words likewise")
    mlm_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="of the words that are asked for")
    itc_gather: Literal["detached", "full"] = Field("full", description="as in blip2_stage1; 'full' is exact")
    itc_same_image: bool = Field(False, description="rows of one image are positives of one another")
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="initial divisor of similarities; learned")
    local_temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="that of token similarities; learned")
    temperature_range: tuple[float, float] = Field((0.001, 0.5), description="both are held inside on every step")

    @model_validator(mode="after")
    def _fits(self) -> GuidedConfig:
        check_widths(self.image, self.fusion)
        check_range(self.temperature_range, temperature=self.temperature, local_temperature=self.local_temperature)
        return self


def check_widths(image: TowerConfig, fusion: FusionConfig) -> None:
    """Raises ValueError where a width does not divide among its heads."""
    for name, section in (("image", image), ("fusion", fusion)):
        if section.width % section.heads:
            raise ValueError(f"{name}.width {section.width} does not divide among {name}.heads {section.heads}")
