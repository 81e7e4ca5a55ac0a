"""One training step of stage 1 in BLIP-2's real shape: Isthmus against the same four passes written plainly.

Forward, backward and AdamW on cached image features (257 tokens of 1408), a Q-Former of 12 layers of 768 with 32
queries, and captions of realistic lengths. The peer (``_plain_stage1.py``) is built from transformers' modules, works
as LAVIS does, and shares our parameters, so both give the same losses; that is checked on every run.

    python benchmarks/stage1_step.py --batches 4,12 --repeats 3 --json stage1.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import _passive  # noqa: F401 - before torch
import torch
import torch.nn.functional as F
from _plain_stage1 import PlainStage1
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

from isthmus.config import QFormerConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.losses.matching import Negatives
from isthmus.methods import blip2_stage1
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.parts import VisionNorm
from isthmus.models import attention
from isthmus.models.attention import CrossAttention, ImageMemory, ImageTokens
from isthmus.models.packing import Packing
from isthmus.models.qformer import QFormer

TOKENS, WIDTH, VOCAB, LONGEST = 257, 1408, 30522, 32
GIB = 2.0**30


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(_peak(options.peak, int(options.batches[-1]), options.dropout)))
        return
    bench = Bench(options.dropout)
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dropout": options.dropout,
    }
    figures |= bench.agreement(options.batches[0])
    largest = options.batches[-1]
    for batch in options.batches:
        figures |= bench.batch(batch, options.repeats, headline=batch == largest)
    figures |= bench.long_texts(options.batches[0], options.repeats)
    if not options.quick:
        figures |= bench.one_by_one(options.batches[0], options.repeats)
        figures |= _memory(largest, options)
    report(figures, options.json)


class Bench:
    """The module, its plain counterpart on the same parameters, and the optimizer of both."""

    def __init__(self, dropout: float) -> None:
        self.ours = build(dropout)
        self.plain = PlainStage1(self.ours, text_length=LONGEST).to(device()).train()
        self.optimizer = torch.optim.AdamW(self.ours.parameters(), lr=1e-6, weight_decay=0.05, fused=True)
        self.bf16 = has_bf16()

    def step(self, module: nn.Module, batch: Batch, *, bf16: bool = False, off: str = "") -> None:
        """Forward, backward, AdamW. ``off`` names an optimisation of ours to do without."""
        with ABLATIONS[off]() if off else nullcontext():
            batch = _padded(batch) if off in ("text padded to 32", "all of these") else batch
            with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                total = module(batch).total
            total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def agreement(self, size: int) -> dict[str, float]:
        """Largest difference of any loss, ours against plain and each ablation against ours, in eval mode."""
        made, turn = captions(size), torch.arange(size, device=device())
        negatives = Negatives(turn.roll(1), turn.roll(-1), torch.ones_like(turn, dtype=torch.bool))
        self.ours.eval(), self.plain.eval()
        with torch.no_grad(), mock.patch.object(self.ours, "mine", lambda *_, **__: negatives):
            ours, plain = self.ours(made), self.plain(made, negatives)
            with ABLATIONS["all of these"]():
                slow = self.ours(_padded(made))
        self.ours.train(), self.plain.train()
        differences = {
            name: max(abs(float(ours.parts[k] - other.parts[k])) for k in ours.parts)
            for name, other in (("max_abs_loss_diff", plain), ("max_abs_loss_diff_all_off", slow))
        }
        rows = [[k, *(f"{float(t.parts[k]):.6f}" for t in (ours, plain, slow))] for k in ours.parts]
        table("Losses on the same weights, batch and negatives", ["", "Isthmus", "plain", "optimisations off"], rows)
        return differences

    def batch(self, size: int, repeats: int, *, headline: bool) -> dict[str, object]:
        """Ours and plain at one batch size, in fp32 and in bf16 where the machine has it."""
        made = captions(size)
        contenders: dict[str, Callable[[], object]] = {
            "plain": partial(self.step, self.plain, made),
            "Isthmus": partial(self.step, self.ours, made),
        }
        if self.bf16:
            contenders["plain bf16"] = partial(self.step, self.plain, made, bf16=True)
            contenders["Isthmus bf16"] = partial(self.step, self.ours, made, bf16=True)
        work = {name: flops(partial(self.step, m, made)) for name, m in (("plain", self.plain), ("Isthmus", self.ours))}
        seconds = alternate(contenders, repeats, warm=torch.cuda.is_available())
        rates = {False: matmul_rate(torch.float32), True: matmul_rate(torch.bfloat16) if self.bf16 else math.nan}
        rows = []
        for name, took in seconds.items():
            operations, rate = work[name.split()[0]], rates["bf16" in name]
            used = utilisation(operations, took)
            rows.append(
                [
                    name,
                    f"{took:.2f}",
                    f"{size / took:.2f}",
                    f"{seconds['plain'] / took:.2f}x",
                    f"{operations / 1e9:.0f}",
                    f"{operations / rate:.2f}",
                    f"{took / (operations / rate):.2f}x",
                    "" if used is None else f"{used:.1%}",
                ]
            )
        lengths = made.mask_BT.sum(1).float()  # type: ignore[union-attr]
        title = f"Batch {size}, captions of {lengths.mean():.1f} tokens (longest {int(lengths.max())})"
        columns = ["step", "seconds", "samples/s", "to plain fp32", "GFLOP", "floor s", "of floor", "MFU"]
        table(title, columns, rows)
        ours, plain = seconds["Isthmus"], seconds["plain"]
        half = {name: seconds.get(f"{name} bf16") for name in ("Isthmus", "plain")}
        found: dict[str, object] = {
            "speedup_vs_plain": plain / ours,
            "speedup_bf16": plain / half["Isthmus"] if half["Isthmus"] else None,
            "speedup_vs_plain_both_bf16": half["plain"] / half["Isthmus"]
            if half["Isthmus"] and half["plain"]
            else None,
            "flop_bound": work["plain"] / work["Isthmus"],
            "samples_per_s": size / ours,
            "samples_per_s_bf16": size / half["Isthmus"] if half["Isthmus"] else None,
            "plain_samples_per_s": size / plain,
            "gflop_per_pair": work["Isthmus"] / size / 1e9,
            "plain_gflop_per_pair": work["plain"] / size / 1e9,
            "matmul_gflops_fp32": rates[False] / 1e9,
            "matmul_gflops_bf16": rates[True] / 1e9 if self.bf16 else None,
            "floor_s": work["Isthmus"] / rates[False],
            "seconds_over_floor": ours / (work["Isthmus"] / rates[False]),
            "seconds_over_floor_bf16": half["Isthmus"] / (work["Isthmus"] / rates[True]) if half["Isthmus"] else None,
            "mfu_bf16": utilisation(work["Isthmus"], half["Isthmus"]) if half["Isthmus"] else None,
        }
        found = {name: round(v, 4) if isinstance(v, float) else v for name, v in found.items()}
        per_batch = {f"b{size}_{name}": found[name] for name in ("speedup_vs_plain", "speedup_bf16", "samples_per_s")}
        return per_batch | (found | {"batch": size} if headline else {})

    def long_texts(self, size: int, repeats: int) -> dict[str, float]:
        """The case without padding to save: every text has all 32 tokens."""
        made = captions(size, full=True)
        steps = {"plain": partial(self.step, self.plain, made), "Isthmus": partial(self.step, self.ours, made)}
        seconds = alternate(steps, min(repeats, 2), warm=False)
        ratio = seconds["plain"] / seconds["Isthmus"]
        rows = [[name, f"{took:.2f}", f"{size / took:.2f}"] for name, took in seconds.items()]
        table(f"Batch {size}, all texts of {LONGEST} tokens: {ratio:.2f}x", ["step", "seconds", "samples/s"], rows)
        return {"speedup_vs_plain_long_texts": round(ratio, 4)}

    def one_by_one(self, size: int, repeats: int) -> dict[str, float]:
        """Ours with each optimisation off, and with all of them off."""
        made = captions(size)
        steps = {"": partial(self.step, self.ours, made)}
        steps |= {name: partial(self.step, self.ours, made, off=name) for name in ABLATIONS}
        seconds = alternate(steps, min(repeats, 2), warm=False)
        rows = [[name or "Isthmus", f"{took:.2f}", f"{took / seconds['']:.2f}x"] for name, took in seconds.items()]
        table(f"Batch {size}, ours without one optimisation", ["without", "seconds", "of ours"], rows)
        return {f"without_{n.replace(' ', '_')}": round(s / seconds[""], 4) for n, s in seconds.items() if n}


def build(dropout: float) -> Blip2Stage1:
    """Stage 1 in the paper's shape on random weights; norms and biases too, so that no term of them is trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Blip2Stage1Config(qformer=QFormerConfig(dropout=dropout, init=None))
        module = Blip2Stage1(config, None, WIDTH, None, LocalComm(), 0, vocab=VOCAB)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1 and name != "temperature":
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.to(device()).train()


