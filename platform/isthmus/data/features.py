"""Frozen image features, computed once and read by memory map.

Layout below the cache's URL::

    plan.json            what is being encoded by what; a folder with another plan is refused
    parts/part-00007.arrow   Arrow IPC, uncompressed: id, key, captions, features (fixed-size list of N*D); where the
                         recipe hears, audio and audio_mask (fixed-size lists of Na*P and Na)
    parts/part-00007.json    commit record, written after the part: rows, bytes, sha256, failures
    cache.json           written last: the plan, the commit records' sum, the quarantined samples

Parts are fixed ranges of the manifest, so a rerun encodes exactly what has no commit record.
Shape letters: N image tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from isthmus import storage
from isthmus.config import VisionConfig
from isthmus.config.differences import vision_differences
from isthmus.contracts import Sample
from isthmus.data.clips import ClipTransform
from isthmus.data.manifest import Manifest
from isthmus.data.readers import Failure
from isthmus.errors import DataError

VERSION = 1
HEADER, PLAN, PARTS = "cache.json", "plan.json", "parts"


@dataclass(frozen=True)
class EncodedBy:
    """The image encoder that a model was trained on; a feature cache that it reads must be of the same.

    Attributes:
        digest: of the encoder's weights, "" where unknown.
        vision: its configuration, None where unknown. Only its ``weights`` may differ: the digest has them.
        clips: frames, seconds and patches of a model that hears.
    """

    digest: str = ""
    vision: VisionConfig | None = None
    clips: ClipTransform | None = None


@dataclass(frozen=True)
class CacheMeta:
    """What a cache holds.

    Attributes:
        data: URL of the data set when it was encoded.
        manifest_digest, encoder_digest, transform_digest: what the features are a function of.
        vision: the encoder's configuration.
        tokens, width, dtype: N, D and ``float16`` or ``float32``.
        chunk: manifest rows per part.
        rows: samples with features.
        parts: number of parts.
        failed: the samples that could not be decoded.
        sound: shape [Na, P] of the sounds' patches, or None where images alone were encoded. ``features`` of clips are
            of frames at their usual times; nothing of a cache is drawn anew in each epoch.
    """

    data: str
    manifest_digest: str
    encoder_digest: str
    transform_digest: str
    vision: Mapping[str, Any]
    tokens: int
    width: int
    dtype: str
    chunk: int
    rows: int = 0
    parts: int = 0
    failed: tuple[Failure, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION
    sound: Sequence[int] | None = None

    def plan(self) -> dict[str, Any]:
        """The part that decides the features' bytes; the place of the data is not among it."""
        skip = ("data", "rows", "parts", "failed", "files")
        return {name: value for name, value in asdict(self).items() if name not in skip}

    @classmethod
    def from_json(cls, text: bytes) -> CacheMeta:
        """Read back what ``json.dumps(asdict(meta))`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "failed": tuple(Failure(**item) for item in values["failed"])})


@dataclass(frozen=True)
class CacheReport:
    """What a build did.

    Attributes:
        url: the cache.
        samples, failed: images with features, and images that could not be decoded; together the whole data set.
        parts, reused: parts of the cache, and how many of them were there already.
        tokens, width: shape of one image's features.
        seconds, images_per_s: of this build alone.
    """

    url: str
    samples: int
    failed: int
    parts: int
    reused: int
    tokens: int
    width: int
    seconds: float
    images_per_s: float


def part_name(number: int) -> str:
    """Name of part ``number`` without its ending, relative to the cache."""
    return f"{PARTS}/part-{number:05d}"


def part_bytes(samples: Sequence[Sample], features_BND: np.ndarray) -> bytes:
    """One part file. ``features_BND`` is float16 or float32."""
    flat = np.ascontiguousarray(features_BND).reshape(-1)
    width = int(np.prod(features_BND.shape[1:]))
    columns = {
        "id": pa.array([s.id for s in samples], pa.int64()),
        "key": pa.array([s.key for s in samples], pa.string()),
        "captions": pa.array([list(s.captions) for s in samples], pa.list_(pa.string())),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(flat), width),
        **_sound_columns(samples, features_BND.dtype),
    }
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])
    return sink.getvalue().to_pybytes()


def _sound_columns(samples: Sequence[Sample], dtype: Any) -> dict[str, pa.Array]:
    if not samples or samples[0].audio_NF is None:
        return {}
    made = {"audio": [s.audio_NF for s in samples], "audio_mask": [s.audio_mask_N for s in samples]}
    out = {}
    for name, arrays in made.items():
        whole = np.stack([np.asarray(array) for array in arrays])
        flat = whole.reshape(-1).astype(dtype if name == "audio" else np.uint8)
        out[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), whole[0].size)
    return out


class _Part:
    """A memory-mapped part."""

    def __init__(self, path: Path, shape: tuple[int, int], sound: Sequence[int] | None = None) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.ids = self.table["id"].to_numpy()
        # written as one batch, so the one chunk is the file's own bytes and nothing is copied here
        self.features_BND = self._column("features", shape)
        self._audio_BNF = self._column("audio", sound) if sound else None
        self._mask_BN = self._column("audio_mask", sound[:1]) if sound else None

    def _column(self, name: str, shape: Sequence[int]) -> np.ndarray:
        flat: np.ndarray = self.table[name].chunk(0).flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(self.ids), *shape)

    def sample(self, row: int) -> Sample:
        captions = tuple(self.table["captions"][row].as_py())
        key = self.table["key"][row].as_py()
        sound: dict[str, Any] = {}
        if self._audio_BNF is not None and self._mask_BN is not None:
            sound = {"audio_NF": self._audio_BNF[row].astype(np.float32), "audio_mask_N": self._mask_BN[row] > 0}
        return Sample(int(self.ids[row]), key, captions, features_ND=self.features_BND[row], **sound)


class FeatureCache:
    """A finished cache, memory-mapped. Picklable: another process opens it by its URL.

    Attributes:
        meta: what it holds.
        ids: int64, in manifest order; quarantined samples are not among them.
    """

    def __init__(self, url: str, folder: Path, meta: CacheMeta) -> None:
        self.url, self.meta = url, meta
        shape = (meta.tokens, meta.width)
        paths = [folder / f"{part_name(number)}.arrow" for number in range(meta.parts)]
        self._parts = [_Part(path, shape, meta.sound) for path in paths if path.exists()]
        if sum(len(part.ids) for part in self._parts) != meta.rows:
            raise DataError(f"Parts of the feature cache {url} are missing.", "Run `isthmus data cache` again.")
        self.ids = np.concatenate([part.ids for part in self._parts]) if self._parts else np.zeros(0, np.int64)
        starts = np.cumsum([0, *(len(part.ids) for part in self._parts)])
        self._starts = starts
        self._sorted = np.argsort(self.ids, kind="stable")
        self._keys = self.ids[self._sorted]

    @classmethod
    def open(cls, url: str, *, expect: Mapping[str, str | tuple[str, ...]] | None = None) -> FeatureCache:
        """Open the cache at ``url``; one that is not on this machine is copied to a scratch folder first.

        Args:
            expect: values that the meta data must have, or several of which it must have one, among
                ``manifest_digest``, ``encoder_digest`` and ``transform_digest``.

        Raises:
            DataError: unfinished, damaged, or not of the data or encoder that ``expect`` names.
        """
        meta = read_meta(url)
        for name, wanted in (expect or {}).items():
            known = (wanted,) if isinstance(wanted, str) else wanted
            if (held := getattr(meta, name)) not in known:
                what = name.removesuffix("_digest")
                raise DataError(
                    f"The feature cache {url} was made with another {what} ({held[:12]}, expected {known[0][:12]}).",
                    "Build a cache for this one in another folder with `isthmus data cache`.",
                )
        folder = storage.local_path(url) if storage.is_local(url) else _copied(url, meta)
        return cls(url, folder, meta)

    @classmethod
    def of_model(cls, url: str, manifest: Manifest, encoder: EncodedBy) -> FeatureCache:
        """Open the cache of this data for a trained model.

        Raises:
            DataError: unfinished, damaged, of other data, or of another encoder, another size or layer of it, or other
                frames and sounds than the model was trained on.
        """
        expect: dict[str, str | tuple[str, ...]] = {"manifest_digest": manifest.digests}
        if encoder.digest:
            expect["encoder_digest"] = encoder.digest
        cache = cls.open(url, expect=expect)
        _check_vision(cache, encoder.vision)
        _check_sounds(cache, encoder.clips)
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureCache.open, (self.url,))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: int) -> bool:
        return self._find(id) is not None

    def get(self, id: int) -> Sample | None:
        """The sample with its ``features_ND`` (a view of the file), or None when it was quarantined or never there."""
        found = self._find(id)
        return None if found is None else self._parts[found[0]].sample(found[1])

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Features of ``ids`` in their order, [len(ids), N, D].

        Raises:
            KeyError: an id that the cache does not hold.
        """
        out = np.empty((len(ids), self.meta.tokens, self.meta.width), self.meta.dtype)
        for number, id in enumerate(ids):
            found = self._find(int(id))
            if found is None:
                raise KeyError(int(id))
            out[number] = self._parts[found[0]].features_BND[found[1]]
        return out

    def captions(self, id: int) -> tuple[str, ...]:
        """The captions of a sample; KeyError when the cache does not hold it."""
        found = self._find(id)
        if found is None:
            raise KeyError(id)
        return tuple(self._parts[found[0]].table["captions"][found[1]].as_py())

    def _find(self, id: int) -> tuple[int, int] | None:
        place = int(np.searchsorted(self._keys, id))
        if place >= len(self._keys) or self._keys[place] != id:
            return None
        row = int(self._sorted[place])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])


