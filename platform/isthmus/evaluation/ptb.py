"""Penn Treebank tokens of captions, as the COCO caption scorers expect them, without Java.

The reference is Stanford's PTBTokenizer 3.4.1 with ``-preserveLines -lowerCase``, after which the scorers drop the
tokens of :data:`DROPPED`. Its rules are written down here in our own words for what captions contain: words, numbers,
contractions, abbreviations, quotes, brackets. It agrees with the Java program on ordinary captions (a test compares
them where Java is there); it does not follow it into telephone numbers, SGML or e-mail headers.

Two habits of the original that look like mistakes are kept: lower-casing turns the bracket token -LRB- into -lrb-,
which is then *not* dropped, and a run of mixed marks such as ``?!`` is one token, not dropped either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_CHARACTERS = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u00bd": " 1/2",
        "\u00bc": " 1/4",
        "\u00be": " 3/4",
        "\u00a3": "#",
        "\u20ac": "$",
        "\u00a2": " cents ",
        "\u00a0": " ",
        "\u00ad": None,
        "\ufe0f": None,
        "\u200d": None,
        "\ufeff": None,
    }
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-"}
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
    "y'all": ("y'", "all"),
    "y'know": ("y'", "know"),
    "more'n": ("more", "'n"),
    "d'ye": ("d'", "ye"),
}
# Words that keep the full stop behind them, and those that keep it only when they are capitalised.
_ABBREVIATIONS = _words(
    "al apr aug ave bldg blvd bros ca capt cf cmdr co col comdr corp cos cpl cpt dec dr est etc ext feb fri ft gen gov "
    "hon inc ind jan jos jr jul jun lieut lt ltd maj mar messrs mo mon mont mr mrs ms mt nov oct pfc ph plc prof pvt "
    "rd rep reps rev sec sen sens sep seq sgt spc sq sr st ste tel thu thurs tue tues univ vs wed"
)
_CAPITAL_ABBREVIATIONS = _words(
    "adm ala ariz ark az calif colo conn ct dak del fla ga ill kans ken ky la mass mich minn miss nev okla ore pa penn "
    "tenn tex va vt wash wis wisc wyo"
)
_CLITIC = r"'(?:s|re|ve|ll|d|m)"
_CLITICS = re.compile(rf"(?i)({_CLITIC})+$")
_NOT = re.compile(rf"(?i)^(.+)(n't)((?:{_CLITIC})*)$")
_ONE_CLITIC = re.compile(rf"(?i){_CLITIC}")
_KEEPS_APOSTROPHE = re.compile(r"(?i)^(?:[dlo]'\w.*|ma'am|c'mon)$")

_SCAN = re.compile(
    r"""
      (?P<tag></?[A-Za-z][^<>\s]*>)
    | (?P<url>(?:https?://|www\.)[^\s"<>]*[\w/])
    | (?P<mail>\w[\w.+-]*@\w[\w-]*(?:\.[\w-]+)+)
    | (?P<handle>[@\#][A-Za-z_]\w*)
    | (?P<smiley>(?<!\w)[:;=]-?[()DP](?!\w))
    | (?P<dots>\.{3,5})
    | (?P<acronym>[^\W\d_](?:\.[^\W\d_])+(?!\w)\.?|[Pp]h\.?[Dd]\.?(?!\w))
    | (?P<elision>'(?:n'|[0-9]0s\b|(?:em|til|cause|tis|twas|n|round|bout|s|re|ve|ll|d|m)\b)|\b[oO]l')
    | (?P<dollar>[A-Z]{1,2}\$)
    | (?P<marks>[?!]+)
    | (?P<dash>-{2,})
    | (?P<signed>(?<![^\s(\d%])[+-]\.?\d+(?:[.,:]\d+)*(?![\w-]))
    | (?P<decimal>(?<!\w)\.\d+(?!\w))
    | (?P<number>\d+(?:[.,:/]\d+)+(?:-\d+)*(?![^\W\d]))
    | (?P<word>(?:[A-Z]+&[A-Z]+(?!\w))|(?:c\+\+|[cC]\#(?!\w)|[cC]\+\+)
          |\w+(?:(?:['-](?=\w)|/(?=[^\W\d])|(?<=[^\W\d])\.(?=[^\W\d]))\w+)*)
    | (?P<quotes>''|``|"|'|`)
    | (?P<other>\S)
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> str:
    """The caption's lower-cased tokens joined by single spaces, punctuation dropped.

    >>> tokenize("A man's dog doesn't like the U.S. flag.")
    "a man 's dog does n't like the u.s. flag"
    """
    return " ".join(t for t in (token.lower() for token in _tokens(_prepared(caption))) if t not in DROPPED)


def _prepared(caption: str) -> str:
    text = " ".join(caption.translate(_CHARACTERS).split())
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    return "".join(c for c in text if ord(c) <= 0xFFFF)  # the Java program knows nothing above the basic plane


def _tokens(text: str) -> Iterator[str]:
    position = 0
    while match := _SCAN.search(text, position):
        kind, found, position = match.lastgroup, match.group(), match.end()
        if kind == "word":
            word, position = _with_full_stop(found, text, position)
            yield from _word(word)
        elif kind == "smiley":
            yield "".join(_BRACKETS.get(c, c) for c in found)
        elif kind == "dots":
            yield "..."
        elif kind == "dash":
            yield "--"
        elif kind == "elision":
            yield from _SPLIT_WORDS.get(found.lower(), (found,))
        elif kind == "quotes" and found == '"':
            yield "''"
        else:
            yield _BRACKETS.get(found, found)


def _with_full_stop(word: str, text: str, end: int) -> tuple[str, int]:
    """The word with the full stop behind it where it is part of the word, and where scanning goes on."""
    if not text.startswith(".", end) or text.startswith("..", end):
        return word, end
    tail = re.split(r"[-/]", word)[-1]
    lower = tail.lower()
    keeps = (len(tail) == 1 and tail.isalpha() and tail == word) or lower in _ABBREVIATIONS
    keeps = keeps or (lower in _CAPITAL_ABBREVIATIONS and tail[0].isupper())
    keeps = keeps or (lower in ("no", "nos") and re.match(r"\.\s*\d", text[end:]) is not None)
    return (word + ".", end + 1) if keeps else (word, end)


def _word(word: str) -> Iterator[str]:
    if word.lower() in _SPLIT_WORDS:
        first, second = _SPLIT_WORDS[word.lower()]
        yield word[: len(first)]
        yield word[len(first) : len(first) + len(second)]
        return
    if match := _NOT.match(word):
        yield match[1]
        yield match[2]
        yield from _ONE_CLITIC.findall(match[3])
        return
    if match := _CLITICS.search(word):
        if match.start():
            yield from _word(word[: match.start()])
        yield from _ONE_CLITIC.findall(match[0])
        return
    if "'" in word and not _KEEPS_APOSTROPHE.match(word):
        head, _, tail = word.partition("'")
        if tail.lower().startswith("n'"):  # rock'n'roll
            yield from (head, "'n'", tail[2:])
            return
        yield from (head, "'")
        yield from _word(tail)
        return
    yield word
