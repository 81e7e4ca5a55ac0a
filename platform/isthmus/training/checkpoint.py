"""Checkpoints that are whole or do not count.

One folder per checkpoint, ``checkpoints/step-00000200-a1``: every rank's share of the training state (trained
parameters and AdamW's moments by name, never frozen ones), every rank's random-number state, and last of all
``manifest.json`` with the sizes and sha256 of the rest and with what the run is. A folder without a manifest, one whose
files do not match it, or one of another run is passed over with the reason. The attempt's number is in the name, so a
restart never writes into what an earlier try left behind.

Training waits only while the state is copied out of the engine. A thread of each rank writes its share meanwhile; when
all are done the ranks meet once more, and rank 0 writes the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from isthmus import storage
from isthmus.errors import StorageError
from isthmus.training.comm import TorchComm
from isthmus.training.randomness import random_state, set_random_state
from isthmus.training.state import gather_state

MANIFEST = "manifest.json"
_TAG = "state"
_NAME = re.compile(r"^step-(\d+)-a(\d+)$")
_CHUNK = 1 << 22
_MAKE_ROOM = "Make room there, or set storage to another place."


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        url: its folder.
        step: optimizer steps done when it was written.
        attempt: which try of the run wrote it.
        world_size, zero_stage: of the group that wrote it; another may go on from it.
        files: path inside the folder -> (bytes, sha256).
        run: what it is a state of: digests of the recipe, the data and the frozen parts.
        score: the watched metric's mean since the checkpoint before; None where none is watched.
    """

    url: str
    step: int
    attempt: int
    world_size: int
    zero_stage: int
    files: Mapping[str, tuple[int, str]]
    run: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None


Files = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Pending:
    """A checkpoint that this rank's thread is writing.

    Attributes:
        facts: the checkpoint as it will be, but for its files.
        written: this rank's files, when they are in place.
    """

    facts: Checkpoint
    written: Future[Files]

    @property
    def step(self) -> int:
        return self.facts.step

    @property
    def done(self) -> bool:
        """Whether this rank's files are in place, or could not be put there."""
        return self.written.done()


def begin(
    engine: Any,
    root: str,
    step: int,
    *,
    attempt: int,
    zero_stage: int,
    comm: TorchComm,
    run: Mapping[str, str] | None = None,
    score: float | None = None,
) -> Pending:
    """Copy the state out of the engine, which is collective, and start writing this rank's share of it.

    Args:
        run, score: see :class:`Checkpoint`.

    Returns:
        What :func:`settle` ends. Until then the checkpoint does not count.
    """
    url = storage.join(root, f"step-{step:08d}-a{attempt}")
    share = gather_state(engine, stage=zero_stage, rank=comm.rank, world=comm.world_size)
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    written = pool.submit(_write_share, url, comm.rank, share, random_state())
    pool.shutdown(wait=False)
    return Pending(Checkpoint(url, step, attempt, comm.world_size, zero_stage, {}, dict(run or {}), score), written)


def settle(pending: Pending, comm: TorchComm) -> str:
    """Wait for the writing and close the checkpoint with its manifest; collective.

    Returns:
        The URL of the checkpoint's folder.

    Raises:
        StorageError: on every rank alike, where one could not write (a full disk), or its files are not where rank 0
            looks for them (a local folder that the nodes do not share). Rank 0 has then deleted what there is.
    """
    url = pending.facts.url
    try:
        mine: Files | str = pending.written.result()
    except (OSError, StorageError, SafetensorError) as error:
        mine = f"The checkpoint {url} could not be written: {error}"
    parts = comm.collect(mine)
    fault, mend = next((part for part in parts if isinstance(part, str)), None), _MAKE_ROOM
    if fault is None:
        whole = replace(pending.facts, files={name: facts for part in parts for name, facts in part.items()})
        fault, mend = comm.broadcast(_write_manifest(whole) if comm.rank == 0 else None)
    if fault is not None:
        if comm.rank == 0:  # what is torn only takes the room that the next one needs
            with contextlib.suppress(OSError, StorageError):
                storage.delete(url)
        raise StorageError(fault, mend)
    return url


def save(engine: Any, root: str, step: int, *, comm: TorchComm, **facts: Any) -> str:
    """:func:`begin` and :func:`settle` in one."""
    return settle(begin(engine, root, step, comm=comm, **facts), comm)


