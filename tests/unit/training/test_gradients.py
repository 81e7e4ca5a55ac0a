"""Under which name a parameter's gradient norm is logged."""

from __future__ import annotations

import pytest

from isthmus.training.gradients import part_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("temperature", "temperature"),
        ("ln_vision.bias", "ln_vision"),
        ("qformer.queries", "qformer.queries"),
        ("qformer.words.weight", "qformer.words"),
        ("qformer.layers.0.cross.query.weight", "qformer.cross"),
        ("qformer.layers.11.text_ffn.norm.bias", "qformer.text_ffn"),
        ("qformer.lm_head.bias", "qformer.lm_head"),
        ("image_projector.tokens.up.weight", "image_projector.tokens"),
        ("weight", "weight"),
        ("heads.0.weight", "heads"),
        ("projector.net.2.bias", "projector.net"),
    ],
)
def test_layers_of_a_kind_share_a_name(name: str, part: str) -> None:
    assert part_of(name) == part
