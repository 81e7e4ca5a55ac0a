"""Cross-modal guidance beyond what every method does: no text leaks into an image's vector, and pairs are learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import CompressionConfig, TowerConfig, VisionConfig, load_run
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods import method_configs
from isthmus.methods.guided_config import GuidedWeights
from isthmus.models.compressible import Guide
from method_cases import batch, build, moved, recipe, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def stage_of(folder: Path, **changes: Any) -> Any:
    stage = build(recipe("guided", folder, **changes))
    moved(stage.module)
    return stage


def with_other_texts(made: Any) -> Any:
    """The same images, every one with its neighbour's text."""
    return replace(made, ids_BT=made.ids_BT.roll(1, 0), mask_BT=made.mask_BT.roll(1, 0))


def seen_by_contrast(module: Any, made: Any) -> list[torch.Tensor]:
    """What stands for the images in both contrasts, and for the image in masked language modelling."""
    found, _ = module._rows(made.features_BND, made, module.streams.image.schedule(), True)
    return [found.image_BE, found.image_BKE, found.numbers_BK]


def test_an_image_s_vectors_are_bit_identical_whatever_its_text(folder: Path) -> None:
    stage = stage_of(folder)
    made = batch(stage, samples(stage, 6))
    with torch.no_grad():
        ours, theirs = (seen_by_contrast(stage.module, b) for b in (made, with_other_texts(made)))
        embedded = stage.module.embed_images(made.features_BND)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(embedded[:, 0], ours[0])
    assert embedded.shape == (6, 1, 16)


def test_the_leak_would_be_found(folder: Path) -> None:
    """The control: were the contrast's images guided by their own texts, the test above would fail."""
    stage = stage_of(folder)
    made, streams = batch(stage, samples(stage, 6)), stage.module.streams
    finish = streams.image.finish

    def leaking(given: Any) -> list[torch.Tensor]:
        pooled = streams.pooled_text(streams.text(given.ids_BT, given.mask_BT), given.mask_BT)
        guide = Guide(streams.guide(pooled))
        streams.image.finish = lambda trunk, steps, _guide=None: finish(trunk, steps, guide)
        return seen_by_contrast(stage.module, given)

    with torch.no_grad():
        ours, theirs = leaking(made), leaking(with_other_texts(made))
    streams.image.finish = finish
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_masked_words_read_does_not_depend_on_the_hidden_words(folder: Path) -> None:
    stage = stage_of(folder)
    made = batch(stage, samples(stage, 6))
    ids, mask = made.ids_BT, made.mask_BT
    hidden = ids.masked_fill(stage.module.streams.words(ids, mask), stage.module.tokenizer.mask_token_id)
    labels = ids.masked_fill(hidden == ids, -100)
    with torch.no_grad():
        steps = stage.module.streams.image.schedule()
        sums = []
        for own in (ids, ids.roll(1, 0)):  # the text that the streams' own pass reads; the targets stay
            found = stage.module._alone(steps, True, made.features_BND, own, mask, hidden, labels, *[None] * 4)
            sums.append(found.mlm_1)
    assert torch.equal(*sums)


