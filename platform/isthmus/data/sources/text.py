"""Captions as people would write them: cleaning, an English word list, and the form in which captions are compared."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_STRAIGHT = str.maketrans(
    {**dict.fromkeys("‘’‚‛", "'"), **dict.fromkeys("“”„‟", '"'), **dict.fromkeys("–‒−", "-"), "—": ", ", "―": ", "}
)
_ADDRESS = re.compile(r"\S+@\S+|\b(?:https?://|www\.)\S+", re.I)
_FILE = re.compile(r"\.(?:svgz?|png|jpe?g|gif|webp|eps|ai|txt|xcf)\b", re.I)
_TAG = re.compile(r"<[^<>]*>")
_DETERMINERS = "a an the one two three four five six seven eight nine ten some this these that it there"
_OPENERS = frozenset(_DETERMINERS.split())


def tidy(text: str) -> str | None:
    """One line of plain text, or None when nothing worth reading is left.

    Entities, NFKC, no double quotes, no mark-up, no addresses, no file endings, no underscores, single spaces; no
    punctuation hanging at either end. None for text without two letters in a row.
    """
    text = unicodedata.normalize("NFKC", html.unescape(html.unescape(text))).translate(_STRAIGHT)
    text = _FILE.sub("", _ADDRESS.sub(" ", _TAG.sub(" ", text))).replace("_", " ")
    text = "".join(
        c if unicodedata.category(c)[0] not in "CS" or unicodedata.category(c) == "Sc" or c in "+|^~" else " "
        for c in text
    )
    text = re.sub(r"[\[(]\s*[\])]", " ", text.replace('"', ""))
    text = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text))
    text = text.strip(" \t-,;:.!?*|/")
    return text if re.search(r"[^\W\d_]{2}", text) or re.search(r"(?:letter|number|sign|vitamin) \w", text) else None


def first_sentence(text: str) -> str:
    """Up to the first full stop, exclamation or question mark that ends a sentence."""
    found = re.match(r"(.+?[a-z)\"'’”\d][.!?]+)(?:\s|$)", text, re.S)
    return found.group(1) if found else text


def lower_opener(text: str) -> str:
    """``A frog`` -> ``a frog``; names and abbreviations at the start stay as they are."""
    head, _, tail = text.partition(" ")
    return f"{head.lower()} {tail}" if tail and head.lower() in _OPENERS else text


def comparable(caption: str) -> str:
    """The form in which two captions count as one: no case, accents, punctuation, articles or spacing.

    >>> comparable("A  Frog!") == comparable("frog")
    True
    """
    text = unicodedata.normalize("NFKD", html.unescape(caption)).casefold().replace("_", " ")
    text = "".join(c for c in text if not unicodedata.combining(c))
    words = re.findall(r"\w+", re.sub(r"(?<=\w)['’](?=\w)", "", text))
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words)


def distinct(captions: Iterable[str | None]) -> tuple[str, ...]:
    """The captions in order, without empty ones and without those that are the same once :func:`comparable`."""
    seen: dict[str, str] = {}
    for caption in captions:
        if caption:
            seen.setdefault(comparable(caption), caption)
    return tuple(seen.values())


@dataclass(frozen=True)
class English:
    """A word list that knows which words are written with a capital.

    Attributes:
        words: lower-case words.
        names: lower-case form -> written form of words that the list holds with capitals only.
    """

    words: frozenset[str]
    names: dict[str, str]

    @classmethod
    def of(cls, lines: Iterable[str]) -> English:
        """From a word list with one word a line. Words of one letter other than ``a`` and ``I`` are left out."""
        entries = [w for w in (line.strip() for line in lines) if len(w) > 1 or w in ("a", "A", "I")]
        words = frozenset(w for w in entries if w.islower())
        return cls(words, {w.lower(): w for w in entries if w.lower() not in words})

    def knows(self, word: str) -> bool:
        """Whether ``word`` is on the list, alone or in each of its hyphenated parts, in any case."""
        parts = [p for p in re.split(r"[-/']", word.lower()) if p]
        return self._one(word.lower()) or (len(parts) > 1 and all(self._one(p) or len(p) == 1 for p in parts))

    def _one(self, word: str) -> bool:
        return word in self.words or word in self.names

    def share(self, text: str) -> float:
        """Share of the words of ``text`` (numbers aside) that are English; 0 when it has none."""
        words = [w for w in re.findall(r"[^\W\d_][\w'-]*", text) if len(w) > 1 or w.lower() in ("a", "i")]
        return sum(self.knows(w) for w in words) / len(words) if words else 0.0

    def cased(self, text: str) -> str:
        """``Pumpkin Pie`` -> ``pumpkin pie``; names (``Brazil``) and abbreviations (``USB``) keep their capitals."""
        return re.sub(r"[^\W\d_][\w']*", lambda found: self._cased_word(found.group()), text)

    def _cased_word(self, word: str) -> str:
        lower = word.lower()
        if word.isupper() and 1 < len(word) <= 4 and lower not in self.words:
            return word
        if len(word) == 1 and word.isupper() and word != "A":
            return word
        return lower if lower in self.words else self.names.get(lower, word)
