"""``isthmus model import``, ``export`` and ``show`` through the command line, with a registry of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_cases import Blip2ForConditionalGeneration, drawn, lavis_eva, tower, write_stage2
from isthmus.cli import app

GOLDEN = Path(__file__).parents[2] / "data/golden"


def call(*words: object) -> tuple[int, Any, str]:
    """(exit code, the JSON on standard output, standard error)."""
    ran = CliRunner().invoke(app, ["--json", *map(str, words)])
    lines = ran.stdout.strip().splitlines()
    return ran.exit_code, json.loads(lines[-1]) if lines else None, ran.stderr


def test_a_checkpoint_comes_in_is_registered_shown_and_goes_out(tmp_path: Path) -> None:
    write_stage2(tmp_path / "theirs", "opt")
    store = f"sqlite:///{tmp_path}/runs/mlflow.db"
    code, done, _ = call(
        "model", "import", "hf", tmp_path / "theirs", "--out", tmp_path / "ours", "--name", "blip2", "--tracking", store
    )
    assert code == 0 and done["method"] == "blip2_stage2" and done["uri"] == "models:/blip2@imported"
    code, shown, _ = call("model", "show", tmp_path / "ours")
    assert code == 0 and shown["method"]["name"] == "blip2_stage2" and shown["trained"]["tensors"] == done["tensors"]
    assert shown["frozen"]["parameters"] > 0 and shown["lineage"]["imported"]["from"] == "hf"
    assert [base["role"] for base in shown["bases"]] == ["vision", "language"]
    code, shown, _ = call("model", "show", "models:/blip2@imported", "--tracking", store)
    assert code == 0 and shown["version"] == "1" and shown["lineage"]["imported"]["from"] == "hf"
    code, sent, _ = call(
        "model", "export", "hf", "models:/blip2@imported", "--out", tmp_path / "hf", "--tracking", store
    )
    assert code == 0 and sent["kind"] == "Blip2ForConditionalGeneration"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")


def test_a_lavis_file_comes_in(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    config = tower().model_copy(update={"image_size": 16})
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 8}
    encoder = drawn(config.model_copy(update={"options": {**config.options, **sizes}}), key_bias=False)
    torch.save(lavis_eva(encoder), tmp_path / "eva.pth")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(tmp_path / "text")
    state = torch.load(GOLDEN / "lavis_stage1_W1_id0.pt", weights_only=True)["state"]
    torch.save({"model": state}, tmp_path / "blip2.pth")
    words = ["model", "import", "lavis", tmp_path / "blip2.pth", "--out", tmp_path / "ours", "--heads", 4]
    code, done, said = call(*words)
    assert code == 2 and "--vision" in done["mend"] and "Traceback" not in said
    words += ["--vision", tmp_path / "eva.pth", "--vision-heads", 4, "--layer", -1, "--text", tmp_path / "text"]
    code, done, _ = call(*words)
    assert code == 0 and done["method"] == "blip2_stage1"
    code, sent, _ = call("model", "export", "hf", tmp_path / "ours", "--out", tmp_path / "hf")
    assert code == 0 and "temperature" in sent["beside"] and "qformer.lm_head.bias" in sent["beside"]
    code, done, _ = call("model", "import", "hf", tmp_path / "hf", "--out", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_faults_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, done, _ = call("model", "import", "hf", tmp_path, "--out", tmp_path / "x")
    assert code == 2 and "config.json" in done["error"]
    code, done, _ = call("model", "export", "hf", tmp_path / "nothing", "--out", tmp_path / "x")
    assert code == 2 and "nothing" in done["error"]
    code, done, _ = call("model", "show", tmp_path)
    assert code == 2 and "recipe.yaml" in done["error"]
    write_stage2(tmp_path / "theirs", "opt")
    code, done, _ = call("model", "show", tmp_path / "theirs")
    assert code == 2 and "isthmus model import hf" in done["mend"]
