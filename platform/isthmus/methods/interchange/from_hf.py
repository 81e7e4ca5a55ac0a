"""A Hugging Face BLIP-2 folder as a model folder, every tensor of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from isthmus.config import MethodConfig, QFormerConfig, TextConfig, VisionConfig, load_run
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods.artefact import BASES_FOLDER, LINEAGE, RECIPE
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config, LossWeights
from isthmus.methods.blip2_stage2 import Blip2Stage2Config
from isthmus.methods.interchange.epsilon import epsilon_difference
from isthmus.methods.interchange.folder import (
    LANGUAGE_FOLDER,
    TEXT,
    VISION,
    Import,
    bases,
    digest,
    finish,
    fresh_folder,
    write_json,
)
from isthmus.models.hf.files import EXTRA, read_file, read_folder, read_json, write_folder
from isthmus.models.hf.names import (
    CLASSES,
    LANGUAGE,
    NORM,
    TOWER,
    Kind,
    from_hf,
    kind_of,
    qformer_names,
    without_counters,
)
from isthmus.models.hf.tokens import without_tokens_from
from isthmus.models.hf.tower import import_tower
from isthmus.models.text import load_tokenizer

log = logging.getLogger(__name__)

_BICUBIC = 3
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def import_hf(source: str | Path, out: str | Path, *, name: str | None = None) -> Import:
    """Writes the folder ``source`` (config.json, weights, processor with tokenizer) as the model folder ``out``.

    Trainable tensors become float32; frozen parts keep their type. Where ``source`` is an export of this package, its
    recipe's other options and the tensors of ``isthmus.safetensors`` come back too.

    Args:
        name: of the recipe; the folder's by default.

    Raises:
        WeightsError: unreadable files, or a tensor that is missing or has no place.
        ConfigError: a configuration that has no equal here.
    """
    folder = Path(source).expanduser()
    config = read_json(folder / "config.json")
    if config.get("model_type") != "blip-2":
        raise WeightsError(
            f"{folder} holds a '{config.get('model_type')}' model and no BLIP-2.", "Give a folder of Blip2For..."
        )
    state = without_counters(read_folder(folder))
    kind = kind_of(state)
    notes: list[str] = []
    tower = {n.removeprefix(TOWER): t for n, t in state.items() if n.startswith(TOWER) and not n.startswith(NORM)}
    language = {n.removeprefix(LANGUAGE): t for n, t in state.items() if n.startswith(LANGUAGE)}
    rest = {n: t for n, t in state.items() if not n.startswith((TOWER, LANGUAGE)) or n.startswith(NORM)}
    vision, tower = import_tower(_section(config, "vision_config"), tower, _pixels(folder, config, notes))
    qformer = _qformer(config, rest, kind)
    mapped = from_hf(rest, qformer_names(kind, qformer.layers, qformer.cross_every))
    if language and kind == "blip2_stage1":
        raise WeightsError(f"The checkpoint holds an itm_head and a language model ({len(language)} tensors).")
    with fresh_folder(out) as scratch:
        save_file({n: t.contiguous() for n, t in tower.items()}, bases(scratch) / VISION, metadata={"format": "pt"})
        vision = vision.model_copy(update={"weights": f"{BASES_FOLDER}/{VISION}"})
        method: MethodConfig
        if kind == "blip2_stage1":
            extra = read_file(folder / EXTRA) if (folder / EXTRA).is_file() else {}
            method = _stage1(folder, scratch, vision, qformer, mapped, extra, notes)
        else:
            method = _stage2(folder, scratch, vision, qformer, config, language)
        origin = read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else None
        lineage = {
            "imported": {"from": "hf", "path": str(folder.absolute()), "digest": digest(state)},
            "origin": origin,
        }
        module = finish(scratch, name or Path(out).name, method, mapped, lineage, language=language or None)
        if language:
            _check_ends(folder, config, module.language.end_id)
        _note_epsilon(module, float(_section(config, "vision_config")["layer_norm_eps"]), notes)
    for note in notes:
        log.warning("%s", note)
    parts = Path(out).absolute() / BASES_FOLDER
    return Import(
        str(out), method.name, len(mapped), sum(t.numel() for t in mapped.values()), str(parts / VISION),
        str(parts / LANGUAGE_FOLDER) if language else None, None if language else str(parts / TEXT), tuple(notes),
    )  # fmt: skip


def _stage1(
    folder: Path,
    scratch: Path,
    vision: VisionConfig,
    qformer: QFormerConfig,
    mapped: dict[str, Tensor],
    extra: Mapping[str, Tensor],
    notes: list[str],
) -> Blip2Stage1Config:
    """The section; ``mapped`` gains the tensors that transformers' class does not hold."""
    words = len(mapped["qformer.words.weight"]) - 1  # the last row is [DEC]'s
    tokenizer = load_tokenizer(str(folder))
    without_tokens_from(tokenizer, words)
    tokenizer.save_pretrained(bases(scratch) / TEXT)
    text = TextConfig(weights=f"{BASES_FOLDER}/{TEXT}")
    base = _recipe(folder, "blip2_stage1") or Blip2Stage1Config(weights=LossWeights(itg=0.0 if not extra else 1.0))
    assert isinstance(base, Blip2Stage1Config)
    mapped |= extra
    if "temperature" not in mapped:
        mapped["temperature"] = mapped["qformer.queries"].new_full((1,), base.temperature)
        notes.append(f"The checkpoint holds no temperature; it starts at {base.temperature}.")
    if not any(name.startswith("qformer.lm_head.") for name in mapped):
        if not extra:
            notes.append("The checkpoint holds no caption head; the recipe's weights.itg is 0.")
        base = base.model_copy(update={"weights": base.weights.model_copy(update={"itg": 0.0})})
    kept = {"max_length": base.text.max_length, **text.model_dump(include={"weights"})}
    return base.model_copy(
        update={"vision": vision, "qformer": _kept(qformer, base.qformer), "text": TextConfig(**kept)}
    )


