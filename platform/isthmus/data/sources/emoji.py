"""Rendered emoji with their names: a clean, small vocabulary of everyday things, people, faces and flags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from isthmus import packages
from isthmus.data.sources.candidate import Candidate, Gathered, Package, Source, safe_key
from isthmus.data.sources.text import comparable, distinct, tidy

_IMAGES = "@lobehub/fluent-emoji-3d"
_NAMES = "emojibase-data"
_DATA = "package/en/data.json"
_MAX_TAGS = 3


def gather(archives: Mapping[str, Path], scratch: Path) -> Gathered:
    """Every render that has a name, without the skin-tone variants (five near-copies of one drawing)."""
    names = _names(archives[_NAMES])
    files = packages.extract(archives[_IMAGES], scratch, prefix="package/assets/")
    found = Gathered()
    seen: set[str] = set()
    for member, path in sorted(files.items(), key=lambda item: (-len(item[0]), item[0])):
        entry = names.get(_code(PurePosixPath(member).stem))
        if entry is None:
            found.dropped["no name"] += 1
        elif "tone" in entry:
            found.dropped["skin-tone variant"] += 1
        elif entry["hexcode"] in seen:
            found.dropped["drawn twice"] += 1
        elif not (captions := _captions(entry)):
            found.dropped["no caption"] += 1
        else:
            seen.add(entry["hexcode"])
            meta = {"emoji": entry["emoji"], "tags": entry.get("tags", [])}
            found.candidates.append(Candidate(safe_key("emoji", entry["hexcode"]), "emoji", captions, path, meta))
    return found


def _names(archive: Path) -> dict[str, Mapping[str, Any]]:
    """Code points without variation selectors -> entry of the data file; variants inherit their base's tags."""
    entries = json.loads(packages.read(archive, [_DATA])[_DATA])
    return {_code(entry["hexcode"]): entry for base in entries for entry in _with_skins(base)}


def _with_skins(base: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield base
    for skin in base.get("skins", ()):
        yield {"tags": base.get("tags", []), **skin, "tone": skin.get("tone", 0)}


def _code(text: str) -> str:
    return "-".join(part.lstrip("0") for part in re.split(r"[-_]", text.lower()) if part != "fe0f")


def _captions(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The name as a phrase, then the name with a few of its tags."""
    main = tidy(_phrase(entry["label"]))
    if main is None:
        return ()
    known = set(comparable(main).split())
    tags = [tag for tag in map(tidy, entry.get("tags", ())) if tag and not tag.isupper()]
    fresh = [tag for tag in tags if len(tag) > 2 and not set(comparable(tag).split()) & known][:_MAX_TAGS]
    return distinct([main, ", ".join([main, *fresh])])


def _phrase(label: str) -> str:
    """``flag: Brazil`` -> ``flag of Brazil``; ``man: red hair`` -> ``man with red hair``."""
    head, colon, tail = label.partition(": ")
    if not colon:
        return label.replace("⊛ ", "")
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if head in ("family", "kiss", "couple with heart"):
        return f"{head} of {re.sub(r', (?=[^,]*$)', ' and ', tail)}"
    return f"{head} {tail}" if tail == "bald" else f"{head} with {tail}"


SOURCE = Source(
    name="emoji",
    summary="1,852 rendered emoji with names and tags",
    packages=(
        Package(
            "npm",
            _IMAGES,
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
            ("package/package.json", "package/README.md"),
            "the images: Fluent 3D emoji, (c) Microsoft, repackaged by LobeHub",
        ),
        Package(
            "npm",
            _NAMES,
            "17.0.0",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
            "MIT",
            ("package/package.json",),
            "English names and tags of the emoji, (c) Miles Johnson",
        ),
    ),
    gather=gather,
)