def read_meta(url: str) -> CacheMeta:
    """The header of a finished cache.

    Raises:
        DataError: there is none (unfinished or no cache at all), or it is of another version.
    """
    header = storage.join(url, HEADER)
    if not storage.exists(header):
        state = "is not finished" if storage.exists(storage.join(url, PLAN)) else "holds no feature cache"
        raise DataError(f"{url} {state} ({HEADER} is missing).", "Run `isthmus data cache` on it.")
    try:
        meta = CacheMeta.from_json(storage.read_bytes(header))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{header} is damaged: {error}.", "Delete the cache and build it again.") from error
    if meta.version != VERSION:
        raise DataError(f"The cache {url} has version {meta.version}, not {VERSION}.", "Build it again.")
    return meta


def _check_vision(cache: FeatureCache, vision: VisionConfig | None) -> None:
    made = VisionConfig(**cache.meta.vision)
    if vision and (shown := vision_differences(made, vision, ("cache", "model"), but=("weights",))):
        raise DataError(
            f"The feature cache {cache.url} is not of the encoder that the model was trained on ({shown}).",
            "Build one for this model in another folder with `isthmus data cache`.",
        )


def _check_sounds(cache: FeatureCache, clips: ClipTransform | None) -> None:
    if clips is None and cache.meta.sound is None:
        return
    if clips is None or cache.meta.transform_digest != clips.digest:
        raise DataError(
            f"The feature cache {cache.url} does not hold the frames and sounds that this recipe reads.",
            "Build one in another folder: `isthmus data cache DATA OUT --recipe RECIPE`.",
        )


