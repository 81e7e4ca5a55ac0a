"""Clips and images with their sound in the co-optimised method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from heard_cases import gradients, heard_recipe, heard_samples
from isthmus.config import load_run, to_yaml
from isthmus.contracts import Batch, Captions, Embeds, Hears, Sees, Stage
from isthmus.data.clips import ClipTransform
from isthmus.methods import METHODS, method_configs
from isthmus.methods.artefact import load_artefact, save_artefact
from isthmus.methods.co_optimise_config import AudioConfig, CoOptimiseConfig
from isthmus.models.freezing import owned_state
from isthmus.models.sequence import SequenceEncoder
from isthmus.models.vision import encode_pixels
from method_cases import batch, build, moved, run_config

BOTH = pytest.mark.parametrize("modality", ["video-audio", "image-audio"])


def made(modality: str, rows: int = 7, padding: int = 0, **changes: object) -> tuple[Stage, Batch]:
    stage = build(heard_recipe(modality, **changes))
    moved(stage.module)
    return stage, batch(stage, heard_samples(stage, rows), 0, padding)


@BOTH
def test_exactly_the_trained_parameters_get_gradients_on_every_step(modality: str) -> None:
    stage = build(heard_recipe(modality), with_vision=True)
    module = stage.module.train()
    moved(module)
    shape = stage.transform.seen_shape
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert any(n.startswith("audio.") for n in names) and not any(n.startswith("vision.") for n in names)
    assert any(n.startswith("frames.") for n in names) == (modality == "video-audio")
    rows = batch(stage, heard_samples(stage, 4))
    module(replace(rows, features_BND=None, pixels_BCHW=torch.randn(4, *shape))).total.backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == names
    zero = [name for name, g in gradients(module).items() if not g.abs().max() > 0]
    assert all(name.endswith("asks.key.bias") for name in zero), zero  # softmax does not see it


@BOTH
def test_pixels_and_their_frozen_tokens_give_the_same_losses(modality: str) -> None:
    stage = build(heard_recipe(modality), with_vision=True)
    module = stage.module.eval()
    pixels = torch.randn(4, *stage.transform.seen_shape)
    rows = batch(stage, heard_samples(stage, 4))
    seen = module(replace(rows, features_BND=None, pixels_BCHW=pixels)).total
    cached = module(replace(rows, features_BND=module.encode_images(pixels))).total
    torch.testing.assert_close(seen, cached)
    assert tuple(module.encode_images(pixels).shape[1:]) == (stage.image_spec["tokens"], stage.image_spec["width"])


def test_a_frame_is_the_mean_of_its_patches() -> None:
    stage = build(heard_recipe("video-audio"), with_vision=True)
    encoder, pixels = stage.module.vision, torch.randn(2, 3, 3, 32, 32)
    tokens = encode_pixels(encoder, pixels)
    alone = encoder(pixels[1, 2:3])[0]
    assert encoder.prefix == 1, "a class token, which is no patch"
    torch.testing.assert_close(tokens[1, 2], alone[1:].mean(0), rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("rows", [1, 3])
def test_some_rows_at_a_time_give_the_whole_batch(modality: str, rows: int) -> None:
    stage, given = made(modality, padding=1, dropout=0.1)
    module = stage.module.train()

    def step(micro_batch: int | None) -> tuple[float, dict[str, torch.Tensor | None]]:
        module.micro_batch = micro_batch
        module.zero_grad()
        terms = module(given)
        terms.total.backward()
        return float(terms.total.detach()), gradients(module)

    (whole, expected), (parts, found) = step(None), step(rows)
    assert parts == pytest.approx(whole, abs=2e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@BOTH
def test_what_stands_behind_the_end_of_a_sound_is_not_heard(modality: str) -> None:
    stage, given = made(modality)
    module = stage.module.eval()
    behind = given.audio_mask_BN == 0
    assert behind.any()
    changed = given.audio_BNF.clone()
    changed[behind] = 100.0
    vectors = [module.embed_sounds(audio, given.audio_mask_BN) for audio in (given.audio_BNF, changed)]
    torch.testing.assert_close(*vectors)
    torch.testing.assert_close(module(given).total, module(replace(given, audio_BNF=changed)).total)
    changed[~behind] = 100.0
    assert (module.embed_sounds(changed, given.audio_mask_BN) - vectors[0]).abs().max() > 0.01


@BOTH
def test_a_padding_row_changes_nothing(modality: str) -> None:
    stage, given = made(modality, rows=6, padding=1)
    module = stage.module.eval()
    last = replace(given, audio_BNF=given.audio_BNF.clone(), features_BND=given.features_BND.clone())
    last.audio_BNF[-1] = 3.0
    last.features_BND[-1] = 3.0
    torch.testing.assert_close(module(last).total, module(given).total)


def test_the_order_of_frames_and_of_a_sound_is_heard() -> None:
    stage, given = made("video-audio")
    module = stage.module.eval()
    images = [module.embed_images(x) for x in (given.features_BND, given.features_BND.flip(1))]
    assert (images[0] - images[1]).abs().max() > 1e-3
    full = torch.ones_like(given.audio_mask_BN)
    columns = given.audio_BNF.unflatten(1, (-1, 8)).flip(1).flatten(1, 2)
    sounds = [module.embed_sounds(x, full) for x in (given.audio_BNF, columns)]
    assert (sounds[0] - sounds[1]).abs().max() > 1e-3


@BOTH
def test_saved_and_loaded_models_are_equal(modality: str, tmp_path: Path) -> None:
    stage, given = made(modality)
    run = run_config(heard_recipe(modality))
    save_artefact(tmp_path, owned_state(stage.module), run, stage, {})
    module = load_artefact(tmp_path, with_vision=False).stage.module
    expected = stage.module.eval()
    torch.testing.assert_close(module.embed_images(given.features_BND), expected.embed_images(given.features_BND))
    sound = given.audio_BNF, given.audio_mask_BN
    torch.testing.assert_close(module.embed_sounds(*sound), expected.embed_sounds(*sound))
    assert isinstance(module, Hears) and isinstance(module, Sees)
    assert not isinstance(module, Embeds) and not isinstance(module, Captions)


@BOTH
def test_building_twice_gives_the_same_start_and_another_seed_another(modality: str) -> None:
    first, again = (build(heard_recipe(modality)).module for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["video_audio", "image_audio"])
def test_recipes_validate_and_survive(name: str, tmp_path: Path) -> None:
    run = load_run(Path("pipelines") / f"{name}.yaml", methods=method_configs())
    assert isinstance(run.method, CoOptimiseConfig) and run.method.modality == name.replace("_", "-")
    (tmp_path / "copy.yaml").write_text(to_yaml(run))
    assert load_run(tmp_path / "copy.yaml", methods=method_configs()) == run
    assert run.method.name in METHODS


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"audio\.width 20 does not divide among audio\.heads 8"):
        CoOptimiseConfig(audio=AudioConfig(width=20, heads=8))
    with pytest.raises(ValidationError, match="two sides in time"):
        CoOptimiseConfig.model_validate({"modality": "image-audio", "attention": {"kind": "banded"}})
    stage = build(heard_recipe("video-audio"))
    assert isinstance(stage.transform, ClipTransform) and stage.transform.sound_shape == (32, 256)


def test_a_sequence_encoder_sees_only_what_the_mask_allows() -> None:
    encoder = SequenceEncoder(5, 4, 2, width=8, layers=2, heads=2)
    x, mask = torch.randn(2, 8, 5), torch.arange(8).expand(2, 8) < 4
    cut = x.clone()
    cut[:, 4:] = 9.0
    torch.testing.assert_close(encoder(x, mask)[:, :4], encoder(cut, mask)[:, :4])
    assert (encoder(x)[:, :4] - encoder(cut)[:, :4]).abs().max() > 1e-3
