"""What MLflow's `predict` makes of a table, for every method: what the module itself makes of the same rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from heard_cases import heard_recipe
from isthmus.config import MethodConfig
from isthmus.data.transforms import decode_image
from isthmus.methods.artefact import save_artefact
from isthmus.models.freezing import owned_state
from isthmus.registry.pyfunc import IsthmusModel
from isthmus.testing.clips import clip_bytes, sound_bytes
from isthmus.testing.shards import image_bytes
from method_cases import build, moved, recipe, run_config

IMAGES, TEXTS = [image_bytes(n) for n in range(3)], ["a red cat", "the moon", "two dogs"]


def served(config: MethodConfig, folder: Path) -> tuple[IsthmusModel, Any]:
    """MLflow's object around a saved model, and the module that was saved."""
    stage = build(config, with_vision=True)
    moved(stage.module)
    save_artefact(folder / "artefact", owned_state(stage.module), run_config(config), stage, {})
    model = IsthmusModel()
    model.load_context(SimpleNamespace(artifacts={"artefact": str(folder / "artefact")}))
    return model, stage


def predicted(model: IsthmusModel, **columns: list[Any]) -> list[Any]:
    return model.predict(None, pd.DataFrame(columns))


@pytest.mark.parametrize("method", ["projector", "co_optimise", "guided"])
def test_images_and_texts_become_vectors(method: str, tmp_path: Path) -> None:
    model, stage = served(recipe(method, tmp_path), tmp_path)
    module = stage.module.eval()
    pixels = torch.from_numpy(np.stack([stage.transform(decode_image(data)) for data in IMAGES]))
    with torch.no_grad():
        images, texts = module.embed_images(module.encode_images(pixels)), module.embed_texts(TEXTS)
    np.testing.assert_allclose(np.stack(predicted(model, image=IMAGES)), images, atol=1e-5)
    np.testing.assert_allclose(np.stack(predicted(model, text=TEXTS)), texts, atol=1e-5)
    with pytest.raises(ValueError, match=rf"'{method}' model makes nothing of the columns \['sound'\]"):
        predicted(model, sound=[b""])


@pytest.mark.parametrize("method", ["blip2_stage1", "blip2_stage2"])
def test_images_become_captions(method: str, tmp_path: Path) -> None:
    model, _ = served(recipe(method, tmp_path), tmp_path)
    found = model.predict(None, pd.DataFrame({"image": IMAGES}), {"max_new_tokens": 3})
    assert len(found) == 3 and all(isinstance(text, str) for text in found)


def test_images_and_questions_become_answers(tmp_path: Path) -> None:
    config = recipe("guided_vqa", tmp_path)
    model, _ = served(config, tmp_path)
    found = predicted(model, image=IMAGES, text=TEXTS)
    assert len(found) == 3 and set(found) <= set(config.answers)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="give them in a column 'text'"):
        predicted(model, image=IMAGES)


@pytest.mark.parametrize(
    ("modality", "column", "data"),
    [("video-audio", "clip", clip_bytes()), ("image-audio", "image", IMAGES[0])],
)
def test_clips_images_and_sounds_become_vectors(modality: str, column: str, data: bytes, tmp_path: Path) -> None:
    model, stage = served(heard_recipe(modality), tmp_path)
    module, sound = stage.module.eval(), sound_bytes()
    kind = "mp4" if column == "clip" else "png"
    pixels = torch.from_numpy(stage.transform.seen(data, kind))[None]
    heard = stage.transform.listen(sound)
    with torch.no_grad():
        image = module.embed_images(module.encode_images(pixels))
        vector = module.embed_sounds(
            torch.from_numpy(heard["audio_NF"])[None], torch.from_numpy(heard["audio_mask_N"])[None].long()
        )
    np.testing.assert_allclose(np.stack(predicted(model, **{column: [data]})), image, atol=1e-5)
    np.testing.assert_allclose(np.stack(predicted(model, sound=[sound])), vector, atol=1e-5)
