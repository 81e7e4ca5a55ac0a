"""Only whole checkpoints count. The engine here is a module and its AdamW; DeepSpeed's own are in tests/distributed."""

from __future__ import annotations

import errno
import json
import random
import threading
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


def save(root: Path, step: int, attempt: int = 1, value: float = 0.0, **facts: Any) -> Path:
    engine = Engine(value)
    engine.step()
    return Path(checkpoint.save(engine, str(root), step, attempt=attempt, zero_stage=0, comm=Alone(), **facts))


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


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    for step, score in ((10, 0.9), (20, 0.2), (30, 0.5), (40, 0.7), (50, None)):
        save(tmp_path, step, score=score)
        checkpoint.prune(str(tmp_path), keep=2, keep_best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020-a1", "step-00000040-a1", "step-00000050-a1"]
    checkpoint.prune(str(tmp_path), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000040-a1", "step-00000050-a1"]


def test_a_checkpoint_of_another_run_is_passed_over_with_the_reason(tmp_path: Path) -> None:
    own = {"recipe": "a" * 64, "vision weights": "b" * 64}
    save(tmp_path, 10, run=own)
    save(tmp_path, 20, run=own | {"vision weights": "c" * 64})
    found, skipped = checkpoint.newest(str(tmp_path), own | {"data": "d" * 64})
    assert found is not None and found.step == 10
    assert len(skipped) == 1 and "another run (vision weights cccccccccccc instead of bbbbbbbbbbbb)" in skipped[0]
    assert checkpoint.newest(str(tmp_path))[0].step == 20  # type: ignore[union-attr]


def test_what_a_new_try_passed_over_does_not_push_out_its_own(tmp_path: Path) -> None:
    """Left by a run on other weights, beyond the step that this one has reached."""
    own, other = {"vision weights": "b" * 64}, {"vision weights": "c" * 64}
    for step in (800, 1000):
        save(tmp_path, step, run=other)
    for step in (200, 400, 600):
        save(tmp_path, step, attempt=2, run=own)
        checkpoint.prune(str(tmp_path), keep=2, keep_best=True, upto=step, run=own)
        found, _ = checkpoint.newest(str(tmp_path), own)
        assert found is not None and found.step == step
    for step in (800, 1000):
        save(tmp_path, step, attempt=2, run=own)
        checkpoint.prune(str(tmp_path), keep=2, upto=step, run=own)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000800-a2", "step-00001000-a1", "step-00001000-a2"
    ]  # fmt: skip
    save(tmp_path, 1200, attempt=2, run=own)
    checkpoint.prune(str(tmp_path), keep=2, upto=1200, run=own)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00001000-a2", "step-00001200-a2"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, put = threading.Event(), checkpoint.put_file
    monkeypatch.setattr(checkpoint, "put_file", lambda *a: (go.wait(30), put(*a)))
    engine = Engine(1.0)
    engine.step()
    stood_at = engine.module.weight.detach().clone()
    pending = checkpoint.begin(engine, str(tmp_path), 10, attempt=1, zero_stage=0, comm=Alone())
    engine.step()  # must not show in what is being written
    assert not pending.done and checkpoint.newest(str(tmp_path))[0] is None
    go.set()
    checkpoint.settle(pending, Alone())
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    with checkpoint.Restored(found, 0) as restored:
        assert torch.equal(restored.read("parameter/weight"), stood_at)


@pytest.mark.parametrize("phase", ["state", "place", "manifest"])
def test_a_full_disk_costs_one_checkpoint_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 10)
    with monkeypatch.context() as patched:
        if phase == "manifest":
            patched.setattr(checkpoint.storage, "write_bytes", full)
        else:
            patched.setattr(checkpoint, "save_file" if phase == "state" else "put_file", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            save(tmp_path, 20)
    assert "Make room" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010-a1"]
    assert checkpoint.newest(str(tmp_path))[0].step == 10  # type: ignore[union-attr]


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