def _stage2(
    folder: Path,
    scratch: Path,
    vision: VisionConfig,
    qformer: QFormerConfig,
    config: Mapping[str, Any],
    language: Mapping[str, Tensor],
) -> Blip2Stage2Config:
    if not language:
        raise WeightsError("The checkpoint holds a language_projection and no language model.", "Fetch all its shards.")
    where = bases(scratch) / LANGUAGE_FOLDER
    write_folder(language, where)
    config_of_text = _section(config, "text_config")
    write_json(where / "config.json", config_of_text)
    load_tokenizer(str(folder)).save_pretrained(where)
    base = _recipe(folder, "blip2_stage2") or Blip2Stage2Config()
    assert isinstance(base, Blip2Stage2Config)
    weights = f"{BASES_FOLDER}/{LANGUAGE_FOLDER}"
    update = {"weights": weights}
    if config_of_text.get("is_encoder_decoder"):
        update["t5_activation"] = "checkpoint"  # its config.json says exactly which one BLIP-2 was trained with
    section = base.language.model_copy(update=update)
    return base.model_copy(update={"vision": vision, "qformer": _kept(qformer, base.qformer), "language": section})


def _check_ends(folder: Path, config: Mapping[str, Any], end_id: int) -> None:
    """The tokens at which the checkpoint's captions end, against the one at which the imported model's do.

    Raises:
        ConfigError: they differ, in the text configuration or in the generation configuration.
    """
    file = folder / "generation_config.json"
    stored = {
        "text_config of config.json": _section(config, "text_config").get("eos_token_id"),
        file.name: read_json(file).get("eos_token_id") if file.is_file() else None,
    }
    for place, ends in stored.items():
        found: set[Any] = set(ends) if isinstance(ends, list) else {ends} - {None}
        if found and found != {end_id}:
            raise ConfigError(
                f"The checkpoint's captions end at {sorted(found)} (eos_token_id in {place}), and here captions of "
                f"this language model end at {end_id}: OPT's at the newline, others' at the tokenizer's eos_token.",
                f"If they should end at {end_id}, set eos_token_id to it in {place}; if not, change the tokenizer's "
                "eos_token (OPT's end cannot be changed).",
            )


