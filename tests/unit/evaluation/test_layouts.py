"""Published layouts: what is read of each, and what is refused by file and id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.config import EvaluateConfig, LayoutConfig
from isthmus.contracts import Sample
from isthmus.data.readers import Failure
from isthmus.data.transforms import ImageTransform
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.layouts import Layout, read_layout
from isthmus.evaluation.sources import LayoutSource
from isthmus.testing.shards import image_bytes

Table = dict[str, Any]


def coco() -> Table:
    return {
        "images": [{"id": 9, "file_name": "nine.jpg"}, {"id": 4, "file_name": "sub/four.jpg", "negatives": ["no"]}],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "four "},
            {"id": 2, "image_id": 9, "caption": "nine"},
            {"id": 3, "image_id": 4, "caption": "vier"},
        ],
    }


def karpathy() -> Table:
    def image(number: int, split: str) -> Table:
        sentences = [{"sentid": 10 * number + n, "imgid": number, "raw": f"{number}.{n}"} for n in range(2)]
        return {
            "imgid": number,
            "cocoid": 100 + number,
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "split": split,
            "sentences": sentences,
        }

    return {"dataset": "coco", "images": [image(n, s) for n, s in enumerate(["test", "train", "restval", "test"])]}


def questions() -> Table:
    return {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 420, "image_id": 42, "question": "What?"},
            {"question_id": 421, "image_id": 42, "question": "How many?"},
            {"question_id": 70, "image_id": 7, "question": "Is it?"},
        ],
    }


def annotations() -> Table:
    def one(number: int, image: int, answer: str) -> Table:
        records = [{"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]
        kinds = {"question_type": "what", "answer_type": "other"}
        return {"question_id": number, "image_id": image, "answers": records, **kinds}

    return {"annotations": [one(70, 7, "yes"), one(420, 42, "cat"), one(421, 42, "2")]}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Layout]:
    """Reads a layout of the given files' contents (JSON or text)."""

    def call(kind: str, *, images: str = "images", **given: Any) -> Layout:
        options: dict[str, Any] = {}
        for name, value in given.items():
            if name in ("annotations", "questions", "training", "members", "class_names"):
                file = tmp_path / f"{name}.txt"
                file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
                value = str(file)
            options[name] = value
        return read_layout(LayoutConfig(kind=kind, images=str(tmp_path / images), **options))

    return call


def captions(layout: Layout) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(item.id, item.file, item.captions) for item in layout.items]


def test_coco(read: Callable[..., Layout]) -> None:
    layout = read("coco", annotations=coco(), split="val")
    assert captions(layout) == [(9, "nine.jpg", ("nine",)), (4, "sub/four.jpg", ("four", "vier"))]
    assert layout.split == "val" and layout.items[1].extras.negatives == ("no",)
    assert read("coco", annotations=coco()).split == "annotations"
    changed = coco()
    changed["annotations"][0]["caption"] = "five"
    assert read("coco", annotations=changed).digest != layout.digest == read("coco", annotations=coco()).digest


def test_karpathy(read: Callable[..., Layout]) -> None:
    layout = read("karpathy", annotations=karpathy(), split="test")
    assert captions(layout) == [
        (100, "val2014/0.jpg", ("0.0", "0.1")),
        (103, "val2014/3.jpg", ("3.0", "3.1")),
    ]
    assert [item.id for item in read("karpathy", annotations=karpathy(), split="train+restval").items] == [101, 102]
    flickr = karpathy()
    for entry in flickr["images"]:
        del entry["cocoid"], entry["filepath"]
    assert captions(read("karpathy", annotations=flickr, split="train"))[0] == (1, "1.jpg", ("1.0", "1.1"))
    with pytest.raises(DataError, match=r"has no split 'dev'.*restval, test, train"):
        read("karpathy", annotations=karpathy(), split="dev")


TOKEN = "a.jpg#0\tone a\na.jpg#1\ttwo a\nb.jpg#0\tone b\n"
PIPED = "image_name| comment_number| comment\na.jpg| 0| one a .\na.jpg| 1   two | a\nb.jpg| 0| one b\n"
SPLIT = 'raw,split,filename\n"[""one a"", ""two, a""]",test,a.jpg\n"[""one b""]",train,b.jpg\n'


@pytest.mark.parametrize(
    ("text", "first"),
    [(TOKEN, ("one a", "two a")), (PIPED, ("one a .", "two | a")), (SPLIT, ("one a", "two, a"))],
)
def test_flickr30k(read: Callable[..., Layout], text: str, first: tuple[str, ...]) -> None:
    assert captions(read("flickr30k", annotations=text)) == [(0, "a.jpg", first), (1, "b.jpg", ("one b",))]


