"""The model side of the service: decodes images, batches requests, runs one forward pass at a time.

B images, Q query tokens, E shared embedding, C channels, H height, W width.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from ray import serve
from torch import Tensor

from isthmus.config import ServeConfig, TrackingConfig
from isthmus.contracts import Answers, Captions, Embeds, Hears, Sees, contrasts, takes_prompt
from isthmus.data.clips import ClipTransform, clip_transform, image_transform
from isthmus.data.media import Limits
from isthmus.errors import ConfigError
from isthmus.serving.answers import Caption, Card, Refusal, Vector
from isthmus.serving.media import Medium
from isthmus.serving.metrics import BatchRecorder

log = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """What a replica runs.

    Attributes:
        module: implements some of contracts' Sees, Captions, Embeds; in eval mode on ``device``.
        transform: PIL image -> float32 [3, H, W].
        version: registered version or folder, for the model list.
    """

    module: Any
    transform: Callable[[Any], np.ndarray]
    version: str
    device: str = "cpu"


LoadModel = Callable[[str, TrackingConfig, str], LoadedModel]
"""(model as the configuration names it, tracking, device) -> loaded model; runs in the replica's process."""


def load_registered(model: str, tracking: TrackingConfig, device: str) -> LoadedModel:
    """A registered model, or a model folder, with its image encoder.

    Raises:
        RegistryError: no such name, version, alias or folder.
        WeightsError: a base's digest is not the one the model was trained on.
    """
    from isthmus.methods.artefact import load_artefact
    from isthmus.registry import store

    version = store.resolve(model, tracking)
    artefact = load_artefact(version.path, with_vision=True, device=device)
    module = artefact.stage.module.to(device).eval()
    return LoadedModel(module, artefact.stage.transform, version.uri or model, device)


def capabilities(module: Any, transform: Any = None) -> tuple[str, ...]:
    """What a loaded module can answer over HTTP."""
    sees, hears = isinstance(module, Sees), isinstance(module, Hears)
    places = contrasts(module)  # a model of pairs alone has no vectors
    clips = clip_transform(transform)
    moving = hears and clips is not None and clips.modality == "video-audio"
    able = {
        "caption-images": sees and isinstance(module, Captions),
        "take-prompts": sees and takes_prompt(module),
        "answer-questions": sees and isinstance(module, Answers),
        "embed-images": places and sees and not moving and (hears or isinstance(module, Embeds)),
        "embed-clips": places and sees and moving,
        "embed-texts": places and isinstance(module, Embeds),
        "embed-sounds": places and hears and clips is not None,
    }
    return tuple(name for name, yes in able.items() if yes)


