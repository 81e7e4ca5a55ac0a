"""Contrast and cross-attention together: nothing leaks, each option does what it says, and pairs are learnt."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from isthmus.contracts import Batch, LocalComm, Stage
from isthmus.errors import ConfigError
from isthmus.methods.co_optimise_config import (
    AttentionConfig,
    CoOptimiseConfig,
    CrossConfig,
    MatchConfig,
    WeightingConfig,
)
from isthmus.methods.co_optimise_model import flat
from isthmus.methods.co_optimise_objective import WATCHED_EVERY, CoOptimise
from isthmus.methods.sides import ImageSide, Tokens
from method_cases import batch, build, moved, recipe, samples

NO_ITM = MatchConfig()
LITERAL = {
    "attention": AttentionConfig(projections=False),
    "cross": CrossConfig(loss="literal", reduction="sum"),
    "itm": NO_ITM,
    "symmetric": False,
    "normalise": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def stage_of(folder: Path, **changes: Any) -> Stage:
    return build(recipe("co_optimise", folder, **changes))


def step(stage: Stage, count: int = 6, **at: int) -> Any:
    return stage.module.train()(batch(stage, samples(stage, count), **at))


# ------------------------------------------------------------------------------------------------------- the leak


def pooled_beside(module: Any, stage: Stage, partner: str, fused: bool = False) -> torch.Tensor:
    """The images' vectors for the contrast, in the company of these texts."""
    rows = [replace(row, captions=(partner,)) for row in samples(stage, 3)]
    made = batch(stage, rows)
    with torch.no_grad():
        found = module._project(module._read(made), made)
        if not fused:
            return found.first_BE
        seen = module.first_asks(*flat(found.first), *flat(found.second))
        return (found.first.values_BND + seen).mean(1)


def test_the_contrasts_vectors_do_not_know_the_partner(folder: Path) -> None:
    stage = stage_of(folder)
    moved(stage.module)
    vectors = [pooled_beside(stage.module, stage, text) for text in ("a red cat", "two dogs on a car")]
    assert torch.equal(*vectors)
    leaking = [pooled_beside(stage.module, stage, text, fused=True) for text in ("a red cat", "two dogs on a car")]
    assert not torch.allclose(*leaking, atol=1e-3), "the test could not have seen a leak"


def test_the_contrast_of_the_forward_pass_is_on_unfused_vectors(folder: Path) -> None:
    """As by hand from what retrieval reads; a forward pass that pooled fused tokens would give another loss."""
    stage = stage_of(folder, beta=0.3)
    moved(stage.module)
    module, rows = stage.module.eval(), samples(stage, 6)
    made = batch(stage, rows)
    images = module.embed_images(made.features_BND)[:, 0]
    texts = module.embed_texts([row.captions[0] for row in rows])
    logits = images @ texts.T * module.logit_scale.exp().clamp(max=100)
    target = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    with torch.no_grad():
        assert float(module(made).parts["contrast"]) == pytest.approx(float(expected.detach()), abs=1e-5)


# ----------------------------------------------------------------------------------------------------- the losses


