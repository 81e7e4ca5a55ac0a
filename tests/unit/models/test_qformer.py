"""The Q-Former: who sees whom, the two forms of attention and generation, starting weights, and Hugging Face's twin."""

from __future__ import annotations

import pytest
import torch

from isthmus.config import QFormerConfig
from isthmus.errors import WeightsError
from isthmus.models import attention
from isthmus.models.attention import ImageMemory, ImageTokens, _written_out
from isthmus.models.lavis import import_lavis, lavis_names
from isthmus.models.packing import Packing
from isthmus.models.qformer import QFormer, bert_names, load_bert_layers

B, N, D, Q, T, V = 3, 5, 12, 4, 6, 40
SHAPE = QFormerConfig(layers=4, width=16, heads=4, feed_forward=24, queries=Q, dropout=0.0, embed=8)


def random_qformer(config: QFormerConfig = SHAPE, **options: object) -> QFormer:
    """A Q-Former far from any degenerate start: every tensor random, norms around one."""
    torch.manual_seed(0)
    qformer = QFormer(config, D, V, positions=20, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in qformer.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if name.endswith("norm.weight") else 0.0))
    return qformer.eval()


@pytest.fixture
def qformer() -> QFormer:
    return random_qformer()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(B, N, D, generator=generator)
    ids = torch.randint(1, V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0
    return image, ids, mask


def run(
    qformer: QFormer, kind: str, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One of the passes, as {"queries": ..., "text": ...}."""
    memory = qformer.remember(ImageTokens(image))
    if kind == "image":
        out = qformer(memory)
    elif kind == "text":
        out = qformer(None, ids, mask)
    elif kind == "joint":
        out = qformer(memory, ids, mask)
    elif kind == "generate":
        out = qformer(memory, ids, mask, causal=True)
    else:
        seen = qformer(memory)
        text = qformer(None, ids, mask, past=seen.past).text_BTM
        return {"queries": seen.queries_BQM, "text": text}
    return {k: v for k, v in (("queries", out.queries_BQM), ("text", out.text_BTM)) if v is not None}


def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    """For row 1 of the batch: which of its rows moved."""
    return ((before[1] - after[1]).abs().amax(-1) > 1e-6).tolist()


# pass -> what is perturbed -> (queries change, text rows that change). Row 1 of the batch has four valid tokens;
# rows 4 and 5 are padding, whose own outputs nobody reads.
TRUTH = {
    "image": {"image": (True, None), "token2": (False, None), "pad": (False, None)},
    "text": {"image": (None, []), "token2": (None, [0, 1, 2, 3]), "pad": (None, [])},
    "joint": {"image": (True, [0, 1, 2, 3]), "token2": (True, [0, 1, 2, 3]), "pad": (False, [])},
    "generate": {"image": (True, [0, 1, 2, 3]), "token2": (False, [2, 3]), "pad": (False, [])},
    "cached": {"image": (True, [0, 1, 2, 3]), "token2": (False, [2, 3]), "pad": (False, [])},
}


@pytest.mark.parametrize("cause", ["image", "token2", "pad"])
@pytest.mark.parametrize("kind", list(TRUTH))
def test_each_pass_sees_what_the_table_says_and_no_more(kind, cause, qformer, inputs) -> None:
    image, ids, mask = inputs
    before = run(qformer, kind, image, ids, mask)
    image, ids = image.clone(), ids.clone()
    if cause == "image":
        image[1] += 1.0
    else:
        column = 2 if cause == "token2" else 5
        ids[1, column] = ids[1, column] % (V - 1) + 1
    after = run(qformer, kind, image, ids, mask)
    queries, text = TRUTH[kind][cause]
    if queries is not None:
        assert changed(before["queries"], after["queries"]) == [queries] * Q
    if text is not None:
        moved = [i for i, hit in enumerate(changed(before["text"], after["text"])[:4]) if hit]
        assert moved == text
    for name in before:  # other images of the batch are never touched
        assert torch.equal(before[name][0], after[name][0]) and torch.equal(before[name][2], after[name][2])


def test_one_pass_and_cached_generation_agree(qformer, inputs) -> None:
    image, ids, mask = inputs
    single, cached = (run(qformer, kind, image, ids, mask) for kind in ("generate", "cached"))
    torch.testing.assert_close(single["queries"], cached["queries"], rtol=0, atol=1e-5)
    valid = mask.bool()
    torch.testing.assert_close(
        qformer.logits(single["text"][valid]), qformer.logits(cached["text"][valid]), rtol=0, atol=1e-5
    )


def test_greedy_decoding_with_cache_equals_decoding_without(qformer, inputs) -> None:
    image, _, _ = inputs
    memory = qformer.remember(ImageTokens(image))
    found = qformer.greedy(memory, end_id=2, max_new_tokens=7)
    for row in range(B):
        ids = torch.tensor([[qformer.dec_id]])
        one = memory.rows(torch.tensor([row]))
        for _ in range(7):
            out = qformer(one, ids, torch.ones_like(ids), causal=True)
            scores = qformer.logits(out.text_BTM[:, -1])
            scores[:, qformer.dec_id] = -torch.inf
            token = scores.argmax(-1, keepdim=True)
            if int(token) == 2:
                break
            ids = torch.cat([ids, token], 1)
        assert found[row] == ids[0, 1:].tolist()


def test_greedy_decoding_honours_least_and_most_tokens(qformer, inputs) -> None:
    memory = qformer.remember(ImageTokens(inputs[0]))
    first = qformer.greedy(memory, end_id=0, max_new_tokens=1)[0]
    again = qformer.greedy(memory, end_id=first[0], max_new_tokens=5, min_new_tokens=3)
    assert 3 <= len(again[0]) <= 5 and first[0] not in again[0][:3]
    assert qformer.greedy(memory, end_id=first[0], max_new_tokens=5)[0] == []


@pytest.mark.parametrize("joint", [False, True])
def test_direct_and_projected_cross_attention_agree_with_gradients(joint, inputs) -> None:
    image, ids, mask = inputs
    results = []
    for uses in (0.0, 1e9):
        qformer = random_qformer().double()
        scale, shift = (torch.randn(D, dtype=torch.double, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
        scale.requires_grad_(), shift.requires_grad_()
        memory = qformer.remember(ImageTokens(image.double(), scale, shift), uses)
        assert (memory.kv is None) == (uses == 0.0)
        twice = ImageMemory.cat([memory, memory.rows(torch.tensor([2, 0, 1]))])
        out = qformer(twice, *((torch.cat([ids, ids]), torch.cat([mask, mask])) if joint else ()))
        loss = (out.queries_BQM * torch.linspace(-1, 1, out.queries_BQM.numel()).view_as(out.queries_BQM)).sum()
        loss.backward()
        gradients = {n: p.grad for n, p in qformer.named_parameters() if p.grad is not None}
        results.append((out.queries_BQM, gradients | {"scale": scale.grad, "shift": shift.grad}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_the_image_map_is_applied_to_the_tokens(qformer, inputs) -> None:
    scale, shift = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)
    folded = qformer(qformer.remember(ImageTokens(inputs[0], scale, shift))).queries_BQM
    plain = qformer(qformer.remember(ImageTokens(inputs[0] * scale + shift))).queries_BQM
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-5)


def test_direct_and_projected_agree_under_dropout_of_one_value(inputs) -> None:
    """Dropping attention weights must scale the value bias too: with every weight dropped, nothing is left of it."""
    config = SHAPE.model_copy(update={"dropout": 0.999999, "layers": 1})
    for uses in (0.0, 1e9):
        qformer = random_qformer(config).train()
        cross = qformer.layers[0].cross
        seen: list[torch.Tensor] = []
        cross.output.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        qformer(qformer.remember(ImageTokens(inputs[0]), uses))
        assert torch.equal(seen[0], torch.zeros_like(seen[0]))


def test_leading_rows_are_the_first_of_all_rows(qformer, inputs) -> None:
    image, ids, mask = inputs
    memory = qformer.remember(ImageTokens(image))
    whole, lead = qformer(memory, ids, mask), qformer(memory, ids, mask, leading=Q)
    torch.testing.assert_close(lead.queries_BQM, whole.queries_BQM, rtol=0, atol=1e-6)
    assert lead.text_BTM is None
    torch.testing.assert_close(
        qformer(None, ids, mask, leading=1).text_BTM, qformer(None, ids, mask).text_BTM[:, :1], rtol=0, atol=1e-6
    )


def test_attention_written_out_is_the_fused_one_with_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 2, n, 8, generator=generator, dtype=torch.double) for n in (5, 7, 7))
    allowed = torch.rand(3, 1, 5, 7, generator=generator) > 0.3
    allowed[..., 0] = True
    found = []
    for form in (_written_out, torch.nn.functional.scaled_dot_product_attention):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        seen = form(*given, allowed, None) if form is _written_out else form(*given, attn_mask=allowed)
        (seen * torch.linspace(-1, 1, seen.numel(), dtype=seen.dtype).view_as(seen)).sum().backward()
        found.append([seen, *(x.grad for x in given)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    dropped = _written_out(q, k, torch.ones_like(v), None, torch.nn.Dropout(0.5))
    assert dropped.std() > 0.05 and abs(float(dropped.mean()) - 1) < 0.2


@pytest.mark.parametrize("kind", ["image", "joint", "cached"])
def test_bf16_takes_the_written_form_and_stays_close(kind, qformer, inputs, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "_written_out", lambda *a: calls.append(a[0].dtype) or _written_out(*a))
    exact = run(qformer, kind, *inputs)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        half = run(qformer, kind, *inputs)
    assert calls and set(calls) == {torch.bfloat16}
    for name in exact:
        torch.testing.assert_close(half[name].float(), exact[name], rtol=0, atol=0.06)


def padding_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path: every place of the padded grid goes through every layer."""
    of, embed = Packing.of, QFormer._embed_text
    ones = torch.ones_like

    def everything(sequences: int, queries: int, mask: torch.Tensor | None) -> Packing:
        return of(sequences, queries, None if mask is None else ones(mask))

    monkeypatch.setattr(Packing, "of", staticmethod(everything))
    monkeypatch.setattr(QFormer, "_embed_text", lambda self, ids, mask, before: embed(self, ids, ones(mask), before))


@pytest.mark.parametrize("kind", ["text", "joint", "generate", "cached", "pooled first", "pooled mean"])
def test_leaving_padding_out_changes_nothing_that_is_read_nor_any_gradient(kind, inputs, monkeypatch) -> None:
    image, ids, mask = inputs
    mask = mask.clone()
    mask[2, 1:] = 0  # a text of one token
    found = []
    for plain in (False, True):
        if plain:
            padding_computed(monkeypatch)
        qformer = random_qformer().double()
        if kind.startswith("pooled"):
            qformer.config = qformer.config.model_copy(update={"text_pool": kind.removeprefix("pooled ")})
            hidden = qformer(None, ids, mask).text_BTM
            read = {"pooled": qformer.pooled_text(ids, mask)}
            own = hidden[:, 0] if kind == "pooled first" else torch.stack(
                [row[: int(m.sum())].mean(0) for row, m in zip(hidden, mask, strict=True)]
            )  # fmt: skip
            if not plain:
                torch.testing.assert_close(read["pooled"], own, rtol=0, atol=1e-12)
            read["pooled"] = own if plain else read["pooled"]
        else:
            read = run(qformer, kind, image.double(), ids, mask)
            read["text"] = read["text"][mask.bool()]
        weights = {name: torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for name, x in read.items()}
        sum((read[name] * weights[name]).sum() for name in read).backward()
        gradients = {n: p.grad for n, p in qformer.named_parameters() if p.grad is not None and bool(p.grad.any())}
        found.append((dict(read), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    assert "layers.0.text_ffn.up.weight" in found[0][1]


def test_padding_goes_through_no_linear_layer(qformer, inputs) -> None:
    image, ids, mask = inputs
    rows: dict[str, int] = {}
    for name in ("attention.key", "attention.output", "text_ffn.up", "query_ffn.up"):
        qformer.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows.update({name: args[0].shape[:-1].numel()})
        )
    run(qformer, "joint", image, ids, mask)
    tokens = int(mask.sum())
    assert tokens < B * T
    both = B * Q + tokens
    assert rows == {"attention.key": both, "attention.output": both, "text_ffn.up": tokens, "query_ffn.up": B * Q}


def test_packed_rows_stand_where_they_stood() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    packing = Packing.of(3, 2, mask)
    grid = torch.arange(1.0, 16.0).view(3, 5, 1).expand(-1, -1, 4) * torch.cat([torch.ones(3, 2), mask], 1).unsqueeze(2)
    rows = packing.collect(grid)
    assert rows[:, 0].tolist() == [1, 2, 6, 7, 11, 12, 3, 4, 8, 13, 14, 15]  # queries first, then texts
    assert torch.equal(packing.spread(rows), grid)
    first, kept = packing.leading(rows, 3)
    assert kept[:, 0].tolist() == [1, 2, 6, 7, 11, 12, 3, 8, 13] and first.query_rows == 6
    assert torch.equal(first.spread(kept), grid[:, :3])
    whole = Packing.of(3, 0, torch.ones_like(mask))
    assert whole.places_R is None
    assert torch.equal(whole.leading(whole.collect(grid[:, :3]), 1)[1], grid[:, 0])


def test_longer_padding_changes_nothing(qformer, inputs) -> None:
    image, ids, mask = inputs
    padded = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    for kind in ("text", "joint", "generate"):
        short, long = run(qformer, kind, image, ids, mask), run(qformer, kind, image, *padded)
        for name in short:
            torch.testing.assert_close(long[name][:, : short[name].shape[1]], short[name], rtol=0, atol=1e-5)


def test_recomputation_gives_the_same_gradients(inputs) -> None:
    image, ids, mask = inputs
    found = []
    for recompute in (False, True):
        qformer = random_qformer(recompute=recompute).train()
        out = qformer(qformer.remember(ImageTokens(image)), ids, mask)
        (out.queries_BQM.square().sum() + out.text_BTM.sum()).backward()
        found.append({n: p.grad for n, p in qformer.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_start_copies_the_text_ffn_and_draws_the_queries(qformer) -> None:
    torch.manual_seed(0)
    fresh = QFormer(SHAPE, D, V)
    for layer in fresh.layers:
        for a, b in zip(layer.query_ffn.parameters(), layer.text_ffn.parameters(), strict=True):
            assert torch.equal(a, b) and a is not b
    assert [layer.cross is not None for layer in fresh.layers] == [True, False, True, False]
    assert 0.01 < float(fresh.queries.detach().std()) < 0.03  # zero queries would all give one output
    assert fresh.words.weight.shape[0] == V + 1
    assert fresh.lm_head.words is fresh.words.weight


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        giant = QFormer(QFormerConfig(), 1408, 30522)
        stage2 = QFormer(QFormerConfig(), 1408, None)
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in (("1", giant), ("2", stage2))}
    assert count["1"] == 186_282_811 + 24_576  # BERT-LM with tied head, and the queries
    layer = giant.layers[0]
    assert sum(p.numel() for p in layer.attention.parameters()) == 2_363_904
    assert sum(p.numel() for p in layer.cross.parameters()) == 3_346_944
    assert sum(p.numel() for p in layer.query_ffn.parameters()) == 4_723_968
    # OPT-2.7B stage 2: Q-Former, ln_vision, projection to 2560
    assert count["2"] + 2 * 1408 + 768 * 2560 + 2560 == 107_133_696


def bert_state(layers: int = 4) -> dict[str, torch.Tensor]:
    source = random_qformer()
    parameters = dict(source.named_parameters())
    names = bert_names(layers, head=False)
    state = {f"bert.{theirs}": parameters[ours].detach().clone() for theirs, ours in names.items()}
    state["bert.embeddings.word_embeddings.weight"] = state["bert.embeddings.word_embeddings.weight"][:V]
    return state


BERT = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 4}


def test_starting_from_bert_takes_first_layers_and_keeps_dec(inputs) -> None:
    torch.manual_seed(3)
    config = SHAPE.model_copy(update={"layers": 2})
    fresh = QFormer(config, D, V, positions=20)
    dec = fresh.words.weight[V].clone()
    load_bert_layers(fresh, BERT, bert_state())
    source = random_qformer()
    assert torch.equal(fresh.words.weight[:V], source.words.weight[:V]) and torch.equal(fresh.words.weight[V], dec)
    assert torch.equal(fresh.layers[1].attention.key.weight, source.layers[1].attention.key.weight)
    assert torch.equal(fresh.layers[1].query_ffn.up.weight, source.layers[1].text_ffn.up.weight)


def test_a_text_model_that_does_not_fit_is_named() -> None:
    with pytest.raises(WeightsError, match=r"qformer\.heads 4 against 8"):
        load_bert_layers(random_qformer(), BERT | {"num_attention_heads": 8}, bert_state())
    with pytest.raises(WeightsError, match="layers 4, and they hold 2"):
        load_bert_layers(random_qformer(), BERT | {"num_hidden_layers": 2}, bert_state())


def test_text_pass_from_bert_is_bert(inputs) -> None:
    from isthmus.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    bert = BertModel(BertConfig(vocab_size=V, max_position_embeddings=20, **BERT), add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, p in bert.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    _, ids, mask = inputs
    for segment in ("fold", "drop"):
        fresh = QFormer(SHAPE.model_copy(update={"init_segment": segment}), D, V, positions=20).eval()
        load_bert_layers(fresh, BERT, bert.state_dict())
        if segment == "drop":  # BERT without segments
            bert.embeddings.token_type_embeddings.weight.data.zero_()
        with torch.no_grad():
            theirs = bert(ids, attention_mask=mask).last_hidden_state
            ours = fresh(None, ids, mask).text_BTM
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)
    assert SHAPE.init_segment == "drop", "LAVIS has no segments"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parity_with_hugging_face(attention, inputs) -> None:
    """Image, text and joint passes against transformers' own Q-Former, on weights that are not degenerate."""
    from isthmus.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import Blip2Config, Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

    config = Blip2QFormerConfig(
        vocab_size=V + 1, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=20,
        cross_attention_frequency=2, encoder_hidden_size=D, use_qformer_text_input=True,
    )  # fmt: skip
    assert Blip2Config is not None
    config._attn_implementation = attention
    theirs, embeddings = Blip2QFormerModel(config).double().eval(), Blip2TextEmbeddings(config).double().eval()
    ours = random_qformer().double()
    parameters = dict(ours.named_parameters())
    state, table = {}, {}
    for lavis, full in lavis_names(4).items():
        name = full.removeprefix("qformer.")
        if not lavis.startswith("Qformer.bert.") or name not in parameters:
            continue
        key = lavis.removeprefix("Qformer.bert.").replace("attention.self.", "attention.attention.")
        if key.startswith("embeddings.LayerNorm"):
            state[key.replace("embeddings.LayerNorm", "layernorm")] = parameters[name]
        elif key.startswith("embeddings."):
            table[key.removeprefix("embeddings.")] = parameters[name]
        else:
            state[key] = parameters[name]
    theirs.load_state_dict(state, strict=True)
    embeddings.load_state_dict(table, strict=False)
    image, ids, mask = inputs
    image = image.double()
    ones = torch.ones(B, Q, dtype=torch.long)
    queries = ours.queries.expand(B, -1, -1)
    memory = ours.remember(ImageTokens(image))
    with torch.no_grad():
        hf_image = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        torch.testing.assert_close(ours(memory).queries_BQM, hf_image, rtol=0, atol=1e-12)
        hf_text = theirs(query_embeds=embeddings(input_ids=ids), query_length=0, attention_mask=mask).last_hidden_state
        text = ours(None, ids, mask).text_BTM
        torch.testing.assert_close(text[mask.bool()], hf_text[mask.bool()], rtol=0, atol=1e-12)
        hf_joint = theirs(
            query_embeds=embeddings(input_ids=ids, query_embeds=queries), query_length=Q,
            attention_mask=torch.cat([ones, mask], 1), encoder_hidden_states=image,
        ).last_hidden_state  # fmt: skip
        out = ours(memory, ids, mask)
        torch.testing.assert_close(out.queries_BQM, hf_joint[:, :Q], rtol=0, atol=1e-12)
        torch.testing.assert_close(out.text_BTM[mask.bool()], hf_joint[:, Q:][mask.bool()], rtol=0, atol=1e-12)


def test_importing_lavis_refuses_what_it_cannot_place() -> None:
    state = {"query_tokens": torch.zeros(1, 4, 16), "opt_model.lm_head.weight": torch.zeros(2, 2)}
    assert set(import_lavis(state)) == {"qformer.queries"}
    with pytest.raises(WeightsError, match=r"holds .Qformer\.extra."):
        import_lavis(state | {"Qformer.extra": torch.zeros(1)})
    tied = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(3, 2),
        "Qformer.cls.predictions.decoder.weight": torch.ones(3, 2),
    }
    with pytest.raises(WeightsError, match="tied"):
        import_lavis(tied)
