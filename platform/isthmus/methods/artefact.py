"""A trained model as a folder: its own tensors, the recipe, and what they stand on.

model.safetensors   all tensors outside the frozen backbones, under their module names
recipe.yaml         the resolved run recipe: rebuilds the module without the parent run
bases.json          frozen parts: role, where from, digest (their bytes are never copied)
freezing.json       every parameter of the module: its size and whether it was trained
lineage.json        data digest, parent, code version: whatever the run knows of its origin
bases/              frozen parts of a model that was imported with them
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.config import RunConfig, load_run, read_yaml, to_yaml
from isthmus.config.later import with_later_fields
from isthmus.contracts import Base, BuildContext, Comm, LocalComm, Stage
from isthmus.data.clips import clip_transform
from isthmus.data.features import EncodedBy
from isthmus.errors import RegistryError, WeightsError
from isthmus.models.freezing import load_owned, owned_parameters
from isthmus.models.partition import whole_shape

log = logging.getLogger(__name__)

MODEL, RECIPE, BASES = "model.safetensors", "recipe.yaml", "bases.json"
FREEZING, LINEAGE = "freezing.json", "lineage.json"
BASES_FOLDER = "bases"
"""Frozen parts of an imported model lie in this folder beside the recipe, which names them relative to itself."""


@dataclass(frozen=True)
class Artefact:
    """A model read back: the stage is built, loaded, in eval mode on the wanted device."""

    recipe: RunConfig
    stage: Stage
    lineage: Mapping[str, Any]
    bases: tuple[Base, ...]

    @property
    def encoded_by(self) -> EncodedBy:
        """The image encoder that the model was trained on, which its feature caches must be of."""
        digest = next((base.digest for base in self.bases if base.role == "vision"), "")
        vision = getattr(self.recipe.method, "vision", None)
        return EncodedBy(digest, vision, clip_transform(self.stage.transform))


def save_artefact(
    directory: str | Path,
    module_state: Mapping[str, Tensor],
    recipe: RunConfig,
    stage: Stage,
    lineage: Mapping[str, Any],
    *,
    bases: Sequence[Base] | None = None,
) -> None:
    """Writes the folder.

    Args:
        directory: made if it does not exist.
        module_state: the tensors outside the backbones, whole, by parameter name.
        recipe: resolved, so that it builds the module without the parent.
        stage: gives the parameters' verdicts and the bases.
        lineage: anything JSON can hold.
        bases: the frozen parts, where the stage does not know all of them (an image encoder whose features came from
            a cache); default: the stage's.

    Raises:
        WeightsError: the tensors' names are not exactly the module's parameters outside its backbones.
    """
    _same_names(set(module_state), set(owned_parameters(stage.module)), "The state to be saved")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module_state.items()
    }
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    _write_json(folder / BASES, [asdict(base) for base in (stage.bases if bases is None else bases)])
    _write_json(folder / FREEZING, verdict(stage.module))
    _write_json(folder / LINEAGE, dict(lineage))


def load_artefact(
    directory: str | Path,
    comm: Comm | None = None,
    with_vision: bool = True,
    device: torch.device | str = "cpu",
) -> Artefact:
    """Builds the module that the recipe names and loads the tensors into it.

    Args:
        directory: what :func:`save_artefact` wrote.
        comm: collectives for further training or distributed scoring.
        with_vision: False leaves the image encoder out.
        device: where the module is moved.

    Raises:
        RegistryError: the folder is no artefact.
        WeightsError: tensors are missing or left over, or a frozen part's digest is not the recorded one.
    """
    from isthmus.methods import METHODS  # here, not above: the methods themselves read parents through this file

    folder = Path(directory)
    recipe, state = read_recipe(folder), read_state(folder)
    context = BuildContext(comm=comm or LocalComm(), seed=recipe.train.seed, with_vision=with_vision)
    stage = METHODS[recipe.method.name].build(recipe.method, context)
    bases = read_bases(folder)
    check_bases(bases, stage.bases)
    load_owned(stage.module, state)
    stage.module.to(device).eval()
    return Artefact(recipe, stage, _read_json(folder / LINEAGE), bases)


def read_recipe(directory: str | Path) -> RunConfig:
    """The recipe of a saved model, the paths of frozen parts in its folder made absolute.

    Raises:
        RegistryError: the folder holds none.
    """
    from isthmus.methods import method_configs

    file = Path(directory) / RECIPE
    if not file.is_file():
        raise RegistryError(f"{directory} holds no saved model: {RECIPE} is missing.", "Give the folder of a model.")
    recipe = load_run(file, methods=method_configs(), values=with_later_fields(read_yaml(file)))
    return localised(recipe, directory)


def localised(recipe: RunConfig, directory: str | Path) -> RunConfig:
    """``recipe`` with weights that it names below ``bases/`` as absolute paths below ``directory``."""
    changes = {}
    for field in type(recipe.method).model_fields:
        section = getattr(recipe.method, field)
        weights = getattr(section, "weights", None)
        if isinstance(weights, str) and weights.startswith(f"{BASES_FOLDER}/"):
            changes[field] = section.model_copy(update={"weights": str(Path(directory).absolute() / weights)})
    return recipe.model_copy(update={"method": recipe.method.model_copy(update=changes)}) if changes else recipe


def read_bases(directory: str | Path) -> tuple[Base, ...]:
    """The frozen parts a saved model stands on."""
    return tuple(Base(**entry) for entry in _read_json(Path(directory) / BASES))


def read_state(directory: str | Path) -> dict[str, Tensor]:
    """The own tensors of a saved model.

    Raises:
        RegistryError: the file is missing or damaged.
    """
    file = Path(directory) / MODEL
    if not file.is_file():
        raise RegistryError(f"{directory} holds no saved model: {MODEL} is missing.", "Give the folder of a model.")
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise RegistryError(f"{file} is damaged ({error}).", "Fetch or train the model again.") from error


def start_from(stage: Stage, parent: str | Path) -> None:
    """Further training: a saved model's tensors as this stage's initial ones. What the stage has and the parent has not
    (a head whose loss was left out there) stays as it was drawn; both lists are logged.

    Raises:
        RegistryError: the folder is no artefact.
        WeightsError: it stands on other frozen parts, a shape differs, or the two have no tensor in common.
    """
    check_bases(read_bases(parent), stage.bases)
    state, own = read_state(parent), owned_parameters(stage.module)
    taken = [name for name in own if name in state]
    if not taken:
        raise WeightsError(f"{parent} has no tensor that this model has.", "Name a model of the same method and shape.")
    for name in taken:
        if whole_shape(own[name]) != tuple(state[name].shape):
            raise WeightsError(
                f"The parent's '{name}' is {tuple(state[name].shape)}, and this recipe's is {whole_shape(own[name])}.",
                "Give the recipe the parent's sizes; its stored recipe.yaml has them.",
            )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(state[name])
    log.info("%d tensors are %s's", len(taken), parent)
    if new := sorted(own.keys() - state.keys()):
        log.warning("%d tensors that %s has not start anew: %s", len(new), parent, ", ".join(new[:8]))
    if left := sorted(state.keys() - own.keys()):
        log.warning("%d tensors of %s are left behind: %s", len(left), parent, ", ".join(left[:8]))


def check_bases(recorded: Sequence[Base], loaded: Sequence[Base]) -> None:
    """Every loaded frozen part must be the one the model was trained on.

    Raises:
        WeightsError: a digest differs.
    """
    digests = {base.role: base.digest for base in recorded}
    for base in loaded:
        wanted = digests.get(base.role)
        if wanted and wanted != base.digest:
            raise WeightsError(
                f"The {base.role} weights '{base.weights}' have digest {base.digest[:12]}, "
                f"and the model was trained on {wanted[:12]}.",
                "Restore the weights that the recipe was trained with.",
            )


def verdict(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Per parameter: shape, and whether it is trained."""
    return {
        name: {"shape": list(whole_shape(parameter)), "trained": parameter.requires_grad}
        for name, parameter in module.named_parameters()
    }


def _same_names(given: set[str], wanted: set[str], what: str) -> None:
    if given != wanted:
        missing, left = sorted(wanted - given), sorted(given - wanted)
        raise WeightsError(
            f"{what} does not fit the recipe's module: missing {missing[:5]}, left over {left[:5]}.",
            "The recipe and the tensors must come from the same run.",
        )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise RegistryError(f"{file} is missing.", "The model folder is incomplete; fetch it again.")
    return json.loads(file.read_text(encoding="utf-8"))
