"""The proof that sounds and clips find one another: trained on drawn clips, with the control that must fail.

Two of eight drawn objects come and go in a clip, and their tones with them; held-out clips are of pairs of objects that
no training clip has. The frozen image encoder is a real one (EfficientNet-Lite0, ImageNet); the audio encoder starts
from nothing. Held-out figures are those of ``isthmus evaluate tasks=[correspondence]``. The same method is then trained
on real pictures with their own sounds, of which there are few.

    python benchmarks/video_audio.py --json video_audio.json

Controls: the same training on clips whose sounds were exchanged; a model that was not trained at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _passive  # noqa: F401 - before torch
import numpy as np
import torch
from _steps import report

from isthmus.config import EvaluateConfig, load_run
from isthmus.contracts import BuildContext, ModelVersion, Sample, Stage
from isthmus.data.features import FeatureCache, build_cache
from isthmus.data.manifest import Manifest, index
from isthmus.data.sources import fetch
from isthmus.errors import IsthmusError
from isthmus.evaluation.driver import evaluate
from isthmus.evaluation.model import Loaded
from isthmus.methods import METHODS, method_configs

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines"
KEPT = (
    "avc_accuracy",
    "avc_auc",
    "seen_to_heard_at_1",
    "heard_to_seen_at_1",
    "seen_to_heard_at_10",
    "heard_to_seen_at_10",
)
CHANCE = ("avc_accuracy_chance", "one_of_n_at_1_chance", "one_of_n_at_10_chance")

Say = Callable[[str], None]


def main() -> None:
    """Train, score, print, and write the figures where ``--json`` says."""
    options = _options()
    figures = prove(options, lambda text: print(text, flush=True))
    report(figures, options.json)


def prove(options: argparse.Namespace, say: Say) -> dict[str, object]:
    """The whole proof; shares are fractions of 1."""
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.folder or made)
        figures = _prove_on("clips", "video_audio", folder, options.steps, options, say)
        try:
            figures |= _prove_on("sounds", "image_audio", folder, options.real_steps, options, say)
        except IsthmusError as error:
            figures["sounds_not_measured"] = f"{error.problem}"
            say(f"real pictures and sounds: not measured: {error.problem}")
    return {**figures, "seconds": round(time.perf_counter() - begun, 1)}


def _prove_on(
    name: str, recipe: str, folder: Path, steps: int, options: argparse.Namespace, say: Say
) -> dict[str, object]:
    """One data set: trained, trained on exchanged sounds, not trained."""
    run = load_run(PIPELINES / f"{recipe}.yaml", methods=method_configs())
    data = _data(name, folder, options, say)
    stage = _build(run, options.seed)
    caches = {part: _cached(stage, run, folder / name, part, data[part]) for part in data}
    say(f"{name}: {len(caches['train'])} to learn from, {len(caches['heldout'])} held out")
    figures: dict[str, object] = {
        f"{name}_train_pairs": len(caches["train"]),
        f"{name}_steps": steps,
        f"{name}_batch": run.train.global_batch,
        f"{name}_trained_parameters": sum(p.numel() for p in stage.module.parameters() if p.requires_grad),
    }
    samples = [_sample(caches["train"], row) for row in range(len(caches["train"]))]
    untrained = _score(stage, folder / name, data["heldout"])
    figures |= {f"{name}_untrained_{k}": untrained[k] for k in KEPT[:4]}
    clock, worked = time.perf_counter(), time.process_time()
    _train(stage, samples, steps, run, options.seed, say)
    figures[f"{name}_training_seconds"] = round(time.perf_counter() - clock, 1)
    figures[f"{name}_training_cpu_seconds"] = round(time.process_time() - worked, 1)
    found = _score(stage, folder / name, data["heldout"])
    figures |= {f"{name}_{k}": found[k] for k in (*KEPT, *CHANCE)}
    figures |= {f"{name}_heldout_pairs": found["pairs"], f"{name}_avc_pairs_tested": found["avc_pairs_tested"]}
    say(f"{name}: " + ", ".join(f"{k} {found[k]:.3f}" for k in KEPT))
    control = _build(run, options.seed)
    _train(control, _exchanged(samples, options.seed), max(2, steps // 2), run, options.seed, say)
    shuffled = _score(control, folder / name, data["heldout"])
    figures |= {f"{name}_shuffled_{k}": shuffled[k] for k in KEPT[:4]}
    say(f"{name}, sounds exchanged: " + ", ".join(f"{k} {shuffled[k]:.3f}" for k in KEPT[:4]))
    return figures


def _data(name: str, folder: Path, options: argparse.Namespace, say: Say) -> dict[str, str]:
    out = folder / name
    say(f"{name}: bringing")
    limit = options.clips if name == "clips" else None
    fetch(name, str(out), limit=limit, heldout=options.heldout if name == "clips" else 600, seed=options.seed)
    parts = {part: str(out / part) for part in ("train", "heldout")}
    for url in parts.values():
        index(url)
    return parts


def _build(run: Any, seed: int) -> Stage:
    return METHODS[run.method.name].build(run.method, BuildContext(seed=seed))


def _cached(stage: Stage, run: Any, folder: Path, part: str, url: str) -> FeatureCache:
    """Frozen tokens of frames and patches of sounds, computed once."""
    out = str(folder / f"features-{part}")
    build_cache(url, out, run.method.vision, actors=0, batch=16, clips=stage.transform)  # type: ignore[arg-type]
    return FeatureCache.open(out, expect={"manifest_digest": Manifest.load(url).digest})


def _sample(cache: FeatureCache, row: int) -> Sample:
    found = cache.get(int(cache.ids[row]))
    assert found is not None
    return found


def _exchanged(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Every sample with the sound of another one."""
    order = np.random.default_rng(seed).permutation(len(samples))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [
        replace(sample, audio_NF=samples[other[n]].audio_NF, audio_mask_N=samples[other[n]].audio_mask_N)
        for n, sample in enumerate(samples)
    ]


def _train(stage: Stage, samples: Sequence[Sample], steps: int, run: Any, seed: int, say: Say) -> None:
    """The recipe's batch and learning rate, AdamW with warm-up and a cosine; one process, float32."""
    module = stage.module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.train.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.train.lr, total_steps=steps, pct_start=0.1)
    rows = _batches(len(samples), run.train.global_batch, seed)
    for step in range(steps):
        terms = module(stage.collate([samples[n] for n in next(rows)], 0, step))
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            parts = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.parts.items())
            say(f"  step {step}: {parts}, r1 {float(terms.metrics['r1_i2t']):.2f}")
    module.eval()


def _batches(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(count).tolist()
        yield from (order[at : at + batch] for at in range(0, count - batch + 1, batch))


def _score(stage: Stage, folder: Path, heldout: str) -> dict[str, Any]:
    loaded = Loaded(ModelVersion("", "", "", "this process"), stage.module.eval(), stage.transform)
    config = EvaluateConfig(
        model="this process", data=heldout, cache=str(folder / "features-heldout"), tasks=("correspondence",)
    )
    return evaluate(config, loaded=loaded)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=1500, help="drawn clips, the held-out ones among them")
    parser.add_argument("--heldout", type=int, default=300, help="held-out clips")
    parser.add_argument("--steps", type=int, default=400, help="of training on clips")
    parser.add_argument("--real-steps", type=int, default=120, help="of training on real pictures and sounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="keeps data and features here; a temporary folder by default")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
