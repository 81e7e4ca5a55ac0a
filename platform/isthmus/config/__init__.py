"""Typed recipes: YAML -> frozen pydantic models that refuse unknown keys."""

from isthmus.config.alignment import CurateConfig, PrototypesConfig, SelectConfig
from isthmus.config.base import Config, MethodConfig
from isthmus.config.compression import CompressionConfig
from isthmus.config.evaluation import ClassificationConfig, EvaluateConfig, LayoutConfig, MatchingConfig, VqaConfig
from isthmus.config.load import load_config, load_run, read_yaml, to_yaml
from isthmus.config.mixture import SetConfig, whole_weights
from isthmus.config.places import Place, absolute, anchored
from isthmus.config.schema import (
    CaptionConfig,
    ClusterConfig,
    DataConfig,
    EmbedConfig,
    FusionConfig,
    LanguageConfig,
    QFormerConfig,
    RegisterConfig,
    RunConfig,
    ServeConfig,
    TextConfig,
    TowerConfig,
    TrackingConfig,
    TrainConfig,
    VisionConfig,
    ZeroConfig,
)

__all__ = [
    "CaptionConfig",
    "ClassificationConfig",
    "ClusterConfig",
    "CompressionConfig",
    "Config",
    "CurateConfig",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FusionConfig",
    "LanguageConfig",
    "LayoutConfig",
    "MatchingConfig",
    "MethodConfig",
    "Place",
    "PrototypesConfig",
    "QFormerConfig",
    "RegisterConfig",
    "RunConfig",
    "SelectConfig",
    "ServeConfig",
    "SetConfig",
    "TextConfig",
    "TowerConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "VqaConfig",
    "ZeroConfig",
    "absolute",
    "anchored",
    "load_config",
    "load_run",
    "read_yaml",
    "to_yaml",
    "whole_weights",
]
