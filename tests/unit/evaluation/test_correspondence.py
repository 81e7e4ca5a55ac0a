"""Both meanings of matching accuracy, on scores whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from heard_cases import heard_recipe
from isthmus.config import EvaluateConfig
from isthmus.contracts import ModelVersion
from isthmus.data.manifest import index
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.correspondence import avc, best_threshold, deranged, similarities
from isthmus.evaluation.driver import evaluate
from isthmus.evaluation.model import Loaded
from isthmus.testing.clips import make_clips
from method_cases import build, moved, recipe


def test_no_clip_is_its_own_wrong_partner_and_each_sound_is_used_once() -> None:
    for count in (8, 9, 50):
        found = avc(torch.rand(count, count), list(range(count)), 0.3, seed=1)
        assert sorted(found.partner_N.tolist()) == list(range(count))
        assert (found.partner_N != np.arange(count)).all()
        # partners are of the same part, so that the tested ones had no part in the threshold
        assert (found.tested_N[found.partner_N] == found.tested_N).all()
        assert found.validation + found.test == count and found.test == found.tested_N.sum()
    assert deranged(np.array([4, 2])).tolist() == [2, 4]


def test_partners_and_parts_depend_on_ids_and_seed_alone() -> None:
    ids, scores = [int(i) for i in np.random.default_rng(0).permutation(40)], torch.rand(40, 40)
    order = np.random.default_rng(1).permutation(40)
    first = avc(scores, ids, 0.3, seed=3)
    again = avc(scores[order][:, order], [ids[n] for n in order], 0.3, seed=3)
    assert again.accuracy == first.accuracy and again.threshold == first.threshold
    partners = {ids[n]: ids[m] for n, m in enumerate(first.partner_N)}
    assert {ids[order[n]]: ids[order[m]] for n, m in enumerate(again.partner_N)} == partners
    assert (avc(scores, ids, 0.3, seed=4).partner_N != first.partner_N).any()


def test_perfect_scores_are_told_and_equal_or_random_ones_are_not() -> None:
    perfect = torch.eye(200) * 0.2 + 0.5
    assert avc(perfect, range(200), 0.3, 0).accuracy == 1.0
    assert avc(-perfect, range(200), 0.3, 0).accuracy == 0.5  # all yes or all no
    assert avc(torch.zeros(200, 200), range(200), 0.3, 0).accuracy == 0.5
    accuracies = [avc(torch.rand(200, 200), range(200), 0.3, seed).accuracy for seed in range(20)]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.03)


def test_the_threshold_is_the_best_of_all_there_are() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        right, wrong = random.integers(0, 6, 7).astype(float), random.integers(0, 6, 5).astype(float)

        def told(threshold: float, right=right, wrong=wrong) -> int:
            return int((right >= threshold).sum() + (wrong < threshold).sum())

        assert told(best_threshold(right, wrong)) == max(told(t) for t in np.arange(-0.5, 7, 0.25))
    assert best_threshold(np.array([1.0]), np.array([0.0])) == 0.5


def test_too_few_pairs_and_broken_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="7 pairs are too few"):
        avc(torch.rand(7, 7), range(7), 0.3, 0)
    with pytest.raises(DataError, match="finite"):
        similarities(torch.full((2, 1, 3), torch.nan), torch.ones(2, 3))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_clips(tmp_path_factory.mktemp("clips"), 10)
    index(str(folder))
    return str(folder)


def test_evaluate_reports_both_with_chance_and_counts(clips: str, tmp_path: Path) -> None:
    stage = build(heard_recipe("video-audio"), with_vision=True)
    moved(stage.module)
    loaded = Loaded(ModelVersion("", "", "", "here"), stage.module.eval(), stage.transform)
    config = EvaluateConfig(model="here", data=clips, tasks=("correspondence",), batch=4, out=str(tmp_path))
    found = evaluate(config, loaded=loaded)
    assert found["avc_accuracy_chance"] == 0.5 and found["one_of_n_at_1_chance"] == 0.1
    assert (found["pairs"], found["avc_clips_for_threshold"], found["avc_pairs_tested"]) == (10, 3, 14)
    assert 0 <= found["seen_to_heard_at_1"] <= found["seen_to_heard_at_5"] <= found["seen_to_heard_at_10"] == 1.0
    assert evaluate(config.model_copy(update={"batch": 10}), loaded=loaded)["avc_auc"] == found["avc_auc"]
    assert (tmp_path / "rows.parquet").exists()


def test_models_of_texts_and_tasks_of_texts_are_refused(clips: str, tmp_path: Path) -> None:
    for config, task in ((recipe("projector", tmp_path), "correspondence"), (heard_recipe("video-audio"), "retrieval")):
        stage = build(config, with_vision=True)
        loaded = Loaded(ModelVersion("", "", "", "here"), stage.module.eval(), stage.transform)
        asked = EvaluateConfig(model="here", data=clips, tasks=(task,))
        with pytest.raises(ConfigError, match=f"cannot do {task}"):
            evaluate(asked, loaded=loaded)


def test_a_model_that_only_matches_has_no_vectors_to_compare(clips: str) -> None:
    stage = build(heard_recipe("video-audio", alpha=0.0), with_vision=True)
    loaded = Loaded(ModelVersion("", "", "", "here"), stage.module.eval(), stage.transform)
    with pytest.raises(ConfigError, match="cannot do correspondence so: it was trained to match pairs"):
        evaluate(EvaluateConfig(model="here", data=clips, tasks=("correspondence",)), loaded=loaded)
