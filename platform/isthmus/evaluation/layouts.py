"""Data sets as their authors publish them: COCO, Karpathy, VQAv2 and Flickr30k files, folders of classes.

Every reader gives a :class:`Layout`: the images in the order of the file, each with what is said of it. Ids that are
missing, doubled or do not fit together are refused by file and id; a file name that leaves its folder is refused too.
Whether an image file is there shows when it is read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus import storage
from isthmus.config import LayoutConfig
from isthmus.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_SUFFIXES = _SUFFIXES + tuple(suffix.upper() for suffix in _SUFFIXES)


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        id: unique within the data set; a text where the data names none.
        answers: of the annotators, ten in VQAv2; none where they are not published.
        kind, answer_kind: question type and answer type, "" where the file names none.
    """

    id: int | str
    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    answer_kind: str = ""


@dataclass(frozen=True)
class Extras:
    """What is said of an image beside its captions.

    Attributes:
        label: its class, "" where it has none.
        negatives: captions that are wrong for it.
    """

    questions: tuple[Question, ...] = ()
    label: str = ""
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """An image: id, file name below the images' folder, captions and the rest."""

    id: int
    file: str
    captions: tuple[str, ...] = ()
    extras: Extras = Extras()


@dataclass(frozen=True)
class Layout:
    """A data set that was read.

    Attributes:
        root: of the image files.
        split: as the recipe calls it, or as the file does.
        digest: sha256 over the annotation files and the images' names; the images' bytes are not in it.
        items: in the order of the file.
        classes: every class, sorted, for classification.
        training: (question kind, answers) of the training questions, for VQA's prior.
    """

    root: str
    split: str
    digest: str
    items: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    training: tuple[Question, ...] = field(default=(), repr=False)


def read_layout(config: LayoutConfig) -> Layout:
    """The data set that ``config`` names.

    Raises:
        DataError: a file that is not of its layout, ids missing or doubled, a file name that leaves the folder.
        StorageError: a file that cannot be read.
    """
    sources = _Sources()
    split, items, classes, training = _READERS[config.kind](config, sources)
    if not items:
        raise DataError(f"{config.annotations or config.images} names no image.", "Is it the right file and split?")
    for item in items:
        sources.add(item.file.encode())
    return Layout(config.images, split, sources.digest, tuple(items), tuple(classes), tuple(training))


