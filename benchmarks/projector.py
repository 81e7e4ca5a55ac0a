"""A training step of the projector method from cached features: Isthmus against a plain PyTorch loop, and the floor.

Both sides read the same cache on disk in the same order, hold the same frozen text features and the same weights, and
do the same arithmetic: mean over the image tokens, two projectors, symmetric cross-entropy over the batch, AdamW. The
plain loop is what one would write for this one purpose: memory-mapped features, `torch.nn` and a `for`. Ours goes
through the platform's reader, its batches, its dropout that does not depend on the number of workers, and the
accounting of padding rows. The floor is the time in which memory could deliver what a step has to touch.

    python benchmarks/projector.py --json projector.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _passive  # noqa: F401 - before torch
import numpy as np
import torch
import torch.nn.functional as F
from _alignment_data import TextTable
from _steps import alternate, flops, matmul_rate, report, table, timed
from torch import Tensor, nn

from isthmus import storage
from isthmus.config import DataConfig, TextConfig, VisionConfig
from isthmus.contracts import Batch, LocalComm, Sample, Stage
from isthmus.data import features as caches
from isthmus.data.encode import Commit, _close, write_part
from isthmus.data.features import CacheMeta, FeatureCache, part_bytes
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.stream import train_batches
from isthmus.methods.batching import choose_caption, stack
from isthmus.methods.parts import seeded
from isthmus.methods.projector import Projector, ProjectorConfig
from isthmus.testing.shards import write_tar

TOKENS, WIDTH, TEXT, EMBED = 36, 1280, 384, 512
LR, DECAY, BETAS = 1e-3, 0.05, (0.9, 0.98)


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    for size in (options.batch, options.token_batch):
        assert options.samples % size == 0, "the plain loop knows no padding: let the batches divide --samples"
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        data = make_data(Path(folder), options.samples)
        found: dict[str, object] = {"batch": options.batch, "samples": options.samples, "dropout": options.dropout}
        found |= compare(data, options, "pool-then-project")
        fewer = argparse.Namespace(**{**vars(options), "batch": options.token_batch})  # 36 times the arithmetic
        found |= {"all_tokens_batch": options.token_batch, **compare(data, fewer, "project-then-pool")}
    report(found, options.json)


class Data:
    """A data set with its feature cache, the text features of its captions, and what a plain loop reads."""

    def __init__(self, folder: Path, manifest: Manifest, cache: str, texts: list[str], states: Tensor) -> None:
        self.manifest, self.cache, self.texts, self.states = manifest, cache, texts, states
        self.config = DataConfig(train=str(folder / "data"), placement="cached", cache=cache)
        self.features = FeatureCache.open(cache)


def make_data(folder: Path, samples: int) -> Data:
    """Random features in the layout of `isthmus data cache`; captions are numbers, and their features random."""
    members: dict[str, bytes] = {}
    for n in range(samples):
        members |= {f"{n:06d}.png": b"not read", f"{n:06d}.txt": f"caption {n}".encode()}
    write_tar(folder / "data" / "0.tar", members)
    index(str(folder / "data"))
    manifest, cache = Manifest.load(str(folder / "data")), str(folder / "cache")
    meta = CacheMeta(
        data=manifest.root, manifest_digest=manifest.digest, encoder_digest="", transform_digest="",
        vision=VisionConfig().model_dump(mode="json"), tokens=TOKENS, width=WIDTH, dtype="float16", chunk=512,
        parts=-(-samples // 512),
    )  # fmt: skip
    random, commits = np.random.default_rng(0), list[Commit]()
    ids = manifest.ids
    for part in range(meta.parts):
        rows = range(part * 512, min((part + 1) * 512, samples))
        values = random.standard_normal((len(rows), TOKENS, WIDTH), np.float32).astype(np.float16)
        some = [Sample(int(ids[n]), f"{n:06d}", (f"caption {n}",)) for n in rows]
        commits.append(write_part(cache, part, part_bytes(some, values), len(rows), []))
    storage.write_bytes(storage.join(cache, caches.PLAN), b"{}")
    _close(cache, meta, commits, samples)
    texts = [f"caption {n}" for n in range(samples)]
    return Data(folder, manifest, cache, texts, torch.randn(samples, TEXT, generator=torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """The platform's own path: train_batches from the cache, the method's module, AdamW."""

    def __init__(self, data: Data, options: argparse.Namespace, pool: str) -> None:
        config = ProjectorConfig(
            vision=VisionConfig(), text=TextConfig(), embed=EMBED, pool=pool, dropout=options.dropout
        )  # fmt: skip
        with seeded(0):
            encoder: Any = TextTable(data.texts, data.states)
            self.module = Projector(config, None, WIDTH, encoder, LocalComm()).train()
        stage: Any = Stage(
            self.module, _collate, None, None, lambda _: {}, (), {"tokens": TOKENS, "width": WIDTH}  # type: ignore[arg-type]
        )  # fmt: skip
        order = Order(len(data.manifest), options.batch, seed=0)
        self.order = order
        self.batches = train_batches(data.config, stage, order, 0, 1, 0, 1 << 20, 0, on_failure=_refuse)
        self.optimizer = _adamw(self.module)

    def step(self) -> Tensor:
        """Read, forward, backward, update."""
        self.optimizer.zero_grad()
        loss = self.module(next(self.batches)).total
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _collate(samples: Any, epoch: int, step: int) -> Batch:
    return Batch(**stack(samples, step, epoch), texts=tuple(choose_caption(sample, 0, epoch) for sample in samples))


def _refuse(failure: object) -> None:
    raise AssertionError(failure)


# ------------------------------------------------------------------------------------------------------- plain loop


class PlainTokens(nn.Module):
    """freeze-align's token projector, on `torch.nn` alone."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.linear, self.up, self.down = nn.Linear(width, EMBED), nn.Linear(width, EMBED), nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        return self.linear(x) + self.down(F.gelu(self.up(x)))