def test_to_the_letter(folder: Path) -> None:
    """Parameter-free attention, summed squared norms, images looking for texts alone: the method's own formulas."""
    stage = stage_of(folder, **LITERAL, alpha=0.7, beta=0.2)
    module, made = stage.module.train(), batch(stage, samples(stage, 5))
    terms = module(made)
    image = stage.module.sides[0].read(made, None).values_BND @ module.projection.first.linear.weight.T
    image = image + module.projection.first.linear.bias
    text = module.sides[1].read(made, None)
    words = text.values_BND @ module.projection.second.linear.weight.T + module.projection.second.linear.bias
    cross, vectors = 0.0, []
    for b in range(5):
        x, y = image[b], words[b, text.mask_BN[b]]
        scores = x @ y.T / x.shape[1] ** 0.5
        cross = cross + (scores.softmax(-1) @ y).square().sum() + (scores.T.softmax(-1) @ x).square().sum()
        vectors.append([torch.nn.functional.normalize(z.mean(0), dim=0) for z in (x, y)])
    g_v, g_t = (torch.stack(side) for side in zip(*vectors, strict=True))
    contrast = torch.nn.functional.cross_entropy(g_v @ g_t.T / 0.07, torch.arange(5))
    assert float(terms.parts["cross"]) == pytest.approx(float(cross.detach() / 5), rel=1e-5)
    assert float(terms.parts["contrast"]) == pytest.approx(float(contrast.detach()), rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(float((0.7 * contrast + 0.2 * cross / 5).detach()), rel=1e-5)


def test_fused_tokens_start_as_the_tokens_themselves(folder: Path) -> None:
    terms = step(stage_of(folder))
    assert float(terms.metrics["attended_first"]) == float(terms.metrics["attended_second"]) == 0.0
    assert float(terms.parts["cross"]) == pytest.approx(2.0, abs=1e-3)
    awake = step(stage_of(folder, attention=AttentionConfig(heads=4, zero_init=False)))
    assert float(awake.metrics["attended_first"]) > 0.01


@pytest.mark.parametrize(
    ("changes", "parts", "without"),
    [
        ({"beta": 0.0, "itm": NO_ITM}, {"contrast"}, ("first_asks", "itm_head")),
        ({"alpha": 0.0}, {"cross", "itm"}, ("logit_scale",)),
        ({"alpha": 0.0, "beta": 0.0}, {"itm"}, ("logit_scale",)),
        ({"alpha": 0.0, "beta": 0.0, "itm": MatchConfig(weight=1, reads="pooled")}, {"itm"}, ("first_asks",)),
        ({"shared": False}, {"contrast", "cross", "itm"}, ()),
        ({"schedule": "alternate"}, {"contrast", "cross", "itm"}, ()),
        ({"cross": CrossConfig(margin=0.2), "itm": NO_ITM}, {"contrast", "cross"}, ("itm_head",)),
        ({"weighting": WeightingConfig(kind="uncertainty")}, {"contrast", "cross", "itm"}, ()),
        ({"attention": AttentionConfig(kind="top_k", top_k=2, heads=4)}, {"contrast", "cross", "itm"}, ()),
        ({"attention": AttentionConfig(kind="favor", features=32, heads=4)}, {"contrast", "cross", "itm"}, ()),
        ({"projection": "mlp", "dropout": 0.2}, {"contrast", "cross", "itm"}, ()),
    ],
)
def test_what_an_option_leaves_out_is_not_there_and_all_else_is_trained(
    folder: Path, changes: dict[str, Any], parts: set[str], without: tuple[str, ...]
) -> None:
    stage = stage_of(folder, **changes)
    terms = step(stage)
    assert set(terms.parts) == parts and {f"weight_{name}" for name in parts} <= set(terms.metrics)
    assert set(terms.parts) == set(stage.references(6))
    terms.total.backward()
    trained = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert not [name for name in trained if name.startswith(without)] or not without


def test_branches_of_their_own_do_not_shape_each_other(folder: Path) -> None:
    for shared in (True, False):
        module = (stage := stage_of(folder, shared=shared, beta=1.0)).module
        moved(module)
        step(stage).total.backward()
        both = module.projection.first.linear.weight.grad.clone()
        alone = (stage := stage_of(folder, beta=0.0, itm=NO_ITM)).module
        alone.load_state_dict(module.state_dict(), strict=False)
        step(stage).total.backward()
        assert torch.allclose(both, alone.projection.first.linear.weight.grad, atol=1e-6) == (not shared)


def test_alternating_losses_take_turns(folder: Path) -> None:
    stage = stage_of(folder, schedule="alternate", alpha=0.5, beta=2.0, itm=NO_ITM)
    for number in range(2):
        terms = step(stage, step=number)
        weighted = {"contrast": 0.5, "cross": 2.0}
        name = ("contrast", "cross")[number]
        assert float(terms.total.detach()) == pytest.approx(weighted[name] * float(terms.parts[name]))


def test_the_margin_asks_for_a_better_own_pair(folder: Path) -> None:
    plain, strict = (stage_of(folder, cross=CrossConfig(margin=margin), itm=NO_ITM) for margin in (0.0, 0.4))
    # Nothing is attended to at the start, so nothing agrees with anything, and all of the margin is missing.
    gap = float(step(strict).parts["cross"]) - float(step(plain).parts["cross"])
    assert gap == pytest.approx(0.4, abs=1e-5)


@pytest.mark.parametrize("pooled_reads", ["fused", "pooled"])
def test_matching_without_a_contrast_draws_any_partner_but_the_own(folder: Path, pooled_reads: str) -> None:
    stage = stage_of(folder, alpha=0.0, beta=0.0, itm=MatchConfig(weight=1.0, reads=pooled_reads))
    made = batch(stage, samples(stage, 6), padding=1)
    drawn = set()
    for number in range(60):
        found = stage.module._negatives(None, replace(made, step=number))
        assert found.counted_B.tolist() == [True] * 5 + [False]
        drawn |= {(row, int(other)) for row, other in enumerate(found.text_B[:5])}
    assert drawn == {(a, b) for a in range(5) for b in range(5) if a != b}


def test_a_collapse_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = stage_of(folder).module.train()
    shares = [0.0, 0.004, 0.3, 0.28, 0.01, 0.005]  # a start from zero is no collapse
    with caplog.at_level(logging.WARNING):
        for number, share in enumerate(shares):
            module._watch(1, torch.tensor(share), number * WATCHED_EVERY)
            assert len(caplog.records) == (number >= 4)
    assert "second side has collapsed" in caplog.text


def test_the_literal_loss_collapses_in_training_and_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shares = {}
    for loss in ("literal", "aligned"):
        caplog.clear()
        attention = AttentionConfig(heads=4, zero_init=False)
        stage = stage_of(folder, cross=CrossConfig(loss=loss), attention=attention, itm=NO_ITM)
        optimizer = torch.optim.Adam([p for p in stage.module.parameters() if p.requires_grad], 2e-2)
        with caplog.at_level(logging.WARNING):
            for number in range(121):
                optimizer.zero_grad()
                terms = step(stage, 8, step=number)
                terms.total.backward()
                optimizer.step()
        shares[loss] = float(terms.metrics["attended_second"])
        assert ("has collapsed" in caplog.text) == (loss == "literal")
    assert shares["literal"] < 0.05 and shares["aligned"] > 0.2


# ------------------------------------------------------------------------------------------------------ inference


def test_the_second_stage_adds_gamma_times_the_agreement(folder: Path) -> None:
    texts = ["a red cat", "two dogs running on the grass left of a house"]
    modules = [stage_of(folder, gamma=gamma, itm=NO_ITM).module for gamma in (1.0, 2.5)]
    for module in modules:
        moved(module)
    features = torch.randn(2, 5, 192)
    once, more = (module.eval().match(features, texts) for module in modules)
    torch.testing.assert_close(2.5 * once, more)
    assert once.abs().max() <= 1.0 and once.abs().min() > 0
    alone = [modules[0].match(features[i : i + 1], texts[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), once, rtol=0, atol=1e-5)  # company, and so padding, changes nothing


def test_an_image_in_succession_is_projected_once(folder: Path) -> None:
    module = stage_of(folder).module.eval()
    moved(module)
    features, texts = torch.randn(3, 5, 192), ["a red cat", "two dogs", "the moon", "blue fish", "a large tree"]
    rows, seen = [0, 0, 2, 1, 1], []
    module.projection.first.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    together = module.match(features[rows], texts)
    assert seen == [3]
    alone = [module.match(features[[row]], [text]) for row, text in zip(rows, texts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_what_a_model_was_not_trained_for_is_refused(folder: Path) -> None:
    features, texts = torch.randn(2, 5, 192), ["a cat", "a dog"]
    contrast = stage_of(folder, beta=0.0, itm=NO_ITM).module
    with pytest.raises(ConfigError, match="contrast alone"):
        contrast.match(features, texts)
    matching = stage_of(folder, alpha=0.0, beta=0.0).module
    for ask in (lambda: matching.embed_images(features), lambda: matching.embed_texts(texts)):
        with pytest.raises(ConfigError, match="rerank: all"):
            ask()
    assert contrast.contrasts and not matching.contrasts
    with pytest.raises(ConfigError, match="no matching head"):
        contrast.match_margin(features, texts)
    assert matching.match_margin(features, texts).shape == (2,)


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"alpha": 0, "beta": 0}, "nothing to learn"),
        ({"embed": 20, "attention": {"heads": 8}}, "does not divide"),
        ({"attention": {"kind": "banded"}}, "two sides in time"),
        ({"attention": {"zero_init": True}, "cross": {"loss": "literal"}}, "nothing is learnt"),
        ({"attention": {"projections": False, "zero_init": True}}, "has none"),
        ({"cross": {"loss": "literal", "margin": 0.1}}, "margin"),
        ({"schedule": "alternate", "weighting": {"kind": "dwa"}}, "weighting of its own"),
        ({"schedule": "alternate", "beta": 0}, "take turns"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(section: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        CoOptimiseConfig.model_validate(section)


# ----------------------------------------------------------------------------------------------- a planted relation


class Given(ImageSide):
    """A side whose tokens a test hands over, under another role."""

    def __init__(self, role: str, width: int) -> None:
        super().__init__(None, width)
        self.role = role

    def read(self, batch: Batch, rows: int | None) -> Tokens:
        return self.given(batch.features_BND if self.role == "vision" else batch.pixels_BCHW)


def planted(pairs: int, seed: int, shuffled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of three of twelve objects, and their sounds in another order: a token each, in two unrelated spaces."""
    random = np.random.default_rng(seed)
    spaces = [np.random.default_rng(99 + side).standard_normal((12, 20)) for side in range(2)]
    objects = np.stack([random.permutation(12)[:3] for _ in range(pairs)])
    heard = np.stack([random.permutation(row) for row in (random.permutation(objects) if shuffled else objects)])
    noise = random.standard_normal((2, pairs, 3, 20)) * 0.3
    return tuple(
        torch.tensor(space[rows] + noise[side], dtype=torch.float32)
        for side, (space, rows) in enumerate(zip(spaces, (objects, heard), strict=True))
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_scenes_and_their_sounds_are_learnt_and_shuffled_ones_are_not(shuffled: bool) -> None:
    config = CoOptimiseConfig(embed=32, attention=AttentionConfig(heads=4), itm=MatchConfig(weight=0.5))
    torch.manual_seed(0)
    module = CoOptimise(config, Given("vision", 20), Given("audio", 20), LocalComm(), 0).train()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    seen, heard = planted(512, 1, shuffled)
    for number in range(250):
        rows = torch.randperm(512)[:64]
        made = Batch(rows, torch.ones(64, dtype=torch.bool), number, 0, heard[rows], seen[rows])
        optimizer.zero_grad()
        module(made).total.backward()
        optimizer.step()
    module.eval()
    seen, heard = planted(200, 2)  # 220 kinds of scene, so some are alike
    tokens = [side.given(x) for side, x in zip(module.sides, (seen, heard), strict=True)]
    vectors = [module.vectors(number, tokens[number]) for number in range(2)]
    sims = vectors[0] @ vectors[1].T
    first = float((sims.argsort(1, descending=True)[:, :5] == torch.arange(200).unsqueeze(1)).any(1).float().mean())
    other = Tokens(tokens[1].values_BND.roll(1, 0), tokens[1].mask_BN)
    better = float((module.scores(tokens[0], tokens[1]) > module.scores(tokens[0], other)).float().mean())
    if shuffled:
        assert first < 0.08 and 0.3 < better < 0.7
    else:
        assert first > 0.9 and better > 0.95


def test_sides_need_something_to_read(folder: Path) -> None:
    bare = Batch(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no features"):
        ImageSide(None, 4).read(bare, None)