class _Sources:
    """Reads files and keeps a digest of all that was read."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def add(self, data: bytes) -> None:
        self._sha.update(len(data).to_bytes(8, "little") + data)

    def text(self, url: str) -> str:
        data = storage.read_bytes(url)
        self.add(data)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{url} is not UTF-8 (byte {error.start}).", "Unpack it, or save it as UTF-8.") from None

    def table(self, url: str) -> dict[str, Any]:
        """The object of a JSON file."""
        try:
            value = json.loads(self.text(url))
        except json.JSONDecodeError as error:
            raise DataError(f"{url} is not valid JSON: {error}.", "Fetch it again.") from None
        if not isinstance(value, dict):
            raise DataError(f"{url} holds no JSON object.", "Is it a file of this layout?")
        return value


_Read = tuple[str, list[Item], Iterable[str], Iterable[Question]]


# ----------------------------------------------------------------------------------------------------- captions


def _coco(config: LayoutConfig, sources: _Sources) -> _Read:
    url = config.annotations or ""
    table = sources.table(url)
    images = _unique(url, "images", _list(table, "images", url), "id")
    captions: dict[int, list[str]] = {number: [] for number in images}
    for number, entry in _unique(url, "annotations", _list(table, "annotations", url), "id").items():
        image = _get(entry, "image_id", int, f"{url}: annotation {number}")
        if image not in captions:
            raise DataError(f"{url}: annotation {number} is of image {image}, which is not among the images.", _FETCH)
        captions[image].append(_get(entry, "caption", str, f"{url}: annotation {number}"))
    items = []
    for number, entry in images.items():
        file = _file(_get(entry, "file_name", str, f"{url}: image {number}"), url)
        items.append(Item(number, file, _captioned(url, number, captions[number]), _negatives(entry, url, number)))
    return config.split or _stem(url), items, (), ()


def _karpathy(config: LayoutConfig, sources: _Sources) -> _Read:
    url = config.annotations or ""
    wanted = set((config.split or "").split("+"))
    entries = _list(sources.table(url), "images", url)
    images = _unique(url, "images", entries, "imgid")
    there = {_get(entry, "split", str, f"{url}: image {number}") for number, entry in images.items()}
    if wanted - there:
        raise DataError(
            f"{url} has no split '{', '.join(sorted(wanted - there))}'.", f"It has: {', '.join(sorted(there))}."
        )
    items, sentences = [], set[int]()
    for number, entry in images.items():
        where = f"{url}: image {number}"
        texts = []
        for sentence in _list(entry, "sentences", where):
            known = _get(sentence, "sentid", int, where)
            if known in sentences:
                raise DataError(f"{url} holds the sentence {known} more than once.", _FETCH)
            sentences.add(known)
            if sentence.get("imgid", number) != number:
                raise DataError(f"{where} holds the sentence {known} of image {sentence['imgid']}.", _FETCH)
            texts.append(_get(sentence, "raw", str, where))
        if entry["split"] in wanted:
            folder = str(entry.get("filepath") or "")
            name = _get(entry, "filename", str, where)
            file = _file(f"{folder}/{name}" if folder else name, url)
            known = int(entry.get("cocoid", number))
            items.append(Item(known, file, _captioned(url, number, texts), _negatives(entry, url, number)))
    _no_doubles(url, "cocoid", [item.id for item in items])
    return config.split or "", items, (), ()


def _flickr30k(config: LayoutConfig, sources: _Sources) -> _Read:
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
        if number in captions.setdefault(_file(file, url), {}):
            raise DataError(f"{url} holds caption {number} of {file} more than once.", _FETCH)
        captions[file][number] = caption
    if config.members:
        captions = _chosen(config.members, sources.text(config.members), captions, url)
    items = [
        Item(row, file, _captioned(url, file, [texts[n] for n in sorted(texts)]))
        for row, (file, texts) in enumerate(captions.items())
    ]
    return config.split or _stem(config.members or url), items, (), ()


def _token_rows(url: str, text: str) -> Iterable[tuple[str, int, str]]:
    for line, content in enumerate(text.splitlines(), start=1):
        found = re.fullmatch(r"([^\t#]+)#(\d+)\t(.*)", content)
        if not found and content.strip():
            raise DataError(f"{url}, line {line}, is not of the form NAME#NUMBER<tab>CAPTION.", _FETCH)
        if found:
            yield found[1], int(found[2]), found[3]


def _piped_rows(url: str, text: str) -> Iterable[tuple[str, int, str]]:
    # The file that circulates lacks its second bar in one line; the number still ends the second column there.
    for line, content in enumerate(text.splitlines()[1:], start=2):
        found = re.fullmatch(r"([^|,]+?)\s*[|,]\s*(\d+)\s*[|,]?\s*(.*)", content)
        if not found and content.strip():
            raise DataError(f"{url}, line {line}, is not of the form NAME| NUMBER| CAPTION.", _FETCH)
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
    _no_doubles(url, "filename", [row["filename"] for row in rows])
    for row in rows:
        if row["split"] in wanted:
            try:
                captions = json.loads(row["raw"])
            except json.JSONDecodeError:
                raise DataError(f"{url}: the captions of {row['filename']} are no JSON list.", _FETCH) from None
            for number, caption in enumerate(captions):
                yield row["filename"], number, caption


def _chosen(members: str, text: str, captions: Mapping[str, dict[int, str]], url: str) -> dict[str, dict[int, str]]:
    by_stem = {_stem(file): file for file in captions}
    names = [line.strip() for line in text.splitlines() if line.strip()]
    _no_doubles(members, "image", names)
    out = {}
    for name in names:
        file = name if name in captions else by_stem.get(_stem(name))
        if file is None:
            raise DataError(f"{members} names the image {name}, and {url} has no caption of it.", "Use matching files.")
        out[file] = captions[file]
    return out


# ---------------------------------------------------------------------------------------- questions and classes


def _vqav2(config: LayoutConfig, sources: _Sources) -> _Read:
    url = config.questions or ""
    table = sources.table(url)
    asked = _unique(url, "questions", _list(table, "questions", url), "question_id")
    known = _answers(config.annotations, sources) if config.annotations else {}
    if config.annotations:
        for what, lost, where in (
            ("question", set(asked) - set(known), config.annotations),
            ("annotation", set(known) - set(asked), url),
        ):
            if lost:
                raise DataError(
                    f"{len(lost)} {what}s have no partner in {where} (first question_id {min(lost)}).",
                    "Give the questions and the annotations of one split.",
                )
    name = config.image_name or f"COCO_{table.get('data_subtype') or 'val2014'}_{{:012d}}.jpg"
    images: dict[int, list[Question]] = {}
    for number, entry in asked.items():
        where = f"{url}: question {number}"
        image, text = _get(entry, "image_id", int, where), _get(entry, "question", str, where)
        of, answered = known.get(number, (image, Question(number, text)))
        if of != image:
            raise DataError(f"{where} is about image {image}, and its annotation about image {of}.", _FETCH)
        question = Question(number, text, answered.answers, answered.kind, answered.answer_kind)
        images.setdefault(image, []).append(question)
    items = [Item(i, _file(_named(name, i), url), (), Extras(tuple(questions))) for i, questions in images.items()]
    training = _answers(config.training, sources) if config.training else {}
    split = config.split or str(table.get("data_subtype") or _stem(url))
    return split, items, (), [question for _, question in training.values()]


def _named(template: str, number: int) -> str:
    """``COCO_val2014_{:012d}.jpg`` with the number in it; nothing else in braces means anything."""
    return re.sub(r"\{(?::(0?\d*)d)?\}", lambda found: format(number, f"{found[1] or ''}d"), template)


def _answers(url: str, sources: _Sources) -> dict[int, tuple[int, Question]]:
    """question id -> (image id, a question without text)."""
    out = {}
    entries = _list(sources.table(url), "annotations", url)
    for number, entry in _unique(url, "annotations", entries, "question_id").items():
        where = f"{url}: question {number}"
        records = _list(entry, "answers", where)
        _no_doubles(where, "answer_id", [_get(record, "answer_id", int, where) for record in records])
        question = Question(
            number,
            "",
            tuple(_get(record, "answer", str, where) for record in records),
            str(entry.get("question_type") or ""),
            str(entry.get("answer_type") or ""),
        )
        out[number] = (_get(entry, "image_id", int, where), question)
    return out


def _classes(config: LayoutConfig, sources: _Sources) -> _Read:
    root = config.images.rstrip("/")
    files = sorted(url[len(root) + 1 :] for url, _ in storage.list_files(root, IMAGE_SUFFIXES))
    outside = [file for file in files if "/" not in file]
    if outside:
        raise DataError(
            f"{len(outside)} images of {root} lie in no class folder (first {outside[0]}).",
            "Put every image into the folder of its class.",
        )
    given = sources.table(config.class_names) if config.class_names else {}
    folders = sorted({file.partition("/")[0] for file in files})
    if given and (unnamed := sorted(set(folders) - set(given))):
        raise DataError(f"{config.class_names} has no name for the folder '{unnamed[0]}'.", "Name every class.")
    names = {folder: str(given.get(folder, folder.replace("_", " "))).strip() for folder in folders}
    _no_doubles(config.class_names or root, "class name", list(names.values()))
    items = [
        Item(row, _file(file, root), (), Extras(label=names[file.partition("/")[0]])) for row, file in enumerate(files)
    ]
    return config.split or _stem(root), items, sorted(names.values()), ()


_READERS: dict[str, Callable[[LayoutConfig, _Sources], _Read]] = {
    "coco": _coco,
    "karpathy": _karpathy,
    "vqav2": _vqav2,
    "flickr30k": _flickr30k,
    "classes": _classes,
}


# --------------------------------------------------------------------------------------------------------- checks

_FETCH = "Fetch the file again, or mend it."


def _list(table: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    value = table.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{where} holds no list '{name}'.", "Is it a file of this layout?")
    return value


def _get(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} has no {'number' if kind is int else 'text'} '{name}'.", _FETCH)
    return value


def _unique(url: str, what: str, entries: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """Entries by id, in their order."""
    out = {}
    for row, entry in enumerate(entries):
        number = _get(entry, name, int, f"{url}: entry {row} of '{what}'")
        if number in out:
            raise DataError(f"{url} holds the {name} {number} more than once in '{what}'.", _FETCH)
        out[number] = entry
    return out


def _no_doubles(where: str, name: str, values: list[Any]) -> None:
    if len(set(values)) < len(values):
        double = next(value for value, count in Counter(values).items() if count > 1)
        raise DataError(f"{where} holds the {name} {double} more than once.", _FETCH)


def _captioned(url: str, number: int | str, captions: list[str]) -> tuple[str, ...]:
    texts = tuple(text.strip() for text in captions if text.strip())
    if not texts:
        raise DataError(f"{url}: the image {number} has no caption.", _FETCH)
    return texts


def _negatives(entry: Mapping[str, Any], url: str, number: int) -> Extras:
    return Extras(negatives=as_negatives(entry.get("negatives"), f"{url}: image {number}"))


def as_negatives(value: Any, where: str) -> tuple[str, ...]:
    """Wrong captions: a list of texts, or None.

    Raises:
        DataError: anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(f"{where}: 'negatives' is no list of captions.", _FETCH)
    return tuple(value)


def _file(name: str, where: str) -> str:
    """A file name that stays below the images' folder."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ":" in parts[0] or ".." in parts or "\\" in name or "\0" in name or not name.strip():
        raise DataError(
            f"{where} names the image file '{name}', which is no path below the images' folder.",
            "File names must be relative, with '/' between folders and without '..'.",
        )
    return name


def _stem(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1].rpartition(".")[0] or url.rstrip("/").rsplit("/", 1)[-1]
