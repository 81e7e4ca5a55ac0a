"""FLAN-T5 as frozen language model: layout, loss, the traps of its output layer and activation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from isthmus.errors import ConfigError, WeightsError
from isthmus.models import language_base
from isthmus.models.language import build_language
from isthmus.models.language_base import length_groups
from isthmus.models.seq2seq import Seq2SeqLanguageModel, check_head
from isthmus.testing.backbones import tiny_t5

PREFIXES = ["", "two small", "a", "", "the large red bird sitting on", "a"]
SUFFIXES = ["a red cat", "birds on the house", "sun", "tree", "a cat", "blue fish and a green ball left of the moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t5")


@pytest.fixture(scope="module")
def config(folder: Path):
    return tiny_t5(folder)


@pytest.fixture(scope="module")
def model(config) -> Seq2SeqLanguageModel:
    return build_language(config)


def soft(model: Seq2SeqLanguageModel, rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, model.width, generator=torch.Generator().manual_seed(0))


def test_both_sides_end_with_the_end_token_and_padding_takes_no_loss(model) -> None:
    ids_BT, mask_BT, labels_BT, prefix_ids_BP, prefix_mask_BP = model.caption_tokens(SUFFIXES, prefixes=PREFIXES)
    for ids, mask, texts in ((ids_BT, mask_BT, SUFFIXES), (prefix_ids_BP, prefix_mask_BP, PREFIXES)):
        assert (mask.diff(dim=1) <= 0).all(), "padding is on the right"
        for row, seen, text in zip(ids, mask, texts, strict=True):
            assert row[seen == 1].tolist() == model.tokenizer(text)["input_ids"]
            assert (row[seen == 0] == model.tokenizer.pad_token_id).all()
    assert torch.equal(labels_BT == -100, mask_BT == 0) and torch.equal(labels_BT[mask_BT == 1], ids_BT[mask_BT == 1])
    _, _, _, prompted, _ = model.caption_tokens(SUFFIXES, "a photo of", PREFIXES)
    assert model.tokenizer.decode(prompted[1][:-1]).startswith("a photo of two small")


def test_max_length_of_the_text_counts_what_is_counted_anyway(config, model) -> None:
    """Each side is counted whole, prompt and ``</s>`` included, as LAVIS's tokenizer does."""
    long = ["cat " * 40, "sun"]
    found = []
    for counted in ("caption", "text"):
        changed = config.model_copy(update={"max_length_of": counted, "prompt": "a photo of"})
        found.append(Seq2SeqLanguageModel(model.model, model.tokenizer, changed).caption_tokens(long, prefixes=long))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape[1] == found[0][3].shape[1] == 16
    cut = model.tokenizer(f"a photo of {long[0].strip()}", truncation=True, max_length=16)["input_ids"]
    assert found[0][3][0].tolist() == cut


def test_what_is_cut_keeps_or_loses_its_end_as_configured(config, model) -> None:
    long = ["cat " * 40, "sun"]
    for keep, last in ((None, True), (True, True), (False, False)):
        other = Seq2SeqLanguageModel(model.model, model.tokenizer, config.model_copy(update={"keep_end": keep}))
        ids_BT, mask_BT, labels_BT, prefix_BP, _ = other.caption_tokens(long, prefixes=long)
        assert ids_BT.shape == prefix_BP.shape == (2, 16) and mask_BT[0].all()
        assert (ids_BT[0, -1] == model.end_id) == last and (labels_BT[0] != -100).all()
        assert prefix_BP[0, -1] == model.end_id, "an encoder's text always ends"
        assert int(mask_BT[1].sum()) == 2


def test_the_loss_is_the_whole_model_s_own_row_by_row(model) -> None:
    """Rows alone, without padding, through transformers' own forward with its own shift and full logits."""
    x = soft(model, len(SUFFIXES))
    total, count = 0.0, 0
    for i, (prefix, suffix) in enumerate(zip(PREFIXES, SUFFIXES, strict=True)):
        words = model.embed(torch.tensor([model.tokenizer(prefix)["input_ids"]]))
        labels = torch.tensor([model.tokenizer(suffix)["input_ids"]])
        out = model.model(inputs_embeds=torch.cat([x[i : i + 1], words], 1), labels=labels)
        total += F.cross_entropy(out.logits[0], labels[0], reduction="sum").item()
        assert float(out.loss) == pytest.approx(F.cross_entropy(out.logits[0], labels[0]).item(), rel=1e-6)
        count += labels.shape[1]
    found = model.loss(x, *model.caption_tokens(SUFFIXES, prefixes=PREFIXES))
    assert int(found.tokens) == count
    assert found.total.item() == pytest.approx(total, rel=1e-5)


