"""One training step of stage 2 on a real small language model: Isthmus against Hugging Face's BLIP-2.

Forward, backward and AdamW of what stage 2 trains (the norm on the image tokens, the queries, a Q-Former of 12 layers
of 768 without its text branch, the projection) through a frozen SmolLM2-135M, on cached image features (257 tokens of
1408) and captions of realistic lengths. The peer is ``Blip2ForConditionalGeneration`` with the same parts frozen, its
image encoder replaced by the features. Both hold the same parameters and the same language model, so both give the same
loss; that is checked on every run.

    python benchmarks/stage2_step.py --batch 16 --repeats 5 --json stage2.json
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import _passive  # noqa: F401 - before torch
import torch
from _steps import (
    PeakMemory,
    alternate,
    device,
    flops,
    has_bf16,
    in_own_process,
    matmul_rate,
    report,
    table,
    utilisation,
)
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.models.language import build_language
from isthmus.models.lavis import lavis_names

ensure_torchvision()
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: E402

TOKENS, WIDTH, LONGEST = 257, 1408, 32
GIB = 2.0**30


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(_peak(options.peak, options)))
        return
    bench = Bench(options.weights, options.dropout)
    figures: dict[str, object] = {"weights": options.weights, "batch": options.batch, "dropout": options.dropout}
    figures |= bench.agreement(options.batch)
    figures |= bench.speed(options.batch, options.repeats)
    figures |= _memory(options)
    report(figures, options.json)


class Bench:
    """Our stage 2, Hugging Face's model on the same parameters, and the optimizer of both."""

    def __init__(self, weights: str, dropout: float) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = Blip2Stage2Config(
                vision=VisionConfig(),
                qformer=QFormerConfig(dropout=dropout, init=None),
                language=LanguageConfig(weights=weights, max_length=LONGEST),
                projection_init="embedding",
            )
            language = build_language(config.language)
            self.ours = Blip2Stage2(config, None, WIDTH, language, LocalComm())
            with torch.no_grad():
                for parameter in self.ours.parameters():
                    if parameter.requires_grad and parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        self.ours.to(device()).train()
        self.theirs = hugging_face(self.ours)
        trained = [p for p in self.ours.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=True)

    def loss(self, which: str, batch: Batch) -> Tensor:
        """The mean cross-entropy of the caption tokens, by ``ours`` or ``hf``."""
        if which == "ours":
            return self.ours(batch).total
        assert batch.ids_BT is not None and batch.mask_BT is not None and batch.labels_BT is not None
        image_BQ = torch.full((len(batch), 32), self.theirs.config.image_token_id, device=batch.ids_BT.device)
        loss: Tensor = self.theirs(
            pixel_values=batch.features_BND,
            input_ids=torch.cat([image_BQ, batch.ids_BT], 1),
            attention_mask=torch.cat([torch.ones_like(image_BQ), batch.mask_BT], 1),
            labels=torch.cat([torch.full_like(image_BQ, -100), batch.labels_BT], 1),
        ).loss
        return loss

    def step(self, which: str, batch: Batch, *, bf16: bool = False) -> None:
        """Forward, backward, AdamW."""
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            total = self.loss(which, batch)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def agreement(self, size: int) -> dict[str, float]:
        """The two losses and the largest difference of a gradient, on one batch in eval mode."""
        made = captions(size, self.ours)
        self.ours.eval(), self.theirs.eval()
        found, gradients = {}, {}
        for which in ("ours", "hf"):
            loss = self.loss(which, made)
            loss.backward()
            found[which] = float(loss.detach())
            gradients[which] = {n: p.grad.clone() for n, p in self.ours.named_parameters() if p.grad is not None}
            self.optimizer.zero_grad()
        self.ours.train(), self.theirs.train(), self.theirs.language_model.eval()
        assert gradients["ours"].keys() == gradients["hf"].keys(), "the two train different parameters"
        worst = max(
            float((a - gradients["hf"][n]).norm() / gradients["hf"][n].norm().clamp(min=1e-6))
            for n, a in gradients["ours"].items()
            if not n.endswith("key.bias")  # softmax cannot see it: zero but for rounding
        )
        table("Loss on the same weights and batch", ["", "nats a token"], [[k, f"{v:.6f}"] for k, v in found.items()])
        return {"max_abs_loss_diff": abs(found["ours"] - found["hf"]), "max_rel_gradient_diff": worst}

    def speed(self, size: int, repeats: int) -> dict[str, object]:
        """Both steps in turns, in fp32 and in bf16 where the machine has it."""
        made = captions(size, self.ours)
        contenders = {which: partial(self.step, which, made) for which in ("hf", "ours")}
        work = {which: flops(step) for which, step in contenders.items()}
        if has_bf16():
            contenders |= {f"{which} bf16": partial(self.step, which, made, bf16=True) for which in ("hf", "ours")}
        seconds = alternate(contenders, repeats, warm=False)
        rows = []
        for name, took in seconds.items():
            operations, half = work[name.split()[0]], name.endswith("bf16")
            floor = operations / matmul_rate(torch.bfloat16 if half else torch.float32)
            used = utilisation(operations, took)
            ratio = seconds["hf bf16" if half else "hf"] / took
            cells = [f"{took:.2f}", f"{size / took:.2f}", f"{ratio:.2f}x", f"{operations / 1e9:.0f}", f"{floor:.2f}"]
            rows.append([name, *cells, f"{took / floor:.2f}x", "" if used is None else f"{used:.1%}"])
        lengths = made.mask_BT.sum(1).float()  # type: ignore[union-attr]
        title = f"Batch {size}, captions of {lengths.mean():.1f} tokens (longest {int(lengths.max())})"
        columns = ["step", "seconds", "samples/s", "to HF, same dtype", "GFLOP", "floor s", "of floor", "MFU"]
        table(title, columns, rows)
        rate = matmul_rate(torch.float32)
        found: dict[str, object] = {
            "speedup_vs_hf": seconds["hf"] / seconds["ours"],
            "speedup_vs_hf_bf16": seconds["hf bf16"] / seconds["ours bf16"] if "ours bf16" in seconds else None,
            "speedup_bf16": seconds["hf"] / seconds["ours bf16"] if "ours bf16" in seconds else None,
            "flop_bound": work["hf"] / work["ours"],
            "samples_per_s": size / seconds["ours"],
            "hf_samples_per_s": size / seconds["hf"],
            "gflop_per_pair": work["ours"] / size / 1e9,
            "hf_gflop_per_pair": work["hf"] / size / 1e9,
            "floor_s": work["ours"] / rate,
            "hf_floor_s": work["hf"] / rate,
            "seconds_over_floor": seconds["ours"] / (work["ours"] / rate),
        }
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in found.items()}


