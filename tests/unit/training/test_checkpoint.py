"""Only whole checkpoints count. The engine here writes plain files; DeepSpeed's own are tested under Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import StorageError
from isthmus.training import checkpoint


class Engine:
    """Keeps one number."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, client_state: dict, **options: Any) -> None:
        assert options == {"save_latest": False, "exclude_frozen_parameters": True}
        (Path(folder) / tag).mkdir()
        torch.save({"value": self.value, **client_state}, Path(folder) / tag / "part.pt")

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> tuple[str | None, dict]:
        file = Path(folder) / tag / "part.pt"
        if not file.exists():
            return None, {}  # as DeepSpeed does
        state = torch.load(file)
        self.value = state.pop("value")
        return str(file), state


class Alone:
    rank, world_size = 0, 1

    def collect(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def save(root: Path, step: int, attempt: int = 1, value: float = 0.0) -> Path:
    return Path(checkpoint.save(Engine(value), str(root), step, attempt=attempt, zero_stage=2, comm=Alone()))


def test_the_newest_is_found_with_its_state_and_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save(tmp_path, 10, value=1.0)
    save(tmp_path, 20, value=2.0)
    expected = torch.rand(2)
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None and not skipped
    assert (found.step, found.attempt, found.world_size, found.zero_stage) == (20, 1, 1, 2)
    engine = Engine()
    assert checkpoint.load(engine, found, Alone()) == 20
    assert engine.value == 2.0
    assert torch.equal(torch.rand(2), expected)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "staging folders are gone"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "manifest.json").unlink(), "no manifest"),
        (lambda c: (c / "manifest.json").write_text(""), "Expecting value"),
        (lambda c: (c / "state" / "part.pt").unlink(), "has no bytes instead of"),
        (lambda c: (c / "state" / "part.pt").write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda c: flip(c / "state" / "part.pt"), "does not match its sha256"),
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
        checkpoint.save(Engine(), str(tmp_path), 10, attempt=1, zero_stage=2, comm=Blind())
    assert checkpoint.newest(str(tmp_path))[0] is None


def test_an_engine_that_reads_nothing_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    (folder / "state" / "part.pt").unlink()
    with pytest.raises(StorageError, match="cannot be read back"):
        checkpoint.load(Engine(), found, Alone())


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    facts = json.loads((folder / "manifest.json").read_text())
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(facts["files"]) == present == {"state/part.pt", "state/random-00000.pt"}
