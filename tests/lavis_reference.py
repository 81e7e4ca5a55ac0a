"""BLIP-2 written down plainly under LAVIS's names, and files of the golden kind made with it.

It shares nothing with the package: functions over one flat dictionary of tensors, every pass on its own, padded to full
length, one process for all ranks. It stands in for the recorded numbers of cases that no file here holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
CFG = {"hidden": 32, "layers": 4, "heads": 4, "inter": 48, "vocab": 61, "enc": 24, "Q": 4, "proj": 16, "L": 8, "P": 5}
LAYER = "Qformer.bert.encoder.layer.{}."
BLOCKED = -10000.0


# --- weights ---------------------------------------------------------------------------------------------------------


def _draw(shape: Sequence[int], generator: torch.Generator, std: float = 0.15, mean: float = 0.0) -> Tensor:
    return mean + std * torch.randn(*shape, generator=generator)


def qformer_state(generator: torch.Generator, *, text: bool) -> State:
    """Wide random weights: the usual small ones hide mistakes."""
    M, D, inter = CFG["hidden"], CFG["enc"], CFG["inter"]
    state: State = {"query_tokens": _draw((1, CFG["Q"], M), generator, 0.5)}

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = _draw((width,), generator, 0.1, 1.0)
        state[f"{name}.bias"] = _draw((width,), generator, 0.1)

    def linear(name: str, into: int, out: int) -> None:
        state[f"{name}.weight"] = _draw((out, into), generator)
        state[f"{name}.bias"] = _draw((out,), generator, 0.05)

    norm("ln_vision", D)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)
    norm("Qformer.bert.embeddings.LayerNorm", M)
    for i in range(CFG["layers"]):
        layer = LAYER.format(i)
        for kind, width in [("attention", M)] + [("crossattention", D)] * (i % 2 == 0):
            linear(f"{layer}{kind}.self.query", M, M)
            linear(f"{layer}{kind}.self.key", width, M)
            linear(f"{layer}{kind}.self.value", width, M)
            linear(f"{layer}{kind}.output.dense", M, M)
            norm(f"{layer}{kind}.output.LayerNorm", M)
        for end in ("_query", "") if text else ("_query",):
            linear(f"{layer}intermediate{end}.dense", M, inter)
            linear(f"{layer}output{end}.dense", inter, M)
            norm(f"{layer}output{end}.LayerNorm", M)
    if text:
        state["temp"] = torch.tensor(0.07)
        state["Qformer.bert.embeddings.word_embeddings.weight"] = _draw((CFG["vocab"], M), generator, 0.5)
        state["Qformer.bert.embeddings.position_embeddings.weight"] = _draw((32, M), generator, 0.3)
        state["Qformer.cls.predictions.bias"] = _draw((CFG["vocab"],), generator, 0.05)
        linear("Qformer.cls.predictions.transform.dense", M, M)
        norm("Qformer.cls.predictions.transform.LayerNorm", M)
        linear("vision_proj", M, CFG["proj"])
        linear("text_proj", M, CFG["proj"])
        linear("itm_head", M, 2)
    return state


def leaves(state: Mapping[str, Tensor]) -> State:
    """What LAVIS trains, asking for gradients."""
    frozen = ("opt_model.", "t5_model.")
    names = [n for n, t in state.items() if t.is_floating_point() and not n.startswith(frozen)]
    return {name: state[name].clone().requires_grad_() for name in names}


# --- the Q-Former ----------------------------------------------------------------------------------------------------


def _linear(p: State, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _norm(p: State, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def _attend(p: State, name: str, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
    heads = CFG["heads"]

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = split(_linear(p, f"{name}.self.query", x))
    k, v = (split(_linear(p, f"{name}.self.{part}", memory)) for part in ("key", "value"))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores if bias is None else scores + bias.unsqueeze(1)).softmax(-1)
    out = _linear(p, f"{name}.output.dense", (weights @ v).transpose(1, 2).flatten(2))
    return _norm(p, f"{name}.output.LayerNorm", out + x)


def _feed(p: State, layer: str, end: str, x: Tensor) -> Tensor:
    inner = F.gelu(_linear(p, f"{layer}intermediate{end}.dense", x))
    return _norm(p, f"{layer}output{end}.LayerNorm", _linear(p, f"{layer}output{end}.dense", inner) + x)


def qformer(
    p: State, rows: int, queries: int, image: Tensor | None, ids: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """Last hidden states of ``[queries ; text]``; ``allowed`` [B, S, S] is 1 where a row (second axis) may look."""
    parts = [p["query_tokens"].expand(rows, -1, -1)] if queries else []
    if ids is not None:
        words = p["Qformer.bert.embeddings.word_embeddings.weight"][ids]
        parts.append(words + p["Qformer.bert.embeddings.position_embeddings.weight"][: ids.shape[1]])
    x = _norm(p, "Qformer.bert.embeddings.LayerNorm", torch.cat(parts, 1))
    bias = None if allowed is None else (1.0 - allowed.float()) * BLOCKED
    for i in range(CFG["layers"]):
        layer = LAYER.format(i)
        x = _attend(p, f"{layer}attention", x, x, bias)
        q, t = x[:, :queries], x[:, queries:]
        if queries:
            if i % 2 == 0:
                assert image is not None
                q = _attend(p, f"{layer}crossattention", q, image, None)
            q = _feed(p, layer, "_query", q)
        x = torch.cat([q, _feed(p, layer, "", t)], 1) if t.shape[1] else q
    return x


def _seen(att: Tensor, queries: int) -> Tensor:
    """Everything sees the queries and the tokens that are no padding."""
    keys = torch.cat([att.new_ones(len(att), queries), att], 1)
    return keys.unsqueeze(1).expand(-1, keys.shape[1], -1)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def _stage1_features(p: State, image: Tensor, ids: Tensor, att: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seen = _norm(p, "ln_vision", image, 1e-5)
    hidden = qformer(p, len(image), CFG["Q"], seen, None, None)
    texts = qformer(p, len(ids), 0, None, ids, _seen(att, 0))[:, 0]
    image_vectors = F.normalize(_linear(p, "vision_proj", hidden), dim=-1)
    return seen, image_vectors, F.normalize(_linear(p, "text_proj", texts), dim=-1)


def _stage1_rank(
    p: State, rows: slice, features: tuple[Tensor, Tensor, Tensor], ids: Tensor, att: Tensor, same: Tensor,
    by_image: bool, generator: torch.Generator,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    seen, image_vectors, text_vectors = features
    # Gathered vectors carry no gradient, this rank's own rows among them.
    i2t = torch.einsum("bqe,ge->bgq", image_vectors[rows], text_vectors.detach()).amax(-1) / p["temp"]
    t2i = torch.einsum("be,gqe->bgq", text_vectors[rows], image_vectors.detach()).amax(-1) / p["temp"]
    own = same[rows]
    if by_image:
        target = 0.9 * own.float() / own.sum(1, keepdim=True) + 0.1 / own.shape[1]
        itc = -sum((s.log_softmax(1) * target).sum(1).mean() for s in (i2t, t2i)) / 2
    else:
        column = torch.arange(own.shape[1])[rows]
        itc = sum(F.cross_entropy(s, column, label_smoothing=0.1) for s in (i2t, t2i)) / 2
    w_i2t, w_t2i = (s.detach().masked_fill(own, BLOCKED).softmax(1) for s in (i2t, t2i))
    neg_img = torch.multinomial(w_t2i, 1, generator=generator)[:, 0]
    neg_txt = torch.multinomial(w_i2t, 1, generator=generator)[:, 0]

    B, Q = len(own), CFG["Q"]
    joint_ids, joint_att = (torch.cat([x[rows], x[rows], x[neg_txt]]) for x in (ids, att))
    joint_image = torch.cat([seen[rows], seen[neg_img], seen[rows]])
    hidden = qformer(p, 3 * B, Q, joint_image, joint_ids, _seen(joint_att, Q))[:, :Q]
    truth = torch.tensor([1] * B + [0] * 2 * B)
    itm = F.cross_entropy(_linear(p, "itm_head", hidden).mean(1), truth)

    said = ids[rows].clone()
    said[:, 0] = CFG["vocab"] - 1
    allowed = _seen(att[rows], Q).clone()
    allowed[:, :Q, Q:] = 0  # queries are blind to text
    allowed[:, Q:, Q:] *= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.long).tril()
    hidden = qformer(p, B, Q, seen[rows], said, allowed)[:, Q:]
    head = "Qformer.cls.predictions"
    hidden = _norm(p, f"{head}.transform.LayerNorm", F.gelu(_linear(p, f"{head}.transform.dense", hidden)))
    logits = hidden @ p["Qformer.bert.embeddings.word_embeddings.weight"].T + p[f"{head}.bias"]
    labels = said.masked_fill(said == 0, -100)[:, 1:]
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    total = itc + itm + lm
    record: dict[str, Any] = {
        k: float(v.detach()) for k, v in zip(("loss", "itc", "itm", "lm"), (total, itc, itm, lm), strict=True)
    }
    record |= {"neg_img": neg_img.tolist(), "neg_txt": neg_txt.tolist()}
    return total, record | {"w_t2i": w_t2i.tolist(), "w_i2t": w_i2t.tolist()}


def write_stage1(file: Path, *, ranks: int, by_image: bool, seed: int = 0) -> None:
    """A stage-1 file: gradients are the mean over ranks."""
    generator = torch.Generator().manual_seed(seed)
    state, N = qformer_state(generator, text=True), 8
    p = leaves(state)
    image = torch.randn(N, CFG["P"], CFG["enc"], generator=generator)
    ids, att = torch.zeros(2, N, CFG["L"], dtype=torch.long)
    for i, length in enumerate(torch.randint(3, CFG["L"] + 1, (N,), generator=generator).tolist()):
        words = torch.randint(3, CFG["vocab"] - 1, (length - 2,), generator=generator).tolist()
        ids[i, :length], att[i, :length] = torch.tensor([1, *words, 2]), 1
    image_ids = torch.tensor([0, 1, 1, 3, 4, 1, 6, 4]) if by_image else torch.arange(N)
    same = image_ids.unsqueeze(1) == image_ids
    features = _stage1_features(p, image, ids, att)
    records, totals = [], []
    for rank in range(ranks):
        rows = slice(rank * N // ranks, (rank + 1) * N // ranks)
        total, record = _stage1_rank(p, rows, features, ids, att, same, by_image, generator)
        totals.append(total)
        records.append(record)
    (torch.stack(totals).sum() / ranks).backward()
    gradients = {name: leaf.grad for name, leaf in p.items()}
    assert all(gradient is not None for gradient in gradients.values())
    tied = "Qformer.cls.predictions.decoder"
    state[f"{tied}.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"].clone()
    state[f"{tied}.bias"] = state["Qformer.cls.predictions.bias"].clone()
    torch.save(
        {
            "cfg": CFG, "W": ranks, "N": N, "with_image_id": by_image, "state": state, "image": image, "ids": ids,
            "image_ids": image_ids if by_image else None, "att": att, "ranks": records, "grads": gradients,
            "grad_norms": {name: float(gradient.norm()) for name, gradient in gradients.items()},
        },
        file,
    )  # fmt: skip


# --- stage 2 with T5 -------------------------------------------------------------------------------------------------

T5 = {
    "vocab_size": 100, "d_model": 40, "d_kv": 10, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True,
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    "is_encoder_decoder": True, "model_type": "t5", "torch_dtype": None, "pruned_heads": {}, "use_cache": True,
    "transformers_version": "4.33.2", "id2label": {0: "LABEL_0", 1: "LABEL_1"}, "max_length": 20, "prefix": None,
}  # fmt: skip
PREFIXES = {"t5_prompt0": ["", "", "", ""], "t5_prompt3": ["p0", "p1", "p2", "p3"]}
SUFFIXES = ["t0", "t1", "t2", "t3"]


def write_t5(file: Path, *, shared_calls: bool = False, seed: int = 0) -> None:
    """A stage-2 file with a T5 whose output matrix is its own.

    Args:
        file: where to.
        shared_calls: one case only, as a recorder that wrote a single pair of tokenizer calls would leave it.
        seed: of weights and tokens.
    """
    from isthmus.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import T5Config, T5ForConditionalGeneration

    generator = torch.Generator().manual_seed(seed)
    t5 = T5ForConditionalGeneration(T5Config(**T5))
    t5.lm_head.weight = torch.nn.Parameter(torch.empty_like(t5.lm_head.weight))
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            # T5 does not divide its attention scores: wide query weights would drown the comparison in rounding.
            std = 0.05 if ".q." in name else 0.1 if "layer_norm" in name else 0.15
            parameter.copy_(_draw(parameter.shape, generator, std, 1.0 if "layer_norm" in name else 0.0))
    t5.requires_grad_(False)
    state = qformer_state(generator, text=False)
    state["t5_proj.weight"] = _draw((40, CFG["hidden"]), generator)
    state["t5_proj.bias"] = _draw((40,), generator, 0.05)
    image = torch.randn(4, CFG["P"], CFG["enc"], generator=generator)
    ids = {"": [1]}
    for text, words in zip(["p0", "p1", "p2", "p3", *SUFFIXES], [2, 4, 1, 3, 5, 2, 7, 4], strict=True):
        ids[text] = [*torch.randint(3, 100, (words,), generator=generator).tolist(), 1]
    out, calls = {}, []
    for case, prefixes in PREFIXES.items():
        if shared_calls and case != "t5_prompt3":
            continue
        p = leaves(state)
        calls += [(prefixes, 32, "right"), (SUFFIXES, 32, "right")]
        loss = _t5_loss(p, t5, image, [ids[t] for t in prefixes], [ids[t] for t in SUFFIXES])
        loss.backward()
        gradients = {name: leaf.grad for name, leaf in p.items()}
        kept = {name: gradients[name] for name in ("query_tokens", "t5_proj.weight", "t5_proj.bias")}
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        out[case] = {"loss": float(loss.detach()), "grad": kept, "gn": norms, "nograd": []}
    frozen = {f"t5_model.{name}": tensor for name, tensor in t5.state_dict().items()}
    everything: dict[str, Any] = {"state": state | frozen, "image": image, "ids": ids, "texts": SUFFIXES, "out": out}
    torch.save(everything | {"t5_config": T5, "tok_calls": calls}, file)


def _t5_loss(p: State, t5: Any, image: Tensor, prefixes: list[list[int]], suffixes: list[list[int]]) -> Tensor:
    """LAVIS's Blip2T5.forward with transformers' own loss: the mean over all label tokens."""
    hidden = qformer(p, len(image), CFG["Q"], _norm(p, "ln_vision", image, 1e-5), None, None)
    soft = _linear(p, "t5_proj", hidden)
    read = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in prefixes], batch_first=True)
    said = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in suffixes], batch_first=True)
    loss: Tensor = t5(
        inputs_embeds=torch.cat([soft, t5.shared(read)], 1),
        attention_mask=torch.cat([torch.ones(soft.shape[:2]), (read != 0).float()], 1),
        decoder_attention_mask=(said != 0).long(),
        labels=said.masked_fill(said == 0, -100),
    ).loss
    return loss
