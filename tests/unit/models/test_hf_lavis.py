"""LAVIS's checkpoints as files: what they hold, what has to be named, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_cases import drawn, lavis_eva, tower
from isthmus.compat import ensure_torchvision
from isthmus.contracts import Batch
from isthmus.errors import WeightsError
from isthmus.losses.matching import Negatives
from isthmus.methods.artefact import load_artefact
from isthmus.methods.interchange import import_hf, import_lavis_checkpoint
from isthmus.models.hf.files import read_file, read_folder, write_folder
from isthmus.models.lavis import lavis_names

ensure_torchvision()
from transformers import BertTokenizer, OPTConfig, OPTForCausalLM  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "data/golden"
ROOT = Path(__file__).parents[3]


def golden(name: str) -> dict[str, Any]:
    return dict(torch.load(GOLDEN / f"{name}.pt", weights_only=True))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower as wide as the golden features, in LAVIS's names; a tokenizer of 60 tokens; golden's OPT as a folder."""
    folder = tmp_path_factory.mktemp("lavis")
    options = {"embed_dim": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 8}
    config = tower().model_copy(update={"image_size": 16})
    encoder = drawn(config.model_copy(update={"options": {**config.options, **options}}), key_bias=False)
    torch.save(lavis_eva(encoder), folder / "eva.pth")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(folder / "text")
    from isthmus.testing.backbones import tiny_lm

    tiny_lm(folder / "opt", "opt")
    data = golden("lavis_stage2_opt")
    opt = OPTForCausalLM(OPTConfig(**data["opt_config"]))
    opt.load_state_dict({n[10:]: t for n, t in data["state"].items() if n.startswith("opt_model.")}, strict=True)
    opt.save_pretrained(folder / "opt")
    torch.save({"model": golden("lavis_stage1_W1_id0")["state"], "epoch": 3}, folder / "stage1.pth")
    torch.save({"model": dict(data["state"])}, folder / "stage2.pth")
    return folder


def stage1(parts: Path, out: Path, source: str = "stage1.pth", **more: Any) -> Any:
    named = {"vision": parts / "eva.pth", "text": str(parts / "text"), "heads": 4, "vision_heads": 4, "layer": -1}
    return import_lavis_checkpoint(parts / source, out, **{**named, **more})


def test_a_stage_1_file_gives_laviss_own_losses(parts: Path, tmp_path: Path) -> None:
    done = stage1(parts, tmp_path / "in")
    assert done.method == "blip2_stage1" and done.vision.endswith("bases/vision.safetensors")
    data = golden("lavis_stage1_W1_id0")
    module: Any = load_artefact(tmp_path / "in").stage.module
    record = data["ranks"][0]
    module.mine = lambda *_, **__: Negatives(
        torch.tensor(record["neg_img"]), torch.tensor(record["neg_txt"]), torch.ones(8, dtype=torch.bool)
    )
    batch = Batch(
        torch.arange(8), torch.ones(8, dtype=torch.bool), features_BND=data["image"], ids_BT=data["ids"],
        mask_BT=data["att"],
    )  # fmt: skip
    with torch.no_grad():
        terms = module(batch)
    assert float(terms.total) == pytest.approx(record["loss"], abs=1e-5)
    assert float(terms.parts["itg"]) == pytest.approx(record["lm"], abs=1e-5)
    names = lavis_names(data["cfg"]["layers"])
    saved = load_file(tmp_path / "in/model.safetensors")
    for name, tensor in data["state"].items():
        if name in names:
            assert torch.equal(saved[names[name]].reshape(tensor.shape), tensor), name
    with torch.no_grad():
        assert module.encode_images(torch.randn(2, 3, 16, 16)).shape == (2, 5, 24)


