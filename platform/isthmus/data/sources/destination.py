"""The place a set is written to: what is there already, and making room without touching anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus import storage
from isthmus.errors import DataError

RECORD = "fetch.json"
SPLITS = ("train", "heldout")


def record(out: str) -> dict[str, Any] | None:
    """What an earlier fetch left at ``out``: its request, files and report; None where there is nothing readable."""
    url = storage.join(out, RECORD)
    if not storage.exists(url):
        return None
    try:
        content = json.loads(storage.read_bytes(url))
        return content if {"request", "files", "report"} <= content.keys() else None
    except (ValueError, AttributeError):
        return None


def _shards(out: str) -> dict[str, int]:
    """Path below ``out`` -> bytes, of every shard in the two splits."""
    found: dict[str, int] = {}
    for name in SPLITS:
        folder = storage.join(out, name)
        if storage.exists(folder):
            root = folder.rstrip("/")
            files = storage.list_files(folder, (".tar", ".parquet"))
            found |= {f"{name}{url[len(root) :]}": size for url, size in files if not url.endswith("/manifest.parquet")}
    return found


def all_there(out: str, files: Sequence[Mapping[str, Any]]) -> bool:
    """Whether exactly these files (at least one) are there, with these sizes."""
    return bool(files) and _shards(out) == {file["path"]: file["size"] for file in files}


def check(out: str, earlier: Mapping[str, Any] | None) -> None:
    """Before any work: can ``out`` be written, and does it hold nothing but what a fetch wrote?

    Raises:
        DataError: shards that no fetch wrote.
        StorageError: ``out`` cannot be written.
    """
    storage.ensure_writable(out)
    ours = {file["path"] for file in earlier["files"]} if earlier else set()
    broken_off = earlier is not None and earlier["report"] is None
    foreign = sorted(path for path in _shards(out) if path not in ours and not (broken_off and _by_fetch(path)))
    if foreign:
        raise DataError(f"{out} already holds other data ({foreign[0]}).", "Choose an empty folder.")


def make_room(out: str, request: Mapping[str, Any]) -> None:
    """Removes what an earlier fetch wrote (see :func:`check`) and notes that a new one has begun."""
    write_record(out, request, [], None)
    for path in _shards(out):
        storage.delete(storage.join(out, path))
    for name in SPLITS:
        for stale in ("manifest.parquet", "manifest.pages", "manifest.json"):
            storage.delete(storage.join(out, name, stale))


def write_record(
    out: str, request: Mapping[str, Any], files: Sequence[Mapping[str, Any]], report: Mapping[str, Any] | None
) -> None:
    """Writes ``fetch.json``; ``report`` None while the shards are being written."""
    content = {"request": request, "files": files, "report": report}
    storage.write_bytes(storage.join(out, RECORD), json.dumps(content, indent=1, sort_keys=True).encode())


def _by_fetch(path: str) -> bool:
    """A shard under a name that fetch gives."""
    folder, _, file = path.partition("/")
    return file.startswith(f"{folder}-") and file.partition(".")[0].removeprefix(f"{folder}-").isdigit()