class ModelReplica:
    """One process with one model; Ray Serve turns the class into a deployment.

    Requests wait in :func:`serve.batch` queues, so that requests which arrive together share a forward pass. Decoding
    happens before that, in threads: an image that cannot be decoded never joins a batch.
    """

    def __init__(self, name: str, model: str, config: ServeConfig, load: LoadModel) -> None:
        self._name = name
        self._config = config
        self._loaded = load(model, config.tracking, _device(config))
        self._able = capabilities(self._loaded.module, self._loaded.transform)
        self._limits = Limits(
            bytes=int(config.max_body_mb * 2**20), seconds=config.max_seconds, pixels=config.max_pixels
        )
        self._created = int(time.time())
        self._recorder = BatchRecorder(name)
        self._forward = ThreadPoolExecutor(1, "forward")  # one pass at a time; the event loop stays free to collect
        self._decode = ThreadPoolExecutor(max(1, int(config.cpus_per_replica)), "decode")
        batched: tuple[Any, ...] = (self._captions, self._images, self._texts, self._sounds)
        for method in batched:
            method.set_max_batch_size(config.max_batch)
            method.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    async def card(self) -> Card:
        """What this model can do. Answers only once it is loaded."""
        return Card(self._able, self._loaded.version, self._created)

    async def caption(self, image: bytes, prompt: str, max_new_tokens: int) -> Caption | Refusal:
        """The caption of one encoded image, or the answer to a question about it, or why there is none."""
        if "answer-questions" in self._able and not prompt:
            return Refusal(
                f"The model '{self._name}' answers questions, and the request holds none: add a text part.",
                "unsupported_capability",
            )
        if not {"caption-images", "answer-questions"} & set(self._able):
            return self._cannot("caption images")
        if prompt and "take-prompts" not in self._able:
            return Refusal(
                f"The model '{self._name}' captions an image as it is and takes no text: leave the text part out.",
                "unsupported_capability",
            )
        pixels_CHW = await self._pixels(image)
        if isinstance(pixels_CHW, Refusal):
            return pixels_CHW
        return await self._captions((pixels_CHW, prompt, max_new_tokens))

    async def embed(self, items: list[str | bytes | Medium]) -> list[Vector | Refusal]:
        """A vector, or why there is none, of each text (str), encoded image (bytes), sound and clip."""
        return list(await asyncio.gather(*(self._embed(item) for item in items)))

    async def _embed(self, item: str | bytes | Medium) -> Vector | Refusal:
        if isinstance(item, Medium):
            return await self._embed_medium(item)
        if isinstance(item, str):
            return await self._texts(item) if "embed-texts" in self._able else self._cannot("embed texts")
        if "embed-images" not in self._able:
            return self._cannot("embed images")
        pixels_CHW = await self._pixels(item)
        return pixels_CHW if isinstance(pixels_CHW, Refusal) else await self._images(pixels_CHW)

    async def _embed_medium(self, item: Medium) -> Vector | Refusal:
        what = "sounds" if item.kind == "audio" else "clips"
        if f"embed-{what}" not in self._able:
            return self._cannot(f"embed {what}")
        clips = clip_transform(self._loaded.transform)
        assert clips is not None  # or it would not be able to
        made = await asyncio.get_running_loop().run_in_executor(self._decode, _decode_medium, item, clips, self._limits)
        if isinstance(made, Refusal):
            return made
        return await (self._sounds(made) if item.kind == "audio" else self._images(made["pixels"]))

    def _cannot(self, wanted: str) -> Refusal:
        can = ", ".join(self._able) or "none"
        return Refusal(f"The model '{self._name}' cannot {wanted}. Its capabilities: {can}.", "unsupported_capability")

    async def _pixels(self, image: bytes) -> np.ndarray | Refusal:
        return await asyncio.get_running_loop().run_in_executor(
            self._decode, _decode, image, self._config.max_pixels, self._loaded.transform
        )

    @serve.batch
    async def _captions(self, asked: list[tuple[np.ndarray, str, int]]) -> list[Caption]:
        return await self._run("caption", len(asked), self._generate, asked)

    @serve.batch
    async def _images(self, pixels: list[np.ndarray]) -> list[Vector]:
        return await self._run("image", len(pixels), self._embed_images, pixels)

    @serve.batch
    async def _sounds(self, sounds: list[dict[str, np.ndarray]]) -> list[Vector]:
        return await self._run("sound", len(sounds), self._embed_sounds, sounds)

    @serve.batch
    async def _texts(self, texts: list[str]) -> list[Vector]:
        return await self._run("text", len(texts), self._embed_texts, texts)

    async def _run(self, kind: str, size: int, work: Callable[[Any], list[T]], items: Sequence[Any]) -> list[T]:
        started = time.monotonic()
        out = await asyncio.get_running_loop().run_in_executor(self._forward, functools.partial(work, items))
        self._recorder.batch(kind, size, time.monotonic() - started)
        return out

    @torch.inference_mode()
    def _generate(self, asked: Sequence[tuple[np.ndarray, str, int]]) -> list[Caption]:
        """The encoder runs over the whole batch, the language model over each group of equal prompt and budget."""
        module = self._loaded.module
        features_BND = module.encode_images(self._stack([pixels for pixels, _, _ in asked]))
        if isinstance(module, Answers):
            answers = module.answer(features_BND, [prompt for _, prompt, _ in asked])
            return [
                Caption(text, count_tokens(module, prompt), max(1, count_tokens(module, text)), False, len(asked))
                for text, (_, prompt, _) in zip(answers, asked, strict=True)
            ]
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (_, prompt, budget) in enumerate(asked):
            groups.setdefault((prompt, budget), []).append(i)
        out: dict[int, Caption] = {}
        for (prompt, budget), rows in groups.items():
            # A request without text asks for a caption as the model was trained to give it.
            texts = module.generate(features_BND[rows], prompt=prompt or None, max_new_tokens=budget, min_new_tokens=1)
            read = count_tokens(module, prompt)
            for i, text in zip(rows, texts, strict=True):
                written = count_tokens(module, text)
                out[i] = Caption(text, read, min(written, budget), written >= budget, len(asked))
        return [out[i] for i in range(len(asked))]

    @torch.inference_mode()
    def _embed_images(self, pixels: Sequence[np.ndarray]) -> list[Vector]:
        module = self._loaded.module
        vectors_BQE = module.embed_images(module.encode_images(self._stack(pixels))).float()
        # One vector is asked for: the queries' mean direction. all_vectors lets a client take the best query itself.
        mean_BE = torch.nn.functional.normalize(vectors_BQE.mean(1), dim=-1).cpu().numpy()
        every_BQE, queries = vectors_BQE.cpu().numpy(), vectors_BQE.shape[1]
        return [Vector(v, queries, every if queries > 1 else None) for v, every in zip(mean_BE, every_BQE, strict=True)]

    @torch.inference_mode()
    def _embed_texts(self, texts: Sequence[str]) -> list[Vector]:
        vectors_BE = self._loaded.module.embed_texts(list(texts)).float().cpu().numpy()
        counts = [count_tokens(self._loaded.module, text) for text in texts]
        return [Vector(v, n) for v, n in zip(vectors_BE, counts, strict=True)]

    @torch.inference_mode()
    def _embed_sounds(self, sounds: Sequence[dict[str, np.ndarray]]) -> list[Vector]:
        values, mask = (self._stack([sound[name] for sound in sounds]) for name in ("audio_NF", "audio_mask_N"))
        vectors_BE = self._loaded.module.embed_sounds(values, mask.long()).float().cpu().numpy()
        return [Vector(v, 1) for v in vectors_BE]

    def _stack(self, pixels: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(pixels)).to(self._loaded.device)


