"""An evaluation in Ray actors: the figures of one process, whatever the number of actors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from isthmus.config import EvaluateConfig
from isthmus.contracts import ModelVersion
from isthmus.data.manifest import index
from isthmus.errors import ConfigError, IsthmusError
from isthmus.evaluation.driver import evaluate
from isthmus.evaluation.model import Loaded
from isthmus.testing.shards import image_bytes, write_tar

pytestmark = pytest.mark.ray
IMAGES, BROKEN = 37, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with captions, questions and negatives; one image cannot be decoded."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members: dict[str, bytes] = {}
        for n in range(shard * 20, min(IMAGES, shard * 20 + 20)):
            more = {
                "questions": [{"question": f"Is it {n}?", "answers": ["yes"] * 8 + ["no"] * 2}],
                "label": f"kind {n % 3}",
            }
            members[f"s{n}.png"] = image_bytes(n)[:40] if n == BROKEN else image_bytes(n)
            members[f"s{n}.txt"] = f"picture {n} of {n * 7}\nnoise number {n}".encode()
            members[f"s{n}.json"] = json.dumps(more).encode()
        write_tar(folder / f"{shard}.tar", members)
    index(str(folder))
    return folder


def loader(fault: str = "", mark: str = "") -> Callable[[], Loaded]:
    """Makes a model whose vectors and words are functions of pixels and letters. Local: it travels by value.

    Args:
        fault: "die" ends the process at its second batch, once in all; "refuse" cannot be loaded.
        mark: a file that the first death leaves behind.
    """

    def load() -> Loaded:
        import torch
        import torch.nn.functional as F

        from isthmus.contracts import StageModule
        from isthmus.data.transforms import ImageTransform

        if fault == "refuse":
            raise ConfigError("The model is gone.", "Bring it back.")

        class StandIn(StageModule):
            calls = 0

            def encode_images(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                if fault == "die" and self.calls == 2 and not os.path.exists(mark):  # noqa: PTH110
                    open(mark, "w").close()  # noqa: PTH123
                    os._exit(1)
                return F.adaptive_avg_pool2d(pixels_BCHW, 2).flatten(2).transpose(1, 2)

            def embed_images(self, features_BND: torch.Tensor) -> torch.Tensor:
                return F.normalize(torch.cat([features_BND, features_BND.sin()], -1), dim=-1)

            def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
                rows = [[sum(map(ord, text[k::6])) % 17 - 8.0 for k in range(6)] for text in texts]
                return F.normalize(torch.tensor(rows) + 0.01, dim=-1)

            def match(self, features_BND: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
                return (self.embed_images(features_BND) @ self.embed_texts(texts).unsqueeze(-1)).mean(1)[:, 0]

            def match_margin(self, features_BND: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
                return self.match(features_BND, texts) - 0.1

            def generate(self, features_BND: torch.Tensor, prompt: Any = None, **how: Any) -> list[str]:
                prompts = [""] * len(features_BND) if prompt is None else prompt
                level = features_BND.mean(dim=(1, 2)).tolist()
                return [
                    f"picture {round(1000 * v)} of {p}" if not p else ["yes", "no"][round(1e4 * v) % 2]
                    for v, p in zip(level, prompts, strict=True)
                ]

        transform = ImageTransform(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        return Loaded(ModelVersion("", "", "", "stand-in"), StandIn().eval(), transform)

    return load


def run(
    data: Path, workers: int, load: Callable[[], Loaded], out: Path | None = None, **options: Any
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tasks": ("retrieval", "captioning", "vqa", "classification", "matching"),
        "rerank": 6,
        "batch": 3,
        "captions_per_image": "all",
        "meteor": False,
        "cpus_per_worker": 0.5,
        **options,
    }
    config = EvaluateConfig(model="m", data=str(data), workers=workers, out=str(out) if out else None, **values)
    return evaluate(config, load=load)


def test_one_and_two_workers_and_this_process_agree(ray_cluster: Any, data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    outs = [tmp_path / str(workers) for workers in (0, 1, 2)]
    here, one, two = (run(data, workers, loader(), out) for workers, out in enumerate(outs))
    assert one == two
    assert here.keys() == one.keys()
    figures = {name: value for name, value in here.items() if isinstance(value, float)}
    assert figures == pytest.approx({name: one[name] for name in figures}, abs=1e-6)  # perhaps with other threads
    rows = [pq.read_table(out / "rows.parquet").to_pylist() for out in outs]
    assert rows[1] == rows[2] and len(rows[2]) == IMAGES - 1
    assert (two["images"], two["unreadable"], two["questions"]) == (IMAGES - 1, 1, IMAGES - 1)
    assert 0 < two["vqa_accuracy"] < 1 and 0 < two["itm_auc"] < 1 and two["ir_mean_rank"] > 1


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(ray_cluster: Any, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("retrieval",), "rerank": 0}
    mark = tmp_path / "died"
    assert run(data, 1, loader("die", str(mark)), **options) == run(data, 0, loader(), **options)
    assert mark.exists()


def test_what_goes_wrong_in_a_worker_is_told(ray_cluster: Any, data: Path) -> None:
    with pytest.raises(ConfigError, match="The model is gone"):
        run(data, 1, loader("refuse"))
    with pytest.raises(IsthmusError, match="cannot work in Ray actors"):
        evaluate(EvaluateConfig(model="m", data=str(data), workers=1), loaded=loader()())