def test_half_of_the_pairs_are_guided_and_the_draw_is_by_row(folder: Path) -> None:
    from isthmus.contracts import LocalComm
    from isthmus.methods.guided_parts import draw_guided

    class SecondRank(LocalComm):
        rank, world_size = 1, 2

    valid = torch.ones(500, dtype=torch.bool)
    config = CompressionConfig()
    drawn = torch.cat([draw_guided(config, valid, 0, step, LocalComm()) for step in range(4)])
    assert float(drawn.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(draw_guided(config, valid[:250], 0, 0, SecondRank()), drawn[250:500])
    never = CompressionConfig(guidance_dropout=1.0)
    assert not draw_guided(never, valid, 0, 0, LocalComm()).any()


def test_guidance_reaches_the_pairs_and_the_overlap_says_so(folder: Path) -> None:
    made: dict[float, Any] = {}
    for share in (0.0, 1.0):
        config = CompressionConfig(layers=(0, 1), keep=(0.5,), guidance_dropout=share)
        stage = stage_of(folder, compression=config)
        with torch.no_grad():
            made[share] = stage.module(batch(stage, samples(stage, 8)))
    assert torch.equal(made[0.0].parts["itc"], made[1.0].parts["itc"])
    assert not torch.equal(made[0.0].parts["itm"], made[1.0].parts["itm"])
    assert 0.0 < float(made[0.0].metrics["guided_overlap"]) < 1.0
    assert {k: float(v) for k, v in made[0.0].metrics.items() if k.startswith("tokens")} == {
        "tokens_layer_0": 4.0, "tokens_layer_1": 3.0,
    }  # fmt: skip


def test_a_loss_left_out_of_a_step_still_gives_a_zero_gradient(folder: Path) -> None:
    stage = build(recipe("guided", folder, pairs_every=2, mlm_every=3))
    seen = []
    for step in range(4):
        stage.module.zero_grad()
        terms = stage.module.train()(batch(stage, samples(stage, 4), step))
        terms.total.backward()
        seen.append(set(terms.parts))
        assert all(p.grad is not None for p in stage.module.parameters() if p.requires_grad)
        assert bool(stage.module.itm_head.weight.grad.any()) == ("itm" in seen[-1])
    plain = {"itc", "loc"}
    assert seen == [plain | {"itm", "rel", "mlm"}, plain, plain | {"itm", "rel"}, plain | {"mlm"}]


def test_the_fusion_encoder_may_wait_for_masked_words_alone(folder: Path) -> None:
    """Pairs are judged by the relational head, which reads nothing that is fused."""
    stage = build(recipe("guided", folder, weights=GuidedWeights(itm=0.0), mlm_every=2))
    for step in (0, 1):
        stage.module.zero_grad()
        stage.module.train()(batch(stage, samples(stage, 4), step)).total.backward()
        found = {name: p.grad for name, p in stage.module.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in found.values())
        assert any(bool(g.any()) for n, g in found.items() if n.startswith("streams.fusion.")) == (step == 0)


@pytest.mark.parametrize("left_out", ["loc", "rel", "itm", "mlm", "itm mlm", "loc rel itm mlm"])
def test_a_loss_without_weight_leaves_no_parameters_behind(folder: Path, left_out: str) -> None:
    gone = dict.fromkeys(left_out.split(), 0.0)
    stage = build(recipe("guided", folder, weights=GuidedWeights(**gone)))
    terms = stage.module(batch(stage, samples(stage, 4)))
    terms.total.backward()
    assert all(p.grad is not None for p in stage.module.parameters() if p.requires_grad)
    assert (stage.module.streams.fusion is None) == ({"itm", "mlm"} <= set(gone)), "nothing reads what is fused"
    assert set(terms.parts) == set(stage.references(4)) == {"itc", "loc", "rel", "itm", "mlm"} - set(gone)
    if "itm" in gone:
        with pytest.raises(ConfigError, match="no matching head"):
            stage.module.match(torch.zeros(1, 5, 192), ["a cat"])


def test_without_compression_or_with_everything_kept_it_is_one_model(folder: Path) -> None:
    plain = build(recipe("guided", folder, compression=CompressionConfig()))
    kept = build(recipe("guided", folder, compression=CompressionConfig(layers=(0, 1), keep=(1.0,))))
    with torch.no_grad():
        one, other = (s.module(batch(s, samples(s, 6))) for s in (plain, kept))
    for name, value in one.parts.items():
        assert torch.equal(value, other.parts[name]), name


def test_the_upper_layers_of_a_pretrained_transformer_are_what_is_trained(folder: Path) -> None:
    vision = VisionConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, layer=-3)
    stage = build(recipe("guided", folder, vision=vision, image=TowerConfig(start="vision")), with_vision=True)
    names = {n.split(".")[3] for n, _ in stage.module.named_parameters() if n.startswith("streams.image.blocks.")}
    assert names == {"0", "1"} and stage.module.streams.image.prefix == 1
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = stage.module.encode_images(pixels)
        whole = stage.module.vision.model.forward_features(pixels)
        seen = stage.module.streams.image.finish(features, ())
    assert torch.equal(seen.tokens_BSC, whole)
    stage.module(batch(stage, samples(stage, 4))).total.backward()
    closed = vision.model_copy(update={"final_norm": True})
    with pytest.raises(ConfigError, match="final_norm: false"):
        build(recipe("guided", folder, vision=closed, image=TowerConfig(start="vision")))


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    config: Any = recipe("guided", folder)
    with pytest.raises(WeightsError, match=r"fusion\.text_layers \+ fusion_layers 4 against 2"):
        build(config.model_copy(update={"fusion": config.fusion.model_copy(update={"text_layers": 3})}))
    values = {"name": "x", "data": {"train": "d"}, "train": {"steps": 1}}
    for name in ("image", "fusion"):
        section = {"width": 10, "heads": 4}
        with pytest.raises(ConfigError, match=f"{name}.width 10 does not divide"):
            load_run(None, values={**values, "method": {"name": "guided", name: section}}, methods=method_configs())


def test_both_temperatures_are_bounded(folder: Path) -> None:
    bounds = build(recipe("guided", folder, temperature_range=(0.01, 0.3))).module.bounds()
    assert bounds == {"temperature": (0.01, 0.3), "local_temperature": (0.01, 0.3)}
    alone = build(recipe("guided", folder, weights=GuidedWeights(loc=0.0))).module.bounds()
    assert alone.keys() == {"temperature"}
    assert build(recipe("guided_vqa", folder)).module.bounds() == {}


def test_it_learns_to_tell_pairs_apart(folder: Path) -> None:
    """Eight pairs, learnt by heart, by every loss."""
    stage = build(recipe("guided", folder))
    module, rows = stage.module.train(), samples(stage, 8)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for step in range(220):
        optimizer.zero_grad()
        terms = module(batch(stage, rows, step))
        terms.total.backward()
        optimizer.step()
    module.eval()
    features = torch.stack([torch.from_numpy(row.features_ND) for row in rows])
    texts = [row.captions[0] for row in rows]
    sims = module.embed_images(features)[:, 0] @ module.embed_texts(texts).T
    assert sims.argmax(1).tolist() == sims.argmax(0).tolist() == list(range(8))
    assert float(terms.parts["loc"]) < 0.3 and float(terms.parts["rel"]) < 0.4
    for score in (module.match, module.match_margin):
        own, other = score(features, texts), score(features, texts[1:] + texts[:1])
        assert (own > other).all()
    assert not torch.allclose(module.match(features, texts), module.match(features, texts, max_length=3))
