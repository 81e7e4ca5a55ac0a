"""Captions of one image as samples of their own: stage 1 from the shards to its targets and its negatives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import DataConfig
from isthmus.contracts import Batch
from isthmus.data.features import build_cache
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.stream import train_batches
from isthmus.testing.shards import image_bytes, write_tar
from method_cases import CAPTIONS, build, recipe

IMAGES, EACH = 4, 2
ROWS = IMAGES * EACH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    members = {}
    for n in range(ROWS):
        members[f"c{n}.png"] = image_bytes(n // EACH)
        members[f"c{n}.txt"] = CAPTIONS[n].encode()
        members[f"c{n}.json"] = json.dumps({"image_id": f"photo-{n // EACH}.jpg"}).encode()
    write_tar(folder / "data" / "a.tar", members)
    index(str(folder / "data"))
    return folder / "data"


@pytest.mark.parametrize("placement", ["inline", "cached"])
def test_captions_of_one_image_are_positives_and_never_negatives(folder: Path, data: Path, placement: str) -> None:
    config = recipe("blip2_stage1", folder, itc_same_image=True, temperature=0.01)  # peaked, else targets hardly matter
    cache = str(folder / "cache")
    build_cache(str(data), cache, config.vision, actors=0)  # type: ignore[attr-defined]
    where: dict[str, Any] = {"placement": placement, "cache": cache if placement == "cached" else None}
    stage = build(config, with_vision=placement == "inline")
    module: Any = stage.module.eval()
    drawn = []
    mine = module.mine

    def watching(*args: Any, **how: Any) -> Any:
        drawn.append((args[2], mine(*args, **how)))
        return drawn[-1][1]

    module.mine = watching
    order, options = Order(ROWS, ROWS, seed=1), DataConfig(train=str(data), **where)
    manifest = Manifest.load(str(data))
    image_of = {
        int(i): int(key[1:]) // EACH for i, key in zip(manifest.ids, manifest.table["key"].to_pylist(), strict=True)
    }
    for batch in train_batches(options, stage, order, 0, 1, 0, 6, 9, lambda f: None):
        images = torch.tensor([image_of[i] for i in batch.sample_ids_B.tolist()])
        same_BB = images[:, None] == images
        assert torch.equal(batch.image_ids_B[:, None] == batch.image_ids_B, same_BB) and same_BB.sum() == ROWS * EACH
        with torch.no_grad():
            loss = module(batch).parts["itc"]
            expected = soft_itc(module, batch, same_BB)
        torch.testing.assert_close(loss, expected)
        forbidden_BB, found = drawn.pop()
        assert torch.equal(forbidden_BB, same_BB)
        assert not (images[found.image_B] == images).any() and not (images[found.text_B] == images).any()
        assert found.counted_B.all()
        if placement == "inline":  # two views of an image; of two equal ones the losses add up to the same
            with torch.no_grad():
                alone = module(replace(batch, image_ids_B=batch.sample_ids_B)).parts["itc"]
            assert abs(float(alone) - float(expected)) > 1e-3
            drawn.pop()


def soft_itc(module: Any, batch: Batch, same_BB: torch.Tensor) -> torch.Tensor:
    """The loss from the model's own unit vectors, written out: targets in equal parts over an image's columns."""
    images_BQE = module.embed_images(module.image_features(batch))
    texts_BE = module.embed_texts(batch.texts)
    sims_BB = torch.einsum("iqe,te->itq", images_BQE, texts_BE).amax(-1) / module.temperature
    smoothing = module.config.label_smoothing
    targets_BB = (1 - smoothing) * same_BB / same_BB.sum(1, keepdim=True) + smoothing / len(same_BB)
    both = [-(targets_BB * sims.log_softmax(1)).sum(1).mean() for sims in (sims_BB, sims_BB.T)]
    return (both[0] + both[1]) / 2


def test_without_the_option_images_ids_change_nothing(folder: Path, data: Path) -> None:
    stage = build(recipe("blip2_stage1", folder), with_vision=True)
    order, options = Order(ROWS, ROWS, seed=1), DataConfig(train=str(data))
    (batch,) = train_batches(options, stage, order, 0, 1, 0, 1, 9, lambda f: None)
    module = stage.module.eval()
    with torch.no_grad():
        terms = [module(replace(batch, image_ids_B=ids)) for ids in (batch.image_ids_B, batch.sample_ids_B, None)]
    assert all(torch.equal(t.total, terms[0].total) and t.parts == terms[0].parts for t in terms)