def captions(size: int, *, full: bool = False) -> Batch:
    """Random image features and texts. Lengths are log-normal about 12 tokens with the special ones, 6 to 32, which is
    how COCO's captions lie; ``full`` gives all of them 32."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.randn(size, generator=generator) * 0.28
    lengths = torch.full((size,), LONGEST) if full else (spread.exp() * 12).round().long().clamp(6, LONGEST)
    T = int(lengths.max())
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1000, 30000, (size, T), generator=generator) * mask
    ids[:, 0], ids[torch.arange(size), lengths - 1] = 101, 102  # [CLS], [SEP]
    features = torch.randn(size, TOKENS, WIDTH, generator=generator)
    rows = torch.arange(size)
    made = Batch(rows, torch.ones(size, dtype=torch.bool), features_BND=features, ids_BT=ids, mask_BT=mask)
    return made.to(device())


# ---------------------------------------------------------------------------------------- ours without an optimisation


def _padded(batch: Batch) -> Batch:
    assert batch.ids_BT is not None and batch.mask_BT is not None
    more = LONGEST - batch.ids_BT.shape[1]
    return replace(batch, ids_BT=F.pad(batch.ids_BT, (0, more)), mask_BT=F.pad(batch.mask_BT, (0, more)))


def _padding_computed() -> AbstractContextManager[object]:
    def of(sequences: int, queries: int, mask_BT: Tensor | None, inner: Callable[..., Packing] = Packing.of) -> Packing:
        return inner(sequences, queries, None if mask_BT is None else torch.ones_like(mask_BT))

    def embed(self: QFormer, ids_BT: Tensor, mask_BT: Tensor, before: int) -> Tensor:
        return EMBED(self, ids_BT, torch.ones_like(mask_BT), before)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Packing, "of", staticmethod(of)))
    stack.enter_context(mock.patch.object(QFormer, "_embed_text", embed))
    return stack


EMBED = QFormer._embed_text


@contextmanager
def _projected_in_every_pass() -> Iterator[None]:
    def direct(self: CrossAttention, query_BHSd: Tensor, image: ImageTokens, noise_BS: Tensor | None) -> Tensor:
        drop = attention._drop(self.weights_dropout, noise_BS, self.heads)
        return attention.merge_heads(attention.attend(query_BHSd, *self.project(image), None, drop))

    with (
        mock.patch.object(QFormer, "remember", lambda _, image, *__, **___: ImageMemory(image)),
        mock.patch.object(CrossAttention, "_direct", direct),
    ):
        yield


def _logits_everywhere() -> AbstractContextManager[object]:
    def loss(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], *, smoothing: float) -> Tensor:
        logits = head(hidden.flatten(0, 1)).unflatten(0, labels.shape)[:, :-1].float()
        return F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing, reduction="sum"
        )

    return mock.patch.object(blip2_stage1, "next_token_sum", loss)


@contextmanager
def _all_last_rows() -> Iterator[None]:
    run = QFormer._run

    def whole(self: QFormer, *arguments: object) -> object:
        x_RM, packing, kept = run(self, *arguments[:-2], None, arguments[-1])  # type: ignore[arg-type]
        return x_RM, packing, kept

    with mock.patch.object(QFormer, "_run", whole):
        yield


def _norm_in_the_tokens() -> AbstractContextManager[object]:
    return mock.patch.object(
        VisionNorm,
        "forward",
        lambda self, x, dtype=torch.float32: ImageTokens(nn.LayerNorm.forward(self, x.float()).to(dtype)),
    )


def _eager_attention() -> AbstractContextManager[object]:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(value.dtype)
        return (weights if drop is None else drop(weights)) @ value

    return mock.patch.object(attention, "attend", attend)


@contextmanager
def _all_off() -> Iterator[None]:
    with ExitStack() as stack:
        for name, switch in ABLATIONS.items():
            if name not in ("text padded to 32", "all of these"):
                stack.enter_context(switch())
        yield


ABLATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "keys and values made once": _projected_in_every_pass,
    "texts packed": _padding_computed,
    "text padded to 32": _padding_computed,
    "logits at labels only": _logits_everywhere,
    "last rows left out": _all_last_rows,
    "norm folded into weights": _norm_in_the_tokens,
    "fused attention": _eager_attention,
    "all of these": _all_off,
}
"""Ours without one optimisation. 'text padded to 32' pads to the fixed length and computes the padding too."""


# ------------------------------------------------------------------------------------------------------------- memory


def _memory(size: int, options: argparse.Namespace) -> dict[str, float]:
    variants = ["plain", "Isthmus", *(["Isthmus bf16"] if has_bf16() else [])]
    arguments = ["--batches", str(size), "--dropout", str(options.dropout), "--threads", str(options.threads)]
    found = {name: in_own_process(__file__, ["--peak", name, *arguments]) for name in variants}
    rows = [[name, f"{v['peak'] / GIB:.2f}", f"{v['above'] / GIB:.2f}"] for name, v in found.items()]
    table(f"Peak memory at batch {size}, GiB", ["step", "peak", "above weights and AdamW state"], rows)
    out = {f"peak_gib_{name.lower().replace(' ', '_')}": round(v["peak"] / GIB, 3) for name, v in found.items()}
    return out | {"peak_memory_ratio": round(found["Isthmus"]["peak"] / found["plain"]["peak"], 4)}


def _peak(variant: str, size: int, dropout: float) -> dict[str, float]:
    bench = Bench(dropout)
    for group in bench.optimizer.param_groups:  # AdamW's state exists before the step that is measured
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    bench.optimizer.step()
    bench.optimizer.zero_grad()
    made = captions(size)
    with PeakMemory() as memory:
        bench.step(bench.plain if variant == "plain" else bench.ours, made, bf16=variant.endswith("bf16"))
    return {"peak": memory.peak, "above": memory.peak - memory.before}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = "64,256" if torch.cuda.is_available() else "4,12"
    parser.add_argument(
        "--batches",
        type=lambda text: [int(b) for b in text.split(",")],
        default=default,
        help="the last is the headline",
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating rounds; their median counts")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--quick", action="store_true", help="leave out ablations and memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
