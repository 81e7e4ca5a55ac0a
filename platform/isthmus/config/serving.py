"""The recipe of the service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isthmus.config.base import Config
from isthmus.config.fields import Positive
from isthmus.config.places import Place
from isthmus.config.run import TrackingConfig


class ServeConfig(Config):
    """The online service. Unauthenticated access is refused unless bound to loopback with ``auth: none``."""

    models: Annotated[dict[str, str], Place()] = Field(description="served name -> models:/NAME@ALIAS")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    auth: Literal["token", "none"] = "token"
    token_env: str = Field("ISTHMUS_API_KEY", description="environment variable that holds the bearer token")
    replicas: Positive = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    max_batch: Positive = 8
    batch_wait_ms: Annotated[float, Field(ge=0)] = 10
    max_ongoing: Positive = 32
    max_queued: Positive = 64
    timeout_s: Annotated[float, Field(gt=0)] = 60
    max_body_mb: Annotated[float, Field(gt=0)] = 10
    max_pixels: Positive = Field(40_000_000, description="of an image or of a frame")
    max_seconds: Annotated[float, Field(gt=0)] = Field(60, description="of a sound or a clip")
    max_new_tokens: Positive = 64
    tracking: TrackingConfig = TrackingConfig()
