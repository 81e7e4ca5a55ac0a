"""An open clip-art library: thousands of drawings whose titles were typed by hundreds of volunteers.

The titles are noisy: names of whole collections, Italian and French, file names, counters. What is kept is a title
(or, for a collection, the drawing's own descriptive name) whose words an English word list knows.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isthmus import packages
from isthmus.data.sources.candidate import Candidate, Gathered, Package, Source, safe_key
from isthmus.data.sources.text import English, comparable, distinct, tidy

_VECTORS, _IMAGES, _WORDS = "openclipart-svg", "openclipart-png", "wamerican"
_VECTOR_ROOT, _IMAGE_ROOT = "usr/share/openclipart/svg/", "usr/share/openclipart/png/"
_HEAD_BYTES = 1 << 20
_WORD_LIST = "usr/share/dict/american-english"
_COLLECTION, _SMALL_COLLECTION = 20, 5
_SAME_CAPTION = 12
_MAX_WORDS = 14
_MAX_KEYWORDS = 4
_COLOURS = "red|green|blue|yellow|orange|black|white|gray|grey|brown|pink|purple|cyan|gold|silver"
_MONOCHROME = re.compile(r"\s*\(?\b(?:B and W|B&W|BW)\b\)?", re.I)
_SUFFIX_COLOUR = re.compile(rf"^(.*\w)\s*\(({_COLOURS})\)$", re.I)
_CREDIT = re.compile(
    r"^clip ?art (?:by|of) .*? - |\bby [A-Z]\w+ [A-Z]\w+.*$|\bRPG map elements?\b|\bbody part\b|\btransparent fix\b",
    re.I,
)
_NOISE = """hash unsorted special icon icons theme computer sign signs symbol symbols misc miscellany other various
    shape shapes geometry clipart clip image picture art svg vector webpage action application menu people appicon
    mimetypes filesystem networksym mapsym tool tools work recreation entertainment education flags"""
_NOISE_WORDS = frozenset(_NOISE.split()) | {"signs and symbols", "map symbols", "united nations member"}
_RANKS = dict(zip("a23456789", ["ace", "two", "three", "four", "five", "six", "seven", "eight", "nine"], strict=True))
_RANKS |= {"10": "ten", "j": "jack", "q": "queen", "k": "king"}
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}


@dataclass(frozen=True)
class Metadata:
    """What the drawing says of itself: raw title, description and keywords."""

    title: str
    description: str
    keywords: tuple[str, ...]


def gather(archives: Mapping[str, Path], scratch: Path) -> Gathered:
    """Drawings with an English title; symbolic links (the same drawing in two folders) are passed over."""
    english = _english(archives[_WORDS])
    described = _read_metadata(archives[_VECTORS])
    shared = collection_titles(described)
    found = Gathered()
    captions: dict[str, tuple[str, ...]] = {}
    same: Counter[str] = Counter()
    for name in sorted(described):
        result = caption(name, described[name], english, collection=described[name].title in shared)
        if isinstance(result, str):
            found.dropped[result] += 1
            continue
        same[comparable(result[0])] += 1
        if same[comparable(result[0])] > _SAME_CAPTION:
            found.dropped["caption of many other images"] += 1
        else:
            captions[name] = result
    wanted = {f"{_IMAGE_ROOT}{name}.png": name for name in captions}
    seen: set[str] = set()
    for member, file in packages.members(archives[_IMAGES], wanted.__contains__):
        path = scratch / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read())
        seen.add(wanted[member])
    found.dropped["no image of its own"] += len(captions) - len(seen)
    for name in sorted(seen):
        meta = {"category": str(PurePosixPath(name).parent), "keywords": list(_keywords(described[name], english))}
        path = scratch / f"{_IMAGE_ROOT}{name}.png"
        found.candidates.append(Candidate(safe_key("clipart", name), "clipart", captions[name], path, meta))
    return found


def collection_titles(described: Mapping[str, Metadata]) -> frozenset[str]:
    """Titles that name a set of drawings and say nothing of the single one.

    Such a title is on very many drawings, or on several whose own names do not repeat it, or on several and begins
    with a credit (the author then pasted the first drawing's title into all).
    """
    files: dict[str, list[str]] = {}
    for name, metadata in described.items():
        files.setdefault(metadata.title, []).append(name)
    found = set()
    for title, names in files.items():
        words = set(re.findall(r"[a-z]{3,}", title.lower()))
        repeating = sum(bool(words & set(re.findall(r"[a-z]{3,}", PurePosixPath(n).name.lower()))) for n in names)
        few = len(names) >= _SMALL_COLLECTION and repeating < len(names) / 2
        if len(names) >= _COLLECTION or few or (len(names) > 1 and _CREDIT.match(title)):
            found.add(title)
    return frozenset(found)


def parse(svg: str) -> Metadata:
    """Title, description and keywords of an SVG's RDF block; empty strings where there is none.

    Read with expressions, not an XML parser: a good part of these files is not well-formed.
    """
    block = re.search(r"<(?:\w+:)?Work\b.*?</(?:\w+:)?Work>", svg, re.S)
    work = block.group() if block else ""
    subject = re.search(r"<dc:subject.*?</dc:subject>", work, re.S)
    keywords = re.findall(r"<rdf:li[^>]*>([^<]*)<", subject.group()) if subject else []
    return Metadata(
        _field(work, "title"), _field(work, "description"), tuple(html.unescape(k).strip() for k in keywords)
    )


def caption(name: str, metadata: Metadata, english: English, collection: bool = False) -> tuple[str, ...] | str:
    """The captions of one drawing, or the reason for leaving it out.

    Args:
        name: path inside the library, without ending.
        metadata: as :func:`parse` gives it.
        english: decides what is English and what keeps its capitals.
        collection: the title is that of a whole collection, so the drawing's own name is looked at instead.
    """
    if card := _playing_card(name):
        return (card,)
    if collection and re.search(r"computer/(?:icons|bb_)|/(?:stars|gradients|cards)/|smilies|stickmen", name):
        return "icon theme or geometric series"
    raw = PurePosixPath(name).name if collection else metadata.title
    main = _title(raw, english, own_name=collection)
    if main is None:
        return "collection's title" if collection else "no title"
    if not (
        _own_words(main, english) if collection else english.share(main) == 1.0 or _backed(main, metadata, english)
    ):
        return "not English"
    if len(main.split()) > _MAX_WORDS:
        return "title too long"
    keywords = _keywords(metadata, english)
    if "/flags/" in name and not re.search(r"\b(flag|ensign|semaphore|banner|standard)\b", main, re.I):
        main = _flag(raw, main)
    elif len(main) < 3:
        return "title too short"
    return distinct([main, _description(metadata, main, english), _with_keywords(main, keywords)])


def _title(raw: str, english: English, own_name: bool) -> str | None:
    """A title as a phrase; for a drawing's own name also without the prefix and counter it was filed under."""
    text = _CREDIT.sub("", html.unescape(raw)).replace("_", " ")
    if own_name:
        text = re.sub(r"^(?:aiga|contour|w|bb|ps|sport) ", "", text)
        text = re.sub(r" (?:bg|inv|r|v)$", "", text)
    text = re.sub(r"^hotel icon(?: has)? (.+)$", r"\1", text, flags=re.I)
    monochrome = bool(_MONOCHROME.search(text))
    text = re.sub(r"\((?:colou?r|\w+ illustration)\)", " ", _MONOCHROME.sub(" ", text), flags=re.I)
    text = re.sub(r"\bv\.? ?\d+\b|\b0\d+\b", " ", text)
    cleaned = tidy(
        re.sub(r"(?<=[a-z]{2})-(?=[a-z]{3})", " ", text) if own_name or ("-" in raw and " " not in raw) else text
    )
    if cleaned is None:
        return None
    if not re.search(r"\b(?:flag|sign|number|signal|semaphore|day|scoop|route)\b", cleaned, re.I):
        cleaned = re.sub(r"(?<=[^\W\d_]{3})[ -]?#?\d{1,3}$", "", cleaned)
    cleaned = " ".join(_split_joined(word, english) for word in cleaned.split())
    if coloured := _SUFFIX_COLOUR.match(cleaned):
        cleaned = f"{coloured.group(2)} {coloured.group(1)}"
    cleaned = re.sub(r"\s*\(([^()]*)\)", r", \1", cleaned)
    cleaned = english.cased(re.sub(r"\s+", " ", cleaned).strip(" ,-#"))
    return f"{cleaned} in black and white" if monochrome and cleaned else cleaned or None


def _split_joined(word: str, english: English) -> str:
    """``StopSign`` -> ``Stop Sign`` where both halves are words and the whole is not."""
    parts = re.findall(r"[A-Z]?[a-z]+", word)
    joined = len(parts) > 1 and "".join(parts) == word and not english.knows(word)
    return " ".join(parts) if joined and all(english.knows(part) for part in parts) else word


def _playing_card(name: str) -> str | None:
    """``recreation/games/cards/simple/simple_h_k`` -> ``king of hearts playing card``."""
    found = re.search(r"/cards/\w+/[a-z]+_([cdhs])_(\w+)$", name)
    rank = _RANKS.get(found.group(2)) if found else None
    return f"{rank} of {_SUITS[found.group(1)]} playing card" if found and rank else None


def _flag(raw: str, main: str) -> str:
    """``United States - Alabama`` -> ``flag of Alabama, United States``, with the capitals of the title."""
    text = tidy(_CREDIT.sub("", html.unescape(raw))) or main
    small = ("of", "and", "the", "de", "la", "with", "in")
    if not re.search(r"[A-Z]", text):
        text = " ".join(word if word in small else word.capitalize() for word in text.split())
    return "flag of " + ", ".join(part.strip() for part in reversed(text.split(" - ")))


def _own_words(main: str, english: English) -> bool:
    """A drawing's own name needs stricter reading: only common words, none of them an abbreviation."""
    words = re.findall(r"[^\W_]+", main.removesuffix(" in black and white"))
    small = ("a", "in", "of", "on", "no", "to", "up", "at", "an", "or")
    return bool(words) and all(w in english.words and (len(w) > 2 or w in small) for w in words)


def _backed(main: str, metadata: Metadata, english: English) -> bool:
    """A title with an unknown word counts where most words are known and the author's keywords repeat the unknown."""
    keywords = {word for key in metadata.keywords for word in comparable(key).split()}
    unknown = [w for w in re.findall(r"[^\W\d_][\w'-]*", main) if len(w) > 1 and not english.knows(w)]
    return english.share(main) >= 0.5 and all(comparable(word) in keywords for word in unknown)


def _keywords(metadata: Metadata, english: English) -> tuple[str, ...]:
    """Keywords that say something: English, no library plumbing, in the author's order."""
    cleaned = (tidy(key) for key in metadata.keywords if "0x" not in key and len(key) <= 30)
    return distinct(
        english.cased(key)
        for key in cleaned
        if key and len(key) > 2 and comparable(key) not in _NOISE_WORDS and english.share(key) == 1.0
    )


def _with_keywords(main: str, keywords: Iterable[str]) -> str | None:
    known = set(comparable(main).split())
    fresh = [key for key in keywords if not set(comparable(key).split()) & known][:_MAX_KEYWORDS]
    return ", ".join([main, *fresh]) if fresh else None


def _description(metadata: Metadata, main: str, english: English) -> str | None:
    """The author's description where it is one English phrase about the drawing."""
    text = tidy(metadata.description) if "HASH(" not in metadata.description else None
    if text is None or "@" in metadata.description or not 2 <= len(text.split()) <= _MAX_WORDS:
        return None
    if re.match(r"(?:this|part of|just|shape|done)\b", text, re.I) or comparable(text).startswith(comparable(main)):
        return None
    related = set(comparable(text).split()) & set(comparable(main).split())
    return english.cased(text) if related and english.share(text) == 1.0 else None


def _read_metadata(archive: Path) -> dict[str, Metadata]:
    """Library path without ending -> metadata."""
    return {
        member.removeprefix(_VECTOR_ROOT).removesuffix(".svg"): parse(file.read(_HEAD_BYTES).decode("utf-8", "replace"))
        for member, file in packages.members(archive, lambda n: n.startswith(_VECTOR_ROOT) and n.endswith(".svg"))
    }


def _field(work: str, name: str) -> str:
    found = re.search(rf"<dc:{name}[^>]*>([^<]*)", work)
    return re.sub(r"\s+", " ", html.unescape(found.group(1))).strip() if found else ""


def _english(archive: Path) -> English:
    words = packages.read(archive, [_WORD_LIST])[_WORD_LIST]
    return English.of(words.decode("utf-8").splitlines())


SOURCE = Source(
    name="clipart",
    summary="about 3,300 drawings with titles and keywords",
    packages=(
        Package(
            "debian",
            _IMAGES,
            "1:0.18+dfsg-19",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
            "public domain",
            ("usr/share/doc/openclipart-png/copyright",),
            "the images, each dedicated to the public domain by its author",
        ),
        Package(
            "debian",
            _VECTORS,
            "1:0.18+dfsg-19",
            "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
            "public domain",
            ("usr/share/doc/openclipart-svg/copyright",),
            "titles, descriptions and keywords, read from the drawings' metadata",
        ),
        Package(
            "debian",
            _WORDS,
            "2020.12.07-2",
            "c8f8e2b2ad0d37bfdd41f0e40f1e4c8e5f907467d768a1d3698b164e9617f0b4",
            "permissive, see its text",
            ("usr/share/doc/wamerican/copyright",),
            "an English word list that filters titles; none of it is in the data",
        ),
    ),
    gather=gather,
)
