"""Checkpoints that are whole or do not count.

One folder per checkpoint, ``checkpoints/step-00000200-a1``: every rank's share of the training state (trained
parameters and AdamW's moments by name, never frozen ones), every rank's random-number state, and last of all
``manifest.json`` with the sizes and sha256 of the rest. A folder without a manifest, or one whose files do not match
it, is passed over with the reason. The attempt's number is in the name, so a restart never writes into what an earlier
try left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isthmus import storage
from isthmus.errors import StorageError
from isthmus.training.comm import TorchComm
from isthmus.training.state import gather_state

MANIFEST = "manifest.json"
_TAG = "state"
_NAME = re.compile(r"^step-(\d+)-a(\d+)$")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        url: its folder.
        step: optimizer steps done when it was written.
        attempt: which try of the run wrote it.
        world_size, zero_stage: of the group that wrote it; another may go on from it.
        files: path inside the folder -> (bytes, sha256).
    """

    url: str
    step: int
    attempt: int
    world_size: int
    zero_stage: int
    files: Mapping[str, tuple[int, str]]


def save(engine: Any, root: str, step: int, *, attempt: int, zero_stage: int, comm: TorchComm) -> str:
    """Write a checkpoint; collective. Every rank stages its own files, moves them into place, and rank 0 then writes
    the manifest from what all ranks report.

    Returns:
        The URL of the checkpoint's folder.

    Raises:
        StorageError: a rank's files are not where rank 0 looks for them (a local folder that the nodes do not share).
    """
    url = storage.join(root, f"step-{step:08d}-a{attempt}")
    with _staging(url, comm.rank) as staging:
        share = gather_state(engine, stage=zero_stage, rank=comm.rank, world=comm.world_size)
        (staging / _TAG).mkdir(parents=True)
        save_file(share, staging / _TAG / f"training-{comm.rank:05d}.safetensors")
        save_file(random_state(), staging / _TAG / f"random-{comm.rank:05d}.safetensors")
        mine = {}
        for file in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = file.relative_to(staging).as_posix()
            mine[name] = (file.stat().st_size, _sha256(file))
            put_file(file, storage.join(url, *name.split("/")))
    files = {name: facts for part in comm.collect(mine) for name, facts in part.items()}
    fault = _write_manifest(url, step, attempt, zero_stage, comm.world_size, files) if comm.rank == 0 else None
    if fault := comm.broadcast(fault):
        raise StorageError(fault, "Set storage to a folder that all nodes share, or to an s3:// URL.")
    return url


