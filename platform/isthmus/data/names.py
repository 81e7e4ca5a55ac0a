"""Lists of class names that users keep in files: a name a line, a JSON list, or a JSON object of label -> name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus import storage
from isthmus.errors import DataError

_FORMS = "Write a name a line, a JSON list of names, or a JSON object of label -> name."


def read_names(url: str) -> tuple[str, ...]:
    """The names of a list; an object's, in its order.

    Raises:
        DataError: not UTF-8, JSON that is broken or of another form, a name that is no text, or none.
    """
    return tuple(read_table(url).values())


def read_table(url: str) -> dict[str, str]:
    """Label -> name; a list's labels are its numbers, "0" first, as in image folders that are numbered by class.

    Raises:
        DataError: as :func:`read_names`.
    """
    try:
        return parse_table(storage.read_bytes(url).decode("utf-8-sig"), url)
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None


def parse_table(text: str, url: str) -> dict[str, str]:
    """:func:`read_table` of what ``url`` holds."""
    table = _json_table(url, text) if text.lstrip()[:1] in ("[", "{") else _numbered(text.splitlines())
    for label, name in table.items():
        if not isinstance(name, str):
            raise DataError(f"{url}: the name of class '{label}' is {json.dumps(name)}, which is no text.", _FORMS)
    names = {label: name.strip() for label, name in table.items() if name.strip()}
    if not names:
        raise DataError(f"{url} names no class.", _FORMS)
    return names


def _json_table(url: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{url} begins as JSON and is not valid: {error}.", _FORMS) from None
    return value if isinstance(value, dict) else _numbered(value)


def _numbered(names: list[Any]) -> dict[str, Any]:
    kept = [name for name in names if not isinstance(name, str) or name.strip()]
    return {str(number): name for number, name in enumerate(kept)}
