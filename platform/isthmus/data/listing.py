"""Which files of the given URLs are shards, and what the manifest calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus import storage
from isthmus.errors import DataError

TABLE_FILE, HEADER_FILE = "manifest.parquet", "manifest.json"
SHARDS = (".tar", ".parquet")
PACKED = (".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True)
class Found:
    """A file that may be a shard.

    Attributes:
        url, size: where, and how many bytes.
        name: relative to the manifest's folder where it lies below that, else the absolute path or URL.
        beside_tar: a Parquet file beside a tar of the same name: perhaps the table that img2dataset writes of a tar.
    """

    url: str
    size: int
    name: str
    beside_tar: bool = False


def find(urls: str | Sequence[str], out: str | None) -> tuple[str, list[Found]]:
    """The manifest's folder, and the shards sorted by URL, each once.

    Args:
        urls: a folder or a shard, or several of them; folders are searched at any depth.
        out: the manifest's folder; by default the one folder that is given.

    Raises:
        DataError: no shards in one of them, or several URLs without ``out``.
        StorageError: one of them cannot be listed.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    root = out or (urls if isinstance(urls, str) else "")
    if not given or not root:
        raise DataError(
            "A list of shards to index is empty or lacks 'out'.",
            "Name the shards, and with --out a folder for the manifest of them all.",
        )
    sizes: dict[str, int] = {}
    for url in given:
        found = _below(url)
        if not out and [item for item, _ in found] == [url]:
            raise DataError(f"{url} is one shard, not a folder.", "Say with --out where the manifest goes.")
        sizes.update(found)
    files = sorted(sizes.items())
    return root, [
        Found(url, size, _name(url, root), url.endswith(".parquet") and f"{url.removesuffix('.parquet')}.tar" in sizes)
        for url, size in files
    ]


def require_index(url: str) -> None:
    """Raises DataError where the folder ``url`` is not indexed, StorageError where it cannot be read."""
    if not storage.exists(storage.join(url, HEADER_FILE)):
        storage.ensure_readable(url)
        raise DataError(f"{url} is not indexed ({HEADER_FILE} is missing).", f"Run `isthmus data index {url}`.")


def _below(url: str) -> list[tuple[str, int]]:
    found = [item for item in storage.list_files(url, SHARDS) if item[0].rpartition("/")[2] != TABLE_FILE]
    if not found:
        raise DataError(
            f"{url} holds no .tar or .parquet shards.",
            "Unpack the compressed tars: they cannot be read at an offset."
            if storage.list_files(url, PACKED)
            else "Check the folder.",
        )
    return found


def _name(url: str, root: str) -> str:
    prefix = root.rstrip("/") + "/"
    if url.startswith(prefix):
        return url[len(prefix) :]
    return str(storage.local_path(url).absolute()) if storage.is_local(url) else url
