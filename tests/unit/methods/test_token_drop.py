"""Image tokens thinned out before the Q-Former: off it changes nothing, on it is the same for every pass and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import TokenDropConfig
from isthmus.errors import ConfigError
from isthmus.methods.artefact import save_artefact
from isthmus.methods.interchange.to_hf import export_hf
from isthmus.methods.parts import VisionNorm, thinned
from isthmus.models.compression import drop_frozen
from isthmus.models.freezing import owned_state
from isthmus.testing.backbones import tiny_cnn_config
from method_cases import QFORMER, batch, build, moved, recipe, run_config, samples

METHODS = ("blip2_stage1", "blip2_stage2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def stage_of(method: str, folder: Path, **drop: Any) -> Any:
    changes = {"compression": TokenDropConfig(**drop)} if drop else {}
    stage = build(recipe(method, folder, qformer=QFORMER.model_copy(update=changes)))
    moved(stage.module)
    return stage


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_is_bit_for_bit_the_model_without_it(method: str, folder: Path) -> None:
    losses = []
    for drop in ({}, {"keep": 1.0}, {"keep": 1.0, "class_token": True}, {"keep": 0.4}):
        stage = stage_of(method, folder, **drop)
        with torch.no_grad():
            losses.append(stage.module(batch(stage, samples(stage, 6))).total)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert not torch.allclose(losses[0], losses[3], atol=1e-4)


def test_the_queries_read_fewer_tokens_and_images_do_not_depend_on_texts(folder: Path) -> None:
    stage = stage_of("blip2_stage1", folder, keep=0.4)
    made = batch(stage, samples(stage, 4))
    assert made.features_BND.shape[1] == 5 and stage.module._normalise(made.features_BND).tokens_BND.shape[1] == 3
    alone = torch.cat([stage.module.embed_images(made.features_BND[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(stage.module.embed_images(made.features_BND), alone)
    stage.module(made).total.backward()
    assert all(p.grad is not None for p in stage.module.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_token_that_the_encoder_has_not_is_refused(method: str, folder: Path) -> None:
    drop = QFORMER.model_copy(update={"compression": TokenDropConfig(class_token=True)})
    with pytest.raises(ConfigError, match=r"qformer\.compression\.class_token is true"):
        build(recipe(method, folder, qformer=drop, vision=tiny_cnn_config()))


def test_what_is_like_the_class_token_stays_and_the_rest_is_one_mean() -> None:
    tokens = torch.zeros(1, 5, 4)
    tokens[0, 0], tokens[0, 2], tokens[0, 4] = torch.tensor([[1.0, 0, 0, 0], [3, 0.1, 0, 0], [2, 0.3, 0, 0]])
    tokens[0, 1], tokens[0, 3] = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]])
    out = drop_frozen(tokens, TokenDropConfig(keep=0.5, class_token=True))
    assert torch.equal(out[:, :3], tokens[:, [0, 2, 4]])
    torch.testing.assert_close(out[0, 3], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    assert drop_frozen(tokens, TokenDropConfig(keep=0.5, fuse=False)).shape[1] == 3


def test_the_norm_s_affine_map_may_come_before_or_behind() -> None:
    norm, x = VisionNorm(8), torch.randn(2, 9, 8)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    image = norm(x)
    short = thinned(image, TokenDropConfig(keep=0.5))
    applied = image.tokens_BND * image.scale_D + image.shift_D
    own = short.tokens_BND * short.scale_D + short.shift_D
    rows = [int((applied[0] - token).abs().sum(1).argmin()) for token in own[0, :5]]
    torch.testing.assert_close(own[0, :5], applied[0, rows])
    assert rows == sorted(set(rows))


def test_export_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    config = recipe("blip2_stage1", folder, qformer=QFORMER.model_copy(update={"compression": TokenDropConfig()}))
    stage = build(config, with_vision=True)
    save_artefact(tmp_path / "model", owned_state(stage.module), run_config(config), stage, {})
    with pytest.raises(ConfigError, match=r"thinned-out image tokens \(qformer.compression\)"):
        export_hf(tmp_path / "model", tmp_path / "out")