def newest(root: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below ``root`` and, for every newer one that is not whole, why it was passed over."""
    skipped: list[str] = []
    for url, present in _folders(root):
        try:
            return _verified(url, present), skipped
        except (StorageError, ValueError, KeyError) as error:
            skipped.append(f"{url}: {error}")
    return None, skipped


def last_attempt(root: str) -> int:
    """The highest attempt number in use below ``root``, torn folders included; 0 where there is none."""
    return max((_key(url)[1] for url, _ in _folders(root)), default=0)


class Restored:
    """A checkpoint's tensors, read by name when they are asked for.

    Use as a context: for remote storage the files lie in a temporary folder meanwhile.
    """

    def __init__(self, found: Checkpoint, rank: int) -> None:
        self.found, self.rank = found, rank
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Restored:
        folder = self._stack.enter_context(_local_copy(self.found, self.rank)) / _TAG
        for file in sorted(folder.glob("training-*.safetensors")):
            opened = self._stack.enter_context(safe_open(file, "pt"))
            self._files |= dict.fromkeys(opened.keys(), opened)
        self._random = folder / f"random-{self.rank:05d}.safetensors"
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def set_random_state(self) -> None:
        """This rank's random-number state. A rank that the writing group did not have keeps its own: the order of
        samples and the negatives do not depend on it, dropout does."""
        if self._random.exists():
            set_random_state(load_file(self._random))


def prune(root: str, keep: int) -> None:
    """Delete all but the ``keep`` newest whole checkpoints, and every torn one that is older than those.

    A manifest goes before its files, so a deletion that is cut short leaves no folder that looks whole.
    """
    whole = 0
    for url, present in _folders(root):
        if MANIFEST in present and whole < keep:
            whole += 1
        elif whole >= keep:
            storage.delete(storage.join(url, MANIFEST))
            storage.delete(url)


def _folders(root: str) -> list[tuple[str, dict[str, int]]]:
    """(folder URL, its files with sizes), newest step first and the later attempt first among equals."""
    if storage.is_local(root) and not storage.exists(root):
        return []
    try:
        listed = storage.list_files(root)
    except StorageError:
        if storage.exists(root):
            raise
        return []
    found: dict[str, dict[str, int]] = {}
    for url, size in listed:
        name, _, inner = url[len(root.rstrip("/")) + 1 :].partition("/")
        if _NAME.match(name) and inner:
            found.setdefault(storage.join(root, name), {})[inner] = size
    return sorted(found.items(), key=lambda item: _key(item[0]), reverse=True)


def _key(url: str) -> tuple[int, int]:
    match = _NAME.match(url.rstrip("/").rsplit("/", 1)[-1])
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _verified(url: str, present: Mapping[str, int]) -> Checkpoint:
    if MANIFEST not in present:
        raise ValueError("it has no manifest, so its writing was cut short")
    facts = json.loads(storage.read_bytes(storage.join(url, MANIFEST)))
    files = {name: (int(size), str(digest)) for name, (size, digest) in facts["files"].items()}
    for name, (size, digest) in files.items():
        if present.get(name) != size:
            raise ValueError(f"{name} has {present.get(name, 'no')} bytes instead of {size}")
        if _sha256_url(storage.join(url, *name.split("/"))) != digest:
            raise ValueError(f"{name} does not match its sha256")
    return Checkpoint(url, facts["step"], facts["attempt"], facts["world_size"], facts["zero_stage"], files)


def _write_manifest(
    url: str, step: int, attempt: int, zero_stage: int, world: int, files: dict[str, tuple[int, str]]
) -> str | None:
    """Write the manifest; the reason instead where a reported file is not to be seen from here."""
    for name, (size, _) in files.items():
        place = storage.join(url, *name.split("/"))
        if not storage.exists(place) or storage.size(place) != size:
            return f"The checkpoint file {place} that a worker wrote is not visible to the first worker."
    facts = {"step": step, "attempt": attempt, "world_size": world, "zero_stage": zero_stage, "files": files}
    storage.write_bytes(storage.join(url, MANIFEST), json.dumps(facts, indent=1).encode())
    return None


@contextlib.contextmanager
def _staging(url: str, rank: int) -> Iterator[Path]:
    """A private folder: hidden beside the final one where that is local (so moving is a rename), else temporary."""
    if storage.is_local(url):
        final = storage.local_path(url)
        staging = final.parent / f".{final.name}.{rank}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    else:
        with tempfile.TemporaryDirectory(prefix="isthmus-checkpoint-") as temporary:
            yield Path(temporary)


def put_file(file: Path, url: str) -> None:
    if storage.is_local(url):
        target = storage.local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
        return
    filesystem, path = storage.resolve(url)
    with file.open("rb") as source, filesystem.open_output_stream(path) as sink:
        shutil.copyfileobj(source, sink, _CHUNK)


@contextlib.contextmanager
def _local_copy(found: Checkpoint, rank: int) -> Iterator[Path]:
    if storage.is_local(found.url):
        yield storage.local_path(found.url)
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-resume-") as temporary:
        for name in found.files:
            if name.startswith(f"{_TAG}/random-") and name != f"{_TAG}/random-{rank:05d}.safetensors":
                continue
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage.open_input(storage.join(found.url, *name.split("/"))) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        yield Path(temporary)


def random_state() -> dict[str, torch.Tensor]:
    """The process's random-number state as tensors."""
    numbers: Any = np.random.get_state()
    assert numbers[0] == "MT19937"
    _, keys, position, has_gauss, gauss = numbers
    version, words, held = random.getstate()
    assert version == 3
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.place": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if held is None else [held], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """What :func:`random_state` gave, in force again."""
    torch.set_rng_state(state["torch"])
    devices = [state[name] for name in sorted((n for n in state if n.startswith("cuda.")), key=lambda n: int(n[5:]))]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    position, has_gauss = state["numpy.place"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy.gauss"][0])))
    held = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), held[0] if held else None))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_url(url: str) -> str:
    if storage.is_local(url):
        return _sha256(storage.local_path(url))
    digest = hashlib.sha256()
    with storage.open_input(url) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
