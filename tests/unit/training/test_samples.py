"""The sheet of samples: what the methods say of images, and what is drawn."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heard_cases import heard_recipe, heard_samples
from isthmus.contracts import Batch, Stage
from isthmus.methods import METHODS
from isthmus.training.samples import SIDE, Pair, contact_sheet, draw, own_captions
from method_cases import batch, build, recipe, samples

WAYS = {
    "blip2_stage1": {"generated", "matched"}, "blip2_stage2": {"generated"}, "projector": {"matched"},
    "co_optimise": {"matched"}, "guided": {"matched"}, "guided_vqa": {"answered"},
}  # fmt: skip


def made(method: str, folder: Path) -> tuple[Stage, Batch]:
    stage = build(recipe(method, folder), with_vision=True)
    size = stage.image_spec["image_size"]
    found = batch(stage, samples(stage, 7), padding=2)
    torch.manual_seed(0)
    return stage, replace(found, features_BND=None, pixels_BCHW=torch.randn(7, 3, size, size))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_says_what_it_can(method: str, tmp_path: Path) -> None:
    stage, found = made(method, tmp_path)
    sheet = contact_sheet(stage, found, 3, data="nowhere", autocast=None, whole=True)
    pairs = json.loads(sheet["json"])
    assert [pair["id"] for pair in pairs] == [0, 1, 2]
    assert [pair["caption"] for pair in pairs] == list(found.texts[:3])
    for pair in pairs:
        assert set(pair["own"]) == WAYS[method]
        assert pair["own"].get("matched", found.texts[0]) in found.texts
    partitioned = json.loads(contact_sheet(stage, found, 3, data="nowhere", autocast=None, whole=False)["json"])
    assert [pair["own"] for pair in partitioned] == [{}] * 3, "ZeRO 3's parameters lie in pieces"
    with Image.open(io.BytesIO(sheet["png"])) as image:
        assert image.size[1] > 3 * SIDE


def test_matched_is_the_nearest_caption(tmp_path: Path) -> None:
    stage, found = made("projector", tmp_path)
    module = stage.module.eval()
    features_BND = module.encode_images(found.pixels_BCHW)
    texts = list(found.texts)
    scores_BK = module.embed_images(features_BND)[:, 0] @ module.embed_texts(texts).T
    assert own_captions(module, features_BND, texts) == {"matched": [texts[i] for i in scores_BK.argmax(1).tolist()]}


def test_padding_is_not_shown_and_images_are_as_the_model_saw_them(tmp_path: Path) -> None:
    stage, found = made("projector", tmp_path)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (stage.transform.mean, stage.transform.std))
    grey = ((torch.full_like(found.pixels_BCHW, 0.5) - mean) / std).to(torch.float32)
    sheet = contact_sheet(stage, replace(found, pixels_BCHW=grey), 50, data="", autocast=None, whole=False)
    with Image.open(io.BytesIO(sheet["png"])) as image:
        shown = np.asarray(image)
    assert shown[20, 20].tolist() == pytest.approx([127, 127, 127], abs=1)
    assert len(range(0, shown.shape[0] - SIDE, SIDE)) >= 5
    assert sheet["json"].count(b'"id"') == 5, "seven rows, two of them padding"


def test_frames_of_clips_are_shown_in_their_own_colours() -> None:
    stage = build(heard_recipe("video-audio"), with_vision=True)
    grey = np.full((4, *stage.transform.seen_shape), 0.5, np.float32)
    mean, std = (
        np.asarray(v, np.float32).reshape(3, 1, 1) for v in (stage.transform.image.mean, stage.transform.image.std)
    )
    found = replace(
        batch(stage, heard_samples(stage, 4)), features_BND=None, pixels_BCHW=torch.from_numpy((grey - mean) / std)
    )
    sheet = contact_sheet(stage, found, 4, data="", autocast=None, whole=False)
    with Image.open(io.BytesIO(sheet["png"])) as image:
        assert np.asarray(image)[20, 20].tolist() == pytest.approx([127, 127, 127], abs=1)


def test_a_sheet_without_an_image_or_a_caption_is_drawn_all_the_same() -> None:
    with Image.open(io.BytesIO(draw([Pair(1, "", {"generated": "x " * 900})], [None]))) as image:
        assert image.format == "PNG"
    with Image.open(io.BytesIO(draw([], []))) as image:
        assert image.format == "PNG"
