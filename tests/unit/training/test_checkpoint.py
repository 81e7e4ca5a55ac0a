"""Only whole checkpoints count. The engine here is a module and its AdamW; DeepSpeed's own are in tests/distributed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.errors import StorageError
from isthmus.training import checkpoint
from isthmus.training.state import check_names, load_moments, load_parameters


class Engine:
    """A layer after one step of AdamW, as DeepSpeed's stage 0 holds it."""

    def __init__(self, value: float = 0.0) -> None:
        self.module = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(self.module.weight, value)
        self.module.bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([self.module.weight], lr=0.1)

    def step(self) -> None:
        self.module(torch.tensor([[1.0, 2.0]])).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alone:
    rank, world_size = 0, 1

    def collect(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def save(root: Path, step: int, attempt: int = 1, value: float = 0.0) -> Path:
    engine = Engine(value)
    engine.step()
    return Path(checkpoint.save(engine, str(root), step, attempt=attempt, zero_stage=0, comm=Alone()))


def test_the_newest_is_found_and_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    save(tmp_path, 10, value=1.0)
    save(tmp_path, 20, value=2.0)
    whole = Engine(2.0)
    whole.step(), whole.step()
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None and not skipped
    assert (found.step, found.attempt, found.world_size, found.zero_stage) == (20, 1, 1, 0)
    engine = Engine()
    with checkpoint.Restored(found, 0) as restored:
        assert restored.names() == {"parameter/weight", "exp_avg/weight", "exp_avg_sq/weight"}
        check_names(restored.names(), engine.module, found.url)
        load_parameters(engine.module, restored.read)
        load_moments(engine, restored.read, stage=0, steps=1)
    engine.step()
    assert torch.equal(engine.module.weight, whole.module.weight)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "staging folders are gone"


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [torch.rand(2).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    draw()  # an odd number of normals: the second of each pair is held back
    save(tmp_path, 10)
    expected = draw()
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    draw()
    with checkpoint.Restored(found, 0) as restored:
        restored.set_random_state()
    assert draw() == expected
    with checkpoint.Restored(found, 1) as restored:  # of a larger group than the one that wrote it
        restored.set_random_state()
    assert draw() != expected


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    other = torch.nn.Linear(2, 1)
    with checkpoint.Restored(found, 0) as restored:
        with pytest.raises(StorageError, match=r"lacks 3 tensors \(\['exp_avg/bias'"):
            check_names(restored.names(), other, found.url)
        with pytest.raises(StorageError, match=r"'weight' has shape \(1, 2\), the model's \(1, 3\)"):
            load_parameters(torch.nn.Linear(3, 1, bias=False), restored.read)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "manifest.json").unlink(), "no manifest"),
        (lambda c: (c / "manifest.json").write_text(""), "Expecting value"),
        (lambda c: (c / "state" / "training-00000.safetensors").unlink(), "has no bytes instead of"),
        (lambda c: (c / "state" / "training-00000.safetensors").write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda c: flip(c / "state" / "training-00000.safetensors"), "does not match its sha256"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: Any, reason: str) -> None:
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None and found.step == 10
    assert len(skipped) == 1 and reason in skipped[0] and "step-00000020-a1" in skipped[0]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_of_two_attempts_at_a_step_the_later_counts(tmp_path: Path) -> None:
    save(tmp_path, 10, attempt=1, value=1.0)
    save(tmp_path, 10, attempt=2, value=2.0)
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None and found.attempt == 2
    assert checkpoint.last_attempt(str(tmp_path)) == 2


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path / "none")) == (None, [])
    assert checkpoint.last_attempt(str(tmp_path / "none")) == 0


def test_prune_keeps_the_newest_whole_ones_and_what_is_newer(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "step-00000015-a1" / "state").mkdir(parents=True)
    (tmp_path / "step-00000015-a1" / "state" / "left.pt").write_text("torn, old")
    (tmp_path / "step-00000040-a1" / "manifest.json").unlink()
    checkpoint.prune(str(tmp_path), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020-a1", "step-00000030-a1", "step-00000040-a1"]


def test_a_file_that_the_first_worker_cannot_see_is_refused(tmp_path: Path) -> None:
    class Blind(Alone):
        def collect(self, value: Any) -> list[Any]:
            return [value, {"state/of-another-node.pt": (3, "0" * 64)}]

    with pytest.raises(StorageError, match=r"of-another-node\.pt.*not visible"):
        engine = Engine()
        engine.step()
        checkpoint.save(engine, str(tmp_path), 10, attempt=1, zero_stage=0, comm=Blind())
    assert checkpoint.newest(str(tmp_path))[0] is None


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    facts = json.loads((folder / "manifest.json").read_text())
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert (
        set(facts["files"])
        == present
        == {
            "state/training-00000.safetensors",
            "state/random-00000.safetensors",
        }
    )
