"""What every method must do, whatever it is: freeze exactly, save and come back, be a pure function of its inputs."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from isthmus.config import load_run, to_yaml
from isthmus.contracts import Answers, Base, Captions, Embeds, Matches, Sees
from isthmus.errors import RegistryError, WeightsError
from isthmus.methods import METHODS, method_configs
from isthmus.methods.artefact import load_artefact, save_artefact
from isthmus.models.freezing import owned_state, state_digest
from method_cases import batch, build, recipe, run_config, samples, saying

EVERY = pytest.mark.parametrize("method", sorted(METHODS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@EVERY
def test_exactly_the_trainable_parameters_get_gradients_and_change(method: str, folder: Path) -> None:
    stage = build(recipe(method, folder), with_vision=True)
    module = stage.module.train()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    assert frozen and trained and all(not name.startswith(("vision.", "text.", "language.")) for name in trained)
    pixels = torch.randn(6, 3, 32, 32)
    # What guides a fused token alone has a gradient of 1e-7, which a smaller step would round away beside weights of 1.
    lr = 1.0 if method == "guided_vqa" else 0.1
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    for step in range(3):
        made = batch(stage, samples(stage, 6), step)
        optimizer.zero_grad()
        module(replace(made, features_BND=None, pixels_BCHW=pixels)).total.backward()
        with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
        assert with_gradient == set(trained)
        optimizer.step()
    for name, p in module.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
        # A key bias adds one number to all scores of a softmax, so it cannot be learnt: zero gradient by mathematics.
        elif not name.endswith("key.bias"):
            assert not torch.equal(p, trained[name]), name


@EVERY
def test_batches_may_be_made_in_another_thread(method: str, folder: Path) -> None:
    """As in training, where the next batches are made while a step runs: tokenizers are not shared between the two."""
    stage = build(recipe(method, folder), with_vision=False)
    memory = getattr(stage.module, "memory", None)
    made = batch(stage, samples(stage, 6), 0)
    stop, faults = threading.Event(), []

    def keep_making() -> None:
        while not stop.is_set():
            try:
                batch(stage, samples(stage, 6), 0)
            except Exception as error:
                faults.append(error)

    thread = threading.Thread(target=keep_making)
    thread.start()
    try:
        with torch.no_grad():
            for _ in range(60):
                if memory is not None:
                    memory._kept.clear()  # so that the forward tokenises
                stage.module(made)
    finally:
        stop.set()
        thread.join()
    assert not faults


@EVERY
def test_frozen_parts_stay_in_eval(method: str, folder: Path) -> None:
    module = build(recipe(method, folder), with_vision=True).module.train()
    for name, part in module.named_modules():
        parameters = list(part.parameters())
        if parameters:
            assert part.training == any(p.requires_grad for p in parameters), name


@EVERY
def test_losses_have_references_and_start_near_chance_or_above_floor(method: str, folder: Path) -> None:
    stage = build(recipe(method, folder))
    with torch.no_grad():
        terms = stage.module(batch(stage, samples(stage, 8)))
    references = stage.references(8)
    assert set(terms.parts) == set(references)
    for name, value in terms.parts.items():
        assert references[name].floor < float(value) < 2 * references[name].chance + 2, name
    assert not any(t.requires_grad for t in (*terms.parts.values(), *terms.metrics.values()))


@EVERY
def test_a_padding_row_changes_nothing(method: str, folder: Path) -> None:
    stage = build(recipe(method, folder))
    rows = samples(stage, 6)
    with torch.no_grad():
        plain = stage.module(batch(stage, rows))
        padded = stage.module(batch(stage, [*rows, rows[0], rows[3]], padding=2))
    for name in plain.parts:
        torch.testing.assert_close(padded.parts[name], plain.parts[name], rtol=0, atol=2e-5)


@EVERY
def test_building_twice_gives_the_same_start(method: str, folder: Path) -> None:
    torch.manual_seed(1)
    first = owned_state(build(recipe(method, folder)).module)
    torch.manual_seed(2)
    second = owned_state(build(recipe(method, folder)).module)
    assert state_digest(first) == state_digest(second)


@EVERY
def test_a_recipe_survives_yaml(method: str, folder: Path) -> None:
    run = run_config(recipe(method, folder))
    assert load_run(None, values=yaml.safe_load(to_yaml(run)), methods=method_configs()) == run


@EVERY
def test_saved_and_loaded_models_are_equal(method: str, folder: Path, tmp_path: Path) -> None:
    config = recipe(method, folder)
    stage = build(config, with_vision=True)
    with torch.no_grad():
        for p in stage.module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    save_artefact(tmp_path, owned_state(stage.module), run_config(config), stage, {"data": "d" * 8})
    back = load_artefact(tmp_path)
    assert back.recipe.method == config and back.lineage == {"data": "d" * 8}
    assert [base.role for base in back.bases] == [base.role for base in stage.bases]
    assert not back.stage.module.training
    assert state_digest(owned_state(back.stage.module)) == state_digest(owned_state(stage.module))
    rows = batch(stage, samples(stage, 4))
    with torch.no_grad():
        pair = [m(rows).total for m in (stage.module.eval(), back.stage.module)]
    assert torch.equal(*pair)


def test_a_model_on_other_frozen_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    config = recipe("projector", folder)
    stage = build(config)
    bases = [Base(base.role, base.weights, "f" * 64) for base in stage.bases]
    save_artefact(tmp_path, owned_state(stage.module), run_config(config), stage, {}, bases=bases)
    with pytest.raises(WeightsError, match="was trained on ffffffffffff"):
        load_artefact(tmp_path, with_vision=False)


def test_incomplete_model_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"recipe\.yaml is missing"):
        load_artefact(tmp_path)
    config = recipe("projector", folder)
    stage = build(config)
    state = owned_state(stage.module)
    with pytest.raises(WeightsError, match="missing"):
        save_artefact(tmp_path, {}, run_config(config), stage, {})
    save_artefact(tmp_path, state, run_config(config), stage, {})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RegistryError, match="is damaged"):
        load_artefact(tmp_path, with_vision=False)


def test_who_can_do_what(folder: Path) -> None:
    modules = {name: build(recipe(name, folder)).module for name in METHODS}
    can = {
        name: [p.__name__ for p in (Answers, Embeds, Matches, Captions, Sees) if isinstance(m, p)]
        for name, m in modules.items()
    }
    assert can == {
        "blip2_stage1": ["Embeds", "Matches", "Captions", "Sees"],
        "blip2_stage2": ["Captions", "Sees"],
        "co_optimise": ["Embeds", "Matches", "Sees"],
        "guided": ["Embeds", "Matches", "Sees"],
        "guided_vqa": ["Answers", "Sees"],
        "projector": ["Embeds", "Sees"],
    }


@EVERY
def test_captions_over_the_limit_are_counted(folder: Path, method: str) -> None:
    stage = build(recipe(method, folder))
    rows = samples(stage, 3)
    limit = 16  # of the small language models
    texts = ("a red cat " * 40, "a cat", " ".join(["cat"] * (limit - 2)))
    rows = [saying(row, text) for row, text in zip(rows, texts, strict=True)]
    assert stage.collate(rows, 0, 0).cut_B.tolist() == [True, False, False]


def test_captions_over_what_bos_and_prompt_leave_are_counted(folder: Path) -> None:
    config = recipe("blip2_stage2", folder)
    changes = {"max_length_of": "text", "prompt": "a photo of"}
    stage = build(config.model_copy(update={"language": config.language.model_copy(update=changes)}))
    rows = samples(stage, 2)
    for i, words in enumerate((16 - 4 - 1, 16 - 4)):  # BOS and three words of prompt, then the end token
        rows[i] = replace(rows[i], captions=(" ".join(["cat"] * words),))
    batch = stage.collate(rows, 0, 0)
    assert batch.cut_B.tolist() == [False, True] and batch.ids_BT.shape == (2, 16)