class Features(nn.Module):
    """Stands in for Hugging Face's image encoder: cached features under its closing norm, which stage 2 trains."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(len(weight), eps=eps)
        self.post_layernorm.weight, self.post_layernorm.bias = weight, bias

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(pixel_values.float()))


def hugging_face(ours: Blip2Stage2) -> Any:
    """Hugging Face's BLIP-2 on our parameters and our language model."""
    c = ours.config.qformer
    assert c is not None
    qformer = Blip2QFormerConfig(
        hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.feed_forward,
        hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout, encoder_hidden_size=WIDTH,
        cross_attention_frequency=c.cross_every,
    )  # fmt: skip
    vision = Blip2VisionConfig(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=8, image_size=14)
    language = ours.language.model
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=language.config.to_dict(),
        num_query_tokens=c.queries, image_token_index=ours.language.vocab - 1,
    )  # fmt: skip
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model.vision_model = Features(ours.ln_vision.weight, ours.ln_vision.bias, ours.ln_vision.eps)
    model.language_model, model.language_projection = language, ours.projection
    model.query_tokens = ours.qformer.queries
    parameters, state = dict(ours.named_parameters()), {}
    for lavis, name in lavis_names(c.layers).items():
        if lavis.startswith("Qformer.bert.") and name in parameters:
            key = lavis.removeprefix("Qformer.bert.").replace("attention.self.", "attention.attention.")
            state[key.replace("embeddings.LayerNorm", "layernorm")] = parameters[name]
    model.qformer.load_state_dict(state, assign=True)
    return model.to(device()).train()


def captions(size: int, module: Blip2Stage2) -> Batch:
    """Random image features and texts of log-normal lengths about 12 tokens, 5 to 32, the end token included."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.randn(size, generator=generator) * 0.28
    lengths = (spread.exp() * 12).round().long().clamp(5, LONGEST)
    T = int(lengths.max())
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1000, 40000, (size, T), generator=generator)
    ids[torch.arange(size), lengths - 1] = module.language.end_id
    ids = ids.masked_fill(mask == 0, module.language.pad_id)
    features = torch.randn(size, TOKENS, WIDTH, generator=generator)
    made = Batch(
        torch.arange(size), torch.ones(size, dtype=torch.bool), features_BND=features, ids_BT=ids, mask_BT=mask,
        labels_BT=ids.masked_fill(mask == 0, -100),
    )  # fmt: skip
    return made.to(device())


def _memory(options: argparse.Namespace) -> dict[str, float]:
    arguments = ["--batch", str(options.batch), "--dropout", str(options.dropout), "--threads", str(options.threads)]
    arguments += ["--weights", options.weights]
    found = {name: in_own_process(__file__, ["--peak", name, *arguments]) for name in ("hf", "ours")}
    rows = [[name, f"{v['peak'] / GIB:.2f}", f"{v['above'] / GIB:.2f}"] for name, v in found.items()]
    table("Peak memory, GiB", ["step", "peak", "above weights and AdamW state"], rows)
    return {
        "peak_memory_ratio": round(found["ours"]["peak"] / found["hf"]["peak"], 4),
        "peak_memory_ratio_above_weights": round(found["ours"]["above"] / found["hf"]["above"], 4),
        "peak_gib": round(found["ours"]["peak"] / GIB, 3),
        "hf_peak_gib": round(found["hf"]["peak"] / GIB, 3),
    }


def _peak(which: str, options: argparse.Namespace) -> dict[str, float]:
    bench = Bench(options.weights, options.dropout)
    for group in bench.optimizer.param_groups:  # AdamW's state exists before the step that is measured
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    bench.optimizer.step()
    bench.optimizer.zero_grad()
    made = captions(options.batch, bench.ours)
    with PeakMemory() as memory:
        bench.step(which, made)
    return {"peak": memory.peak, "above": memory.peak - memory.before}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", default="pkg:smollm2-135m-instruct", help="the frozen language model")
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 16)
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds; their median counts")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
