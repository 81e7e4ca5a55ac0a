"""Two ranks must be one rank: losses, metrics, gradients and the parameters after some steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import CompressionConfig
from isthmus.contracts import Comm, LocalComm
from isthmus.losses.contrastive import contrast
from isthmus.methods import METHODS
from isthmus.methods.blip2_stage1_config import LossWeights
from isthmus.methods.co_optimise_config import AttentionConfig, CrossConfig, MatchConfig, WeightingConfig
from isthmus.testing.gloo import run_ranks
from method_cases import QFORMER, batch, build, dropped, recipe, samples

pytestmark = pytest.mark.timeout(600)  # two processes import all methods, on a machine that may be busy
Results = tuple[dict[str, Any], list[dict[str, Any]]]
GLOBAL, STEPS = 8, 20
LR = dict.fromkeys(
    ("blip2_stage2", "stage 2, in parts", "guided, scheduled"), 0.0005
)  # steep: larger steps blow up rounding, of stage 2's random language model, of guided's choice among tokens
LR_ELSE = 0.005
AWAKE = {"attention": AttentionConfig(heads=4, kind="top_k", top_k=3, zero_init=False)}
# Odd ones: nine tenths of the text on one rank, a padding row, image ids, losses left out, both gathers.
DROPPED = QFORMER.model_copy(update={"dropout": 0.1})
SHRINKING = CompressionConfig(layers=(0, 1), keep=(0.5,), warmup_steps=2, shrink_steps=5)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, dropped(name)) for name in sorted(METHODS)},
    "stage 1, full gather": ("blip2_stage1", {"itc_gather": "full"}),
    "stage 1, image ids": ("blip2_stage1", {"itc_same_image": True}),
    "stage 1, scheduled": ("blip2_stage1", {"itm_every": 2, "itg_every": 3, "weights": LossWeights(itm=0.5)}),
    "stage 1, in parts": ("blip2_stage1", {"qformer": DROPPED}),
    "stage 2, in parts": ("blip2_stage2", {"qformer": DROPPED}),
    "guided, scheduled": (
        "guided",
        {
            "pairs_every": 2,
            "mlm_every": 3,
            "compression": SHRINKING,
            "itc_same_image": True,
            "itc_gather": "detached",
        },
    ),
    "guided, in parts": ("guided", dropped("guided")),
    "projector, in parts": ("projector", {"dropout": 0.1}),
    "co-optimised, in parts": (
        "co_optimise",
        {"dropout": 0.1, "cross": CrossConfig(margin=0.2), "weighting": WeightingConfig(kind="uncertainty")},
    ),
    "co-optimised, apart": (
        "co_optimise",
        {"shared": False, "itm": MatchConfig(), "weighting": WeightingConfig(kind="dwa", period=3), **AWAKE},
    ),
    "co-optimised, matching alone": (
        "co_optimise",
        {"alpha": 0.0, "beta": 0.0, "attention": AttentionConfig(heads=4, kind="favor", features=32)},
    ),
    "co-optimised, to the letter": (
        "co_optimise",
        {
            "attention": AttentionConfig(projections=False),
            "itm": MatchConfig(),
            "symmetric": False,
            "beta": 0.01,
            "cross": CrossConfig(loss="literal", reduction="sum"),
            "normalise": False,
            "itc_gather": "detached",
        },
    ),
    "projector, detached": ("projector", {"itc_gather": "detached", "text_features": "tokens"}),
}


def train(folder: Path, comm: Comm) -> dict[str, Any]:
    """Some plain gradient steps of every case on this rank's share of one global batch."""
    found = {}
    for name, (method, changes) in CASES.items():
        stage = build(recipe(method, folder, **changes), comm)
        if name.endswith("in parts") and comm.world_size > 1:  # one rank takes its rows whole
            stage.module.micro_batch = 3
        rows = samples(stage, GLOBAL)
        if changes.get("itc_same_image"):
            rows[5] = replace(rows[5], image_id=rows[1].id, features_ND=rows[1].features_ND)  # on the other rank
        share = GLOBAL // comm.world_size
        own = rows[comm.rank * share : (comm.rank + 1) * share]
        padding = 1 if comm.rank == comm.world_size - 1 else 0
        parameters = {n: p for n, p in stage.module.named_parameters() if p.requires_grad}
        history = []
        for step in range(STEPS):
            stage.module.zero_grad()
            terms = stage.module.train()(batch(stage, own, step, padding))
            terms.total.backward()
            logged = {**terms.parts, **terms.metrics}
            history.append({n: float(comm.sum(v)) / comm.world_size for n, v in logged.items()})
            gradients = {n: comm.sum(p.grad) / comm.world_size for n, p in parameters.items()}
            if step == 0:
                first = gradients
            with torch.no_grad():
                for n, p in parameters.items():
                    p.sub_(LR.get(name, LR_ELSE) * gradients[n])
        found[name] = {
            "history": history,
            "first": first,
            "after": {n: p.detach().clone() for n, p in parameters.items()},
        }
    return found


