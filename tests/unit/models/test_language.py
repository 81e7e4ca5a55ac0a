"""The frozen language model: token layout, loss, gradients, generation."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from isthmus.errors import ConfigError, WeightsError
from isthmus.models import language_base
from isthmus.models.language import LanguageModel, build_language
from isthmus.testing.backbones import tiny_bert, tiny_lm

FAMILIES = ("opt", "llama", "gpt2")
TEXTS = ["a red cat", "two small birds on the house", "sun"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, LanguageModel]:
    return {f: build_language(tiny_lm(tmp_path_factory.mktemp(f), f)) for f in FAMILIES}


def prefix(model: LanguageModel, rows: int, queries: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, queries, model.width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_and_end_follow_the_family(models, family):
    model = models[family]
    ids_BT, mask_BT, labels_BT = model.caption_tokens(["a red cat"], "")
    row = ids_BT[0].tolist()
    words = model.tokenizer("a red cat", add_special_tokens=False)["input_ids"]
    end = (
        model.tokenizer("\n", add_special_tokens=False)["input_ids"]
        if family == "opt"
        else [model.tokenizer.eos_token_id]
    )
    bos = [] if family == "gpt2" else [model.tokenizer.bos_token_id]
    assert row == bos + words + end
    assert labels_BT[0].tolist() == row, "without a prompt everything is predicted, BOS too"
    assert mask_BT.all()


def test_the_opening_token_may_stand_before_the_soft_prompt(tmp_path):
    config = tiny_lm(tmp_path, "llama")
    behind, first = build_language(config), build_language(config.model_copy(update={"opening": "first"}))
    ids_BT, mask_BT, labels_BT = first.caption_tokens(["a red cat"], "")
    assert ids_BT[0].tolist() == behind.caption_tokens(["a red cat"], "")[0][0].tolist()[1:]
    soft = prefix(first, 1)
    bos_11L = behind.embed(torch.tensor([[first.tokenizer.bos_token_id]]))
    by_hand = behind.loss(torch.cat([bos_11L, soft], 1), ids_BT, mask_BT, labels_BT)
    assert first.loss(soft, ids_BT, mask_BT, labels_BT).total.item() == pytest.approx(by_hand.total.item())
    # Generation sees the same sequence: the first token of the caption is the argmax of the full forward.
    whole_1SL = torch.cat([bos_11L, soft, first.embed(torch.tensor([first._plain_ids("of")]))], 1)
    best = int(first.model(inputs_embeds=whole_1SL).logits[0, -1].argmax())
    assert first.generate(soft, prompt="of", max_new_tokens=1) == [first._decode([best])]


def test_an_opening_token_that_the_tokenizer_lacks_is_named(tmp_path):
    config = tiny_lm(tmp_path, "llama").model_copy(update={"opening": "first"})
    file = next(Path(config.weights).glob("tokenizer_config.json"))
    settings = json.loads(file.read_text())
    settings.pop("bos_token", None)
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no begin-of-sequence token"):
        build_language(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_padding_take_no_loss(models, family):
    model = models[family]
    _, mask_BT, labels_BT = model.caption_tokens(TEXTS, "a photo of")
    head = len(model._prompt_ids("a photo of"))
    assert (labels_BT[:, :head] == -100).all()
    assert ((labels_BT == -100)[:, head:] == (mask_BT == 0)[:, head:]).all()
    assert (mask_BT.diff(dim=1) <= 0).all(), "padding is on the right"
    for i, text in enumerate(TEXTS):
        assert model.tokenizer.decode(labels_BT[i][labels_BT[i] != -100][:-1]) == f" {text}"
        assert labels_BT[i][labels_BT[i] != -100][-1] == model.end_id


def test_a_caption_that_is_cut_loses_its_end(models):
    model = models["llama"]
    ids_BT, _, _ = model.caption_tokens(["cat " * 40], "")
    assert ids_BT.shape == (1, 1 + 16)
    assert ids_BT[0, -1] != model.end_id


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_whole_model_s_own(models, family):
    """Against the full forward with full logits and a hand-written shift, row by row without padding."""
    model = models[family]
    prefix_BQL = prefix(model, len(TEXTS))
    total, count = 0.0, 0
    for i, text in enumerate(TEXTS):
        ids_1T, _, labels_1T = model.caption_tokens([text], "a photo of")
        inputs = torch.cat([prefix_BQL[i : i + 1], model.embed(ids_1T)], 1)
        logits = model.model(inputs_embeds=inputs).logits[0]
        for t, label in enumerate(labels_1T[0].tolist()):
            if label != -100:
                total += F.cross_entropy(logits[3 + t - 1], torch.tensor(label)).item()
                count += 1
    result = model.loss(prefix_BQL, *model.caption_tokens(TEXTS, "a photo of"))
    assert int(result.tokens) == count
    assert result.total.item() == pytest.approx(total, rel=1e-4)


def test_keep_end_decides_what_a_cut_caption_loses(models):
    model = models["llama"]
    other = LanguageModel(model.model, model.tokenizer, model.config.model_copy(update={"keep_end": True}))
    ids_BT, mask_BT, labels_BT = other.caption_tokens(["cat " * 40, "sun"], "")
    assert ids_BT.shape == (2, 1 + 16) and mask_BT[0].all()
    assert ids_BT[0, -1] == labels_BT[0, -1] == other.end_id
    assert torch.equal(ids_BT[:, :-1], model.caption_tokens(["cat " * 40, "sun"], "")[0][:, :-1])


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_max_length_of_the_text_cuts_where_laviss_tokenizer_cuts(models, prompt):
    """LAVIS has the tokenizer cut prompt, caption and newline, behind the BOS that it puts there."""
    model = models["opt"]
    config = model.config.model_copy(update={"max_length_of": "text", "prompt": prompt})
    text = LanguageModel(model.model, model.tokenizer, config)
    captions = [" ".join(["cat", "dog", "sun"][i % 3] for i in range(n)) for n in range(1, 20)]
    ids_BT, mask_BT, labels_BT = text.caption_tokens(captions)
    wanted = [
        model.tokenizer(f"{prompt} {caption}\n".strip(" "), truncation=True, max_length=16)["input_ids"]
        for caption in captions
    ]
    assert [row[keep.bool()].tolist() for row, keep in zip(ids_BT, mask_BT, strict=True)] == wanted
    assert len({len(row) for row in wanted}) > 3 and ids_BT.shape[1] == 16
    head = len(text._prompt_ids(prompt)) if prompt else 0
    assert (labels_BT[:, :head] == -100).all() and (labels_BT[:, head] != -100).all()
    whole, _, _ = LanguageModel(
        model.model, model.tokenizer, config.model_copy(update={"max_length_of": "caption"})
    ).caption_tokens(captions)
    assert whole.shape[1] == 16 + len(text._prompt_ids(prompt)), "by default BOS and prompt do not count"
    assert [len(text.caption_ids(caption)) > text.room() for caption in captions] == [
        row[-1] != text.end_id for row in wanted
    ]
    kept = LanguageModel(model.model, model.tokenizer, config.model_copy(update={"keep_end": True}))
    assert (kept.caption_tokens(captions)[0][-1, -1] == text.end_id) and kept.caption_tokens(captions)[0].shape[1] == 16


def test_a_prompt_that_leaves_no_room_for_a_caption_is_refused(models):
    model = models["opt"]
    config = model.config.model_copy(update={"max_length_of": "text", "prompt": "a photo of " * 5})
    with pytest.raises(ConfigError, match=r"max_length 16 counts the text, and the prompt alone takes 16"):
        LanguageModel(model.model, model.tokenizer, config)
    LanguageModel(model.model, model.tokenizer, config.model_copy(update={"max_length_of": "caption"}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_groups_of_rows_equal_one_call(models, family, prompt, monkeypatch):
    model = models[family]
    tokens = model.caption_tokens([" ".join(["cat"] * n) for n in (5, 9, 1, 7, 3, 10, 2, 8, 4, 6, 1, 9)], prompt)
    found = []
    for groups in (1, 3):
        monkeypatch.setattr(language_base, "GROUP_ROWS", 12 // groups)
        assert len(language_base.length_groups(tokens[1].sum(1))) == groups
        x = prefix(model, 12).requires_grad_()
        result = model.loss(x, *tokens)
        result.total.backward()
        found.append((result.total.detach(), result.tokens, x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=2e-5)
    assert (found[0][2].abs().sum((1, 2)) > 0.01).all()


def test_groups_hold_every_row_once_and_rows_of_one_length_together(monkeypatch):
    lengths = torch.tensor([5, 9, 1, 7, 3, 9, 2, 8, 4, 6, 1, 9])
    monkeypatch.setattr(language_base, "GROUP_ROWS", 4)
    groups = language_base.length_groups(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(12)) and len(groups) == 3
    assert all(lengths[a].max() <= lengths[b].min() for a, b in itertools.pairwise(groups))
    assert [g.tolist() for g in language_base.length_groups(lengths[:7])] == [list(range(7))]


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_on_the_right_changes_nothing(models, family):
    model, x = models[family], prefix(models[family], 3)
    ids, mask, labels = model.caption_tokens(TEXTS, "a photo of")
    wide = (F.pad(ids, (0, 4), value=7), F.pad(mask, (0, 4)), F.pad(labels, (0, 4), value=-100))
    torch.testing.assert_close(model.loss(x, *wide), model.loss(x, ids, mask, labels), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_soft_prompt_and_no_weight(models, family):
    model = models[family]
    prefix_BQL = prefix(model, 3).requires_grad_()
    model.loss(prefix_BQL, *model.caption_tokens(TEXTS, "")).total.backward()
    assert (prefix_BQL.grad.abs().sum(-1) > 0).all(), "every query of every row"
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_a_processor_is_near_float32(tmp_path, models, family):
    half = build_language(tiny_lm(tmp_path, family), bf16=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    tokens, x = half.caption_tokens(TEXTS, ""), prefix(half, 3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as training runs it
        found = half.loss(x, *tokens)
    found.total.backward()
    whole = models[family].loss(x.detach(), *tokens)
    assert found.total.dtype == torch.float32 and found.tokens == whole.tokens
    assert float((found.total / found.tokens).detach()) == pytest.approx(float(whole.total / whole.tokens), abs=2e-2)
    assert x.grad.isfinite().all() and (x.grad.abs().sum(-1) > 0).all()


def test_no_label_is_a_differentiable_zero(models):
    model = models["llama"]
    ids_BT, mask_BT, labels_BT = model.caption_tokens(TEXTS, "")
    prefix_BQL = prefix(model, 3).requires_grad_()
    result = model.loss(prefix_BQL, ids_BT, mask_BT, torch.full_like(labels_BT, -100))
    result.total.backward()
    assert result.total.item() == 0.0
    assert result.tokens.item() == 0.0
    assert prefix_BQL.grad.abs().sum() == 0


def test_dropout_sleeps_unless_the_recipe_wakes_it(tmp_path):
    config = tiny_lm(tmp_path, "opt")
    asleep = build_language(config).train()
    assert not any(m.training for m in asleep.modules())
    awake = build_language(config.model_copy(update={"dropout": True})).train()
    batch = awake.caption_tokens(TEXTS, "")
    x = prefix(awake, 3)
    assert awake.loss(x, *batch).total != awake.loss(x, *batch).total
    assert asleep.loss(x, *batch).total == asleep.loss(x, *batch).total
    assert awake.generate(x, max_new_tokens=4) == asleep.generate(x, max_new_tokens=4)
    assert awake.model.training, "generation leaves the mode as it was"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_what_single_rows_give(models, family, beams):
    """Prompts of different lengths, so that rows are padded on the left."""
    model, x = models[family], prefix(models[family], 3, seed=5)
    prompts = ["", "a photo of", "the small red bird on a"]
    together = model.generate(x, prompts, max_new_tokens=6, num_beams=beams)
    alone = [model.generate(x[i : i + 1], prompts[i], max_new_tokens=6, num_beams=beams)[0] for i in range(3)]
    assert together == alone
    assert len(set(together)) == 3, "a model that ignores its prompt would pass otherwise"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_full_forward(models, family):
    model, x = models[family], prefix(models[family], 1, seed=2)
    ids = model._prompt_ids("a photo of")
    for _ in range(5):
        inputs = torch.cat([x, model.embed(torch.tensor([ids]))], 1)
        following = int(model.model(inputs_embeds=inputs).logits[0, -1].argmax())
        if following == model.end_id:
            break
        ids.append(following)
    expected = model.tokenizer.decode(ids[len(model._prompt_ids("a photo of")) :], skip_special_tokens=True).strip()
    assert model.generate(x, "a photo of", max_new_tokens=5) == [expected]


def test_a_taught_soft_prompt_speaks_the_caption_and_stops(models):
    """Training layout and generation layout are one: what the loss teaches is what generation says."""
    model, text = models["llama"], "a red cat"
    x = torch.nn.Parameter(prefix(model, 1, queries=4) * 0.1)
    batch = model.caption_tokens([text], "photo")
    optimizer = torch.optim.Adam([x], lr=0.3)
    for _ in range(150):
        result = model.loss(x, *batch)
        if result.total.item() < 0.1:
            break
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
    assert model.generate(x.detach(), "photo", max_new_tokens=12) == [text]


def test_bounds_and_empty_batches(models):
    model = models["llama"]
    assert model.generate(prefix(model, 0)) == []
    with pytest.raises(ConfigError, match="2 prompts were given for 3"):
        model.generate(prefix(model, 3), ["a", "b"])
    assert len(model.tokenizer(model.generate(prefix(model, 1), max_new_tokens=2)[0])["input_ids"]) <= 1 + 2 + 1


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    from isthmus.config.parts import LanguageConfig

    with pytest.raises(WeightsError, match="cannot be loaded as a causal"):
        build_language(LanguageConfig(weights=str(tmp_path)))


def test_weights_with_a_hole_are_refused(tmp_path):
    """transformers would start the missing tensor at random and only log it."""
    config = tiny_lm(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        build_language(config)


def test_the_digest_names_the_weights(tmp_path):
    first = build_language(tiny_lm(tmp_path / "a", "gpt2", seed=0)).base
    again = build_language(tiny_lm(tmp_path / "b", "gpt2", seed=0)).base
    other = build_language(tiny_lm(tmp_path / "c", "gpt2", seed=1)).base
    assert first.digest == again.digest != other.digest
    assert tiny_bert(tmp_path / "d").weights == str(tmp_path / "d")