def test_groups_of_rows_equal_one_call(model, monkeypatch) -> None:
    rows = 2 * len(SUFFIXES)
    tokens = model.caption_tokens(SUFFIXES * 2, prefixes=PREFIXES * 2)
    found = []
    for groups in (1, 3):
        monkeypatch.setattr(language_base, "GROUP_ROWS", 12 // groups)
        assert len(length_groups(tokens[1].sum(1))) == groups
        x = soft(model, rows).requires_grad_()
        total = model.loss(x, *tokens).total
        total.backward()
        found.append((total.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert (found[0][1].abs().sum((1, 2)) > 0.01).all()


def test_padding_on_either_side_changes_nothing(model) -> None:
    x, (ids, mask, labels, read, seen) = soft(model, 6), model.caption_tokens(SUFFIXES, prefixes=PREFIXES)
    plain = model.loss(x, ids, mask, labels, read, seen)
    wide = model.loss(
        x, F.pad(ids, (0, 3), value=7), F.pad(mask, (0, 3)), F.pad(labels, (0, 3), value=-100),
        F.pad(read, (0, 5), value=9), F.pad(seen, (0, 5)),
    )  # fmt: skip
    torch.testing.assert_close(plain, wide, rtol=1e-5, atol=1e-4)


def test_gradients_reach_the_soft_prompt_and_no_weight(model) -> None:
    x = soft(model, 6).requires_grad_()
    model.loss(x, *model.caption_tokens(SUFFIXES, prefixes=PREFIXES)).total.backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    tokens = list(model.caption_tokens(SUFFIXES))
    tokens[2] = torch.full_like(tokens[2], -100)
    nothing = model.loss(x, *tokens)
    nothing.total.backward()
    assert nothing.total.item() == 0.0 and nothing.tokens.item() == 0.0


def test_flan_has_an_output_matrix_of_its_own_unscaled_and_v1_the_scaled_embeddings(folder, model, tmp_path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
    assert torch.equal(model.model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.shared.weight, stored["shared.weight"])
    assert model.scale == 1.0
    old = build_language(tiny_t5(tmp_path, tied=True))
    assert old.model.lm_head.weight is old.model.shared.weight and old.scale == 32**-0.5
    x = soft(old, 1)
    labels = torch.tensor([old.tokenizer("a red cat")["input_ids"]])
    words = old.embed(torch.tensor([old.tokenizer("two")["input_ids"]]))
    theirs = old.model(inputs_embeds=torch.cat([x, words], 1), labels=labels).loss
    ours = old.loss(x, *old.caption_tokens(["a red cat"], prefixes=["two"]))
    assert float(ours.total / ours.tokens) == pytest.approx(float(theirs), rel=1e-6)


def test_an_output_layer_that_contradicts_the_configuration_is_refused(tmp_path, model) -> None:
    """transformers 5 ties an output matrix that is missing without a word, and scales by what config.json says."""
    config = tiny_t5(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if n != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 'lm_head\.weight'"):
        build_language(config)
    save_file({**state, "lm_head.weight": state["shared.weight"].clone()}, file, metadata={"format": "pt"})
    equal = build_language(config)
    assert equal.model.lm_head.weight is not equal.model.shared.weight and equal.scale == 1.0
    save_file(state, file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    with pytest.raises(WeightsError, match="has an output layer of its own"):
        build_language(config)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    assert build_language(config).base.digest == model.base.digest, "as published, by transformers 4's config.json"
    from transformers import AutoConfig, T5ForConditionalGeneration

    built = T5ForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(WeightsError, match="is tied to its word embeddings"):
        check_head(built, "built")


def test_the_gate_is_exact_unless_the_checkpoint_s_own_is_asked_for(config, model) -> None:
    own = build_language(config.model_copy(update={"t5_activation": "checkpoint"}))
    gates = [m.model.encoder.block[0].layer[1].DenseReluDense.act for m in (model, own)]
    x = torch.linspace(-3, 3, 61)
    assert torch.equal(gates[0](x), F.gelu(x))
    torch.testing.assert_close(gates[1](x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)
    assert (gates[0](x) - gates[1](x)).abs().max() > 1e-4
    assert model.model.config.dense_act_fn == "gelu", "an export says which"
    tokens = model.caption_tokens(SUFFIXES)
    assert model.loss(soft(model, 6), *tokens).total != own.loss(soft(model, 6), *tokens).total
    assert model.base.digest == own.base.digest


def test_bfloat16_on_a_processor_is_near_float32(config, model) -> None:
    half = build_language(config, bf16=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.base.digest == model.base.digest
    tokens, x = model.caption_tokens(SUFFIXES, prefixes=PREFIXES), soft(model, 6).requires_grad_()
    found = half.loss(x, *tokens)
    whole = model.loss(x.detach(), *tokens)
    assert found.total.dtype == torch.float32
    assert float((found.total / found.tokens).detach()) == pytest.approx(float(whole.total / whole.tokens), abs=2e-2)
    found.total.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert len(half.generate(x.detach(), max_new_tokens=3)) == 6


def test_dropout_sleeps_unless_the_recipe_wakes_it(config, model) -> None:
    assert not any(m.training for m in model.train().modules())
    awake = build_language(config.model_copy(update={"dropout": True})).train()
    x, tokens = soft(awake, 6), awake.caption_tokens(SUFFIXES)
    assert awake.loss(x, *tokens).total != awake.loss(x, *tokens).total
    assert awake.generate(x, max_new_tokens=4) == model.generate(x, max_new_tokens=4)


def test_a_taught_soft_prompt_speaks_the_suffix_and_stops(model) -> None:
    x = torch.nn.Parameter(soft(model, 1) * 0.1)
    tokens = model.caption_tokens(["a red cat"], "photo")
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(300):
        total = model.loss(x, *tokens).total
        if total.item() < 0.1:
            break
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert model.generate(x.detach(), "photo", max_new_tokens=12) == ["a red cat"]


def test_other_encoder_decoders_are_refused_by_name(tmp_path, config) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(ConfigError, match="'bart' model; of the encoder-decoder models only T5"):
        build_language(config.model_copy(update={"weights": str(tmp_path)}))
