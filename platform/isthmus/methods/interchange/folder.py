"""Folders that appear whole, and the model folder that every import ends in.

DIR/model.safetensors, recipe.yaml, ...   as :mod:`isthmus.methods.artefact` writes them
DIR/bases/vision.safetensors              the image tower, under timm's names
DIR/bases/language/                       the language model, in Hugging Face layout with its tokenizer
DIR/bases/text/                           stage 1's tokenizer
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.config import DataConfig, MethodConfig, RunConfig, TrainConfig
from isthmus.contracts import BuildContext
from isthmus.errors import StorageError, WeightsError
from isthmus.methods.artefact import BASES_FOLDER, localised, save_artefact
from isthmus.models.freezing import load_owned, owned_state, state_digest

VISION, LANGUAGE_FOLDER, TEXT = "vision.safetensors", "language", "text"


@dataclass(frozen=True)
class Import:
    """What was read.

    Attributes:
        out: the model folder. method: of the recipe.
        tensors, parameters: trainable ones.
        vision, language, text: where the frozen parts are, as the recipe names them; None where there is none.
        notes: what the checkpoint did not say, and what was taken instead.
    """

    out: str
    method: str
    tensors: int
    parameters: int
    vision: str
    language: str | None
    text: str | None
    notes: tuple[str, ...] = ()


@contextmanager
def fresh_folder(out: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes ``out`` if the body ends well, and vanishes if it does not.

    Raises:
        StorageError: ``out`` exists and is not an empty folder, or cannot be made.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists already.", "Name a new folder, or empty that one.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}.", "Name a folder you own.") from error
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private to one user
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish(
    folder: Path,
    name: str,
    method: MethodConfig,
    state: Mapping[str, Tensor],
    lineage: Mapping[str, Any],
    *,
    language: Mapping[str, Tensor] | None = None,
    names: Mapping[str, str] | None = None,
) -> Any:
    """Builds the imported model from the bases below ``folder``, loads it, and writes the model folder.

    Args:
        folder: holds ``bases/``; the recipe names them relative to it, so that the folder may be moved.
        name: of the recipe.
        method: options; weights below ``bases/`` are relative.
        state: the trainable tensors.
        lineage: where they come from.
        language: the checkpoint's own language-model tensors, all of which must have arrived.
        names: the checkpoint's name -> ours, for messages.

    Returns:
        the model, a :class:`isthmus.contracts.StageModule`, on the CPU in eval mode.

    Raises:
        WeightsError: tensors missing, left over, or of another shape.
    """
    from isthmus.methods import METHODS  # here, not above: the methods' table imports nothing of this package

    recipe = RunConfig(
        name=name,
        method=method,
        data=DataConfig(train="imported://no-data"),
        train=TrainConfig(steps=1, global_batch=2),
        cluster={"workers": 1},  # type: ignore[arg-type]
    )
    stage = METHODS[method.name].build(localised(recipe, folder).method, BuildContext())
    module: Any = stage.module
    _same_names(set(state), {n for n, p in module.named_parameters() if p.requires_grad}, names or {})
    load_owned(module, {key: tensor.float() for key, tensor in state.items()})
    if language is not None:
        _arrived(language, module.language.model)
    bases = [_relative(base, folder) for base in stage.bases]
    save_artefact(folder, owned_state(module), recipe, stage, lineage, bases=bases)
    return module.eval()


def _same_names(given: set[str], wanted: set[str], names: Mapping[str, str]) -> None:
    theirs = {ours: name for name, ours in names.items()}
    missing, surplus = ([theirs.get(n, n) for n in sorted(some)] for some in (wanted - given, given - wanted))
    if missing or surplus:
        raise WeightsError(
            f"The checkpoint lacks {len(missing)} tensors ({', '.join(missing) or 'none'}) and holds {len(surplus)} "
            f"that have no place ({', '.join(surplus) or 'none'}).",
            "Give a complete BLIP-2 checkpoint of one stage.",
        )


def _relative(base: Any, folder: Path) -> Any:
    path = Path(base.weights)
    return replace(base, weights=str(path.relative_to(folder))) if path.is_relative_to(folder) else base


def _arrived(given: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    """Every tensor of the checkpoint's language model is in ``model``, unchanged.

    Raises:
        WeightsError: one is not.
    """
    found = model.state_dict()
    lost = sorted(n for n, t in given.items() if n not in found or not torch.equal(found[n].to(t.dtype), t))
    if lost:
        raise WeightsError(
            f"{len(lost)} tensors of the checkpoint's language model have no equal in the one that is loaded: "
            f"{', '.join(lost[:5])}.",
            "Name the language model that the checkpoint was trained with.",
        )


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of a checkpoint's tensors, for the lineage."""
    return state_digest(state)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """``value`` as an indented JSON file."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def bases(folder: Path) -> Path:
    """The folder for frozen parts, made."""
    path = folder / BASES_FOLDER
    path.mkdir(parents=True, exist_ok=True)
    return path
