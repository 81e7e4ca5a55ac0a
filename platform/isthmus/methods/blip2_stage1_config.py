"""Options of BLIP-2's first stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from isthmus.config import Config, MethodConfig, QFormerConfig, TextConfig, VisionConfig

Smoothing = Annotated[float, Field(ge=0.0, lt=1.0)]
Every = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0)]


class LossWeights(Config):
    """What each loss counts in the total. A weight of 0 leaves the loss and the parameters that only it trains out."""

    itc: Annotated[float, Field(gt=0.0)] = 1.0
    itm: Weight = 1.0
    itg: Weight = 1.0


class Blip2Stage1Config(MethodConfig):
    """Options of BLIP-2's first stage."""

    least_batch: ClassVar[int] = 2

    name: Literal["blip2_stage1"] = "blip2_stage1"
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    qformer: QFormerConfig = QFormerConfig()
    weights: LossWeights = LossWeights()
    itc_gather: Literal["detached", "full"] = Field(
        "detached",
        description="detached: other ranks' and own columns are constants, as in LAVIS; full: exact gradient",
    )
    itc_same_image: bool = Field(
        False,
        description="rows of one image ('image_id' in the data) are positives of one another (retrieval fine-tuning)",
    )
    label_smoothing: Smoothing = Field(0.1, description="of ITC and ITG")
    itm_every: Every = Field(1, description="ITM is computed at every k-th step only, at its full weight")
    itg_every: Every = Field(1, description="ITG likewise")
    itg_mean: Literal["global", "rank"] = Field(
        "global", description="tokens that ITG averages over; 'rank' is LAVIS's, and depends on the number of ranks"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="initial divisor of similarities; learned")

    @model_validator(mode="after")
    def _heads_divide(self) -> Blip2Stage1Config:
        check_heads(self.qformer)
        return self


def check_heads(qformer: QFormerConfig) -> None:
    """Raises ValueError where the width does not divide among the heads."""
    if qformer.width % qformer.heads:
        raise ValueError(f"qformer.width {qformer.width} does not divide among qformer.heads {qformer.heads}")
