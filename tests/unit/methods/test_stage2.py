"""Stage 2: what it inherits, what it drops, what takes loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.errors import ConfigError, WeightsError
from isthmus.methods.artefact import save_artefact
from isthmus.methods.batching import split_caption
from isthmus.methods.blip2_stage2 import NEW, resolve, text_branch
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
    assert text_branch(QFORMER.layers, theirs) == set(theirs) - set(ours)
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


def test_what_may_be_missing_and_what_may_be_left_over_is_exact_and_listed_in_full(folder: Path, parent: Path) -> None:
    from isthmus.methods.artefact import read_state

    module = build(recipe("blip2_stage2", folder)).module
    stage1 = read_state(parent)
    taken, dropped = module.load_stage1(stage1)
    assert set(taken) | NEW == {name for name, p in module.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in module.named_parameters()}
    for name in stage1:
        less = {other: tensor + 1 for other, tensor in stage1.items() if other != name}
        with pytest.raises(WeightsError, match="lacks") as fault:
            module.load_stage1(less)
        assert f"'{name}'" in str(fault.value)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), "a refused parent left traces"
    many = {f"stranger{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(WeightsError) as fault:
        module.load_stage1(stage1 | many)
    assert all(name in str(fault.value) for name in many)
    stage2 = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    assert module.load_stage1(stage2) == (sorted(stage2), [])
    with pytest.raises(WeightsError, match=r"lacks \['projection.bias'\]"):
        module.load_stage1({name: tensor for name, tensor in stage2.items() if name != "projection.bias"})
    with pytest.raises(WeightsError, match=r"holds \['qformer.words.weight'\]"):
        module.load_stage1({**stage2, "qformer.words.weight": torch.zeros(1)})
    assert dropped == sorted(set(stage1) - set(stage2))


def test_a_parent_without_one_of_the_heads_fits(folder: Path, parent: Path) -> None:
    from isthmus.methods.artefact import read_state

    module = build(recipe("blip2_stage2", folder)).module
    stage1 = read_state(parent)
    for head in ("itm_head.", "qformer.lm_head."):
        taken, dropped = module.load_stage1({n: t for n, t in stage1.items() if not n.startswith(head)})
        assert taken and not [name for name in dropped if name.startswith(head)]


def test_the_prefix_is_drawn_by_sample_and_epoch_over_all_places_but_the_end() -> None:
    text = "one two three four five"
    counts = [0] * 5
    for sample_id in range(4000):
        before, after = split_caption(text, sample_id, 7, 0)
        assert f"{before} {after}".strip() == text and after
        counts[len(before.split())] += 1
    # 3.5 standard deviations of a binomial (4000, 1/5) are 89.
    assert all(abs(count - 800) < 89 for count in counts), counts
    draws = {
        (seed, epoch): [split_caption(text, i, seed, epoch) for i in range(40)] for seed in (7, 8) for epoch in (0, 1)
    }
    assert all(draws[a] != draws[b] for a in draws for b in draws if a != b)
    assert split_caption("sun", 5, 0, 0) == ("", "sun") and split_caption("", 5, 0, 0) == ("", "")


def t5_stage(folder: Path, **changes: object):
    from isthmus.testing.backbones import tiny_t5

    config = tiny_t5(folder / "t5").model_copy(update=changes)
    return build(recipe("blip2_stage2", folder, language=config))


def test_prefix_and_suffix_make_up_the_caption_whatever_else_is_in_the_batch(folder: Path) -> None:
    stage = t5_stage(folder)
    rows = samples(stage, 8)
    whole, language = stage.collate(rows, 3, 0), stage.module.language
    said = [language.tokenizer.decode(row[row > 1]) for row in whole.ids_BT]
    read = [language.tokenizer.decode(row[row > 1]) for row in whole.prefix_ids_BT]
    assert [f"{a} {b}".strip() for a, b in zip(read, said, strict=True)] == list(whole.texts)
    assert any(read) and not all(read), "some prefixes are empty, some are not"
    for i, sample in enumerate(rows):
        alone = stage.collate([sample], 3, 9)
        assert alone.ids_BT[0].tolist() == whole.ids_BT[i][whole.mask_BT[i] == 1].tolist()
        assert alone.prefix_ids_BT[0].tolist() == whole.prefix_ids_BT[i][whole.prefix_mask_BT[i] == 1].tolist()
    other = stage.collate(rows, 4, 0)
    assert other.ids_BT.shape != whole.ids_BT.shape or not torch.equal(other.ids_BT, whole.ids_BT)
    none = t5_stage(folder, prefix="none", prompt="a photo of", max_length=32).collate(rows, 3, 0)
    head = language.tokenizer("a photo of")["input_ids"]
    assert none.prefix_ids_BT.tolist() == [head] * 8
    assert [language.tokenizer.decode(row[row > 1]) for row in none.ids_BT] == list(whole.texts)


def test_a_t5_teaches_the_query_side_and_nothing_else(folder: Path) -> None:
    stage = t5_stage(folder)
    module, made = stage.module.train(), batch(stage, samples(stage, 6), padding=2)
    module(made).total.backward()
    got = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    # A bias of the keys moves all scores of a row alike.
    assert wanted - got <= {name for name in wanted if name.endswith("key.bias")}
    assert got <= wanted and not any(name.startswith("language.") for name in wanted)
    with torch.no_grad():
        cut = stage.module(batch(stage, samples(stage, 4))).total
        assert float(module(made).total) == pytest.approx(float(cut), rel=1e-5), "padding rows count for nothing"


def test_t5_captions_take_a_prompt_each(folder: Path) -> None:
    stage = t5_stage(folder)
    features = torch.randn(2, stage.image_spec["tokens"], stage.image_spec["width"])
    soft = stage.module.soft_prompt(features)
    prompts = ["a", "the small red bird on a house"]
    both = stage.module.language.generate(soft, prompts, max_new_tokens=5)
    assert both == [stage.module.language.generate(soft[i : i + 1], prompts[i], max_new_tokens=5)[0] for i in range(2)]
    assert stage.module.generate(features, max_new_tokens=5) == stage.module.generate(features, max_new_tokens=5)


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
    for row, prompt in enumerate(prompts):
        assert module.generate(features[row : row + 1], prompt=prompt, **settings) == [together[row]]
    assert together != module.generate(features, prompt=prompts[::-1], **settings)
    with pytest.raises(ConfigError, match="2 prompts were given for 4 images"):
        module.generate(features, prompt=["a", "b"])


def test_the_recipes_own_prompt_is_used_where_none_is_given_and_an_empty_one_is_none(folder: Path) -> None:
    config = recipe("blip2_stage2", folder)
    own = config.language.model_copy(update={"prompt": "a photo of"})
    module = build(config.model_copy(update={"language": own})).module.eval()
    with torch.no_grad():
        for p in module.qformer.parameters():
            p.normal_(0.0, 0.3)
        module.projection.weight.mul_(20)
        features = torch.randn(3, 5, module.ln_vision.weight.shape[0], generator=torch.Generator().manual_seed(2))
        soft = module.soft_prompt(features)
    assert module.own_prompt == "a photo of"
    given = module.language.generate(soft, "a photo of", max_new_tokens=6)
    none = module.language.generate(soft, "", max_new_tokens=6)
    assert given != none
    assert module.generate(features, max_new_tokens=6) == given
    assert (
        module.generate(features, prompt="", max_new_tokens=6)
        == none
        == module.generate(features, prompt=[""] * 3, max_new_tokens=6)
    )


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
