"""The alignment methods. A new one is a file beside this one, a line in METHODS and a recipe in ``pipelines/``."""

from __future__ import annotations

from isthmus.config import MethodConfig
from isthmus.methods import (
    blip2_stage1,
    blip2_stage1_config,
    blip2_stage2,
    co_optimise,
    guided,
    guided_config,
    guided_vqa,
    projector,
)
from isthmus.methods.table import MethodSpec

METHODS: dict[str, MethodSpec] = {
    "blip2_stage1": MethodSpec(blip2_stage1_config.Blip2Stage1Config, blip2_stage1.build),
    "blip2_stage2": MethodSpec(blip2_stage2.Blip2Stage2Config, blip2_stage2.build, blip2_stage2.resolve, starts=True),
    "co_optimise": MethodSpec(co_optimise.CoOptimiseConfig, co_optimise.build),
    "guided": MethodSpec(guided_config.GuidedConfig, guided.build),
    "guided_vqa": MethodSpec(
        guided_vqa.GuidedVqaConfig, guided_vqa.build, guided_vqa.resolve, guided_vqa.survey, starts=True
    ),
    "projector": MethodSpec(projector.ProjectorConfig, projector.build),
}


def method_configs() -> dict[str, type[MethodConfig]]:
    """Method name -> its section's type, as :func:`isthmus.config.load_run` wants them."""
    return {name: spec.config for name, spec in METHODS.items()}


__all__ = ["METHODS", "MethodSpec", "method_configs"]
