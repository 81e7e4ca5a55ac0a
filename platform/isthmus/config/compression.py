"""How a vision transformer's sequence of image tokens is shortened on its way through the layers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from isthmus.config.base import Config

Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]

EVEN, ELIP_MIX = 0.5, 0.2
"""Shares of the image's own score, and of the text in ELIP's class token."""

PRESETS: dict[str, dict[str, Any]] = {
    "evit": {"layers": (3, 6, 9), "keep": (0.7,)},
    "elip": {
        "layers": (2, 4, 10), "keep": (0.90, 0.65, 0.40), "keep_of": "image", "place": "before",
        "look_ahead": (2, 6, 2), "class_mix": ELIP_MIX, "detach": True,
    },
    "trips": {"layers": (4, 9), "keep": (0.7,), "balance": 0.0},
}  # fmt: skip
"""Published settings for a transformer of twelve layers: EViT (Liang et al. 2022), ELIP on ALBEF (Guo et al. 2023),
TRIPS (Jiang et al. 2022; its two layers and rate as recalled, its code was not at hand)."""


class TokenDropConfig(Config):
    """How frozen image tokens are thinned out before a Q-Former reads them, without any parameter.

    A completion of ours: EViT's choice and fused token, by how much the encoder's class token, or the mean token, is
    like each of them.
    """

    keep: Rate = Field(0.5, description="share of the tokens that stays")
    class_token: bool = Field(
        False, description="the encoder's first token is a class token: it always stays, and what is like it stays"
    )
    fuse: bool = Field(True, description="put the weighted mean of what is dropped in its place, as one token")
    sharpness: Annotated[float, Field(gt=0.0)] = Field(9.0, description="of the softmax of cosines that are the scores")


class CompressionConfig(Config):
    """Which layers drop image tokens, how many, and by what score.

    The mechanics are EViT's. That image and text guide the choice together is the seed's; how the two scores are mixed
    is our completion.
    """

    preset: Literal["evit", "elip", "trips"] | None = Field(
        None, description="a published setting; fields that are given beside it take precedence"
    )
    layers: tuple[Count, ...] = Field((), description="layers that drop tokens, from 0, ascending; none drops nothing")
    keep: tuple[Rate, ...] = Field((0.7,), description="share that stays: one for all layers, or one for each")
    keep_of: Literal["layer", "image"] = Field(
        "layer", description="share of the tokens that reach the layer, or of those that the image had at first"
    )
    place: Literal["inside", "before"] = Field(
        "inside", description="between a layer's attention and its feed-forward network (EViT), or before it (ELIP)"
    )
    balance: Share = Field(
        EVEN, description="share of the image's own score in the guided one; the rest is the text's. 1 is no guidance"
    )
    look_ahead: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="ELIP: layers that a copy runs ahead without gradient, for the last one's attention as score"
    )
    class_mix: Share = Field(ELIP_MIX, description="ELIP: share of the text's vector in the copy's class token")
    fuse: bool = Field(True, description="put the score-weighted mean of what is dropped in its place, as one token")
    detach: bool = Field(False, description="no gradient through the weights of that mean (ELIP)")
    guidance_dropout: Share = Field(
        0.5, description="share of the guided pairs that a training step compresses unguided, so that both are learnt"
    )
    warmup_steps: Count = Field(0, description="training steps in which everything is kept")
    shrink_steps: Count = Field(0, description="steps after them in which the rates fall to 'keep', along a cosine")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return PRESETS[values["preset"]] | values
        return values

    @model_validator(mode="after")
    def _fits(self) -> CompressionConfig:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"compression.layers {list(self.layers)} are not ascending")
        for name, given in (("keep", self.keep), ("look_ahead", self.look_ahead)):
            if len(given) not in (1, len(self.layers)) and (given or name == "keep"):
                raise ValueError(f"compression.{name} has {len(given)} values for {len(self.layers)} layers")
        if self.look_ahead and self.place != "before":
            raise ValueError("compression.look_ahead scores tokens before a layer: set compression.place: before")
        if self.look_ahead and self.balance != EVEN:
            raise ValueError(
                "compression.look_ahead scores by a class token that class_mix gives the text's share of: balance "
                "has no say. class_mix: 0 is no guidance"
            )
        if self.class_mix != ELIP_MIX and not self.look_ahead:
            raise ValueError("compression.class_mix is of look_ahead; without it, the text's share is 1 - balance")
        if self.keep_of == "image" and list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"compression.keep {list(self.keep)} are shares of the image and must not rise")
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """The share that stays, layer by layer."""
        return self.keep * len(self.layers) if len(self.keep) == 1 else self.keep