def check_alike(caches: Mapping[str, CacheMeta]) -> None:
    """Whether features of these caches, by URL, may stand in one batch.

    Raises:
        DataError: two of them are of different encoders or transforms, or hold other shapes or types.
    """
    (first, known), *rest = caches.items()
    for url, meta in rest:
        for name in ("encoder_digest", "transform_digest", "tokens", "width", "dtype", "sound"):
            if getattr(meta, name) != getattr(known, name):
                raise DataError(
                    f"The feature caches {first} and {url} do not go together: their {name.replace('_', ' ')} is "
                    f"{getattr(known, name)} and {getattr(meta, name)}.",
                    "Build them with the same recipe and the same dtype.",
                )


def _copied(url: str, meta: CacheMeta) -> Path:
    """The cache's files on this machine: fetched once, verified, and shared by the processes of this machine."""
    name = hashlib.sha256(json.dumps([url, dict(meta.files)]).encode()).hexdigest()[:24]
    root = Path(os.environ.get("ISTHMUS_SCRATCH") or Path(tempfile.gettempdir()) / f"isthmus-scratch-{os.getuid()}")
    folder = root / name
    for relative, digest in meta.files.items():
        target = folder / relative
        if target.exists():
            continue
        data = storage.read_bytes(storage.join(url, relative))
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(
                f"{storage.join(url, relative)} is damaged.", "Delete it and run `isthmus data cache` again."
            )
        if shutil.disk_usage(root if root.exists() else root.parent).free < 2 * len(data):
            raise DataError(
                f"{root} has no room for the feature cache {url}.", "Point ISTHMUS_SCRATCH to a larger disk."
            )
        storage.write_bytes(str(target), data)  # whole or not at all: two processes may fetch the same file
    return folder


def build_cache(
    data_url: str,
    out: str,
    vision: VisionConfig,
    *,
    actors: int = 2,
    batch: int = 32,
    dtype: str = "float16",
    clips: ClipTransform | None = None,
    cpus: float = 1,
    gpus: float | None = None,
) -> CacheReport:
    """Encode every image of an indexed data set once, with Ray actors where Ray runs, else in this process.

    Resumable: parts with a commit record are kept. A finished cache of the same plan is left as it is.

    Args:
        data_url: the indexed folder.
        out: the cache's folder or URL.
        vision: the frozen encoder.
        actors: encoding processes, as far as the cluster has room for them; 0 encodes in this process, which for a
            few hundred images is done before an actor has started.
        cpus, gpus: of an actor, which has a torch thread for each CPU; gpus None: one where the cluster has any.
        batch: images per forward pass.
        dtype: ``float16`` or ``float32``.
        clips: encode frames of clips (or images), and keep their sounds' patches beside them.

    Raises:
        DataError: ``out`` holds another plan's cache, no image could be encoded, or features are not finite.
        ConfigError, WeightsError: the encoder cannot be built, or the cluster has no room for it.
    """
    from isthmus.data.encode import build

    return build(data_url, out, vision, actors=actors, batch=batch, dtype=dtype, clips=clips, cpus=cpus, gpus=gpus)
