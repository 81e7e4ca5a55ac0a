"""Our Q-Former and both stages against transformers' own classes, on weights that are nowhere zero or equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cases import (
    QFORMER,
    QUERIES,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2TextEmbeddings,
    overwrite,
    pixels,
    write_stage1,
    write_stage2,
)
from isthmus.config import QFormerConfig
from isthmus.methods.artefact import load_artefact
from isthmus.methods.interchange import import_hf
from isthmus.models.attention import ImageTokens
from isthmus.models.hf.names import from_hf, qformer_names
from isthmus.models.qformer import QFormer

WIDTH, VOCAB, TOKENS = 24, 40, 7
BOTH = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def pair(dtype: torch.dtype, attention: str) -> tuple[QFormer, Any, Any, torch.Tensor]:
    """Ours, theirs, their text embeddings and queries: one set of random weights."""
    config = Blip2QFormerConfig(
        **QFORMER, vocab_size=VOCAB, encoder_hidden_size=WIDTH, use_qformer_text_input=True, max_position_embeddings=16
    )
    config._attn_implementation = attention
    theirs, text = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    overwrite(theirs, 1), overwrite(text, 2)
    queries = torch.randn(1, QUERIES, QFORMER["hidden_size"], generator=torch.Generator().manual_seed(3)) * 0.15
    state = {f"qformer.{n}": t for n, t in theirs.state_dict().items()}
    state |= {f"embeddings.{n}": t for n, t in text.state_dict().items()} | {"query_tokens": queries}
    names = qformer_names("blip2_stage1", QFORMER["num_hidden_layers"], 2)
    names = {a: b for a, b in names.items() if a.startswith(("qformer.", "embeddings.", "query_tokens"))}
    shape = QFormerConfig(
        layers=QFORMER["num_hidden_layers"], width=QFORMER["hidden_size"], heads=QFORMER["num_attention_heads"],
        feed_forward=QFORMER["intermediate_size"], queries=QUERIES, init=None,
    )  # fmt: skip
    ours = QFormer(shape, WIDTH, VOCAB - 1, head=False, positions=16).eval()
    ours.load_state_dict({n.removeprefix("qformer."): t for n, t in from_hf(state, names).items()}, strict=True)
    return ours.to(dtype), theirs.to(dtype), text.to(dtype), queries.to(dtype)


@pytest.mark.parametrize("uses", [0.0, 1e9], ids=["direct", "projected"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), BOTH, ids=["fp32", "fp64"])
@torch.no_grad()
def test_the_q_former_is_transformers(dtype: torch.dtype, tolerance: float, attention: str, uses: float) -> None:
    ours, theirs, text, queries = pair(dtype, attention)
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(3, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, VOCAB, (3, 6), generator=generator)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()
    memory = ours.remember(ImageTokens(image), uses)
    ones = torch.ones(3, TOKENS, dtype=torch.long)
    seen = {"encoder_hidden_states": image, "encoder_attention_mask": ones}

    found = ours(memory).queries_BQM
    wanted = theirs(query_embeds=queries.expand(3, -1, -1), **seen).last_hidden_state
    assert float((found - wanted).abs().max()) <= tolerance
    assert float((found[0] - found[1]).abs().max()) > 0.1  # images differ, and so do queries: the weights are alive
    assert float((found[:, 0] - found[:, 1]).abs().max()) > 0.1

    found = ours(None, ids, mask).text_BTM
    wanted = theirs(query_embeds=text(input_ids=ids), query_length=0, attention_mask=mask).last_hidden_state
    assert float((found - wanted)[mask.bool()].abs().max()) <= tolerance
    assert float((ours.pooled_text(ids, mask) - wanted[:, 0]).abs().max()) <= tolerance

    joint = ours(memory, ids, mask)
    embeds = text(input_ids=ids, query_embeds=queries.expand(3, -1, -1))
    both = torch.cat([torch.ones(3, QUERIES, dtype=torch.long), mask], 1)
    wanted = theirs(query_embeds=embeds, query_length=QUERIES, attention_mask=both, **seen).last_hidden_state
    assert float((joint.queries_BQM - wanted[:, :QUERIES]).abs().max()) <= tolerance
    assert float((joint.text_BTM - wanted[:, QUERIES:])[mask.bool()].abs().max()) <= tolerance
    assert float((joint.queries_BQM - ours(memory).queries_BQM).abs().max()) > 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_stage_1_is_image_text_retrieval(folder: Path, attention: str) -> None:
    """One epsilon (1e-5) for all norms on both sides, so that nothing but rounding is left."""
    theirs = write_stage1(folder / f"itm-{attention}", eps=1e-5)
    theirs.set_attn_implementation(attention)
    import_hf(folder / f"itm-{attention}", folder / f"itm-{attention}-in")
    module: Any = load_artefact(folder / f"itm-{attention}-in").stage.module
    texts = ["a red cat on the tree", "two dogs", "a"]
    tokens = module.tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    features = module.encode_images(pixels())

    wanted = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask)
    images, words = module.embed_images(features), module.embed_texts(texts)
    cosines = torch.einsum("iqe,te->iqt", images, words).amax(1)
    assert float((cosines - wanted.logits_per_image).abs().max()) <= 1e-5
    assert float((images - wanted.image_embeds).abs().max()) <= 1e-5
    assert float(cosines.std()) > 0.01

    wanted = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    memory = module.qformer.remember(module._normalise(features))
    assert float((module._match_logits(memory, ids, mask) - wanted.logits_per_image).abs().max()) <= 1e-5
    assert float((module.match(features, texts) - wanted.logits_per_image[:, 1]).abs().max()) <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@torch.no_grad()
def test_stage_2_is_conditional_generation(folder: Path, family: str, attention: str) -> None:
    where = folder / f"{family}-{attention}"
    theirs = write_stage2(where, family, eps=1e-5)
    theirs.set_attn_implementation(attention)
    import_hf(where, where.with_name(f"{where.name}-in"))
    module: Any = load_artefact(where.with_name(f"{where.name}-in")).stage.module
    language = module.language
    features = module.encode_images(pixels())
    ids, mask, labels = language.caption_tokens(["a red cat", "two dogs and a very large tree", "a"])
    prefix = module.soft_prompt(features)

    image = torch.full((3, QUERIES), theirs.config.image_token_index)
    inputs = {
        "pixel_values": pixels(),
        "input_ids": torch.cat([image, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
    }
    wanted = theirs(**inputs, labels=torch.cat([torch.full_like(image, -100), labels], 1))
    total, tokens = language.loss(prefix, ids, mask, labels)
    assert float(total / tokens) == pytest.approx(float(wanted.loss), abs=1e-5)
    hidden = language._hidden(prefix, ids, mask)[:, QUERIES - 1 : -1]
    counted = labels != -100
    difference = (language.logits(hidden) - wanted.logits[:, QUERIES - 1 : -1])[counted].abs().max()
    assert float(difference) <= 1e-5
    assert float((prefix - theirs.get_image_features(pixels()).pooler_output).abs().max()) <= 1e-5
    assert float((prefix[0] - prefix[1]).abs().max()) > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_stage_2_with_t5_is_conditional_generation(folder: Path, attention: str) -> None:
    where = folder / f"t5-{attention}"
    theirs = write_stage2(where, "t5", eps=1e-5)
    for name, parameter in theirs.language_model.named_parameters():
        if "wi_0" in name:
            parameter.data *= 12.0  # the exact GELU and that by tanh differ on numbers that are not small
    theirs.save_pretrained(where)
    theirs.set_attn_implementation(attention)
    import_hf(where, where.with_name(f"{where.name}-in"))
    module: Any = load_artefact(where.with_name(f"{where.name}-in")).stage.module
    language = module.language
    texts, prefixes = ["cat", "dogs and a very large tree", "house on a tree"], ["a red", "", "two small birds by the"]
    ids, mask, labels, prefix_ids, prefix_mask = language.caption_tokens(texts, "a photo of", prefixes)
    soft = module.soft_prompt(module.encode_images(pixels()))
    assert len(set(mask.sum(1).tolist())) == 3 and len(set(prefix_mask.sum(1).tolist())) > 1  # padding on both sides

    image = torch.full((3, QUERIES), theirs.config.image_token_index)
    wanted = theirs(
        pixel_values=pixels(),
        input_ids=torch.cat([image, prefix_ids], 1),
        attention_mask=torch.cat([torch.ones_like(image), prefix_mask], 1),
        labels=labels,
    )
    total, tokens = language.loss(soft, ids, mask, labels, prefix_ids, prefix_mask)
    assert float(total / tokens) == pytest.approx(float(wanted.loss), abs=1e-5)
    inputs, seen = language._encoder_inputs(soft, prefix_ids, prefix_mask)
    found = language.logits(language._hidden(inputs, seen, ids, mask))
    counted = labels != -100
    assert float((found - wanted.logits)[counted].abs().max()) <= 1e-5
    assert float((soft[0] - soft[1]).abs().max()) > 0.1 and float(found[counted].std()) > 0.1
