"""Stamps of a children's drawing program that have a sound of their own: a picture and what is heard of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from isthmus import packages
from isthmus.data.media import read_sound
from isthmus.data.sources import stamps
from isthmus.data.sources.candidate import Gathered, Source, safe_key
from isthmus.data.transforms import DecodeError

_KINDS = ("ogg", "wav")


def gather(archives: Mapping[str, Path], scratch: Path) -> Gathered:
    """The stamps of :func:`isthmus.data.sources.stamps.gather` that have a sound, with it.

    The sounds beside a stamp that say its description in some language are not its own. A sound that several stamps
    share stays with each of them.
    """
    found = stamps.gather(archives, scratch)
    wanted = {candidate.key: candidate for candidate in found.candidates}
    heard: dict[str, Path] = {}
    archive = archives[stamps.PACKAGE]
    for member, file in packages.members(archive, lambda name: name.startswith(stamps.ROOT)):
        base, _, kind = member.removeprefix(stamps.ROOT).rpartition(".")
        key = safe_key("stamps", base)
        if kind in _KINDS and key in wanted and key not in heard:
            heard[key] = scratch / f"{key}.{kind}"
            heard[key].write_bytes(file.read())
    out = Gathered(dropped=found.dropped)
    for key, candidate in wanted.items():
        reason = _unusable(heard.get(key))
        if reason:
            out.dropped[reason] += 1
        else:
            new = candidate.key.replace("stamps-", "sounds-", 1)
            out.candidates.append(replace(candidate, key=new, source="sounds", sound=heard[key]))
    return out


def _unusable(path: Path | None) -> str:
    if path is None:
        return "no sound of its own"
    try:
        heard = read_sound(path.read_bytes(), 16_000)
    except DecodeError:
        return "sound unreadable"
    return "" if abs(heard).max() > 0 else "sound silent"


SOURCE = Source(
    name="sounds",
    summary="pictures with a sound of their own, and a descriptive sentence",
    packages=(
        replace(stamps.SOURCE.packages[0], note="images, sounds and descriptions, (c) Bill Kendrick and others"),
    ),
    gather=gather,
)
