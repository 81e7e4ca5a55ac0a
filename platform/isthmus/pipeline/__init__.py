"""Chains of runs: fetch -> index -> stage 1 -> stage 2 -> evaluate -> caption -> serve -> report."""

from isthmus.pipeline.engine import Pipeline, StepSpec, load_pipeline, run_pipeline

__all__ = ["Pipeline", "StepSpec", "load_pipeline", "run_pipeline"]
