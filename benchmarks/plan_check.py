"""What ``isthmus plan`` says of a step against the step itself, on this machine's processor.

Small recipe shapes of stage 1 (cached image features, a Q-Former without pretrained weights) and of stage 2 (through
SmolLM2-135M), in float32. Each is run in a process of its own: forward, backward, AdamW; the median of its seconds, and
the most that was resident above what the process held before the model was built.

    python benchmarks/plan_check.py --repeats 5 --json plan.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import _passive  # noqa: F401 - before torch
import torch
from _steps import PeakMemory, _status, flops, in_own_process, report, table, timed

from isthmus.config import RunConfig, load_run
from isthmus.contracts import Batch, LocalComm
from isthmus.methods import method_configs
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.methods.parts import SeeingModule
from isthmus.models.language import build_language
from isthmus.planning.assumptions import CPU_UTILISATION
from isthmus.planning.compute import Flops
from isthmus.planning.hardware import Gpu, probe_cpu
from isthmus.planning.plan import Wishes, reckon
from isthmus.planning.shapes import Texts
from isthmus.planning.subject import Subject, examine
from isthmus.planning.trial import NAME, trial_of

VISION = {"name": "vit_base_patch32_224", "weights": "random"}  # 50 tokens of 768; only its sizes are used
MIB = 2.0**20


def shape(layers: int, width: int, queries: int) -> dict[str, Any]:
    """A Q-Former without dropout, which makes a processor write attention out."""
    heads = width // 64
    return {
        "layers": layers, "width": width, "heads": heads, "feed_forward": 4 * width, "queries": queries,
        "dropout": 0.0, "init": None,
    }  # fmt: skip


def recipe(batch: int, micro_batch: int | None = None, **method: Any) -> RunConfig:
    """A run on cached features."""
    values = {
        "name": "check", "method": {"vision": VISION, **method}, "cluster": {"workers": 1}, "zero": {"stage": 0},
        "data": {"train": "nowhere", "placement": "cached", "cache": "nowhere"},
        "train": {"steps": 1, "global_batch": batch, "precision": "fp32", "micro_batch": micro_batch},
    }  # fmt: skip
    return load_run(None, methods=method_configs(), values=values)


SMOLLM = {"weights": "pkg:smollm2-135m-instruct"}
CASES: dict[str, Callable[[], RunConfig]] = {
    "stage 1, 2 x 384, batch 64": partial(recipe, 64, name="blip2_stage1", qformer=shape(2, 384, 16)),
    "stage 1, 4 x 384, batch 32": partial(recipe, 32, name="blip2_stage1", qformer=shape(4, 384, 32)),
    "stage 1, 6 x 768, batch 4": partial(recipe, 4, name="blip2_stage1", qformer=shape(6, 768, 32)),
    "stage 1, 4 x 384, batch 32 in parts of 8": partial(recipe, 32, 8, name="blip2_stage1", qformer=shape(4, 384, 32)),
    "stage 2, 4 x 384, batch 8": partial(recipe, 8, name="blip2_stage2", qformer=shape(4, 384, 16), language=SMOLLM),
    "stage 2, 6 x 768, batch 4": partial(recipe, 4, name="blip2_stage2", qformer=shape(6, 768, 32), language=SMOLLM),
    "stage 2, 4 x 384, batch 16 in parts of 4": partial(
        recipe, 16, 4, name="blip2_stage2", qformer=shape(4, 384, 16), language=SMOLLM
    ),
}


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    if options.case:
        print(json.dumps(measured(options.case, options.repeats)))
        return
    figures: dict[str, object] = {"threads": torch.get_num_threads(), "utilisation": CPU_UTILISATION}
    rows = []
    for name in options.only or CASES:
        found = in_own_process(__file__, ["--case", name, "--repeats", str(options.repeats)])
        said = planned(name, found)
        cells = []
        for what, unit, scale in (("memory", "MiB", MIB), ("seconds", "s", 1.0), ("flops", "GFLOP", 1e9)):
            a, b = said[what] / scale, found[what] / scale
            cells += [f"{a:.4g} {unit}", f"{b:.4g}", f"{a / b - 1:+.1%}"]
            key = name.replace(",", "").replace(" ", "_")
            figures |= {f"{key}_{what}_planned": said[what], f"{key}_{what}_measured": found[what]}
        figures |= {f"{key}_{what}": found[what] for what in ("rate", "bandwidth", "elementwise", "timed", "start")}
        figures |= {f"{key}_{what}": said[what] for what in ("kept", "trained")}
        rows.append([name, *cells])
    columns = ["", *(f"{head}" for what in ("memory", "step", "products") for head in (what, "measured", "off by"))]
    table("Planned and measured", columns, rows)
    report(figures, options.json)


def subject_of(run: RunConfig, batch: Batch) -> Subject:
    """The recipe as a plan sees it, for captions of this batch's lengths."""
    assert batch.mask_BT is not None
    lengths = batch.mask_BT.sum(1)
    return examine(run, Texts(float(lengths.float().mean()), int(lengths.max())))


