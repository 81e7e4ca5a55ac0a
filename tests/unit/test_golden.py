"""LAVIS's own numbers: losses, gradients and sampling weights of its unmodified forward on tiny random models.

Every ``*.pt`` in the folder is read, and one of no known kind fails; ``ISTHMUS_GOLDEN_DIR`` names another folder. A
file with two ranks runs in two gloo processes. Cases of which the folder holds no file are made by ``lavis_reference``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.compat import ensure_torchvision
from isthmus.config import LanguageConfig, QFormerConfig
from isthmus.contracts import Batch, Comm, LocalComm
from isthmus.losses.matching import Negatives, negative_weights
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.models.language import LanguageModel
from isthmus.models.language_base import FrozenLanguage
from isthmus.models.lavis import import_lavis, lavis_names
from isthmus.models.seq2seq import Seq2SeqLanguageModel, untie_head
from isthmus.testing.gloo import run_ranks
from lavis_reference import write_stage1, write_t5

ensure_torchvision()
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration  # noqa: E402

FOLDER = Path(os.environ.get("ISTHMUS_GOLDEN_DIR") or Path(__file__).parent.parent / "data" / "golden")
FILES = sorted(FOLDER.glob("*.pt"))
TOLERANCE = 1e-5
PAD, IGNORED = 0, -100


def read(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def kind(file: Path) -> str:
    """What a file is, by its members: ``stage1``, ``opt``, ``t5``, or in words why it is none of them."""
    try:
        golden = read(file)
    except Exception as error:
        return f"unreadable: {error}"
    if not isinstance(golden, Mapping):
        return f"no mapping but a {type(golden).__name__}"
    members = {"stage1": {"ranks", "W"}, "opt": {"opt_config", "out"}, "t5": {"t5_config", "out"}}
    found = [name for name, needed in members.items() if needed <= set(golden)]
    return found[0] if len(found) == 1 else f"of no known kind; it holds {sorted(map(str, golden))}"


def cases(golden: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recorded results of a stage-2 file by name, in the order in which they were recorded."""
    out = golden["out"]
    return {"": out} if "loss" in out else dict(out)


KINDS = {file: kind(file) for file in FILES}
STAGE1 = [f for f in FILES if KINDS[f] == "stage1"]
STAGE2 = [(f, case) for f in FILES if KINDS[f] in ("opt", "t5") for case in cases(read(f))]


def test_there_is_something_to_compare_with() -> None:
    assert FILES, f"no *.pt in {FOLDER}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_is_of_a_known_kind(file: Path) -> None:
    assert KINDS[file] in ("stage1", "opt", "t5"), f"{file.name} is {KINDS[file]}"
    assert KINDS[file] == "stage1" or cases(read(file))


def test_a_file_of_another_kind_is_noticed(tmp_path: Path) -> None:
    torch.save({"state": {}, "gpt_config": {}, "out": {}}, tmp_path / "a.pt")
    torch.save(torch.zeros(2), tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"junk")
    assert not {kind(file) for file in tmp_path.glob("*.pt")} & {"stage1", "opt", "t5"}


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
    check_stage1(file, uses)


def check_stage1(file: Path, uses: float) -> None:
    W = read(file)["W"]
    compare_stage1(file, run_ranks(stage1_rank, W, file, uses) if W > 1 else [stage1_rank(file, uses)])


def compare_stage1(file: Path, found: list[dict[str, Any]]) -> None:
    golden = read(file)
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


class GoldenTokenizer:
    """Stands in for OPT's or T5's: only the special tokens are asked for; the golden file brings its own ids."""

    def __init__(self, bos: int | None, eos: int, pad: int) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([2] if add_special_tokens else []) + [4]}


def load_opt(golden: Mapping[str, Any]) -> FrozenLanguage:
    opt = OPTForCausalLM(OPTConfig(**golden["opt_config"]))
    opt.load_state_dict(part(golden["state"], "opt_model."), strict=True)
    return LanguageModel(opt, GoldenTokenizer(2, 2, 1), LanguageConfig(weights="golden"))


def load_t5(golden: Mapping[str, Any]) -> FrozenLanguage:
    """A T5 whose output matrix is its own before the state comes, for transformers 5 ties whatever it builds."""
    state = part(golden["state"], "t5_model.")
    for repeated in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        state.setdefault(repeated, state["shared.weight"])
    own_head = not torch.equal(state["lm_head.weight"], state["shared.weight"])
    settings = {"tie_word_embeddings": not own_head, **golden["t5_config"]}
    if str(settings.get("feed_forward_proj")) == "gated-gelu":
        settings["dense_act_fn"] = "gelu"  # as Blip2T5 sets it, whatever the file's configuration says
    t5 = T5ForConditionalGeneration(T5Config(**settings))
    untie_head(t5)
    t5.load_state_dict(state, strict=True)
    assert torch.equal(t5.lm_head.weight, golden["state"].get("t5_model.lm_head.weight", t5.shared.weight))
    return Seq2SeqLanguageModel(t5, GoldenTokenizer(None, 1, PAD), LanguageConfig(weights="golden"))


def part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    T = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])


