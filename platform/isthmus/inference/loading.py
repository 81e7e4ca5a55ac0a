"""From a model's name to an :class:`Engine`, the same on the driver and inside every actor."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.config import TrackingConfig
from isthmus.errors import ConfigError, RegistryError
from isthmus.inference.engine import Engine

IDENTITY = ("model.safetensors", "recipe.yaml", "bases.json")


@dataclass(frozen=True)
class ModelHandle:
    """A model as a job names it: enough to load it anywhere and to know it again.

    Attributes:
        uri: fixed to a version where the registry knows one, so that a moved alias changes nothing in mid-job.
        path: the unpacked artefact on the machine that resolved it.
        digest: sha256 over weights, recipe and bases.
        own_prompt: the text that its recipe puts between the soft prompt and a caption.
    """

    uri: str
    path: str
    digest: str
    own_prompt: str = ""


def resolve_model(model: str, tracking: TrackingConfig) -> ModelHandle:
    """The registered model (or folder) that ``model`` names.

    Raises:
        RegistryError: no such name, version, alias or folder, or it holds no model.
    """
    from isthmus.methods.artefact import read_recipe
    from isthmus.registry import store

    version = store.resolve(model, tracking)
    uri = f"models:/{version.name}/{version.version}" if version.name and version.version else version.uri
    path, digest = str(Path(version.path).absolute()), artefact_digest(version.path)
    language = getattr(read_recipe(path).method, "language", None)
    return ModelHandle(uri or model, path, digest, getattr(language, "prompt", ""))


def artefact_digest(path: str) -> str:
    """sha256 over the files that make a model what it is, independent of where it lies and what it is called.

    Raises:
        RegistryError: ``path`` holds no model.
    """
    digest, folder = hashlib.sha256(), Path(path)
    if not (folder / IDENTITY[0]).is_file():
        raise RegistryError(f"{path} holds no {IDENTITY[0]}.", "Name a registered model or the folder of one.")
    for name in IDENTITY:
        file = folder / name
        digest.update(name.encode())
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class LoadModel:
    """Loads the same model in any process; picklable.

    Attributes:
        with_vision: False where features come from a cache.
        gpu: whether the process was given one.
    """

    handle: ModelHandle
    tracking: TrackingConfig
    with_vision: bool = True
    gpu: bool = False

    def __call__(self) -> Engine:
        """The engine, on the GPU that Ray gave this process or on the CPU.

        Raises:
            RegistryError: the artefact that this process finds is not the one that the job was started with.
        """
        from isthmus.methods.artefact import load_artefact

        handle = self.handle
        if not Path(handle.path).is_dir():  # another node: fetch it here
            handle = resolve_model(handle.uri, self.tracking)
            if handle.digest != self.handle.digest:
                raise RegistryError(f"{handle.uri} is not the model that this job started with.", "Start the job anew.")
        device = pick_device(self.gpu)
        artefact = load_artefact(handle.path, with_vision=self.with_vision, device=device)
        module = artefact.stage.module.to(device).eval()
        return Engine(module, artefact.stage.transform, self.handle.uri, device, artefact.encoded_by)


def pick_device(gpu: bool) -> str:
    """``cuda``, or ``cpu`` with as many threads as Ray gave this process CPUs (it sets OMP_NUM_THREADS).

    Raises:
        ConfigError: a GPU was given by name but this torch cannot use one.
    """
    if gpu:
        if not torch.cuda.is_available():
            raise ConfigError("gpus_per_actor is set, but torch sees no CUDA device here.", "Set gpus_per_actor to 0.")
        return "cuda"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(max(1, int(threads)))
    return "cpu"