def _write_share(url: str, rank: int, share: Mapping[str, torch.Tensor], random: Mapping[str, torch.Tensor]) -> Files:
    mine: Files = {}
    with _staging(url, rank) as staging:
        (staging / _TAG).mkdir(parents=True)
        save_file(dict(share), staging / _TAG / f"training-{rank:05d}.safetensors")
        save_file(dict(random), staging / _TAG / f"random-{rank:05d}.safetensors")
        for file in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = file.relative_to(staging).as_posix()
            mine[name] = (file.stat().st_size, _sha256(file))
            put_file(file, storage.join(url, *name.split("/")))
    return mine


def newest(root: str, run: Mapping[str, str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below ``root`` and, for every newer one that does not count, why it was passed over.

    Args:
        run: what the checkpoint has to be a state of; facts that either side lacks are not compared.
    """
    skipped: list[str] = []
    for url, present in _folders(root):
        try:
            found = _verified(url, present)
            _check_run(found, run or {})
            return found, skipped
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
        """This rank's random-number state. A rank that the writing group did not have keeps its own: order, negatives
        and dropout are functions of the seed; only a woken frozen model's own dropout draws from it."""
        if self._random.exists():
            set_random_state(load_file(self._random))


def _check_run(found: Checkpoint, run: Mapping[str, str]) -> None:
    other = [f"{n} {found.run[n][:12]} instead of {run[n][:12]}" for n in run if found.run.get(n, run[n]) != run[n]]
    if other:
        raise ValueError(f"it belongs to another run ({', '.join(other)})")


def prune(
    root: str, keep: int, *, keep_best: bool = False, upto: int | None = None, run: Mapping[str, str] | None = None
) -> None:
    """Delete all but the ``keep`` newest whole checkpoints, and every other one that is older than those.

    A manifest goes before its files, so a deletion that is cut short leaves no folder that looks whole.

    Args:
        keep_best: the checkpoint with the lowest score stays too, and is not counted.
        upto: the step that has been reached. What lies beyond was passed over when this try began, as damaged or as
            another run's: it is not counted among those that a next try could go on from.
        run: what a checkpoint has to be a state of to be counted, as in :func:`newest`.
    """
    folders = [found for found in _folders(root) if upto is None or _key(found[0])[0] <= upto]
    own = {url for url, present in folders if MANIFEST in present and _is_of(url, run or {})}
    best = _best([found for found in folders if found[0] in own]) if keep_best else None
    whole = 0
    for url, _ in folders:
        if url == best:
            continue
        if url in own and whole < keep:
            whole += 1
        elif whole >= keep:
            storage.delete(storage.join(url, MANIFEST))
            storage.delete(url)


def _is_of(url: str, run: Mapping[str, str]) -> bool:
    """Whether a manifest says that its checkpoint is a state of ``run``."""
    try:
        known = json.loads(storage.read_bytes(storage.join(url, MANIFEST))).get("run") or {}
    except (ValueError, StorageError):
        return False
    return all(known.get(name, run[name]) == run[name] for name in run)


def _best(folders: list[tuple[str, dict[str, int]]]) -> str | None:
    """The folder of the lowest score; the earliest step of equals."""
    scores = []
    for url, present in folders:
        if MANIFEST in present:
            with contextlib.suppress(ValueError, StorageError):
                score = json.loads(storage.read_bytes(storage.join(url, MANIFEST))).get("score")
                if score is not None:
                    scores.append((score, _key(url), url))
    return min(scores)[2] if scores else None


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
    return Checkpoint(
        url, facts["step"], facts["attempt"], facts["world_size"], facts["zero_stage"], files,
        facts.get("run", {}), facts.get("score"),
    )  # fmt: skip


def _write_manifest(whole: Checkpoint) -> tuple[str | None, str]:
    """Write the manifest; the reason and the mend instead where it cannot be, or a file is not to be seen from here."""
    for name, (size, _) in whole.files.items():
        place = storage.join(whole.url, *name.split("/"))
        if not storage.exists(place) or storage.size(place) != size:
            fault = f"The checkpoint file {place} that a worker wrote is not visible to the first worker."
            return fault, "Set storage to a folder that all nodes share, or to an s3:// URL."
    facts = {name: value for name, value in asdict(whole).items() if name != "url"}
    try:
        storage.write_bytes(storage.join(whole.url, MANIFEST), json.dumps(facts, indent=1).encode())
    except (OSError, StorageError) as error:
        fault = f"The checkpoint {whole.url} could not be closed: {error}"
        return fault, _MAKE_ROOM
    return None, ""


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
