"""Checkpoints that are whole or do not count.

One folder per checkpoint, ``checkpoints/step-00000200-a1``: every rank's DeepSpeed state (trainable parameters and
optimizer, never frozen ones), every rank's random-number state, and last of all ``manifest.json`` with the sizes and
sha256 of the rest. A folder without a manifest, or one whose files do not match it, is passed over with the reason. The
attempt's number is in the name, so a restart never writes into what an earlier try left behind.
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

from isthmus import storage
from isthmus.errors import StorageError
from isthmus.training.comm import TorchComm

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
        world_size, zero_stage: of the group that wrote it.
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
        engine.save_checkpoint(
            str(staging), tag=_TAG, client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
        )
        (staging / "zero_to_fp32.py").unlink(missing_ok=True)
        _write_random_state(staging / _TAG / f"random-{comm.rank:05d}.pt")
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


def load(engine: Any, found: Checkpoint, comm: TorchComm) -> int:
    """Restore parameters, optimizer and this rank's random-number state; collective. Returns the steps done."""
    with _local_copy(found, comm.rank) as folder:
        path, client = engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None or client.get("step") != found.step:
            raise StorageError(f"The checkpoint {found.url} cannot be read back by DeepSpeed.", "Delete that folder.")
        _read_random_state(folder / _TAG / f"random-{comm.rank:05d}.pt")
    return found.step


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
            if name.startswith(f"{_TAG}/random-") and name != f"{_TAG}/random-{rank:05d}.pt":
                continue
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage.open_input(storage.join(found.url, *name.split("/"))) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        yield Path(temporary)


def _write_random_state(file: Path) -> None:
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def _read_random_state(file: Path) -> None:
    if not file.exists():
        return  # another world size: the ranks' streams are new ones, the sample order is not theirs to decide
    state = torch.load(file, weights_only=False)  # written by this run and verified by its sha256
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


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
