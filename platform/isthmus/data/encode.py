"""Filling a feature cache: parts of the manifest handed to encoding actors, each committed when it is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from isthmus import storage
from isthmus.config import VisionConfig
from isthmus.contracts import Sample
from isthmus.data.clips import ClipTransform
from isthmus.data.features import HEADER, PLAN, CacheMeta, CacheReport, part_bytes, part_name, read_meta
from isthmus.data.local import cached_manifest
from isthmus.data.manifest import Manifest
from isthmus.data.parallel import ray_is_up, store_environment
from isthmus.data.readers import Failure
from isthmus.errors import ConfigError, DataError
from isthmus.progress import progress
from isthmus.ray_session import joins_cluster

log = logging.getLogger(__name__)

_PART_BYTES = 64 << 20
_PART_ROWS = 512


@dataclass(frozen=True)
class Commit:
    """The record of one finished part: its samples, bytes, sha256 ("" where all failed) and failures."""

    rows: int
    size: int
    sha256: str
    failed: tuple[Failure, ...]

    @classmethod
    def from_json(cls, text: bytes) -> Commit:
        """Read back what was written."""
        values = json.loads(text)
        return cls(**{**values, "failed": tuple(Failure(**item) for item in values["failed"])})


@dataclass(frozen=True)
class Task:
    """What every encoder is told: picklable."""

    data: str
    manifest_digest: str
    out: str
    vision: VisionConfig
    batch: int
    dtype: str
    clips: ClipTransform | None = None
    threads: int | None = None
    gpu: bool = True


class Encoder:
    """Holds the frozen encoder; makes parts. Runs as a Ray actor or in this process."""

    def __init__(self, task: Task, environment: dict[str, str], actor: bool) -> None:
        os.environ.update(environment)
        import torch

        from isthmus.models.vision import build_vision

        if actor:  # as many actors as cores: more threads would only wait for one another
            torch.set_num_threads(task.threads or 1)
        self._task = task
        self._device = "cuda" if task.gpu and torch.cuda.is_available() else "cpu"
        self._encoder = build_vision(task.vision).to(self._device).eval()
        clips = task.clips
        self._transform: Any = replace(clips, image=self._encoder.transform) if clips else self._encoder.transform

    def facts(self) -> dict[str, Any]:
        """The encoder's digests and shape."""
        encoder, clips = self._encoder, self._task.clips
        return {
            "encoder_digest": encoder.base.digest,
            "transform_digest": self._transform.digest,
            "tokens": clips.frames if clips and clips.modality == "video-audio" else int(encoder.tokens),
            "sound": list(clips.sound_shape) if clips else None,
            "width": int(encoder.width),
        }

    def encode(self, number: int, first: int, last: int) -> Commit:
        """Encode manifest rows ``first`` to ``last`` - 1 into part ``number`` and commit it."""
        from isthmus.data.stream import iter_samples

        manifest = cached_manifest(self._task.data, self._task.manifest_digest)
        samples: list[Sample] = []
        failed: list[Failure] = []
        features: list[np.ndarray] = []
        groups = iter_samples(manifest, transform=self._transform, rows=range(first, last), batch=self._task.batch)
        for group in groups:
            good = [item for item in group if isinstance(item, Sample)]
            failed += [item for item in group if isinstance(item, Failure)]
            if good:
                features.append(self._forward(good))
                samples += [replace(item, pixels_CHW=None) for item in good]
        data = part_bytes(samples, np.concatenate(features)) if samples else b""
        return write_part(self._task.out, number, data, len(samples), failed)

    def _forward(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch

        from isthmus.models.vision import encode_pixels

        pixels_BCHW = torch.from_numpy(np.stack([np.asarray(sample.pixels_CHW) for sample in samples]))
        with torch.inference_mode():
            features_BND = encode_pixels(self._encoder, pixels_BCHW.to(self._device)).float().cpu().numpy()
        with np.errstate(over="ignore"):  # reported below, with the images' name
            out = features_BND.astype(self._task.dtype)
        if not np.isfinite(out).all():
            peak = float(np.abs(features_BND).max())
            raise DataError(
                f"Features of the images from {samples[0].key} on do not fit {self._task.dtype} (up to {peak:.3g}).",
                "Build the cache with dtype float32.",
            )
        return out


def write_part(out: str, number: int, data: bytes, rows: int, failed: Sequence[Failure]) -> Commit:
    """Write a part, then the record that vouches for it."""
    target = storage.join(out, part_name(number))
    digest = hashlib.sha256(data).hexdigest() if data else ""
    if data:
        storage.write_bytes(f"{target}.arrow", data)
    commit = Commit(rows, len(data), digest, tuple(failed))
    storage.write_bytes(f"{target}.json", json.dumps(asdict(commit)).encode())
    return commit


def build(
    data_url: str,
    out: str,
    vision: VisionConfig,
    *,
    actors: int,
    batch: int,
    dtype: str,
    clips: ClipTransform | None = None,
    cpus: float = 1,
    gpus: float | None = None,
) -> CacheReport:
    """See :func:`isthmus.data.features.build_cache`."""
    if dtype not in ("float16", "float32"):
        raise DataError(f"A feature cache of dtype '{dtype}' cannot be written.", "Choose float16 or float32.")
    started = time.perf_counter()
    manifest = Manifest.load(data_url)
    if (done := _finished(out, manifest, vision, dtype, clips)) is not None:
        return _report(out, done, reused=done.parts, seconds=0.0, encoded=0)
    storage.ensure_writable(out)
    task = Task(data_url, manifest.digest, out, vision, batch, dtype, clips, max(1, int(cpus)), gpus != 0)
    with _pool(task, min(actors, -(-len(manifest) // 32)), cpus, gpus) as pool:
        facts = pool.facts()
        values = facts["tokens"] * facts["width"] + int(np.prod(facts["sound"] or 0))
        chunk = _chunk_rows(values * np.dtype(dtype).itemsize)
        meta = CacheMeta(
            data=data_url,
            manifest_digest=manifest.digest,
            vision=vision.model_dump(mode="json"),
            dtype=dtype,
            chunk=chunk,
            parts=-(-len(manifest) // chunk),
            **facts,
        )
        _settle_plan(out, meta)
        commits = _commits(out, meta)
        reused, encoded = len(commits), 0
        with progress("Encoding images", total=len(manifest), unit="images") as tracker:
            tracker.advance(sum(commit.rows + len(commit.failed) for commit in commits.values()))
            missing = [n for n in range(meta.parts) if n not in commits]
            for number, commit in pool.run([(n, n * chunk, min((n + 1) * chunk, len(manifest))) for n in missing]):
                commits[number] = commit
                encoded += commit.rows
                tracker.advance(commit.rows + len(commit.failed))
    meta = _close(out, meta, [commits[number] for number in range(meta.parts)], len(manifest))
    return _report(out, meta, reused=reused, seconds=time.perf_counter() - started, encoded=encoded)


def _chunk_rows(sample_bytes: int) -> int:
    """Manifest rows per part: about 64 MiB, so that a part fits into memory and an interruption loses little."""
    return max(32, min(_PART_ROWS, _PART_BYTES // sample_bytes))


def _report(out: str, meta: CacheMeta, *, reused: int, seconds: float, encoded: int) -> CacheReport:
    rate = encoded / seconds if seconds else 0.0
    return CacheReport(
        out, meta.rows, len(meta.failed), meta.parts, reused, meta.tokens, meta.width, round(seconds, 3), round(rate, 2)
    )


def _finished(
    out: str, manifest: Manifest, vision: VisionConfig, dtype: str, clips: ClipTransform | None
) -> CacheMeta | None:
    """The cache that is asked for, if it is finished. Weights that are a local file may have changed: those are
    loaded and their digest compared instead."""
    if not storage.exists(storage.join(out, HEADER)):
        return None
    meta = read_meta(out)
    if meta.manifest_digest != manifest.digest:
        raise DataError(
            f"{out} holds features of another data set than {manifest.root} is now.",
            "Give another folder, or delete this one.",
        )
    if clips is not None or meta.sound is not None:  # how a sample is cut up is known once the encoder is
        return None
    pinned = vision.weights in ("random", "timm") or vision.weights.startswith("pkg:")
    same = _completed(meta.vision) == vision.model_dump(mode="json") and meta.dtype == dtype
    return meta if same and pinned else None


def _settle_plan(out: str, meta: CacheMeta) -> None:
    """Write the plan, or refuse a folder that holds parts of another one."""
    url = storage.join(out, PLAN)
    plan = json.loads(json.dumps(meta.plan()))
    if not storage.exists(url):
        storage.write_bytes(url, json.dumps(plan, indent=1).encode())
        return
    held = json.loads(storage.read_bytes(url))
    held["vision"] = _completed(held.get("vision"))
    differing = sorted(name for name in plan if plan[name] != held.get(name))
    if differing:
        raise DataError(
            f"{out} holds features of another plan: {', '.join(differing)} differ.",
            "Give another folder, or delete this one.",
        )


def _completed(vision: Any) -> Any:
    """A recorded encoder with the defaults of fields that it was recorded without, being older than they are."""
    try:
        return VisionConfig(**vision).model_dump(mode="json")
    except (TypeError, ValueError):
        return vision


def _commits(out: str, meta: CacheMeta) -> dict[int, Commit]:
    """Commit records whose part is there with the size they name."""
    folder = storage.join(out, "parts")
    if not storage.exists(folder):
        return {}
    there = dict(storage.list_files(folder))
    found = {}
    for number in range(meta.parts):
        target = storage.join(out, part_name(number))
        if f"{target}.json" not in there:
            continue
        commit = Commit.from_json(storage.read_bytes(f"{target}.json"))
        if there.get(f"{target}.arrow", 0) == commit.size:
            found[number] = commit
    return found


def _close(out: str, meta: CacheMeta, commits: Sequence[Commit], samples: int) -> CacheMeta:
    rows = sum(commit.rows for commit in commits)
    failed = tuple(failure for commit in commits for failure in commit.failed)
    if rows + len(failed) != samples:
        raise DataError(f"{out} holds {rows} images and {len(failed)} failures of {samples} samples.", "Delete it.")
    if not rows:
        first = failed[0]
        raise DataError(
            f"None of the {samples} images of {meta.data} can be decoded; "
            f"{first.shard} at {first.offset}: {first.reason}.",
            "`isthmus data check` lists every fault.",
        )
    files = {f"{part_name(n)}.arrow": commit.sha256 for n, commit in enumerate(commits) if commit.sha256}
    meta = replace(meta, rows=rows, failed=failed, files=files)
    storage.write_bytes(storage.join(out, HEADER), json.dumps(asdict(meta)).encode())
    return meta


# -------------------------------------------------------------------------------------------------------- pools


class _Here:
    """One encoder in this process."""

    def __init__(self, task: Task) -> None:
        self._encoder = Encoder(task, {}, actor=False)

    def facts(self) -> dict[str, Any]:
        return self._encoder.facts()

    def run(self, parts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Commit]]:
        for number, first, last in parts:
            yield number, self._encoder.encode(number, first, last)


class _Actors:
    """Encoders on the cluster; a part whose actor died is encoded again by its successor."""

    def __init__(self, task: Task, count: int, cpus: float, gpus: float | None) -> None:
        import ray

        count, gpus = fitting(ray.cluster_resources(), count, cpus, gpus, grows=joins_cluster())
        remote: Any = ray.remote(Encoder).options(num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3)
        self._ray: Any = ray
        self._actors: list[Any] = [remote.remote(task, store_environment(), True) for _ in range(count)]

    def facts(self) -> dict[str, Any]:
        return self._get(self._actors[0].facts.remote())

    def run(self, parts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Commit]]:
        waiting = list(reversed(parts))
        idle = list(self._actors)
        busy: dict[Any, tuple[int, Any]] = {}
        while waiting or busy:
            while waiting and idle:
                part, actor = waiting.pop(), idle.pop()
                busy[actor.encode.remote(*part)] = (part[0], actor)
            done, _ = self._ray.wait(list(busy), num_returns=1)
            number, actor = busy.pop(done[0])
            idle.append(actor)
            yield number, self._get(done[0])

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None


def fitting(
    there: Mapping[str, float], count: int, cpus: float, gpus: float | None, *, grows: bool
) -> tuple[int, float]:
    """Actors that the cluster has room for, at most ``count``, and the GPUs of each: where ``gpus`` is None, one if the
    cluster has any. An actor beyond would wait for a place for ever, and with it the part that it was handed.

    Args:
        there: the cluster's resources.
        grows: nodes may join later; then one actor is asked for where there is no room yet.

    Raises:
        ConfigError: there is no room for one, and none to come.
    """
    if gpus is None:
        gpus = 1.0 if there.get("GPU") else 0.0
    asked = {"CPU": cpus, "GPU": gpus}
    room = min(int(there.get(kind, 0) / share + 1e-9) for kind, share in asked.items() if share)
    if room < 1 and grows:
        log.warning("No node has %g CPUs and %g GPUs for an encoding actor yet; waiting for one to join.", cpus, gpus)
    elif room < 1:
        raise ConfigError(
            f"An encoding actor asks for {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has "
            f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}.",
            "Ask for less (cpus_per_actor, gpus_per_actor), or start a node that has them.",
        )
    return max(1, min(count, room)), gpus


@contextmanager
def _pool(task: Task, actors: int, cpus: float, gpus: float | None) -> Iterator[_Here | _Actors]:
    if actors == 0 or not ray_is_up():
        yield _Here(task)
        return
    pool = _Actors(task, actors, cpus, gpus)
    try:
        yield pool
    finally:
        pool.close()