def test_flickr30k_splits(read: Callable[..., Layout]) -> None:
    assert captions(read("flickr30k", annotations=TOKEN, members="b\n")) == [(0, "b.jpg", ("one b",))]
    assert captions(read("flickr30k", annotations=SPLIT, split="train")) == [(0, "b.jpg", ("one b",))]
    with pytest.raises(DataError, match="names the image c, and"):
        read("flickr30k", annotations=TOKEN, members="c\n")
    with pytest.raises(DataError, match="has no split 'val'"):
        read("flickr30k", annotations=SPLIT, split="val")


def test_vqav2(read: Callable[..., Layout]) -> None:
    layout = read("vqav2", questions=questions(), annotations=annotations(), training=annotations())
    assert [item.file for item in layout.items] == ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000007.jpg"]
    first = layout.items[0].extras.questions
    assert [(q.id, q.text, q.answers[0], q.kind, q.answer_kind) for q in first] == [
        (420, "What?", "cat", "what", "other"),
        (421, "How many?", "2", "what", "other"),
    ]
    assert layout.split == "val2014" and len(layout.training) == 3
    test = read("vqav2", questions=questions(), image_name="{}.png")
    assert [item.file for item in test.items] == ["42.png", "7.png"]
    assert all(not q.answers for item in test.items for q in item.extras.questions)


