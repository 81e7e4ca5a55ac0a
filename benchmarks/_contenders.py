"""Who takes part in `ingest.py`: each reads one set of tars once and gives batches of normalised pixels.

All crop 0.5 to 1 of the area at random, resize that to a square with antialiased bicubic, mirror half of the images and
normalise: float32 [B, 3, S, S]. Functions stand at the top level because worker processes unpickle them.
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isthmus import storage
from isthmus.compat import ensure_torchvision
from isthmus.config import DataConfig
from isthmus.contracts import Batch, Sample, Stage, StageModule
from isthmus.data.manifest import Manifest
from isthmus.data.order import Order, mix
from isthmus.data.pixels import TrainingPixels
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.data.stream import train_batches
from isthmus.data.transforms import ImageTransform, decode_image

IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Setting:
    """What every contender is given.

    Attributes:
        url: the indexed set.
        shards: its tars as webdataset can open them: paths, or addresses that curl can fetch.
        images: to take, a multiple of ``batch``.
        batch, size: rows of a batch, pixels of a side.
        workers: processes, threads or tasks that decode at once.
    """

    url: str
    shards: tuple[str, ...]
    images: int
    batch: int
    size: int
    workers: int

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform(self.size)


Contender = Callable[[], Iterator[Tensor]]
"""One pass over the images, batch by batch."""


# --------------------------------------------------------------------------------------------------------- ours


def ours(setting: Setting) -> Contender:
    """The training path, augmented: on Ray Data where this process has a Ray cluster, else on threads. Every pass is
    an epoch of its own, in its own order."""
    data = DataConfig(train=setting.url, decode_workers=setting.workers)
    order = Order(len(Manifest.load(setting.url)), setting.batch)
    transform = setting.transform
    spec = {"tokens": 1, "width": 1, "image_size": setting.size}
    stage = Stage(StageModule(), _stacked, transform, transform.augment, lambda _: {}, (), spec)
    epochs = itertools.count()

    def batches() -> Iterator[Tensor]:
        first = next(epochs) * order.steps_per_epoch
        steps = range(first, first + setting.images // setting.batch)
        for batch in train_batches(data, stage, order, 0, 1, steps.start, steps.stop, 0, _refuse):
            assert batch.pixels_BCHW is not None
            yield batch.pixels_BCHW

    return batches


def _stacked(samples: Sequence[Sample], epoch: int, step: int) -> Batch:
    from isthmus.methods.batching import stack  # here, for it brings in every method, and most contenders need none

    return Batch(**stack(samples, step, epoch))


def _refuse(failure: Failure) -> None:
    raise RuntimeError(f"{failure.key} could not be read: {failure.reason}")


def bare_alone(setting: Setting) -> Contender:
    """Our decoder and transform alone: image after image, on one thread, of bytes that are in memory."""
    raw, transform = _in_memory(setting), setting.transform

    def batches() -> Iterator[Tensor]:
        for row in raw:
            yield torch.from_numpy(our_pixels(row.image, transform, mix(0, row.id)))[None]

    return batches


def bare(setting: Setting) -> Contender:
    """The floor: the same loop on as many processes as the others have workers, each over its share.

    Cores that are busy together are slower than one that is busy alone (shared caches, memory, clock), so a loop on
    one core is no floor for contenders that keep all of them busy. Nothing travels between the processes: of its
    pixels each gives a mean for every image, [n, 3, 1, 1].
    """
    if setting.workers == 1:
        return bare_alone(setting)
    raw, transform = _in_memory(setting), setting.transform
    pool = multiprocessing.get_context("fork").Pool(setting.workers, _keep, (raw, transform))
    shares = [range(first, len(raw), setting.workers) for first in range(setting.workers)]
    return lambda: pool.imap_unordered(_means, shares)


def _in_memory(setting: Setting) -> list[RawSample]:
    rows = read_rows(Manifest.load(setting.url), range(setting.images))
    return [row for row in rows if isinstance(row, RawSample)]


_kept: list[Any] = []
"""In a process of :func:`bare`: the stored images and the transform."""


def _keep(raw: list[RawSample], transform: ImageTransform) -> None:
    _kept[:] = [raw, transform]


def _means(share: range) -> Tensor:
    raw, transform = _kept
    pixels = (our_pixels(raw[number].image, transform, mix(0, raw[number].id)) for number in share)
    return torch.tensor([[float(one[:, ::16, ::16].mean())] * 3 for one in pixels])[:, :, None, None]


def our_pixels(data: bytes, transform: ImageTransform, seed: int) -> np.ndarray:
    pixels = TrainingPixels(transform)
    return transform.normalised(pixels(decode_image(data, at_least=transform.size), seed))


# --------------------------------------------------------------------------------------------------- webdataset


def webdataset(setting: Setting, decoder: str) -> Contender:
    """webdataset and torch's DataLoader: worker processes that stay (none with one worker), which make the batches; no
    shuffling.

    ``decoder`` is ``pil`` (its PIL images and torchvision's transforms of those), ``tensor`` (its uint8 arrays and
    torchvision's transforms of uint8 tensors, the way that torchvision recommends for speed), or ``ours`` (this
    package's decoder and transform).
    """
    import webdataset as wds
    from torch.utils.data import DataLoader

    stream = wds.WebDataset(list(setting.shards), shardshuffle=False, empty_check=False)
    if decoder == "ours":
        stream = stream.map(functools.partial(_ours_of, transform=setting.transform))
    else:
        transform = torchvision_transform(setting.transform, decoder)
        stream = stream.decode({"pil": "pilrgb", "tensor": "rgb8"}[decoder])
        stream = stream.map(functools.partial(_theirs_of, transform=transform))
    stream = stream.batched(setting.batch, collation_fn=torch.stack, partial=False)
    workers = min(setting.workers, len(setting.shards))
    processes: dict[str, Any] = {}
    if workers > 1:
        processes = {"num_workers": workers, "persistent_workers": True, "prefetch_factor": 4}
        # What its users have on Linux. This process was spawned, and its children would be as well.
        processes["multiprocessing_context"] = "fork"
    loader = DataLoader(stream, batch_size=None, **processes)
    return lambda: itertools.islice(iter(loader), setting.images // setting.batch)


def _image(sample: dict[str, Any]) -> Any:
    return next(sample[kind] for kind in IMAGES if kind in sample)


def _ours_of(sample: dict[str, Any], transform: ImageTransform) -> Tensor:
    return torch.from_numpy(our_pixels(_image(sample), transform, hash(sample["__key__"])))


def _theirs_of(sample: dict[str, Any], transform: Callable[[Any], Tensor]) -> Tensor:
    return transform(_image(sample))


@functools.cache
def torchvision_transform(ours: ImageTransform, decoder: str) -> Callable[[Any], Tensor]:
    """The same transform from torchvision's parts, of PIL images or of uint8 arrays [H, W, 3]."""
    ensure_torchvision()
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(
        ours.size, scale=ours.crop_scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    pixels = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(ours.mean, ours.std, inplace=True)]
    if decoder == "pil":
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor(), *pixels])
    return v2.Compose([_channels_last, crop, v2.RandomHorizontalFlip(), *pixels])


