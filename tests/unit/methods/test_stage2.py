"""Stage 2: what it inherits, what it drops, what takes loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.errors import ConfigError, WeightsError
from isthmus.methods.artefact import save_artefact
from isthmus.methods.blip2_stage2 import NEW, in_text_branch, resolve
from isthmus.models.freezing import owned_state
from method_cases import QFORMER, batch, build, recipe, run_config, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def parent(folder: Path) -> Path:
    config = recipe("blip2_stage1", folder)
    stage = build(config, with_vision=True)
    with torch.no_grad():
        for p in stage.module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    save_artefact(folder / "stage1", owned_state(stage.module), run_config(config), stage, {})
    return folder / "stage1"


def test_it_takes_the_query_side_and_drops_exactly_the_text_side(folder: Path, parent: Path) -> None:
    config = recipe("blip2_stage2", folder, vision=None, qformer=None)
    stage = build(config, parent=str(parent))
    from isthmus.methods.artefact import read_state

    theirs, ours = read_state(parent), owned_state(stage.module)
    assert set(ours) - set(theirs) == NEW
    assert {name for name in theirs if in_text_branch(name)} == set(theirs) - set(ours)
    for name in set(ours) & set(theirs):
        assert torch.equal(ours[name], theirs[name]), name
    assert not any("text_ffn" in name or "words" in name for name in ours)


def test_the_recipe_is_filled_in_from_the_parents(folder: Path) -> None:
    stage1, config = recipe("blip2_stage1", folder), recipe("blip2_stage2", folder, vision=None, qformer=None)
    filled = resolve(config, run_config(stage1))
    assert filled.vision == stage1.vision and filled.qformer == QFORMER
    assert resolve(filled, None) == filled
    with pytest.raises(ConfigError, match="names no 'parent'"):
        resolve(config, None)
    other = config.model_copy(update={"qformer": QFORMER.model_copy(update={"queries": 5})})
    with pytest.raises(ConfigError, match=r"method\.qformer differs"):
        resolve(other, run_config(stage1))
    with pytest.raises(ConfigError, match="has no Q-Former"):
        resolve(config, run_config(recipe("projector", folder)))


def test_a_parent_that_does_not_fit_is_refused(folder: Path) -> None:
    module = build(recipe("blip2_stage2", folder)).module
    state = owned_state(module)
    with pytest.raises(WeightsError, match=r"lacks \['qformer.queries'\]"):
        module.load_stage1({k: v for k, v in state.items() if k != "qformer.queries"})
    with pytest.raises(WeightsError, match=r"holds \['stranger'\]"):
        module.load_stage1({**state, "stranger": torch.zeros(1)})
    with pytest.raises(WeightsError, match="this stage needs"):
        module.load_stage1({**state, "qformer.queries": torch.zeros(1, 9, 32)})


def test_queries_prompt_and_padding_take_no_loss(folder: Path) -> None:
    config = recipe("blip2_stage2", folder)
    language = config.language.model_copy(update={"prompt": "a photo of"})
    stage = build(config.model_copy(update={"language": language}))
    made = batch(stage, samples(stage, 4))
    assert (made.labels_BT[made.mask_BT == 0] == -100).all()
    ids = stage.module.language.tokenizer("a photo of")["input_ids"]
    assert (made.labels_BT[:, : len(ids)] == -100).all() and (made.labels_BT[:, len(ids)] != -100).all()
    with torch.no_grad():
        plain = stage.module(made).total
        other = stage.module(replace(made, ids_BT=made.ids_BT.masked_fill(made.mask_BT == 0, 9))).total
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)


def test_captions_depend_on_the_image_and_are_repeatable(folder: Path) -> None:
    stage = build(recipe("blip2_stage2", folder))
    module = stage.module.eval()
    with torch.no_grad():
        for p in module.qformer.parameters():  # the start's small weights barely read the image
            p.normal_(0.0, 0.3)
        module.projection.weight.mul_(20)
    features = torch.randn(4, stage.image_spec["tokens"], stage.image_spec["width"])
    captions = module.generate(features, max_new_tokens=6)
    assert captions == module.generate(features, max_new_tokens=6) and len(set(captions)) > 1
    assert captions[2:] == module.generate(features[2:], max_new_tokens=6)


def test_each_image_may_have_its_own_prompt(folder: Path) -> None:
    config = recipe("blip2_stage2", folder)
    own = config.language.model_copy(update={"prompt": "a photo of"})
    stage = build(config.model_copy(update={"language": own}))
    module = stage.module.eval()
    with torch.no_grad():
        for p in module.qformer.parameters():
            p.normal_(0.0, 0.3)
        module.projection.weight.mul_(20)
    features = torch.randn(4, stage.image_spec["tokens"], stage.image_spec["width"])
    prompts = ["a red cat sitting on", "", "the", "two dogs"]
    settings = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": -1.0}
    together = module.generate(features, prompt=prompts, **settings)
    for row, prompt in enumerate(prompts):  # an empty one is the recipe's own, as for all images at once
        assert module.generate(features[row : row + 1], prompt=prompt or "a photo of", **settings) == [together[row]]
    assert together != module.generate(features, prompt=prompts[::-1], **settings)
    with pytest.raises(ConfigError, match="2 prompts were given for 4 images"):
        module.generate(features, prompt=["a", "b"])


def test_the_language_models_dropout_sleeps_unless_it_is_asked_for(folder: Path) -> None:
    from isthmus.testing.backbones import tiny_lm

    opt = tiny_lm(folder / "opt", "opt")
    for wanted in (False, True):
        config = recipe("blip2_stage2", folder, language=opt.model_copy(update={"dropout": wanted}))
        stage = build(config)
        module, made = stage.module.train(), batch(stage, samples(stage, 4))
        torch.manual_seed(0)
        losses = [float(module(made).total.detach()) for _ in range(2)]
        assert (losses[0] != losses[1]) == wanted
