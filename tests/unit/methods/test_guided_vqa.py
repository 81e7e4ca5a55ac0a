"""Questions as classification: the vocabulary of the data, soft targets, the start from a parent, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.config import DataConfig
from isthmus.contracts import Question, Sample
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.questions import frequent_answers, parse_questions
from isthmus.data.sources.easy_vqa import caption
from isthmus.data.stream import train_batches
from isthmus.errors import ConfigError, DataError, WeightsError
from isthmus.methods.artefact import save_artefact
from isthmus.methods.guided_vqa import GuidedVqaConfig, resolve, soft_target, survey
from isthmus.models.freezing import owned_state
from isthmus.testing.shards import make_dataset
from method_cases import ANSWERS, GUIDED, batch, build, moved, recipe, run_config, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = make_dataset(tmp_path_factory.mktemp("data") / "d", 12, answers=("cat", "Dog ", "cat"))
    index(str(root))
    return str(root)


def test_the_classes_are_the_data_s_frequent_answers_and_stay_in_the_recipe(data: str, folder: Path) -> None:
    assert frequent_answers([data], 1, 10) == ("yes", "cat", "dog")
    assert frequent_answers([data], 5, 10) == ("yes", "cat") and frequent_answers([data], 1, 1) == ("yes",)
    with pytest.raises(DataError, match="no answer is given 50 times"):
        frequent_answers([data], 50, 10)
    config = recipe("guided_vqa", folder).model_copy(update={"answers": (), "least_answers": 4})
    found = survey(config, [data])
    assert found.answers == ("yes", "cat", "dog")
    assert survey(found, ["nowhere"]) is found, "a recipe that names its answers asks no data"
    with pytest.raises(ConfigError, match=r"method\.answers is empty"):
        build(config)


def test_targets_are_soft_and_unknown_answers_no_class(folder: Path) -> None:
    assert [soft_target(n, 10) for n in (0, 1, 3, 4, 10)] == pytest.approx([0, 0.3, 0.9, 1, 1])
    assert soft_target(1, 1) == 1.0 and soft_target(1, 5) == pytest.approx(0.6)
    stage = build(recipe("guided_vqa", folder))
    made = batch(stage, samples(stage, 3))
    assert made.targets_BA[0].tolist() == pytest.approx([1.0, 0.3, 0, 0, 0])
    silent = replace(samples(stage, 1)[0], questions=())
    assert stage.collate([silent, *samples(stage, 2)], 0, 0).valid_B.tolist() == [False, True, True]


def test_each_visit_draws_its_question_by_number_alone(folder: Path) -> None:
    stage = build(recipe("guided_vqa", folder))
    row = samples(stage, 1)[0]
    many = replace(row, questions=tuple(Question(i, f"question {i}", ("cat",)) for i in range(5)))
    drawn = [stage.collate([many], epoch, 0).texts[0] for epoch in range(60)]
    assert drawn == [stage.collate([many], epoch, 9).texts[0] for epoch in range(60)] and len(set(drawn)) == 5


@pytest.mark.parametrize("placement", ["inline", "cached"])
def test_questions_reach_training_wherever_the_images_come_from(
    placement: str, data: str, folder: Path, tmp_path: Path
) -> None:
    from isthmus.data.features import build_cache

    config: Any = recipe("guided_vqa", folder)
    stage = build(config.model_copy(update={"answers": ("yes", "cat", "dog")}))
    settings = {"train": data, "placement": placement}
    if placement == "cached":
        build_cache(data, str(tmp_path / "cache"), config.vision, actors=0)
        settings["cache"] = str(tmp_path / "cache")
    order = Order(12, 4, 0)
    batches = list(train_batches(DataConfig(**settings), stage, order, 0, 1, 0, 3, 0, lambda failure: None))
    ids = {int(i): n for n, i in enumerate(Manifest.load(data).ids)}
    for made in batches:
        assert made.valid_B.all() and (made.features_BND is None) == (placement == "inline")
        for sample, text, target in zip(made.sample_ids_B.tolist(), made.texts, made.targets_BA, strict=True):
            wanted = "yes" if text == "is it a picture" else ("cat", "dog", "cat")[ids[sample] % 3]
            assert target.tolist() == [float(a == wanted) for a in ("yes", "cat", "dog")]


def test_malformed_questions_are_named() -> None:
    for meta, said in (
        ({"questions": "why"}, "is no list"),
        ({"questions": [{"answers": ["a"]}]}, "no text 'question'"),
        ({"questions": [{"question": "why", "answers": [3]}]}, "is no text"),
    ):
        with pytest.raises(DataError, match=said):
            parse_questions(meta, 1, "sample 1")


def test_a_parent_gives_its_streams_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    config = recipe("guided", folder)
    parent = build(config, with_vision=True)
    moved(parent.module)
    save_artefact(tmp_path / "parent", owned_state(parent.module), run_config(config), parent, {})
    child = build(GuidedVqaConfig(answers=ANSWERS), parent=str(tmp_path / "parent"))
    theirs, ours = dict(parent.module.named_parameters()), dict(child.module.named_parameters())
    for name, parameter in ours.items():
        assert name.startswith("classifier.") or torch.equal(parameter, theirs[name]), name
    assert child.module.config.compression == GUIDED["compression"]
    resolved = resolve(GuidedVqaConfig(answers=ANSWERS), run_config(config))
    grand = build(resolved)
    moved(child.module)
    save_artefact(tmp_path / "child", owned_state(child.module), run_config(resolved), grand, {})
    again = build(GuidedVqaConfig(answers=ANSWERS), parent=str(tmp_path / "child"))
    assert torch.equal(again.module.classifier[3].weight, child.module.classifier[3].weight)
    turned = build(GuidedVqaConfig(answers=ANSWERS[::-1]), parent=str(tmp_path / "child"))
    assert not torch.equal(turned.module.classifier[3].weight, child.module.classifier[3].weight), "other classes"
    with pytest.raises(WeightsError, match=r"lacks \['streams"):
        grand.module.load_parent({"itm_head.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="names no 'parent'"):
        resolve(GuidedVqaConfig(), None)
    with pytest.raises(ConfigError, match="is a 'projector' model"):
        resolve(GuidedVqaConfig(), run_config(recipe("projector", folder)))


def test_it_learns_what_the_images_answer(folder: Path) -> None:
    """One question for all images: only the image can tell the answer."""
    stage = build(recipe("guided_vqa", folder))
    random = np.random.default_rng(0)
    rows = [
        Sample(i, f"s{i}", ("x",), features_ND=random.standard_normal((5, 192)).astype(np.float32),
               questions=(Question(i, "what is it?", (ANSWERS[i % 3],)),))
        for i in range(9)
    ]  # fmt: skip
    module = stage.module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        module(batch(stage, rows, step)).total.backward()
        optimizer.step()
    module.eval()
    features = torch.stack([torch.from_numpy(row.features_ND) for row in rows])
    assert module.answer(features, ["What is it?"] * 9) == [ANSWERS[i % 3] for i in range(9)]


def test_easy_vqa_s_sentences_say_only_what_is_affirmed() -> None:
    asked = [("what is the blue shape?", "rectangle"), ("is there a red shape?", "no")]
    assert caption(asked) == "a blue rectangle"
    assert caption([("is there not a circle?", "yes"), ("is a teal shape present?", "yes")]) == "a teal shape"
    assert caption([("is there no circle?", "yes")]) == "a shape"