def _channels_last(pixels_HWC: np.ndarray) -> Tensor:
    """[3, H, W], a view in the layout that torchvision resizes fastest."""
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------- Ray's own reader


def ray_webdataset(setting: Setting) -> Contender:
    """``ray.data.read_webdataset`` of the bytes, decoder and transform in ``map_batches``, ``iter_torch_batches``."""
    import ray.data

    manifest = Manifest.load(setting.url)
    filesystem, _ = storage.resolve(setting.url)
    paths = [storage.resolve(manifest.url(number))[1] for number in range(len(manifest.shards))]
    pixels = functools.partial(_theirs_of_batch, ours=setting.transform)

    def batches() -> Iterator[Tensor]:
        read = ray.data.read_webdataset(
            paths, filesystem=filesystem, decoder=None, suffixes=list(IMAGES), concurrency=setting.workers
        )
        made = read.map_batches(pixels, batch_size=setting.batch, concurrency=setting.workers)
        of_torch = made.iter_torch_batches(batch_size=setting.batch, drop_last=True, prefetch_batches=4)
        return (batch["pixels"] for batch in itertools.islice(of_torch, setting.images // setting.batch))

    return batches


def _theirs_of_batch(batch: dict[str, np.ndarray], ours: ImageTransform) -> dict[str, np.ndarray]:
    transform = torchvision_transform(ours, "tensor")
    files = next(batch[kind] for kind in IMAGES if kind in batch)
    return {"pixels": np.stack([transform(_rgb8(data)).numpy() for data in files])}


def _rgb8(data: bytes) -> np.ndarray:
    """What webdataset's decoder of that name does."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


# ------------------------------------------------------------------------------------------------------- who is who

PLAIN: dict[str, Callable[[Setting], Contender]] = {"bare_loop": bare, "bare_loop_alone": bare_alone, "ours": ours}
WEBDATASET: dict[str, Callable[[Setting], Contender]] = {
    "webdataset_pil": functools.partial(webdataset, decoder="pil"),
    "webdataset_tensor": functools.partial(webdataset, decoder="tensor"),
    "webdataset_our_decoder": functools.partial(webdataset, decoder="ours"),
}
ON_RAY: dict[str, Callable[[Setting], Contender]] = {"ours_on_ray": ours, "ray_read_webdataset": ray_webdataset}
GROUPS = {"plain": PLAIN, "webdataset": WEBDATASET, "ray": ON_RAY}
"""Contenders by the process that they share."""