def count_tokens(module: Any, text: str) -> int:
    """Tokens of a text in the module's own vocabulary, without special ones; words where it holds no tokenizer."""
    holder = getattr(module, "language", None)
    tokenizer = getattr(holder, "tokenizer", None) or getattr(module, "tokenizer", None)
    if tokenizer is None:
        return len(text.split())
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0


def _decode(image: bytes, max_pixels: int, transform: Callable[[Any], np.ndarray]) -> np.ndarray | Refusal:
    from isthmus.data.transforms import DecodeError, decode_image

    make: Callable[[Any], np.ndarray] = image_transform(transform)
    try:
        return make(decode_image(image, max_pixels=max_pixels))
    except DecodeError as error:
        return Refusal(f"The image cannot be used: {str(error).strip().rstrip('.')}.", "invalid_image")


def _decode_medium(item: Medium, transform: ClipTransform, limits: Limits) -> dict[str, np.ndarray] | Refusal:
    from isthmus.data.transforms import DecodeError

    what = "sound" if item.kind == "audio" else "clip"
    try:
        if item.kind == "audio":
            return transform.listen(item.data, what, limits)
        return {"pixels": transform.seen(item.data, "mp4", limits=limits)}
    except DecodeError as error:
        return Refusal(f"The {what} cannot be used: {str(error).strip().rstrip('.')}.", f"invalid_{item.kind}")


def _device(config: ServeConfig) -> str:
    if config.gpus_per_replica:
        if not torch.cuda.is_available():
            raise ConfigError("gpus_per_replica is set, but torch sees no CUDA device.", "Set gpus_per_replica to 0.")
        return "cuda"
    torch.set_num_threads(max(1, int(config.cpus_per_replica)))
    return "cpu"