def test_class_folders(read: Callable[..., Layout], tmp_path: Path) -> None:
    for name in ("n02_b/deep/2.JPG", "n01/1.png", "n02_b/1.jpg", "n01/note.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    layout = read("classes")
    assert [(item.file, item.extras.label) for item in layout.items] == [
        ("n01/1.png", "n01"),
        ("n02_b/1.jpg", "n02 b"),
        ("n02_b/deep/2.JPG", "n02 b"),
    ]
    named = read("classes", class_names={"n01": "tench", "n02_b": "shark"})
    assert named.classes == ("shark", "tench") and named.items[0].extras.label == "tench"
    with pytest.raises(DataError, match="has no name for the folder 'n02_b'"):
        read("classes", class_names={"n01": "tench"})
    with pytest.raises(DataError, match="class name same more than once"):
        read("classes", class_names={"n01": "same", "n02_b": "same"})
    with pytest.raises(DataError, match=r"name of class 'n01' is \[\"tench\", \"Tinca\"\], which is no text"):
        read("classes", class_names={"n01": ["tench", "Tinca"], "n02_b": "shark"})
    (tmp_path / "images" / "loose.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"lie in no class folder \(first loose.png\)"):
        read("classes")


def broken(make: Callable[[], Table], change: Callable[[Table], Any]) -> Table:
    table = make()
    change(table)
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["images"].append(t["images"][0]), "holds the id 9 more than once in 'images'"),
        (lambda t: t["annotations"].append(t["annotations"][0]), "holds the id 1 more than once in 'annotations'"),
        (lambda t: t["annotations"][0].update(image_id=5), "annotation 1 is of image 5, which is not among"),
        (lambda t: t["annotations"].pop(1), "the image 9 has no caption"),
        (lambda t: t["annotations"][1].pop("image_id"), "annotation 2 has no number 'image_id'"),
        (lambda t: t["annotations"][1].update(caption=3), "annotation 2 has no text 'caption'"),
        (lambda t: t["images"][0].update(id="9"), "entry 0 of 'images' has no number 'id'"),
        (lambda t: t["images"][0].update(file_name="../../etc/passwd"), "no path below the images' folder"),
        (lambda t: t["images"][0].update(file_name="/etc/passwd"), "no path below the images' folder"),
        (lambda t: t["images"][0].update(file_name="s3://other/a.jpg"), "no path below the images' folder"),
        (lambda t: t["images"][0].update(file_name="a\\..\\b.jpg"), "no path below the images' folder"),
        (lambda t: t["images"][1].update(negatives="no"), "image 4: 'negatives' is no list"),
        (lambda t: t.pop("images"), "holds no list 'images'"),
    ],
)
def test_coco_files_that_are_refused(read: Callable[..., Layout], change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read("coco", annotations=broken(coco, change))
    assert "annotations.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["images"][1].update(imgid=0), "holds the imgid 0 more than once"),
        (lambda t: t["images"][3].update(cocoid=100), "holds the cocoid 100 more than once"),
        (lambda t: t["images"][1]["sentences"][0].update(sentid=0), "holds the sentence 0 more than once"),
        (lambda t: t["images"][1]["sentences"][0].update(imgid=0), "image 1 holds the sentence 10 of image 0"),
        (lambda t: t["images"][0].update(sentences=[]), "the image 0 has no caption"),
        (lambda t: t["images"][0].update(filepath=".."), "no path below"),
    ],
)
def test_karpathy_files_that_are_refused(read: Callable[..., Layout], change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("karpathy", annotations=broken(karpathy, change), split="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOKEN + "a.jpg#1\tagain\n", "holds caption 1 of a.jpg more than once"),
        (TOKEN + "no number\n", "line 4, is not of the form"),
        (PIPED + "no bar\n", "line 5, is not of the form"),
        ("what,is,this\n1,2,3\n", "no Flickr30k file that is known"),
        (SPLIT + "[],test,a.jpg\n", "holds the filename a.jpg more than once"),
        ("../a.jpg#0\tout\n", "no path below"),
    ],
)
def test_flickr30k_files_that_are_refused(read: Callable[..., Layout], text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("flickr30k", annotations=text)


@pytest.mark.parametrize(
    ("asked", "answered", "message"),
    [
        (lambda t: t["questions"].append(t["questions"][0]), None, "holds the question_id 420 more than once"),
        (lambda t: t["questions"].pop(0), None, r"1 annotations have no partner.*\(first question_id 420\)"),
        (None, lambda t: t["annotations"].pop(0), r"1 questions have no partner.*\(first question_id 70\)"),
        (None, lambda t: t["annotations"].append(t["annotations"][0]), "holds the question_id 70 more than once"),
        (None, lambda t: t["annotations"][0].update(image_id=8), "about image 7, and its annotation about image 8"),
        (
            None,
            lambda t: t["annotations"][1]["answers"][3].update(answer_id=1),
            "question 420 holds the answer_id 1 more than once",
        ),
        (None, lambda t: t["annotations"][1]["answers"][3].pop("answer"), "question 420 has no text 'answer'"),
    ],
)
def test_vqa_files_that_are_refused(read: Callable[..., Layout], asked: Any, answered: Any, message: str) -> None:
    nothing = lambda table: None  # noqa: E731
    with pytest.raises(DataError, match=message):
        read(
            "vqav2",
            questions=broken(questions, asked or nothing),
            annotations=broken(annotations, answered or nothing),
        )


def test_files_that_are_no_json_are_named(read: Callable[..., Layout]) -> None:
    with pytest.raises(DataError, match=r"annotations\.txt is not valid JSON"):
        read("coco", annotations="{")
    with pytest.raises(DataError, match=r"annotations\.txt holds no JSON object"):
        read("coco", annotations="[]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vqav2"}, "needs 'questions'"),
        ({"kind": "coco"}, "needs 'annotations'"),
        ({"kind": "karpathy", "annotations": "a"}, "needs 'split'"),
        ({"kind": "vqav2", "questions": "q", "image_name": "{}{}"}, "one place for the id"),
        ({"kind": "vqav2", "questions": "q", "image_name": "{0.__class__}.jpg"}, "one place for the id"),
    ],
)
def test_layouts_that_lack_something(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(images="i", **options)  # type: ignore[arg-type]


def test_data_or_a_layout_but_not_both() -> None:
    layout = LayoutConfig(kind="classes", images="i")
    for options in ({}, {"data": "d", "layout": layout}):
        with pytest.raises(ValueError, match="either 'data'"):
            EvaluateConfig(model="m", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belong to an indexed data set"):
        EvaluateConfig(model="m", layout=layout, cache="c")


def test_overrides_and_paths(tmp_path: Path) -> None:
    from isthmus.config import anchored, load_config

    words = ["model=m", "layout.kind=coco", "layout.images=i", "layout.annotations=s3://b/a.json", "vqa.num_beams=3"]
    config = load_config(EvaluateConfig, None, words, values={})
    there = anchored(config, tmp_path)
    assert there.layout is not None and there.layout.images == str(tmp_path / "i")
    assert there.layout.annotations == "s3://b/a.json" and there.vqa.num_beams == 3
    with pytest.raises(ConfigError, match=r"unknown key 'layout\.image'.*Did you mean 'images'"):
        load_config(EvaluateConfig, None, [*words, "layout.image=j"], values={})


def test_a_missing_or_broken_image_is_a_failure_with_its_name(read: Callable[..., Layout], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "nine.jpg").write_bytes(image_bytes(1, kind="JPEG")[:90])
    source = LayoutSource(read("coco", annotations=coco()))
    transform = ImageTransform(size=8)
    (first, _), (second, more) = source.read([0, 1], transform, images=True, extras=False)
    assert isinstance(first, Failure) and (first.id, first.key, len(first.digest)) == (9, "nine.jpg", 64)
    assert isinstance(second, Failure) and "four.jpg" in second.reason and second.id == 4
    assert more.negatives == ("no",)
    (texts, _), _ = source.read([1, 0], transform, images=False, extras=False)
    assert isinstance(texts, Sample) and texts.captions == ("four", "vier") and texts.pixels_CHW is None
