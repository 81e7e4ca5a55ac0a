"""Checkpoint files: everything in them is read, or the reading fails. No pickle is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from isthmus.errors import WeightsError
from isthmus.models.weights import restricted_load

EXTRA = "isthmus.safetensors"
"""Tensors that transformers' classes have no place for, beside the files that they read."""
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt"}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder in Hugging Face layout: one file or shards with their index, safetensors before pickles.

    Raises:
        WeightsError: no weights, an index that does not fit its shards, or a file that :func:`read_file` refuses.
    """
    for name in _WHOLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_file(folder / name)
        if index.is_file():
            return _read_shards(folder, index)
    raise WeightsError(
        f"The folder {folder} holds no weights.", f"It needs {' or '.join(_WHOLE)}, or shards with an index."
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: missing, or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"There is no file {file}.", "Give a folder in Hugging Face layout.") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds no JSON object.")
    return value


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map", {})
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:  # an index must not lead out of its folder
            raise WeightsError(f"{index} names the shard '{shard}', which is no plain file name.")
        state |= read_file(folder / shard)
    if differing := sorted(set(places) ^ set(state)):
        raise WeightsError(
            f"{index} and its shards differ in {len(differing)} tensors: {', '.join(differing[:5])}.",
            "The checkpoint is incomplete; fetch it again.",
        )
    return state


def read_file(file: Path) -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors`` or pickled state dict, on the CPU.

    A training checkpoint's state dict is looked for under ``model`` and ``state_dict``.

    Raises:
        WeightsError: not readable, a pickle with anything but data in it, or values that are no tensors.
    """
    if file.suffix not in _SUFFIXES:
        raise WeightsError(f"{file} is no weights file.", f"It should end in {', '.join(sorted(_SUFFIXES))}.")
    if not file.is_file():
        raise WeightsError(f"There is no file {file}.", "Give the path of a checkpoint.")
    if file.suffix == ".safetensors":
        try:
            return dict(load_file(file))
        except Exception as error:  # its own error type, and the operating system's
            raise WeightsError(f"{file} cannot be read as weights: {error}.", "Fetch the file again.") from error
    loaded = restricted_load(file)
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{file} holds no state dict but a {type(loaded).__name__}.")
    strange = sorted(str(name) for name, value in loaded.items() if not isinstance(value, Tensor))
    if strange:
        raise WeightsError(
            f"{file} holds {len(strange)} values that are no tensors: {', '.join(strange[:5])}.",
            "Give a state dict, or a checkpoint that has one under 'model'.",
        )
    return {str(name): value for name, value in loaded.items()}


def write_folder(state: Mapping[str, Tensor], folder: Path) -> None:
    """``model.safetensors``, or shards of at most 5 GB with their index. No two tensors may share memory."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(plain, folder, max_shard_size="5GB", metadata={"format": "pt"})


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with tensors that share memory kept once, under the first name."""
    seen: set[tuple[object, ...]] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in seen or tensor.numel() == 0:
            out[name] = tensor
        seen.add(key)
    return out