class PlainHead(nn.Module):
    """Its text head."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, EMBED), nn.Linear(EMBED, EMBED)
        self.norm, self.dropout = nn.LayerNorm(EMBED), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        p = self.first(x)
        return self.norm(p + self.dropout(self.second(F.gelu(p))))


class Plain:
    """A loop written for this: rows of memory-mapped features, two modules, cross-entropy both ways, AdamW."""

    def __init__(self, data: Data, options: argparse.Namespace, pool: str, ours: Ours) -> None:
        self.image, self.text = PlainTokens(WIDTH, options.dropout), PlainHead(TEXT, options.dropout)
        module = ours.module
        self.image.load_state_dict(module.image_projector.tokens.state_dict())
        self.text.load_state_dict(module.text_projector.head.state_dict())
        self.temperature = nn.Parameter(module.temperature.detach().clone())
        self.module = nn.ModuleList([self.image, self.text])
        self.module.register_parameter("temperature", self.temperature)
        self.optimizer = _adamw(self.module)
        self.pool_first = pool == "pool-then-project"
        self.features, self.states = [part.features_BND for part in data.features._parts], data.states
        self.rows = self._rows(ours.order)

    @staticmethod
    def _rows(order: Order) -> Iterator[np.ndarray]:
        step = 0
        while True:
            yield order.local(step, 0, 1)
            step += 1

    def step(self) -> Tensor:
        """Read, forward, backward, update."""
        rows = next(self.rows)
        x = torch.from_numpy(np.stack([self.features[row // 512][row % 512] for row in rows.tolist()])).float()
        self.optimizer.zero_grad()
        image = self.image(x.mean(1)) if self.pool_first else self.image(x).mean(1)
        image, text = F.normalize(image, dim=-1), F.normalize(self.text(self.states[rows]), dim=-1)
        logits, target = image @ text.T / self.temperature, torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        return loss.detach()


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)


# ------------------------------------------------------------------------------------------------------ measurement


def compare(data: Data, options: argparse.Namespace, pool: str) -> dict[str, object]:
    """Both loops in turns, on the same rows from the same weights; their losses must agree where dropout is off."""
    checked = argparse.Namespace(**{**vars(options), "dropout": 0.0})
    ours = Ours(data, checked, pool)
    plain = Plain(data, checked, pool, ours)
    apart = max(abs(float(ours.step()) - float(plain.step())) for _ in range(3))
    assert apart < 1e-3, f"the two loops do different things: losses {apart} apart after three steps"
    ours = Ours(data, options, pool)
    plain = Plain(data, options, pool, ours)
    contenders = {"plain": lambda: _several(plain, options.steps), "ours": lambda: _several(ours, options.steps)}
    took = {n: s / options.steps for n, s in alternate(contenders, options.repeats).items()}
    trained = sum(p.numel() for p in ours.module.parameters() if p.requires_grad)
    floors = {"memory": memory_floor(options.batch, trained), "matrix products": flops(plain.step) / _rate()}
    rows = [
        [name, f"{1000 * s:.1f}", f"{options.batch / s:.0f}", f"{took['plain'] / s:.2f}x"] for name, s in took.items()
    ]
    rows += [[f"floor: {name}", f"{1000 * s:.1f}", f"{options.batch / s:.0f}", ""] for name, s in floors.items()]
    table(
        f"{pool}, batch {options.batch}, {TOKENS} tokens of {WIDTH}", ["", "ms a step", "samples/s", "to plain"], rows
    )
    prefix = "" if pool == "pool-then-project" else "all_tokens_"
    floor = max(floors.values())
    return {
        f"{prefix}ratio_vs_plain_loop": round(took["plain"] / took["ours"], 4),
        f"{prefix}samples_per_s": round(options.batch / took["ours"], 1),
        f"{prefix}plain_samples_per_s": round(options.batch / took["plain"], 1),
        f"{prefix}floor_samples_per_s": round(options.batch / floors["memory"], 1),
        f"{prefix}matmul_floor_samples_per_s": round(options.batch / floors["matrix products"], 1),
        f"{prefix}seconds_over_floor": round(took["ours"] / floor, 3),
        f"{prefix}max_loss_diff": float(f"{apart:.2g}"),
        f"{prefix}trained_parameters": trained,
    }


def _several(loop: Ours | Plain, steps: int) -> None:
    for _ in range(steps):
        loop.step()


def memory_floor(batch: int, trained: int) -> float:
    """Seconds in which memory delivers what a step cannot but touch: the batch's features once, as they are stored;
    weights twice (forward and backward); AdamW's update: weights, gradients and two moments read, all but the gradients
    written."""
    features = batch * TOKENS * WIDTH * 2
    return (features + 4 * trained * (2 + 1 + 4 + 3)) / bandwidth()


def bandwidth() -> float:
    """Bytes a second of reading memory that no cache holds."""
    block = torch.ones(64 << 20)
    return 4 * block.numel() / min(timed(block.sum) for _ in range(5))


def _rate() -> float:
    return matmul_rate(torch.float32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--token-batch", type=int, default=64, help="where each image token is projected")
    parser.add_argument("--samples", type=int, default=4096, help="92 kB each of features on disk")
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--repeats", type=int, default=7, help="alternating rounds; their median counts")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--scratch", help="folder for the features; that for temporary files by default")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