def planned(name: str, found: dict[str, float]) -> dict[str, float]:
    """Bytes, seconds and operations that the plan gives, without the framework's share and DeepSpeed's buckets, which
    the measured step has not. The processor is as fast as it was found beside the steps."""
    run = CASES[name]()
    batch = captions(run)
    subject = subject_of(run, batch)
    timed = {NAME: found["timed"]} if subject.language is not None else {}
    cpu = Gpu(
        "cpu", found["rate"], found["rate"], 1e12, found["bandwidth"], 1e10, 1e10, "measured", found["elementwise"],
        timed, found["start"],
    )  # fmt: skip
    plan = reckon(subject, Wishes(cpu, 1, 1, CPU_UTILISATION))
    parts = plan.chosen.memory
    memory = plan.chosen.total - parts["framework"] - parts["gradient buckets"]
    memory += _rest_of_batch(subject, batch)
    return {
        "memory": memory, "seconds": plan.step["seconds"], "kept": parts["activations kept"],
        "trained": float(subject.trained),
        "flops": sum(sum(part.values()) for part in plan.flops.values()),
    }  # fmt: skip


def _rest_of_batch(subject: Subject, batch: Batch) -> float:
    """The features are float32 here and float16 in the plan's cache."""
    return 2.0 * len(batch) * subject.vision.tokens * subject.vision.width


def measured(name: str, repeats: int) -> dict[str, float]:
    """Resident bytes above those before the model was built, median seconds, operations of a step."""
    run = CASES[name]()
    captions(run)  # what is imported for it is imported before
    _warm()
    before = _status("VmRSS")
    module = _build(run)
    batch = captions(run)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05, fused=True)

    def step() -> None:
        module(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are, as an engine's do

    step()
    with PeakMemory() as memory:
        step()
    subject, size = subject_of(run, batch), run.train.global_batch
    products = sum((part for name, part in subject.flops(size, 1).items() if name != NAME), Flops()).products
    seconds, probes, trials = [], [], []
    for _ in range(repeats):  # in turns, so that a slow minute hits both
        probes.append(probe_cpu(products, rounds=1))
        if subject.language is not None:
            trials.append(trial_of(subject, size, bf16=False).seconds(rounds=1) * subject.parts(size))
        step()  # brings back what the probe drove out of caches and heap
        seconds.append(timed(step))
    return {
        "memory": memory.peak - before, "seconds": statistics.median(seconds), "flops": flops(step),
        "rate": statistics.median(p.fp32 for p in probes), "bandwidth": statistics.median(p.bandwidth for p in probes),
        "elementwise": statistics.median(p.elementwise for p in probes),
        "timed": statistics.median(trials or [0.0]), "start": statistics.median(p.start for p in probes),
    }  # fmt: skip


def _warm() -> None:
    """Libraries' own buffers and code exist before anything is measured."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.LayerNorm(256))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(64, 256)).sum().backward()
    optimizer.step()


def _build(run: RunConfig) -> torch.nn.Module:
    method = run.method
    if isinstance(method, Blip2Stage1Config):
        module: SeeingModule = Blip2Stage1(method, None, 768, None, LocalComm(), 0, vocab=30522)
    else:
        assert isinstance(method, Blip2Stage2Config)
        module = Blip2Stage2(method, None, 768, build_language(method.language), LocalComm())
    module.micro_batch = run.train.micro_batch
    return module.train()


def captions(run: RunConfig) -> Batch:
    """Random features and texts of log-normal lengths about 12 tokens, 5 to 24."""
    size = run.train.global_batch
    generator = torch.Generator().manual_seed(size)
    lengths = ((torch.randn(size, generator=generator) * 0.28).exp() * 12).round().long().clamp(5, 24)
    T = int(lengths.max())
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1000, 30000, (size, T), generator=generator) * mask
    features = torch.randn(size, 50, 768, generator=generator)
    valid = torch.ones(size, dtype=torch.bool)
    return Batch(
        torch.arange(size), valid, features_BND=features, ids_BT=ids, mask_BT=mask,
        labels_BT=ids.masked_fill(mask == 0, -100),
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps; their median counts")
    parser.add_argument("--only", action="append", choices=list(CASES), help="this case alone; may be repeated")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
