"""The sections of the jobs before a projector is trained: selecting encoders, and curating pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from isthmus.config.base import Config
from isthmus.config.evaluation import ClassificationConfig
from isthmus.config.fields import Fraction, MaybeSource, Output, Positive, Source
from isthmus.config.parts import TextConfig, VisionConfig
from isthmus.config.run import TrackingConfig


def _last_state(value: Any) -> Any:
    """A timm name alone, or a section; what is compared is the encoder's last state where nothing else is said."""
    if isinstance(value, str):
        value = {"name": value, "weights": "timm"}
    return {"layer": -1, "final_norm": True, **value} if isinstance(value, dict) else value


def _weights(value: Any) -> Any:
    return {"weights": value} if isinstance(value, str) else value


class SelectConfig(Config):
    """CKA of every image encoder with every text encoder, over a sample of image-text pairs."""

    data: Source = Field(description="URL of an indexed data set")
    out: Output = Field(description="folder or URL of features, which a second run takes, and of the report")
    vision: tuple[Annotated[VisionConfig, BeforeValidator(_last_state)], ...] = Field(
        min_length=1,
        description="image encoders: sections as in a recipe's method.vision, with layer -1 and final_norm where they "
        "say nothing, or names of timm models with timm's weights; the mean over all tokens is what is compared",
    )
    text: tuple[Annotated[TextConfig, BeforeValidator(_weights)], ...] = Field(
        min_length=1,
        description="text encoders: sections as method.text, or weights alone; the mean over a sample's captions of "
        "their unit vectors is what is compared",
    )
    sample: Annotated[int, Field(ge=4)] = Field(5000, description="pairs that are looked at, drawn with 'seed'")
    kernels: tuple[Literal["linear", "rbf"], ...] = Field(
        ("linear", "rbf"), min_length=1, description="the first one orders the pairs"
    )
    permutations: Positive = Field(10, description="permuted pairings that each value is read against")
    seed: int = 0
    chunk: Positive = Field(512, description="samples whose text features are committed together")
    batch: Positive = 32
    actors: Positive = 2
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float | None, Field(ge=0)] = Field(
        None, description="not given: one for image encoders where the cluster has any, none for texts"
    )
    max_failed_share: Fraction = 0.01


class PrototypesConfig(Config):
    """One vector for each class: of prompts with its name, or of images that are known to show it."""

    out: Output = Field(description="a .parquet file: class, count, vector")
    classes: tuple[str, ...] | None = Field(None, description="names; with 'vectors' those of the data's labels")
    class_file: MaybeSource = Field(None, description="names, one a line, or a JSON list")
    templates: tuple[str, ...] = Field(
        ClassificationConfig().templates, min_length=1, description="{} is where the name goes"
    )
    model: MaybeSource = Field(None, description="a registered model, whose text side encodes the prompts")
    text: Annotated[TextConfig | None, BeforeValidator(_weights)] = Field(
        None, description="a sentence encoder that encodes the prompts"
    )
    vectors: MaybeSource = Field(None, description="'out' of `isthmus embed` on the labelled images of 'data'")
    data: MaybeSource = Field(None, description="an indexed data set with 'label' or 'class' in its samples' JSON")
    per_class: Positive = Field(128, description="labelled images of a class that are averaged, at most")
    batch: Positive = 64
    seed: int = Field(0, description="of the choice of labelled images")
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("templates")
    @classmethod
    def _one_place_for_the_class(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := next((template for template in value if template.count("{}") != 1), None):
            raise ValueError(f"expected exactly one {{}} in '{bad}', where the class name goes")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> PrototypesConfig:
        if sum(value is not None for value in (self.model, self.text, self.vectors)) != 1:
            raise ValueError("give one of 'model', 'text' (both read prompts) and 'vectors' (of labelled images)")
        if (self.vectors is None) != (self.data is None):
            raise ValueError("'vectors' and 'data', the labelled images that they are of, go together")
        names = sum(value is not None for value in (self.classes, self.class_file))
        if names > 1 or (names == 0 and self.vectors is None):
            raise ValueError("give one of 'classes' and 'class_file', the names of the classes")
        return self


class CurateConfig(Config):
    """A concept-balanced choice of samples: of each class the best ones, rare classes first, each sample once."""

    data: Source = Field(description="URL of an indexed data set")
    out: Output = Field(description="folder or URL of the choice, which is a data set for data.train")
    prototypes: Source = Field(description="the file that `isthmus data prototypes` wrote")
    vectors: MaybeSource = Field(None, description="'out' of `isthmus embed` on 'data' with the prototypes' model")
    side: Literal["texts", "images"] = Field("texts", description="which of the embedded vectors are scored")
    text: Annotated[TextConfig | None, BeforeValidator(_weights)] = Field(
        None, description="in place of 'vectors': the sentence encoder of the prototypes, for the captions"
    )
    top: Positive = Field(50_000, description="candidates of a class that are kept while the data streams by")
    per_class: Positive = Field(2_000, description="samples of a class, at most")
    cut_rank: Positive | None = Field(
        None, description="classes are served in the order of their score at this rank, the lowest first; per_class"
    )
    nearest: Positive | None = Field(
        None, description="a sample is a candidate of so many classes, the nearest ones; of all of them if not given"
    )
    min_score: float | None = Field(None, description="cosine below which a sample is no candidate of a class")
    chunk: Positive = Field(65_536, description="samples that are committed together; that of 'vectors' where given")
    batch: Positive = 512
    actors: Positive = 2
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    max_failed_share: Fraction = 0.01

    @model_validator(mode="after")
    def _fits(self) -> CurateConfig:
        if (self.vectors is None) == (self.text is None):
            raise ValueError("give one of 'vectors', embeddings of the data, and 'text', a sentence encoder")
        if self.text is not None and self.side == "images":
            raise ValueError("a sentence encoder reads captions; for images give 'vectors'")
        if self.per_class > self.top or (self.cut_rank or 1) > self.top:
            raise ValueError(f"'top' is {self.top}: it cannot be less than 'per_class' or 'cut_rank'")
        return self
