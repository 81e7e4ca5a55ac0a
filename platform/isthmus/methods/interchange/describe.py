"""What a model folder holds, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isthmus.errors import RegistryError
from isthmus.methods.artefact import FREEZING, LINEAGE, read_bases, read_recipe, read_state


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """Method, frozen parts with their digests, trainable and frozen parameters, lineage.

    Raises:
        RegistryError: the folder holds no model.
    """
    path = Path(folder).expanduser().absolute()
    if (path / "config.json").is_file():
        kind = _model_type(path / "config.json")
        if kind and not (path / "bases.json").is_file():
            raise RegistryError(
                f"{path} holds a '{kind}' model in Hugging Face layout.", "Import it: isthmus model import hf"
            )
    recipe, state = read_recipe(path), read_state(path)
    verdicts = json.loads((path / FREEZING).read_text(encoding="utf-8")) if (path / FREEZING).is_file() else {}
    frozen = sum(_size(entry["shape"]) for entry in verdicts.values() if not entry["trained"])
    lineage = path / LINEAGE
    return {
        "path": str(path),
        "name": recipe.name,
        "method": recipe.method.model_dump(mode="json"),
        "bases": [{"role": b.role, "weights": b.weights, "digest": b.digest} for b in read_bases(path)],
        "trained": {"tensors": len(state), "parameters": sum(tensor.numel() for tensor in state.values())},
        "frozen": {"parameters": frozen},
        "lineage": json.loads(lineage.read_text(encoding="utf-8")) if lineage.is_file() else {},
    }


def _model_type(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
