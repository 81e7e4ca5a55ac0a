"""Ctrl-C in the middle of training and of captioning, given to the real command from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.testing.backbones import tiny_bert, tiny_lm

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
ISTHMUS = Path(sys.executable).parent / "isthmus"
IMAGES = 240


class Commands:
    """``isthmus`` in a folder of its own, with the repository's recipes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # As a user's shell has it, without conftest's settings.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "ISTHMUS_PROGRESS"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ISTHMUS), *words, "--json"], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells hand down "ignored"
        )  # fmt: skip

    def run(self, *words: str) -> dict[str, Any]:
        process = self.start(*words)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return dict(json.loads(out))

    def interrupt(self, *words: str, when: Callable[[], bool]) -> str:
        """Ctrl-C as soon as ``when`` holds; what the command said until it ended of it."""
        process = self.start(*words)
        deadline = time.monotonic() + 240
        while not when():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "it never came to the point where it is interrupted"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        return err


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("interrupted")
    tiny_bert(folder / "text")
    tiny_lm(folder / "language")
    made = Commands(folder)
    made.run("data", "fetch", "--synthetic", "--limit", str(IMAGES), "--heldout", "8", "--out", "data")
    made.run("data", "index", "data/train")
    return made


def training(name: str, stage: int, steps: int) -> tuple[str, ...]:
    return (
        "train", str(ROOT / f"pipelines/demo/stage{stage}.yaml"), f"name={name}", f"model.name={name}",
        "data.train=data/train", "data.placement=inline", "data.cache=null", f"train.steps={steps}",
        "train.global_batch=8", "train.warmup_steps=1", "train.checkpoint_every=5", "cluster.workers=1",
        "data.max_cut_share=1",  # the small tokenizers spell most words
    )  # fmt: skip


SMALL = (
    "method.vision.name=vit_tiny_patch16_224", "method.vision.weights=random", "method.vision.image_size=32",
    "method.text.weights=text", "method.qformer.init=null", "method.qformer.layers=1",
    "method.qformer.width=16", "method.qformer.heads=2", "method.qformer.feed_forward=32",
)  # fmt: skip


def test_interrupted_training_goes_on_from_its_checkpoint(commands: Commands) -> None:
    words = (*training("one", 1, 400), *SMALL)
    checkpoints = commands.folder / "runs" / "one" / "checkpoints"
    said = commands.interrupt(*words, when=lambda: len(list(checkpoints.glob("*"))) > 1)
    assert "The same command resumes run 'one' from its last checkpoint" in said
    assert not (commands.folder / "runs" / "one" / "artefact").exists()
    rows = (commands.folder / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    reached = json.loads(rows[-1])["step"]
    assert 5 <= reached < 400
    done = commands.run(*words)
    assert done["name"] == "one"
    steps = [json.loads(row)["step"] for row in (commands.folder / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 400, "no step twice, none missing at the end"


def test_interrupted_captioning_goes_on_with_the_chunks_that_are_left(commands: Commands) -> None:
    parent = commands.run(*training("seer", 1, 2), *SMALL)["uri"]
    model = commands.run(*training("teller", 2, 2), "method.language.weights=language", f"parent={parent}")["uri"]
    words = ("caption", f"model={model}", "data=data/train", "out=captions", "chunk=4", "actors=1", "max_new_tokens=30")
    commits = commands.folder / "captions" / "commits"
    commands.interrupt(*words, when=lambda: len(list(commits.glob("*"))) > 1)
    assert not (commands.folder / "captions" / "report.json").exists()
    report = commands.run(*words)
    assert report["skipped_chunks"] > 0
    assert report["captioned"] == report["expected"] == IMAGES - 8