def _note_epsilon(module: Any, theirs: float, notes: list[str]) -> None:
    """Notes what it does to the queries that ln_vision has one epsilon here and another in transformers."""
    difference = epsilon_difference(module, theirs)
    if difference is not None:
        notes.append(
            f"ln_vision has the epsilon {module.ln_vision.eps:g} here, as in LAVIS, and {theirs:g} in the checkpoint; "
            f"the queries' outputs differ by {difference:.1e} (root mean square, two images of noise)."
        )


def _kept(qformer: QFormerConfig, recorded: QFormerConfig | None) -> QFormerConfig:
    """``qformer`` as the checkpoint has it, with the options that no checkpoint shows taken from the recipe."""
    return qformer if recorded is None else qformer.model_copy(update={"text_pool": recorded.text_pool})


def _recipe(folder: Path, wanted: Kind) -> MethodConfig | None:
    """The method's section of the recipe that this package's export left, if there is one."""
    from isthmus.methods import method_configs  # here, not above: the methods' table imports nothing of this package

    file = folder / RECIPE
    if not file.is_file():
        return None
    method = load_run(file, methods=method_configs()).method
    if method.name != wanted:
        raise WeightsError(f"{file} is of a '{method.name}' run, and the tensors are a {CLASSES[wanted]}'s.")
    return method


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of config.json with transformers' defaults filled in: it is saved as a difference to them."""
    from isthmus.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import Blip2Config

    return dict(getattr(Blip2Config(**{k: v for k, v in config.items() if k != "model_type"}), key).to_dict())


def _qformer(config: Mapping[str, Any], rest: Mapping[str, Tensor], kind: Kind) -> QFormerConfig:
    """Raises ConfigError where the Q-Former of transformers is set to what there is no option for here."""
    theirs = _section(config, "qformer_config")
    wanted = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    if wrong := [f"{key} {theirs[key]}" for key, value in wanted.items() if theirs[key] != value]:
        raise ConfigError(f"The checkpoint's Q-Former has {', '.join(wrong)}.", f"Only {wanted} is known.")
    if theirs["hidden_dropout_prob"] != theirs["attention_probs_dropout_prob"]:
        raise ConfigError(
            "The checkpoint's Q-Former has two dropout rates, hidden_dropout_prob and attention_probs_dropout_prob.",
            "Set both to one value in config.json: here there is one.",
        )
    projected, positions = rest.get("vision_projection.weight"), rest.get("embeddings.position_embeddings.weight")
    return QFormerConfig(
        layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        heads=theirs["num_attention_heads"],
        feed_forward=theirs["intermediate_size"],
        queries=rest["query_tokens"].shape[1] if "query_tokens" in rest else config.get("num_query_tokens", 32),
        cross_every=theirs["cross_attention_frequency"],
        dropout=theirs["hidden_dropout_prob"],
        embed=len(projected) if projected is not None else int(config.get("image_text_hidden_size", 256)),
        positions=len(positions) if positions is not None and kind == "blip2_stage1" else None,
        init=None,
    )


def _pixels(folder: Path, config: Mapping[str, Any], notes: list[str]) -> Any:
    """(mean, std) of the pixels.

    Raises:
        ConfigError: an image processor that does what :class:`isthmus.data.transforms.ImageTransform` does not.
    """
    found: dict[str, Any] = {}
    for name in _PROCESSORS:
        if (folder / name).is_file():
            whole = read_json(folder / name)
            found = whole.get("image_processor", whole)
            if "image_mean" in found:
                break
    if "image_mean" not in found:
        notes.append("The checkpoint holds no image processor; CLIP's mean and std and bicubic resizing are taken.")
        return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    size, side = found.get("size", {}), _section(config, "vision_config")["image_size"]
    wrong = [key for key in ("do_center_crop", "do_pad") if found.get(key)]
    wrong += [key for key in ("do_resize", "do_rescale", "do_normalize") if found.get(key) is False]
    wrong += [f"resample {found['resample']}"] if found.get("resample", _BICUBIC) != _BICUBIC else []
    wrong += [f"size {size}"] if size and set(size.values()) != {side} else []
    if wrong:
        raise ConfigError(
            f"The checkpoint's image processor has {', '.join(wrong)}, which has no equal here.",
            f"It should resize to {side}x{side}, bicubic, and normalise.",
        )
    return tuple(found["image_mean"]), tuple(found["image_std"])
