"""Model folders to Hugging Face and back: nothing is lost, and stock transformers says the same things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_cases import (
    QUERIES,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    images,
    own,
    pixels,
    tower,
    transformers,
    write_stage1,
    write_stage2,
)
from isthmus.errors import ConfigError, StorageError, WeightsError
from isthmus.methods.artefact import load_artefact
from isthmus.methods.interchange import describe_folder, export_hf, import_hf
from isthmus.models.freezing import owned_state
from isthmus.testing.backbones import tiny_lm
from method_cases import build

FAMILIES = ["opt", "llama", "gpt2", "t5"]
ANY = ["stage1", *FAMILIES]
OPT = "language_model.model.decoder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of ANY: NAME (of transformers), NAME-in (imported), NAME-out (exported again)."""
    root = tmp_path_factory.mktemp("trips")
    for name in ANY:
        write_stage1(root / name) if name == "stage1" else write_stage2(root / name, name)
        import_hf(root / name, root / f"{name}-in")
        export_hf(root / f"{name}-in", root / f"{name}-out")
    return root


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in sorted(folder.rglob("*.safetensors"))]
    return {f"{file.relative_to(folder)}:{n}": t for file in files for n, t in load_file(file).items()}


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY)
def test_import_and_export_give_back_every_bit(folder: Path, name: str) -> None:
    before, after = load_file(folder / name / "model.safetensors"), load_file(folder / f"{name}-out/model.safetensors")
    assert same(before, after)
    import_hf(folder / f"{name}-out", folder / f"{name}-again")
    assert same(weights(folder / f"{name}-in"), weights(folder / f"{name}-again"))
    bases = [json.loads((folder / f"{name}-{x}/bases.json").read_text()) for x in ("in", "again")]
    assert bases[0] == bases[1] and bases[0][0]["weights"] == "bases/vision.safetensors"


@pytest.mark.parametrize("method", ["blip2_stage1", "blip2_stage2"])
def test_a_model_of_our_own_comes_back_whole_with_its_recipe(tmp_path: Path, method: str) -> None:
    changes = {"temperature": 0.05} if method == "blip2_stage1" else {"language": {"prompt": "a photo of"}}
    module = own(tmp_path / "ours", method, **changes)
    done = export_hf(tmp_path / "ours", tmp_path / "hf")
    heads = {"temperature", *(n for n in owned_state(module) if "lm_head" in n)}
    assert set(done.beside) == (heads if method == "blip2_stage1" else set())
    import_hf(tmp_path / "hf", tmp_path / "back")
    back = load_artefact(tmp_path / "back")
    assert same(owned_state(module), owned_state(back.stage.module))
    for key, value in changes.items():
        found = getattr(back.recipe.method, key)
        assert found == value or found.prompt == value["prompt"]  # type: ignore[index]
    assert back.lineage["origin"] == {"made": "here"}
    features = module.encode_images(pixels())
    assert torch.equal(features, back.stage.module.encode_images(pixels()))  # type: ignore[operator]
    kind = {"num_beams": 1} if method == "blip2_stage1" else {"num_beams": 3}
    ours = module.generate(features, max_new_tokens=6, **kind)
    assert ours == back.stage.module.generate(features, max_new_tokens=6, **kind)  # type: ignore[operator]
    assert len(set(ours)) > 1


def test_an_imported_folder_may_be_moved(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "opt-in", tmp_path / "elsewhere")
    assert load_artefact(tmp_path / "elsewhere").recipe.method.vision.weights.startswith(str(tmp_path))  # type: ignore
    shown = describe_folder(tmp_path / "elsewhere")
    assert shown["trained"]["tensors"] == 75 and shown["method"]["name"] == "blip2_stage2"
    assert {base["role"] for base in shown["bases"]} == {"vision", "language"}


def test_an_imported_stage_1_is_a_parent_of_stage_2(folder: Path, tmp_path: Path) -> None:
    from isthmus.methods import METHODS

    config = METHODS["blip2_stage2"].config(language=tiny_lm(tmp_path / "lm", "gpt2"))
    stage = build(config, parent=str(folder / "stage1-in"), with_vision=True)
    theirs = load_file(folder / "stage1-in/model.safetensors")
    taken = {n: t for n, t in owned_state(stage.module).items() if n in theirs}
    assert len(taken) > 50 and all(torch.equal(theirs[n], t) for n, t in taken.items())


