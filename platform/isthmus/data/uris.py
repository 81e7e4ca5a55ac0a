"""Where images may lie that a table names instead of holding: below given places, and nowhere else.

A table is data from others. Whoever wrote it must not choose which files of this machine, which buckets of these keys
or which hosts of this network are read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from urllib.parse import unquote

from isthmus import storage


def store_of(url: str) -> str:
    """The place that is allowed without being named: the bucket of ``url``, or on a local disk the folder itself."""
    if storage.is_local(url):
        path = storage.local_path(url).absolute()
        return str(path.parent if path.is_file() else path)
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def image_url(uri: str, shard: str, places: Sequence[str]) -> str:
    """The URL of an image that a row of the table ``shard`` names.

    Args:
        uri: a path relative to the table's folder, an absolute path or a URL.
        shard: URL of the table.
        places: URLs below which it must lie.

    Raises:
        ValueError: it lies elsewhere, with the reason.
    """
    uri = uri.strip()
    if not uri:
        raise ValueError("the image's URI is empty")
    scheme, mark, rest = uri.partition("://")
    url = f"{scheme.lower()}://{rest}" if mark else storage.join(shard.rpartition("/")[0] or ".", uri)
    if ".." in unquote(url).split("/"):
        raise ValueError(f"the image's URI {uri} has a '..' in it, which is not followed")
    url = _plain(url)
    if any(url.startswith(_plain(place).rstrip("/") + "/") for place in places):
        return url
    if url.startswith(("http://", "https://")):
        raise ValueError(
            f"the image {uri} is a web address, and nothing is fetched from hosts that were not named: bring the "
            "images into your store first, or allow the address with --images-from"
        )
    raise ValueError(f"the image {uri} lies outside of {' and '.join(places)}: allow its place with --images-from")


def _plain(url: str) -> str:
    if not storage.is_local(url):
        return url
    return posixpath.normpath(str(storage.local_path(url).absolute()))
