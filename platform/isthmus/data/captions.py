"""Where the captions stand inside a text member."""

from __future__ import annotations

import json
from typing import Any

TEXT_KINDS = ("txt", "json", "caption")
"""Members that may hold captions, the preferred one first."""


def parse_captions(data: bytes, kind: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(captions, the remaining fields) of a text member.

    ``txt``, ``caption``: every non-empty line is a caption. ``json``: the field ``captions`` (a list) or ``caption``
    (a text); the other fields are the sample's meta data.

    Raises:
        ValueError: bytes that are no UTF-8 or no JSON object, with the reason.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption file is not UTF-8 (byte {error.start})") from None
    if kind != "json":
        return as_captions(text.splitlines()), {}
    meta = parse_meta(data)
    found = meta.pop("captions", None)
    single = meta.pop("caption", None)
    return as_captions(found if found is not None else single), meta


def parse_meta(data: bytes) -> dict[str, Any]:
    """The JSON object of a meta member; ValueError with the reason when it is none."""
    try:
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the .json member is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("the .json member holds no object")
    return value


def parse_side(data: bytes) -> dict[str, Any]:
    """The fields of a member beside the captions: a JSON object, or ``{"class": ...}`` of a ``.cls`` member's text.

    Raises:
        ValueError: bytes that are neither, with the reason.
    """
    try:
        return parse_meta(data)
    except ValueError:
        text = data.decode("utf-8-sig", errors="replace").strip()
        if text.startswith(("{", "[")) or "\n" in text:
            raise
        return {"class": text}


def as_captions(value: Any) -> tuple[str, ...]:
    """Non-empty stripped texts of a text, a list of texts or None."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else list(value)
    return tuple(text for item in items if isinstance(item, str) and (text := item.strip()))
