"""One pass over one shard: where its samples are, and everything that is wrong with it.

A tar is parsed header by header here instead of by an iterator that stops at the first oddity: an archive that was cut
at a member boundary looks complete to such an iterator. Every fault is a :class:`Problem`; none is passed over.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa

from isthmus.data.captions import TEXT_KINDS, parse_captions
from isthmus.data.ranges import RangeReader, Sequential
from isthmus.data.records import IMAGE_KINDS, SCHEMA, SOUND_KINDS, VIDEO_KINDS, Problem, Scan, image_id, sample_id
from isthmus.data.tables import scan_parquet
from isthmus.errors import DataError, IsthmusError

__all__ = ["SCHEMA", "Problem", "Scan", "image_id", "sample_id", "scan_shard"]

CLASS_KIND = "cls"
PICTURES = (*IMAGE_KINDS, *VIDEO_KINDS)
UNREAD_IMAGES = ("heic", "heif", "jxl", "jp2", "jfif", "svg", "psd", "dng")
"""Images that are not read; passing over them without a word would lose samples."""


def scan_shard(url: str, name: str, need_captions: bool, places: Sequence[str] = (), beside_tar: bool = False) -> Scan:
    """Index one ``.tar`` or ``.parquet`` shard. Unreadable shards give a scan without samples and one problem.

    Args:
        url, name: where it is, and its name in the manifest.
        need_captions: a sample without a caption is a fault.
        places: URLs below which images may lie that a Parquet file names instead of holding them.
        beside_tar: a tar of the same name is there, so that a Parquet file without images is its table of meta data.

    Raises:
        DataError: a Parquet file without a column of images.
    """
    scan = Scan(name)
    try:
        if url.endswith(".parquet"):
            scan_parquet(url, scan, need_captions, places, beside_tar)
        else:
            _scan_tar(url, scan, need_captions)
    except DataError:
        raise
    except (IsthmusError, OSError, pa.ArrowException) as error:
        scan.report(0, "", str(error))
        scan.final = False
    return scan


# ---------------------------------------------------------------------------------------------------- tar


class _State(tarfile.TarFile):
    """The state that ``TarInfo.fromtarfile`` wants; walking is done by :func:`_members`."""

    def next(self) -> tarfile.TarInfo | None:
        return None


def _members(handle: Sequential, scan: Scan) -> Iterator[tarfile.TarInfo]:
    """Regular members whose data is wholly there; how the archive ends is checked."""
    state = _State(fileobj=handle, mode="r")  # type: ignore[arg-type]
    while True:
        handle.seek(state.offset)
        at = handle.tell()
        try:
            info = tarfile.TarInfo.fromtarfile(state)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                scan.report(at, "", "only one of the two end-of-archive blocks is there")
            end = handle.tell()
            if handle.drain():
                scan.report(end, "", "there is data behind the end of the archive; it is not indexed")
            return
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if not at:
                scan.report(0, "", "the archive is empty (0 bytes)")
            elif at < state.offset:
                scan.report(at, "", f"the archive is cut short: the padding behind byte {at} is missing")
            else:
                scan.report(at, "", "the end-of-archive blocks are missing: the archive may have been cut short here")
            return
        except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
            scan.report(at, "", f"damaged or cut tar header ({error}); what follows it is not indexed")
            return
        if info.islnk() or info.issym():
            if _kind(_split(info.name)[1]) in (*PICTURES, *SOUND_KINDS, *TEXT_KINDS):
                reason = f"{info.name} is a link to {info.linkname}; links are not followed"
                scan.report(info.offset, _split(info.name)[0], reason)
            continue
        if not info.isreg():
            continue
        if info.issparse():
            scan.report(info.offset, _split(info.name)[0], f"{info.name} is stored as a sparse file, which is not read")
            continue
        if info.offset_data + info.size > scan.size:
            there = max(0, scan.size - info.offset_data)
            scan.report(info.offset, _split(info.name)[0], f"{info.name} is cut short: {there} of {info.size} bytes")
            return
        yield info


def _scan_tar(url: str, scan: Scan, need_captions: bool) -> None:
    source = RangeReader(url)
    scan.size = source.size
    handle = Sequential(source)
    group = _Group("", -1)
    seen: set[str] = set()
    for info in _members(handle, scan):
        key, extension = _split(info.name)
        if not extension or PurePosixPath(info.name).name.startswith("."):
            continue
        if key != group.key:
            group.finish(scan, need_captions)
            group = _Group(key, info.offset)
            if key in seen:
                group.repeated = True
                scan.report(info.offset, key, "the key occurs a second time in this shard; only the first one is kept")
            seen.add(key)
        group.add(scan, info, extension, handle)
    group.finish(scan, need_captions)
    handle.drain()  # to the end, for the digest of the whole file
    scan.digest = handle.digest
    source.close()


@dataclass
class _Group:
    """Members of one key on their way to a sample."""

    key: str
    offset: int
    repeated: bool = False
    image: tuple[int, int, str] | None = None
    sound: tuple[int, int, str] | None = None
    texts: dict[str, tuple[int, int, tuple[str, ...]]] = field(default_factory=dict)
    label: tuple[int, int] = (-1, -1)
    image_id: int | None = None
    asked: bool = False

    def add(self, scan: Scan, info: tarfile.TarInfo, extension: str, handle: Sequential) -> None:
        kind = _kind(extension)
        if self.repeated:
            return
        if kind in UNREAD_IMAGES:
            scan.report(info.offset, self.key, f"images of the kind .{extension} are not read")
        if kind not in (*PICTURES, *SOUND_KINDS, *TEXT_KINDS, CLASS_KIND):
            return
        if not info.size:
            scan.report(info.offset, self.key, f"the member .{extension} is empty")
        elif kind in PICTURES:
            if self.image is None:
                self.image = (info.offset_data, info.size, kind)
            else:
                what = "image" if kind in IMAGE_KINDS else "picture"
                scan.report(info.offset, self.key, f"a second {what} (.{extension}) of one key; the first one is kept")
        elif kind in SOUND_KINDS:
            if self.sound is None:
                self.sound = (info.offset_data, info.size, kind)
            else:
                scan.report(info.offset, self.key, f"a second sound (.{extension}) of one key; the first one is kept")
        elif kind == CLASS_KIND:
            self.label = (info.offset_data, info.size)
        elif kind not in self.texts:
            try:
                found, meta = parse_captions(handle.read(info.size), kind)
                self.texts[kind] = (info.offset_data, info.size, found)
                self.image_id = image_id(meta.get("image_id")) if kind == "json" else self.image_id
                self.asked = self.asked or bool(meta.get("questions"))
            except ValueError as error:
                scan.report(info.offset, self.key, str(error))

    def finish(self, scan: Scan, need_captions: bool) -> None:
        if self.repeated or not (self.image or self.sound or self.texts):
            return
        if self.image is None:
            scan.report(self.offset, self.key, "the sample has no image")
            return
        kind = next((k for k in TEXT_KINDS if k in self.texts and self.texts[k][2]), "")
        # What is heard is matched with what is seen, and questions bring their own words.
        wordless = self.sound is not None or self.image[2] in VIDEO_KINDS or self.asked
        if need_captions and not kind and not wordless:
            scan.report(self.offset, self.key, "the sample has no caption (.txt, .caption, or .json with 'caption')")
            return
        text = self.texts.get(kind, (-1, -1, ()))
        sound = self.sound or (None, None, None)
        meta = self.texts["json"][:2] if "json" in self.texts else self.label
        scan.samples.append(
            {
                "id": sample_id(scan.name, self.key),
                "key": self.key,
                "image_offset": self.image[0],
                "image_length": self.image[1],
                "image_ext": self.image[2],
                "text_offset": text[0],
                "text_length": text[1],
                "text_ext": kind,
                "meta_offset": meta[0],
                "meta_length": meta[1],
                "row": -1,
                "image_id": self.image_id,
                **dict(zip(("audio_offset", "audio_length", "audio_ext"), sound, strict=True)),
            }
        )


def _kind(extension: str) -> str:
    """``jpg`` of ``jpg`` and of ``large.JPG``."""
    return extension.rsplit(".", 1)[-1].lower()


def _split(name: str) -> tuple[str, str]:
    """(key, extension) by webdataset's rule: the base name is cut at its first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension
