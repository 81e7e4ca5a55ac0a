"""Flickr30k's captions, in each of the three files that circulate."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping

from isthmus.config import LayoutConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts.checks import FETCH_AGAIN, Sources, below_folder, captioned, no_doubles, stem
from isthmus.evaluation.layouts.types import Item, Read


def flickr30k(config: LayoutConfig, sources: Sources) -> Read:
    """The .token file, the table with bars, or the table with a split column; told by the first line."""
    url = config.annotations or ""
    text = sources.text(url)
    first = text.lstrip().partition("\n")[0]
    if "#" in first and "\t" in first:
        rows = list(_token_rows(url, text))
    elif first.startswith("image_name"):
        rows = list(_piped_rows(url, text))
    else:
        rows = list(_split_rows(url, text, config.split))
    captions: dict[str, dict[int, str]] = {}
    for file, number, caption in rows:
        if number in captions.setdefault(below_folder(file, url), {}):
            raise DataError(f"{url} holds caption {number} of {file} more than once.", FETCH_AGAIN)
        captions[file][number] = caption
    if config.members:
        captions = _chosen(config.members, sources.text(config.members), captions, url)
    items = [
        Item(row, file, captioned(url, file, [texts[n] for n in sorted(texts)]))
        for row, (file, texts) in enumerate(captions.items())
    ]
    return config.split or stem(config.members or url), items, (), ()


def _token_rows(url: str, text: str) -> Iterable[tuple[str, int, str]]:
    for line, content in enumerate(text.splitlines(), start=1):
        found = re.fullmatch(r"([^\t#]+)#(\d+)\t(.*)", content)
        if not found and content.strip():
            raise DataError(f"{url}, line {line}, is not of the form NAME#NUMBER<tab>CAPTION.", FETCH_AGAIN)
        if found:
            yield found[1], int(found[2]), found[3]


def _piped_rows(url: str, text: str) -> Iterable[tuple[str, int, str]]:
    # The file that circulates lacks its second bar in one line; the number still ends the second column there.
    for line, content in enumerate(text.splitlines()[1:], start=2):
        found = re.fullmatch(r"([^|,]+?)\s*[|,]\s*(\d+)\s*[|,]?\s*(.*)", content)
        if not found and content.strip():
            raise DataError(f"{url}, line {line}, is not of the form NAME| NUMBER| CAPTION.", FETCH_AGAIN)
        if found:
            yield found[1], int(found[2]), found[3].strip('"')


def _split_rows(url: str, text: str, split: str | None) -> Iterable[tuple[str, int, str]]:
    """The table with columns filename, split and raw (a JSON list of captions)."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"filename", "split", "raw"} <= set(rows[0]):
        raise DataError(f"{url} is no Flickr30k file that is known.", "Give the .token file or a table with captions.")
    there = {row["split"] for row in rows}
    wanted = set(split.split("+")) if split else there
    if wanted - there:
        raise DataError(
            f"{url} has no split '{', '.join(sorted(wanted - there))}'.", f"It has: {', '.join(sorted(there))}."
        )
    no_doubles(url, "filename", [row["filename"] for row in rows])
    for row in rows:
        if row["split"] in wanted:
            try:
                captions = json.loads(row["raw"])
            except json.JSONDecodeError:
                raise DataError(f"{url}: the captions of {row['filename']} are no JSON list.", FETCH_AGAIN) from None
            for number, caption in enumerate(captions):
                yield row["filename"], number, caption


def _chosen(members: str, text: str, captions: Mapping[str, dict[int, str]], url: str) -> dict[str, dict[int, str]]:
    by_stem = {stem(file): file for file in captions}
    names = [line.strip() for line in text.splitlines() if line.strip()]
    no_doubles(members, "image", names)
    out = {}
    for name in names:
        file = name if name in captions else by_stem.get(stem(name))
        if file is None:
            raise DataError(f"{members} names the image {name}, and {url} has no caption of it.", "Use matching files.")
        out[file] = captions[file]
    return out
