"""The recipes of bulk jobs: captioning and embedding."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from isthmus.config.base import Config
from isthmus.config.fields import Fraction, MaybeSource, Output, Positive, Source
from isthmus.config.run import TrackingConfig


class CaptionConfig(Config):
    """Bulk captioning of an image lake, exactly once."""

    model: Source
    data: Source = Field(description="URL of an indexed data set, of tars or of Parquet files")
    out: Output = Field(description="folder or URL for Parquet parts and commit records")
    chunk: Positive = Field(128, description="images per deterministic chunk, the unit that is committed")
    batch: Positive = Field(32, description="images per forward pass")
    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    prompt: str | None = Field(
        None, description="text between the soft prompt and the caption, '' for none; the recipe's own if not given"
    )
    max_new_tokens: Positive = 20
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    num_beams: Positive = 1
    max_failed_share: Fraction = 0.01
    cache: MaybeSource = Field(None, description="feature cache to read instead of encoding the images again")
    tracking: TrackingConfig = TrackingConfig()


class EmbedConfig(Config):
    """Bulk embeddings of images and texts."""

    model: Source
    data: Source
    out: Output
    images: bool = Field(True, description="vectors of images, or of clips")
    texts: bool = Field(True, description="vectors of captions; of sounds, where the model pairs those")
    chunk: Positive = 256
    batch: Positive = 64
    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    max_failed_share: Fraction = 0.01
    cache: MaybeSource = None
    tracking: TrackingConfig = TrackingConfig()
