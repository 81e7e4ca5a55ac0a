"""Lists of class names that users keep in files: a name a line, a JSON list, or a JSON object of label -> name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus import storage
from isthmus.errors import DataError

_FORMS = "Write a name a line, a JSON list of names, or a JSON object of label -> name."


def read_names(url: str) -> tuple[str, ...]:
    """The names of a list; an object's, in its order. Empty ones are left out.

    Raises:
        DataError: not UTF-8, JSON that is broken or of another form, a name that is no text, or none.
    """
    return tuple(name for name in _read(url).values() if name)


def read_table(url: str) -> dict[str, str]:
    """Label -> name; a list's labels are its numbers, "0" first, as in image folders that are numbered by class.

    Raises:
        DataError: as :func:`read_names`, or a label without a name.
    """
    return _each_named(_read(url), url)


def parse_table(text: str, url: str) -> dict[str, str]:
    """:func:`read_table` of what ``url`` holds."""
    return _each_named(_parsed(text, url), url)


def _read(url: str) -> dict[str, str]:
    try:
        return _parsed(storage.read_bytes(url).decode("utf-8-sig"), url)
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None


def _each_named(table: dict[str, str], url: str) -> dict[str, str]:
    if bare := next((label for label, name in table.items() if not name), None):
        raise DataError(f"{url} has no name for the class '{bare}'.", "Name it: others would take its number.")
    return table


def _parsed(text: str, url: str) -> dict[str, str]:
    table = _json_table(url, text) if text.lstrip()[:1] in ("[", "{") else _numbered(text.splitlines())
    for label, name in table.items():
        if not isinstance(name, str):
            raise DataError(f"{url}: the name of class '{label}' is {json.dumps(name)}, which is no text.", _FORMS)
    names = {label: name.strip() for label, name in table.items()}
    if not any(names.values()):
        raise DataError(f"{url} names no class.", _FORMS)
    return names


def _json_table(url: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{url} begins as JSON and is not valid: {error}.", _FORMS) from None
    return value if isinstance(value, dict) else _numbered(value)


def _numbered(names: list[Any]) -> dict[str, Any]:
    while names and isinstance(names[-1], str) and not names[-1].strip():
        names = names[:-1]  # a file's last line
    return {str(number): name for number, name in enumerate(names)}