# --- stock transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY)
def test_stock_classes_open_it_without_a_word(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind = Blip2ForImageTextRetrieval if name == "stage1" else Blip2ForConditionalGeneration
    transformers.utils.logging.enable_propagation()
    try:
        model, report = kind.from_pretrained(folder / f"{name}-out", output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert {key: list(found) for key, found in report.items() if found} == {}
    said = [r.message for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    if name == "t5":  # T5Config says tied whatever config.json says, and transformers notes that it does not obey it
        assert said and all(message.startswith("The tied weights mapping") for message in said)
        head, table = model.language_model.lm_head.weight, model.language_model.shared.weight
        assert head.data_ptr() != table.data_ptr() and not torch.equal(head, table)
    else:
        assert said == []


@torch.no_grad()
def test_itc_and_itm_are_those_of_stock_transformers(tmp_path: Path) -> None:
    module = own(tmp_path / "ours", "blip2_stage1")
    done = export_hf(tmp_path / "ours", tmp_path / "hf")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    texts = ["a red cat on the tree", "two dogs", "a"]
    inputs = processor(images=images(), text=texts, padding=True, return_tensors="pt")
    features = module.encode_images(inputs["pixel_values"])
    wanted = theirs(**inputs).logits_per_image
    found = torch.einsum("iqe,te->iqt", module.embed_images(features), module.embed_texts(texts)).amax(1)
    matched = theirs(**inputs, use_image_text_matching_head=True).logits_per_image[:, 1]
    assert float((found - wanted).abs().max()) <= 1e-4
    assert float((module.match(features, texts) - matched).abs().max()) <= 1e-4
    assert torch.equal(found.argsort(1), wanted.argsort(1)) and float(found.std()) > 0.01
    # What is left is ln_vision's epsilon; with one epsilon on both sides nothing but rounding is.
    theirs.vision_model.post_layernorm.eps = 1e-5
    assert float((found - theirs(**inputs).logits_per_image).abs().max()) <= 2e-6
    assert done.query_difference <= 1e-4


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_and_beam_ids_are_those_of_stock_transformers(tmp_path: Path, family: str, beams: int) -> None:
    """No row is added to the vocabulary for <image>: where none is spare it takes the place of a byte no text holds."""
    module = own(tmp_path / "ours", "blip2_stage2", family=family)
    done = export_hf(tmp_path / "ours", tmp_path / "hf")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    table = module.language.model.get_input_embeddings()
    assert theirs.language_model.get_input_embeddings().num_embeddings == table.num_embeddings
    ours: list[list[int]] = []
    decode = module.language._decode
    module.language._decode = lambda row: (ours.append(list(row)), decode(row))[1]
    for prompts in (["", "", ""], ["a photo of", "a", "the small dog"]):
        ours.clear()
        inputs = processor(images=images(), text=prompts, padding=True, return_tensors="pt")
        features = module.encode_images(inputs["pixel_values"])
        captions = module.language.generate(
            module.soft_prompt(features), prompt=prompts, max_new_tokens=12, num_beams=beams
        )
        found = theirs.generate(**inputs, max_new_tokens=12, num_beams=beams)
        start = 1 if family == "t5" else inputs["input_ids"].shape[1]  # the decoder's start token, or all of the prompt
        assert int((inputs["input_ids"] == done.image_token).sum()) == 3 * QUERIES
        assert [row[: len(mine)] for row, mine in zip(found[:, start:].tolist(), ours, strict=True)] == ours
        assert processor.batch_decode(found[:, start:], skip_special_tokens=True) == [
            processor.tokenizer.decode(row, skip_special_tokens=True) for row in ours
        ]
        assert len(set(captions)) > 1


@torch.no_grad()
def test_captions_end_where_ours_end(tmp_path: Path) -> None:
    """OPT ends a caption with a newline: generate of the export has to know it without being told."""
    module = own(tmp_path / "ours", "blip2_stage2", family="opt")
    newline = module.language.end_id
    export_hf(tmp_path / "ours", tmp_path / "hf")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert theirs.config.text_config.eos_token_id == newline
    assert theirs.generation_config.eos_token_id == theirs.language_model.generation_config.eos_token_id == newline
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(images=images(6), text=[""] * 6, padding=True, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    said = int(theirs.generate(**inputs, max_new_tokens=12)[0, start + 4])  # swapped with it, the newline is said there
    for model in (module.language.model, theirs.language_model):
        table = model.get_input_embeddings().weight.data
        table[[newline, said]] = table[[said, newline]].clone()
    found = theirs.generate(**inputs, max_new_tokens=12)[:, start:]
    lengths = [[*row, newline].index(newline) for row in found.tolist()]
    assert lengths[0] <= 4 and max(lengths) > min(lengths)
    captions = module.generate(module.encode_images(inputs["pixel_values"]), max_new_tokens=12)
    assert captions == [t.split("\n")[0].strip() for t in processor.batch_decode(found, skip_special_tokens=True)]


def test_the_processor_sees_our_pixels(tmp_path: Path) -> None:
    own(tmp_path / "ours", "blip2_stage1", tower("vit_base_patch16_224"))
    export_hf(tmp_path / "ours", tmp_path / "hf", check=False)
    transform: Any = load_artefact(tmp_path / "ours").stage.transform
    assert transform.mean == (0.5, 0.5, 0.5)
    ours = torch.stack([torch.from_numpy(transform(image)) for image in images()])
    pil = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    found = torch.as_tensor(pil(images=images(), return_tensors="pt")["pixel_values"])
    assert float((ours - found).abs().max()) <= 1e-6
    # torchvision's resizing, which transformers takes by default, rounds otherwise: a level of 256 on average at most.
    fast = AutoProcessor.from_pretrained(tmp_path / "hf")(images=images(), return_tensors="pt")["pixel_values"]
    assert float((ours - fast).abs().mean()) <= 1 / 255 / 0.5


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("blip2_stage1", {"weights": {"itm": 0.0}}, "trained without ITM"),
        ("blip2_stage1", {"qformer": {"text_pool": "mean"}}, r"means of the tokens"),
        ("blip2_stage2", {"language": {"opening": "first"}}, "begin-of-sequence token stands before the soft prompt"),
    ],
)
def test_what_transformers_cannot_say_is_refused(
    tmp_path: Path, method: str, changes: dict[str, Any], reason: str
) -> None:
    own(tmp_path / "ours", method, **changes)
    with pytest.raises(ConfigError, match=reason):
        export_hf(tmp_path / "ours", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_folder_is_not_written_into(folder: Path) -> None:
    with pytest.raises(StorageError, match="exists already"):
        export_hf(folder / "opt-in", folder / "opt")
    with pytest.raises(StorageError, match="exists already"):
        import_hf(folder / "opt", folder / "opt-in")


@pytest.mark.parametrize("name", ["stage1", "opt"])
def test_a_missing_or_surplus_tensor_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    import shutil

    shutil.copytree(folder / name, tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    whole = load_file(file)
    for lost in (
        "qformer.encoder.layer.2.crossattention.output.dense.bias", "query_tokens",
        "vision_model.post_layernorm.bias", "vision_model.encoder.layers.1.self_attn.qkv.bias",
        "embeddings.position_embeddings.weight" if name == "stage1" else f"{OPT}.layers.0.fc1.bias",
    ):  # fmt: skip
        save_file({n: t for n, t in whole.items() if n != lost}, file, metadata={"format": "pt"})
        with pytest.raises(
            WeightsError, match=lost.removeprefix("vision_model.encoder.").removeprefix("language_model.")
        ):
            import_hf(tmp_path / "hf", tmp_path / "in")
    for surplus in (
        "qformer.encoder.layer.1.crossattention.attention.query.weight", "stranger",
        "vision_model.encoder.layers.3.mlp.fc1.bias",
        "qformer.cls.bias" if name == "stage1" else f"{OPT}.layers.9.fc1.bias",
    ):  # fmt: skip
        save_file({**whole, surplus: torch.zeros(3)}, file, metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=surplus.removeprefix("vision_model.").removeprefix("language_model.")):
            import_hf(tmp_path / "hf", tmp_path / "in")
    save_file(whole, file, metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "in")
    assert not list(tmp_path.glob(".in*"))


def test_position_numbers_of_old_checkpoints_are_no_loss(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "stage1", tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    whole = load_file(file)
    save_file({**whole, "embeddings.position_ids": torch.arange(24)[None]}, file, metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "in")
    save_file({**whole, "embeddings.position_ids": torch.arange(24)[None] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="does not count"):
        import_hf(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("where", "key", "value", "reason"),
    [
        ("qformer_config", "hidden_act", "relu", "Q-Former has hidden_act relu"),
        ("qformer_config", "layer_norm_eps", 1e-6, "layer_norm_eps"),
        ("qformer_config", "hidden_dropout_prob", 0.3, "two dropout rates"),
        ("vision_config", "hidden_act", "quick_gelu", "activation is quick_gelu"),
        ("vision_config", "layer_norm_eps", 1e-3, "epsilon"),
        ("", "model_type", "blip", "no BLIP-2"),
    ],
)
def test_a_configuration_without_an_equal_is_refused(
    folder: Path, tmp_path: Path, where: str, key: str, value: Any, reason: str
) -> None:
    import shutil

    shutil.copytree(folder / "opt", tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    config = json.loads(file.read_text())
    (config[where] if where else config)[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises((ConfigError, WeightsError), match=reason):
        import_hf(tmp_path / "hf", tmp_path / "in")
    assert not (tmp_path / "in").exists()
