"""LAVIS's own numbers: losses, gradients and sampling weights of its unmodified forward on tiny random models.

Every ``*.pt`` in the folder is read; ``ISTHMUS_GOLDEN_DIR`` names another folder. A file with two ranks runs in two
gloo processes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import LanguageConfig, QFormerConfig
from isthmus.contracts import Batch, Comm, LocalComm
from isthmus.losses.matching import Negatives, negative_weights
from isthmus.methods.blip2_stage1 import Blip2Stage1, Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.models.lavis import import_lavis, lavis_names
from isthmus.testing.gloo import run_ranks

FOLDER = Path(os.environ.get("ISTHMUS_GOLDEN_DIR") or Path(__file__).parent.parent / "data" / "golden")
FILES = sorted(FOLDER.glob("*.pt"))
TOLERANCE = 1e-5


def read(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


STAGE1 = [f for f in FILES if "stage1" in f.name]
OPT = [f for f in FILES if "stage2" in f.name and "opt" in f.name]


def shape(cfg: dict[str, int]) -> QFormerConfig:
    return QFormerConfig(
        layers=cfg["layers"],
        width=cfg["hidden"],
        heads=cfg["heads"],
        feed_forward=cfg["inter"],
        queries=cfg["Q"],
        dropout=0.0,
        embed=cfg.get("proj", 16),
    )


def load(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Every trainable tensor of ours from theirs, and every one of theirs used."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert set(state) == set(parameters)
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


class NoTokenizer:
    sep_token_id = 2

    def __len__(self) -> int:
        return 60


def stage1_rank(file: Path, uses: float) -> dict[str, Any]:
    """This rank's losses, sampling weights and gradients (averaged over ranks, as training does)."""
    golden = read(file)
    comm: Comm = LocalComm()
    if golden["W"] > 1:
        from isthmus.training.comm import TorchComm

        comm = TorchComm()
    cfg, record = golden["cfg"], golden["ranks"][comm.rank]
    by_image = bool(golden["with_image_id"])
    config = Blip2Stage1Config(qformer=shape(cfg), itc_same_image=by_image, itg_mean="rank")
    module = Blip2Stage1(config, None, cfg["enc"], NoTokenizer(), comm, 0, vocab=cfg["vocab"] - 1, positions=32)
    load(module, import_lavis(golden["state"]))
    module._uses = lambda with_itm: uses  # type: ignore[method-assign]
    weights = {}

    def recorded(
        i2t: torch.Tensor, t2i: torch.Tensor, forbidden: torch.Tensor, valid: torch.Tensor, *_: Any, **__: Any
    ):
        weights["w_i2t"], weights["w_t2i"] = negative_weights(i2t, forbidden), negative_weights(t2i, forbidden)
        return Negatives(torch.tensor(record["neg_img"]), torch.tensor(record["neg_txt"]), valid)

    module.mine = recorded  # type: ignore[assignment]
    rows = slice(comm.rank * golden["N"] // comm.world_size, (comm.rank + 1) * golden["N"] // comm.world_size)
    ids = torch.as_tensor(golden["image_ids"]) if by_image else torch.arange(golden["N"])
    batch = Batch(
        ids[rows],
        torch.ones(len(ids[rows]), dtype=torch.bool),
        features_BND=golden["image"][rows],
        ids_BT=golden["ids"][rows],
        mask_BT=golden["att"][rows],
    )
    terms = module.train()(batch)
    terms.total.backward()
    gradients = {
        name: comm.sum(p.grad) / comm.world_size for name, p in module.named_parameters() if p.grad is not None
    }
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    return {"total": terms.total.detach(), **terms.parts, **weights, "gradients": gradients, "trainable": trainable}


@pytest.mark.parametrize("uses", [0.0, 1e9], ids=["direct", "projected"])
@pytest.mark.parametrize("file", STAGE1, ids=lambda f: f.stem)
def test_stage1_is_lavis(file: Path, uses: float) -> None:
    golden = read(file)
    found = run_ranks(stage1_rank, golden["W"], file, uses) if golden["W"] > 1 else [stage1_rank(file, uses)]
    names = lavis_names(golden["cfg"]["layers"])
    for ours, theirs in zip(found, golden["ranks"], strict=True):
        for part, name in (("total", "loss"), ("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
            assert float(ours[part]) == pytest.approx(theirs[name], abs=TOLERANCE), part
        for name in ("w_i2t", "w_t2i"):
            torch.testing.assert_close(ours[name], torch.as_tensor(theirs[name]), rtol=0, atol=TOLERANCE)
    gradients = found[0]["gradients"]
    assert set(gradients) == found[0]["trainable"] == {names[name] for name in golden["grad_norms"]}
    for name, expected in golden["grads"].items():
        torch.testing.assert_close(
            gradients[names[name]].reshape(expected.shape), expected, rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
    for name, norm in golden["grad_norms"].items():
        assert float(gradients[names[name]].norm()) == pytest.approx(norm, rel=TOLERANCE, abs=TOLERANCE), name


def test_there_is_something_to_compare_with() -> None:
    assert STAGE1 and OPT


class GoldenTokenizer:
    """Stands in for OPT's: only the special tokens are asked for; the golden file brings its own ids."""

    bos_token_id, eos_token_id, pad_token_id = 2, 2, 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([2] if add_special_tokens else []) + [4]}


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("file", OPT, ids=lambda f: f.stem)
def test_stage2_is_lavis(file: Path, prompt: int) -> None:
    from isthmus.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import OPTConfig, OPTForCausalLM

    from isthmus.models.language import LanguageModel

    golden = read(file)
    state = golden["state"]
    opt = OPTForCausalLM(OPTConfig(**golden["opt_config"]))
    theirs = {name.removeprefix("opt_model."): t for name, t in state.items() if name.startswith("opt_model.")}
    opt.load_state_dict(theirs, strict=True)
    language = LanguageModel(opt, GoldenTokenizer(), LanguageConfig(weights="golden"))
    trained = import_lavis(state)
    M, D = trained["qformer.queries"].shape[-1], trained["ln_vision.weight"].shape[0]
    layers = 1 + max(int(n.split(".")[2]) for n in trained if n.startswith("qformer.layers."))
    qformer = QFormerConfig(
        layers=layers, width=M, heads=4, feed_forward=trained["qformer.layers.0.query_ffn.up.weight"].shape[0],
        queries=trained["qformer.queries"].shape[1], dropout=0.0,
    )  # fmt: skip
    module = Blip2Stage2(Blip2Stage2Config(qformer=qformer), None, D, language, LocalComm())
    load(module, trained)
    rows = [golden["ids"][f"{text}\n"] for text in golden["texts"]]
    T = max(map(len, rows))
    ids = torch.tensor([row + [1] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    valid = torch.ones(len(ids), dtype=torch.bool)
    batch = Batch(
        torch.arange(len(ids)), valid, features_BND=golden["image"], ids_BT=ids, mask_BT=mask, labels_BT=labels
    )
    terms = module.train()(batch)
    terms.total.backward()
    expected = golden["out"][f"opt_prompt{prompt}"]
    assert float(terms.total.detach()) == pytest.approx(expected["loss"], abs=TOLERANCE)
    names = lavis_names(layers)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(gradients) == {names[name] for name in expected["gn"]}
    for name, gradient in expected["grad"].items():
        torch.testing.assert_close(gradients[names[name]], gradient, rtol=TOLERANCE, atol=TOLERANCE)
    for name, norm in expected["gn"].items():
        assert float(gradients[names[name]].norm()) == pytest.approx(norm, rel=TOLERANCE, abs=TOLERANCE), name