def test_a_stage_2_file_needs_its_language_model(parts: Path, tmp_path: Path) -> None:
    named = {"vision": parts / "eva.pth", "heads": 4, "vision_heads": 4, "layer": -1}
    with pytest.raises(WeightsError, match=r"stage-2 checkpoint.*--language"):
        import_lavis_checkpoint(parts / "stage2.pth", tmp_path / "in", **named)
    import_lavis_checkpoint(parts / "stage2.pth", tmp_path / "in", language=str(parts / "opt"), **named)
    data = golden("lavis_stage2_opt")
    module: Any = load_artefact(tmp_path / "in").stage.module
    rows = [data["ids"][f"{text}\n"] for text in data["texts"]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = (torch.arange(longest) < torch.tensor([[len(row)] for row in rows])).long()
    with torch.no_grad():
        total, tokens = module.language.loss(
            module.soft_prompt(data["image"]), ids, mask, ids.masked_fill(mask == 0, -100)
        )
    assert float(total / tokens) == pytest.approx(data["out"]["opt_prompt0"]["loss"], abs=1e-5)
    state = {n: t + (0.1 if n.endswith("layers.1.fc1.bias") else 0) for n, t in data["state"].items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"language model have no equal.*layers\.1\.fc1\.bias"):
        import_lavis_checkpoint(tmp_path / "other.pth", tmp_path / "no", language=str(parts / "opt"), **named)


def test_a_tower_inside_the_file_is_taken_and_half_precision_is_kept(parts: Path, tmp_path: Path) -> None:
    eva = {f"visual_encoder.{n}": t.half() for n, t in torch.load(parts / "eva.pth").items()}
    torch.save({"model": {**golden("lavis_stage1_W1_id0")["state"], **eva}}, tmp_path / "whole.pth")
    done = stage1(tmp_path, tmp_path / "in", "whole.pth", vision=None, text=str(parts / "text"), layer=None)
    saved = load_file(done.vision)
    assert saved["blocks.1.mlp.fc1.weight"].dtype == torch.float16
    assert torch.equal(saved["blocks.0.attn.qkv.bias"][:24], eva["visual_encoder.blocks.0.attn.q_bias"])
    assert not saved["blocks.0.attn.qkv.bias"][24:48].any()
    recipe: Any = load_artefact(tmp_path / "in").recipe.method
    assert recipe.vision.layer == -1
    with pytest.raises(WeightsError, match="Leave --vision out"):
        stage1(tmp_path, tmp_path / "no", "whole.pth", vision=parts / "eva.pth", text=str(parts / "text"))


def test_what_is_not_named_is_asked_for(parts: Path, tmp_path: Path) -> None:
    for change, wanted in (
        ({"vision": None}, "--vision"), ({"text": None}, "--text"), ({"heads": None}, "--heads"),
        ({"vision_heads": None}, "--vision-heads"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=wanted):
            stage1(parts, tmp_path / "in", **change)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    "name",
    ["Qformer.bert.encoder.layer.2.crossattention.output.dense.bias", "itm_head.bias", "temp", "ln_vision.weight"],
)
def test_a_missing_tensor_is_named(parts: Path, tmp_path: Path, name: str) -> None:
    state = golden("lavis_stage1_W1_id0")["state"]
    torch.save({n: t for n, t in state.items() if n != name}, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match=rf"lacks 1 tensors \({name}\)"):
        stage1(tmp_path, tmp_path / "in", "less.pth", vision=parts / "eva.pth", text=str(parts / "text"))


@pytest.mark.parametrize(
    "name", ["stranger", "Qformer.bert.pooler.dense.weight", "visual_encoder.strange", "opt_model.strange"]
)
def test_a_surplus_tensor_is_named(parts: Path, tmp_path: Path, name: str) -> None:
    eva = {f"visual_encoder.{n}": t for n, t in torch.load(parts / "eva.pth").items()}
    state = {**golden("lavis_stage2_opt")["state"], **eva, name: torch.zeros(2)}
    torch.save({"model": state}, tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=name.removeprefix("visual_encoder.").removeprefix("opt_model.")):
        import_lavis_checkpoint(
            tmp_path / "more.pth", tmp_path / "in", language=str(parts / "opt"), heads=4, vision_heads=4
        )


def test_ties_and_counters_must_hold(parts: Path, tmp_path: Path) -> None:
    state = golden("lavis_stage1_W1_id0")["state"]
    for name in ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.position_ids"):
        torch.save({**state, name: state[name] + 1}, tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match=name):
            stage1(tmp_path, tmp_path / "in", "odd.pth", vision=parts / "eva.pth", text=str(parts / "text"))


# --- files -----------------------------------------------------------------------------------------------------------


class Malice:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(parts: Path, tmp_path: Path, zipped: bool) -> None:
    mark, file = tmp_path / "run", tmp_path / "evil.pth"
    value = {"model": {**golden("lavis_stage1_W1_id0")["state"], "x": Malice(mark)}}
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read as weights: .*system.*can run code") as caught:
        import_lavis_checkpoint(file, tmp_path / "in", vision=parts / "eva.pth", text=str(parts / "text"), heads=4)
    assert "safetensors" in caught.value.mend and not mark.exists() and not (tmp_path / "in").exists()
    file.write_bytes(pickle.dumps(Malice(mark)))
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        read_file(file)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "blip-2"}')
    torch.save({"itm_head.weight": Malice(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin cannot be read as weights: its pickle holds more"):
        import_hf(folder, tmp_path / "in")
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # the file is what it claims to be
    assert mark.exists()


def test_shards_and_pickles_are_read_whole(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    state = {f"w{i}": torch.randn(40, 40, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    (tmp_path / "shards").mkdir()
    save_torch_state_dict(state, tmp_path / "shards", max_shard_size=15_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    write_folder(state, tmp_path / "one")
    for folder in ("shards", "bin", "one"):
        found = read_folder(tmp_path / folder)
        assert found.keys() == state.keys() and all(torch.equal(found[n], t) for n, t in state.items())
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    kept = load_file(lost)
    save_file({n: t for n, t in kept.items() if n != min(kept)}, lost)
    with pytest.raises(WeightsError, match=min(kept)):
        read_folder(tmp_path / "shards")
    lost.unlink()
    with pytest.raises(WeightsError, match=lost.name):
        read_folder(tmp_path / "shards")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_folder(tmp_path)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1), "step": 3}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="1 values that are no tensors: step"):
        read_file(tmp_path / "a.pth")
    torch.save([torch.ones(1)], tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="no state dict but a list"):
        read_file(tmp_path / "b.pth")
    (tmp_path / "c.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"c\.safetensors cannot be read"):
        read_file(tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match=r"There is no file .*d\.pth"):
        read_file(tmp_path / "d.pth")
    with pytest.raises(WeightsError, match="no weights file"):
        read_file(tmp_path / "e.txt")
