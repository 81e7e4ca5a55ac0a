"""The one kind of error that a user is meant to read.

Everything a user can cause (a wrong path, a misspelt key, a missing alias) is raised as an
:class:`IsthmusError`: one sentence that says what is wrong and one that says how to mend it. The command
line prints both without a traceback; ``--debug`` shows the traceback too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IsthmusError(Exception):
    """A fault that the user can mend.

    Args:
        problem: what is wrong, naming the file, field or URL.
        mend: what to do about it. Empty when the problem already says so.
    """

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(problem, mend)
        self.problem = problem
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.problem} {self.mend}".strip()


class ConfigError(IsthmusError):
    """A recipe that cannot be read or does not fit its schema."""


class StorageError(IsthmusError):
    """A URL that cannot be listed, read or written."""


class DataError(IsthmusError):
    """Shards, manifests or caches that cannot be used as they are."""


class WeightsError(IsthmusError):
    """Pretrained weights that cannot be found, verified or fitted."""


class RegistryError(IsthmusError):
    """A model name, version or alias that the registry does not hold, or a registry out of reach."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``known``, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