def opt_members(golden: Mapping[str, Any], case: str) -> dict[str, torch.Tensor]:
    """The case's name says how many tokens are prompt."""
    prompt = int("".join(c for c in case if c.isdigit()) or 0)
    ids, mask = padded([list(golden["ids"][f"{text}\n"]) for text in golden["texts"]], 1)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :prompt] = IGNORED
    return {"ids_BT": ids, "mask_BT": mask, "labels_BT": labels}


def t5_members(golden: Mapping[str, Any], case: str) -> dict[str, torch.Tensor]:
    """Blip2T5.forward tokenises what the encoder reads, then what the decoder says; each case is one such pair."""
    texts = t5_texts(golden)
    before, said = texts[case]
    prefix_ids, prefix_mask = padded([tokens(golden, text) for text in before], PAD)
    ids, mask = padded([tokens(golden, text) for text in said], PAD)
    members = {"ids_BT": ids, "mask_BT": mask, "labels_BT": ids.masked_fill(ids == PAD, IGNORED)}
    return members | {"prefix_ids_BT": prefix_ids, "prefix_mask_BT": prefix_mask}


def t5_texts(golden: Mapping[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """(read by the encoder, said by the decoder) for every case: one pair of calls each, or one pair for all."""
    rows, names = len(golden["image"]), list(cases(golden))
    calls = [list(call[0]) for call in golden["tok_calls"] if not isinstance(call[0], str) and len(call[0]) == rows]
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    if len(pairs) == 1:
        pairs *= len(names)
    assert len(pairs) == len(names), f"{len(calls)} calls of the tokenizer for the cases {names}"
    return dict(zip(names, pairs, strict=True))


def tokens(golden: Mapping[str, Any], text: str) -> list[int]:
    limits = [int(call[1]) for call in golden["tok_calls"] if call[1]]
    return [int(i) for i in golden["ids"][text]][: min(limits, default=None)]


@pytest.mark.parametrize(("file", "case"), STAGE2, ids=[f"{f.stem}-{case}" for f, case in STAGE2])
def test_stage2_is_lavis(file: Path, case: str) -> None:
    check_stage2(file, case)


def check_stage2(file: Path, case: str) -> None:
    golden = read(file)
    t5 = kind(file) == "t5"
    language = load_t5(golden) if t5 else load_opt(golden)
    trained = import_lavis(golden["state"])
    M, D = trained["qformer.queries"].shape[-1], trained["ln_vision.weight"].shape[0]
    layers = 1 + max(int(n.split(".")[2]) for n in trained if n.startswith("qformer.layers."))
    qformer = QFormerConfig(
        layers=layers, width=M, heads=golden.get("cfg", {}).get("heads", 4),
        feed_forward=trained["qformer.layers.0.query_ffn.up.weight"].shape[0],
        queries=trained["qformer.queries"].shape[1], dropout=0.0,
    )  # fmt: skip
    module = Blip2Stage2(Blip2Stage2Config(qformer=qformer), None, D, language, LocalComm())
    load(module, trained)
    members = (t5_members if t5 else opt_members)(golden, case)
    rows = len(golden["image"])
    valid = torch.ones(rows, dtype=torch.bool)
    terms = module.train()(Batch(torch.arange(rows), valid, features_BND=golden["image"], **members))
    terms.total.backward()
    expected = cases(golden)[case]
    assert float(terms.total.detach()) == pytest.approx(expected["loss"], abs=TOLERANCE)
    names = lavis_names(layers)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(gradients) == {names[name] for name in expected["gn"]}
    for name, gradient in expected["grad"].items():
        torch.testing.assert_close(gradients[names[name]], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    for name, norm in expected["gn"].items():
        assert float(gradients[names[name]].norm()) == pytest.approx(norm, rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("shared_calls", [False, True], ids=["calls of each case", "calls of one case"])
def test_stage2_with_t5_is_the_plain_reference(tmp_path: Path, shared_calls: bool) -> None:
    write_t5(tmp_path / "t5.pt", shared_calls=shared_calls)
    assert kind(tmp_path / "t5.pt") == "t5"
    for case in cases(read(tmp_path / "t5.pt")):
        check_stage2(tmp_path / "t5.pt", case)


@pytest.mark.parametrize("by_image", [False, True], ids=["by pair", "by image"])
def test_stage1_is_the_plain_reference(tmp_path: Path, by_image: bool) -> None:
    write_stage1(tmp_path / "stage1.pt", ranks=1, by_image=by_image)
    assert kind(tmp_path / "stage1.pt") == "stage1"
    check_stage1(tmp_path / "stage1.pt", 0.0)


def test_two_ranks_of_stage1_are_the_plain_reference(tmp_path: Path) -> None:
    files = [tmp_path / "pair.pt", tmp_path / "image.pt"]
    for file in files:
        write_stage1(file, ranks=2, by_image=file.stem == "image")
    found = run_ranks(stage1_ranks, 2, files)
    for i, file in enumerate(files):
        compare_stage1(file, [rank[i] for rank in found])


def stage1_ranks(files: list[Path]) -> list[dict[str, Any]]:
    return [stage1_rank(file, 0.0) for file in files]