def train_on_ranks(folder: Path) -> dict[str, Any]:
    from isthmus.training.comm import TorchComm

    gather = {full: gather_gradient(full) for full in (False, True)}
    return {**train(folder, TorchComm()), "gather": gather, "own rows": gather_gradient(True, own_rows=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("parts")
    return train(folder, LocalComm()), run_ranks(train_on_ranks, 2, folder, timeout_s=500)


@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_equal_one(case: str, results: Results) -> None:
    one, two = results[0][case], results[1][0][case]
    for step, (ours, theirs) in enumerate(zip(one["history"], two["history"], strict=True)):
        assert theirs == pytest.approx(ours, abs=1e-5), f"step {step}"
    torch.testing.assert_close(two["first"], one["first"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["after"], one["after"], rtol=0, atol=1e-5)
    assert results[1][1][case]["history"] == two["history"]


def unit(seed: int) -> torch.Tensor:
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def gather_gradient(full: bool, own_rows: bool = False) -> torch.Tensor:
    from isthmus.training.comm import TorchComm

    comm = TorchComm()
    image, text = unit(0), unit(1)
    mine = slice(comm.rank * 3, comm.rank * 3 + 3)
    own = image[mine].clone().requires_grad_()
    valid = torch.ones(3, dtype=torch.bool)
    loss = contrast(own, text[mine, 0], torch.tensor([0.1]), valid, comm, full_gradient=full, own_rows=own_rows).loss
    loss.backward()
    return own.grad / comm.world_size


def test_full_gather_is_autograd_of_the_global_batch_and_detached_is_not(results: Results) -> None:
    image, text = unit(0), unit(1)
    image.requires_grad_()
    sims, target = torch.einsum("iqe,je->ijq", image, text[:, 0]).amax(-1) / 0.1, torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    ((cross_entropy(sims, target) + cross_entropy(sims.T, target)) / 2).backward()
    full = torch.cat([rank["gather"][True] for rank in results[1]])
    torch.testing.assert_close(full, image.grad, rtol=0, atol=1e-6)
    detached = torch.cat([rank["gather"][False] for rank in results[1]])
    assert not torch.allclose(detached, image.grad, atol=1e-3)


def test_contrast_over_own_rows_is_autograd_of_each_ranks_batch(results: Results) -> None:
    image, text = unit(0), unit(1)
    image.requires_grad_()
    cross_entropy, target = torch.nn.functional.cross_entropy, torch.arange(3)
    losses = []
    for mine in (slice(0, 3), slice(3, 6)):
        sims = torch.einsum("iqe,je->ijq", image[mine], text[mine, 0]).amax(-1) / 0.1
        losses.append((cross_entropy(sims, target) + cross_entropy(sims.T, target)) / 2)
    torch.stack(losses).mean().backward()
    found = torch.cat([rank["own rows"] for rank in results[1]])
    torch.testing.assert_close(found, image.grad, rtol=0, atol=1e-6)
