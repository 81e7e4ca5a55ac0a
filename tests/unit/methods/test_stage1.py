"""Stage 1 beyond what every method does: schedules, absent heads, captions of the epoch, retrieval, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.config import load_run
from isthmus.contracts import Sample
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods import method_configs
from isthmus.methods.batching import choose_caption
from isthmus.methods.blip2_stage1_config import LossWeights
from method_cases import batch, build, recipe, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def test_a_loss_left_out_of_a_step_still_gives_its_head_a_zero_gradient(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder, itm_every=2, itg_every=3))
    rows = samples(stage, 4)
    seen = []
    for step in range(4):
        stage.module.zero_grad()
        terms = stage.module(batch(stage, rows, step))
        terms.total.backward()
        seen.append(set(terms.parts))
        assert all(p.grad is not None for p in stage.module.parameters() if p.requires_grad)
        assert bool(stage.module.itm_head.weight.grad.any()) == ("itm" in seen[-1])
        assert bool(stage.module.qformer.lm_head.dense.weight.grad.any()) == ("itg" in seen[-1])
        if seen[-1] == {"itc"}:
            assert torch.equal(terms.total.detach(), terms.parts["itc"])
    assert seen == [{"itc", "itm", "itg"}, {"itc"}, {"itc", "itm"}, {"itc", "itg"}]


def test_a_loss_without_weight_leaves_no_parameters_behind(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder, weights=LossWeights(itm=0.0, itg=0.0)))
    names = {name for name, _ in stage.module.named_parameters()}
    assert not any("itm_head" in name or "lm_head" in name for name in names)
    stage.module(batch(stage, samples(stage, 4))).total.backward()
    assert {n for n, p in stage.module.named_parameters() if p.grad is not None} == names
    assert set(stage.references(4)) == {"itc"}
    with pytest.raises(ConfigError, match="no matching head"):
        stage.module.match(torch.zeros(1, 5, 192), ["a cat"])
    with pytest.raises(ConfigError, match="cannot caption"):
        stage.module.generate(torch.zeros(1, 5, 192))


def test_loss_weights_scale_the_total_alone(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder, weights=LossWeights(itc=2.0, itm=0.5, itg=3.0)))
    terms = stage.module(batch(stage, samples(stage, 4)))
    expected = 2 * terms.parts["itc"] + 0.5 * terms.parts["itm"] + 3 * terms.parts["itg"]
    torch.testing.assert_close(terms.total.detach(), expected)


def test_one_pair_alone_trains_without_matching(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder))
    terms = stage.module(batch(stage, samples(stage, 1)))
    terms.total.backward()
    assert float(terms.parts["itm"]) == 0.0 and torch.isfinite(terms.total)


@pytest.mark.parametrize("images", [1, 2])
def test_a_batch_of_one_image_says_that_matching_is_left_out(folder: Path, caplog, images: int) -> None:
    """Retrieval fine-tuning with captions of one image only: nothing is a negative."""
    stage = build(recipe("blip2_stage1", folder, itc_same_image=True))
    rows = [replace(row, image_id=i % images) for i, row in enumerate(samples(stage, 4))]
    for step in (4, 5):
        terms = stage.module(batch(stage, rows, step))
    said = [record.getMessage() for record in caplog.records if "ITM is left out" in record.getMessage()]
    assert float(terms.parts["itm"]) > 0.0 if images == 2 else float(terms.parts["itm"]) == 0.0
    assert len(said) == (images == 1)  # once, not at every step
    assert all("step 4" in text and "sample ids [0, 1, 2, 3]" in text and "train.global_batch" in text for text in said)


@pytest.mark.parametrize("method", ["blip2_stage1", "projector", "blip2_stage2"])
def test_a_global_batch_of_one_is_refused_where_pairs_are_contrasted(method: str) -> None:
    values = {"name": "x", "method": {"name": method}, "data": {"train": "d"}, "cluster": {"workers": 1}}
    values["train"] = {"steps": 1, "global_batch": 1}
    if method == "blip2_stage2":  # its loss needs no other pair
        assert load_run(None, values=values, methods=method_configs()).train.global_batch == 1
        return
    with pytest.raises(ConfigError, match=rf"global_batch 1 is too small: {method} .* at least 2"):
        load_run(None, values=values, methods=method_configs())
    values["train"]["global_batch"] = 2
    assert load_run(None, values=values, methods=method_configs()).train.global_batch == 2


@pytest.mark.parametrize("key", ["gradient_accumulation", "gradient_accumulation_steps", "accumulate"])
def test_gradient_accumulation_is_refused_as_an_unknown_field(key: str) -> None:
    """Two half batches are not one batch: each row would be contrasted with half as many others."""
    values = {"name": "x", "method": {"name": "blip2_stage1"}, "data": {"train": "d"}, "train": {"steps": 1, key: 2}}
    with pytest.raises(ConfigError, match=key):
        load_run(None, values=values, methods=method_configs())


def test_two_half_batches_are_not_one_batch(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder))
    rows = samples(stage, 8)
    whole = stage.module(batch(stage, rows)).parts["itc"]
    halves = [stage.module(batch(stage, part)).parts["itc"] for part in (rows[:4], rows[4:])]
    assert float(whole) - float(sum(halves) / 2) > 0.3  # near ln 8 against near ln 4


def test_each_epoch_draws_its_caption_by_number_alone() -> None:
    sample = Sample(12345, "k", tuple(f"caption {i}" for i in range(5)))
    drawn = [choose_caption(sample, 0, epoch) for epoch in range(100)]
    assert drawn == [choose_caption(sample, 0, epoch) for epoch in range(100)]
    assert len(set(drawn)) == 5 and drawn != [choose_caption(sample, 1, epoch) for epoch in range(100)]
    other = replace(sample, id=12346)
    assert drawn != [choose_caption(other, 0, epoch) for epoch in range(100)]
    assert choose_caption(replace(sample, captions=()), 0, 0) == ""


def test_collating_cleans_tokenises_and_marks_padding(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder))
    rows = samples(stage, 2)
    rows[0] = replace(rows[0], captions=("A RED  cat!",))
    made = stage.collate([*rows, replace(rows[0], id=-1, captions=("",))], 0, 7)
    assert made.texts[0] == "a red cat" and made.valid_B.tolist() == [True, True, False] and made.step == 7
    assert made.ids_BT.shape[1] == int(made.mask_BT.sum(1).max())
    missing = stage.collate([rows[0], replace(rows[1], features_ND=None)], 0, 0)
    assert missing.valid_B.tolist() == [True, False] and not missing.features_BND[1].any()


def test_it_learns_to_tell_pairs_apart(folder: Path) -> None:
    """Eight pairs, learnt by heart: contrast, matching and captions must all get there."""
    stage = build(recipe("blip2_stage1", folder, label_smoothing=0.0))
    module, rows = stage.module.train(), samples(stage, 8)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        terms = module(batch(stage, rows, step))
        terms.total.backward()
        optimizer.step()
    module.eval()
    features = torch.stack([torch.from_numpy(row.features_ND) for row in rows])
    texts = [row.captions[0] for row in rows]
    sims = torch.einsum("iqe,je->ijq", module.embed_images(features), module.embed_texts(texts)).amax(-1)
    assert sims.argmax(1).tolist() == sims.argmax(0).tolist() == list(range(8))
    own, other = module.match(features, texts), module.match(features, texts[1:] + texts[:1])
    assert (own > 0).float().mean() > 0.8 and (own > other).all()
    assert module.generate(features, max_new_tokens=20)[0] == texts[0]


def test_half_precision_parameters_stay_close(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder))
    made = batch(stage, samples(stage, 6))
    with torch.no_grad():
        exact = stage.module(made)
        half = stage.module.to(torch.bfloat16)(made)
    for name in exact.parts:
        assert float(half.parts[name]) == pytest.approx(float(exact.parts[name]), abs=0.05), name


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    config = recipe("blip2_stage1", folder)
    with pytest.raises(WeightsError, match=r"qformer\.width 48 against 32"):
        build(config.model_copy(update={"qformer": config.qformer.model_copy(update={"width": 48})}))
    with pytest.raises(ConfigError, match="'bert' is not known"):
        build(config.model_copy(update={"qformer": config.qformer.model_copy(update={"init": "bert"})}))
    values = {
        "name": "x",
        "method": {"name": "blip2_stage1", "qformer": {"width": 10, "heads": 4}},
        "data": {"train": "d"},
        "train": {"steps": 1},
    }
    with pytest.raises(ConfigError, match="does not divide among"):
        load_run(None, values=values, methods=method_configs())


def test_a_random_start_takes_any_shape(folder: Path) -> None:
    config = recipe("blip2_stage1", folder)
    shape = config.qformer.model_copy(update={"width": 24, "layers": 3, "init": None})
    module = build(config.model_copy(update={"qformer": shape})).module
    assert module.qformer.queries.shape == (1, 4, 24) and len(module.qformer.layers) == 3


def test_texts_of_another_length_and_the_margin_of_a_match(folder: Path) -> None:
    stage = build(recipe("blip2_stage1", folder))
    module = stage.module.eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    long = ["a red cat and two dogs sitting in a large green house", "a red cat and two dogs sitting in a boat"]
    full, cut = module.embed_texts(long), module.embed_texts(long, max_length=6)
    assert not torch.allclose(full[0], full[1]) and torch.equal(cut[0], cut[1])
    features = torch.randn(2, stage.image_spec["tokens"], stage.image_spec["width"])
    logit, margin = module.match(features, long), module.match_margin(features, long)
    assert logit.shape == margin.shape == (2,) and not torch.allclose(logit, margin)
    same = features[:1].expand(2, -1, -1)
    for score in (module.match, module.match_margin):
        assert not torch.allclose(*score(same, long).unbind(), atol=1e-3)
        torch.testing.assert_close(*score(same, long, max_length=6).unbind())
    with pytest.raises(ConfigError, match="takes no prompt"):
        module.generate(features, prompt=["", "a"])
