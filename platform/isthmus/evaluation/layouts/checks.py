"""Reading annotation files, and refusing what does not fit together, by file and id."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from isthmus import storage
from isthmus.errors import DataError
from isthmus.evaluation.layouts.types import Extras

FETCH_AGAIN = "Fetch the file again, or mend it."


class Sources:
    """Reads files and keeps a digest of all that was read."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def add(self, data: bytes) -> None:
        self._sha.update(len(data).to_bytes(8, "little") + data)

    def text(self, url: str) -> str:
        data = storage.read_bytes(url)
        self.add(data)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{url} is not UTF-8 (byte {error.start}).", "Unpack it, or save it as UTF-8.") from None

    def table(self, url: str) -> dict[str, Any]:
        """The object of a JSON file."""
        try:
            value = json.loads(self.text(url))
        except json.JSONDecodeError as error:
            raise DataError(f"{url} is not valid JSON: {error}.", "Fetch it again.") from None
        if not isinstance(value, dict):
            raise DataError(f"{url} holds no JSON object.", "Is it a file of this layout?")
        return value


def entries_of(table: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The list of objects called ``name``."""
    value = table.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{where} holds no list '{name}'.", "Is it a file of this layout?")
    return value


def required(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """The member ``name``, which must be there and of the kind."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} has no {'number' if kind is int else 'text'} '{name}'.", FETCH_AGAIN)
    return value


def by_id(url: str, what: str, entries: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """Entries by id, in their order."""
    out = {}
    for row, entry in enumerate(entries):
        number = required(entry, name, int, f"{url}: entry {row} of '{what}'")
        if number in out:
            raise DataError(f"{url} holds the {name} {number} more than once in '{what}'.", FETCH_AGAIN)
        out[number] = entry
    return out


def no_doubles(where: str, name: str, values: list[Any]) -> None:
    """Refuses a value that is there more than once."""
    if len(set(values)) < len(values):
        double = next(value for value, count in Counter(values).items() if count > 1)
        raise DataError(f"{where} holds the {name} {double} more than once.", FETCH_AGAIN)


def captioned(url: str, number: int | str, captions: list[str]) -> tuple[str, ...]:
    """The captions that are not empty; at least one."""
    texts = tuple(text.strip() for text in captions if text.strip())
    if not texts:
        raise DataError(f"{url}: the image {number} has no caption.", FETCH_AGAIN)
    return texts


def negatives_of(entry: Mapping[str, Any], url: str, number: int) -> Extras:
    """The wrong captions that an entry names, if any."""
    return Extras(negatives=as_negatives(entry.get("negatives"), f"{url}: image {number}"))


def as_negatives(value: Any, where: str) -> tuple[str, ...]:
    """Wrong captions: a list of texts, or None.

    Raises:
        DataError: anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(f"{where}: 'negatives' is no list of captions.", FETCH_AGAIN)
    return tuple(value)


def below_folder(name: str, where: str) -> str:
    """A file name that stays below the images' folder."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ":" in parts[0] or ".." in parts or "\\" in name or "\0" in name or not name.strip():
        raise DataError(
            f"{where} names the image file '{name}', which is no path below the images' folder.",
            "File names must be relative, with '/' between folders and without '..'.",
        )
    return name


def stem(url: str) -> str:
    """The last part of a path, without its ending."""
    return url.rstrip("/").rsplit("/", 1)[-1].rpartition(".")[0] or url.rstrip("/").rsplit("/", 1)[-1]
