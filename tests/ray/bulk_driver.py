"""A captioning job with a stand-in model, as a process of its own that a test can kill: DATA OUT PAUSE."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from isthmus.config import CaptionConfig
from isthmus.inference.caption import CaptionReport, caption_with
from isthmus.inference.engine import Engine
from isthmus.inference.loading import ModelHandle

HANDLE = ModelHandle("models:/stand-in/1", "", "digest-of-the-stand-in")


def loader(pause: float) -> Callable[[], Engine]:
    """Makes an engine whose caption is a function of the pixels. Local, so that it travels to actors by value."""

    def load() -> Engine:
        import torch

        from isthmus.contracts import StageModule
        from isthmus.data.transforms import ImageTransform

        class StandIn(StageModule):
            def encode_images(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
                return pixels_BCHW.mean(dim=(2, 3)).unsqueeze(1)

            def generate(self, features_BND: torch.Tensor, **how: Any) -> list[str]:
                time.sleep(pause)
                return [f" mean {value:.4f} " for value in features_BND.mean(dim=(1, 2)).tolist()]

        transform = ImageTransform(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        return Engine(StandIn().eval(), transform, HANDLE.uri)

    return load


def run(data: str, out: str, pause: float = 0.0, **options: Any) -> CaptionReport:
    """The job, two actors, four images a chunk."""
    values = {"model": "stand-in", "chunk": 4, "batch": 2, "actors": 2, "max_failed_share": 0.1, **options}
    return caption_with(CaptionConfig(data=data, out=out, **values), HANDLE, loader(pause))


if __name__ == "__main__":
    print(run(sys.argv[1], sys.argv[2], float(sys.argv[3])))
