"""The class that a sample's JSON member names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = ("label", "class")


def label_of(meta: Mapping[str, Any]) -> str:
    """``label``, or else ``class``, as text; empty where neither is given. 0 is a class."""
    given = (meta.get(field) for field in FIELDS)
    return next((str(value) for value in given if value is not None and value != ""), "")
