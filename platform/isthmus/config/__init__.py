"""Typed recipes: YAML -> frozen pydantic models that refuse unknown keys."""

from isthmus.config.alignment import CurateConfig, PrototypesConfig, SelectConfig
from isthmus.config.base import Config, MethodConfig
from isthmus.config.bulk import CaptionConfig, EmbedConfig
from isthmus.config.compression import CompressionConfig, TokenDropConfig
from isthmus.config.data import DataConfig
from isthmus.config.evaluation import ClassificationConfig, EvaluateConfig, LayoutConfig, MatchingConfig, VqaConfig
from isthmus.config.load import load_config, load_run, read_yaml, to_yaml
from isthmus.config.mixture import SetConfig, whole_weights
from isthmus.config.parts import FusionConfig, LanguageConfig, QFormerConfig, TextConfig, TowerConfig, VisionConfig
from isthmus.config.places import Place, absolute, anchored
from isthmus.config.run import RegisterConfig, RunConfig, TrackingConfig
from isthmus.config.serving import ServeConfig
from isthmus.config.training import ClusterConfig, TrainConfig, ZeroConfig

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
    "TokenDropConfig",
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
