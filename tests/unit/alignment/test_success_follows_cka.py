"""Two frozen encoders of one latent (CKA high) can be joined by projectors; of independent latents (CKA low) not.

The encoders are random networks that are never trained; what they see is all that differs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.alignment.cka import Covariance, Similarity, similarity
from isthmus.config import TextConfig, VisionConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.evaluation.retrieval import retrieve
from isthmus.methods.parts import seeded
from isthmus.methods.projector import Projector, ProjectorConfig

LATENT, WIDTH, TRAIN, HELD_OUT = 8, 32, 768, 200


def frozen(latent: Tensor, seed: int) -> Tensor:
    """Features of a random network of two layers, with some noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(a, WIDTH, generator=generator) / a**0.5 for a in (LATENT, WIDTH))
    return torch.tanh(latent @ first) @ second + 0.05 * torch.randn(len(latent), WIDTH, generator=generator)


class Table(nn.Module):
    """A frozen text encoder whose text number n has row n."""

    width = WIDTH

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states, requires_grad=False)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([[int(text)] for text in texts])
        return rows, torch.ones_like(rows)

    def forward(self, rows: Tensor, _mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.states[rows], self.states[rows[:, 0]]


def joined(images: Tensor, texts: Tensor) -> tuple[Similarity, dict[str, float]]:
    """CKA of the training pairs, and held-out retrieval after 120 steps."""
    config = ProjectorConfig(vision=VisionConfig(), text=TextConfig(), embed=32, dropout=0.0)
    with seeded(0):
        module = Projector(config, None, WIDTH, Table(texts), LocalComm()).train()  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    random = np.random.default_rng(0)
    for step in range(120):
        rows = random.choice(TRAIN, 128, replace=False)
        said, valid = tuple(str(row) for row in rows), torch.ones(128, dtype=torch.bool)
        batch = Batch(torch.from_numpy(rows), valid, step, features_BND=images[rows].unsqueeze(1), texts=said)
        optimizer.zero_grad()
        module(batch).total.backward()
        optimizer.step()
    module.eval()
    held = range(TRAIN, TRAIN + HELD_OUT)
    vectors = module.embed_images(images[TRAIN:].unsqueeze(1)), module.embed_texts([str(n) for n in held])
    alike = similarity(Covariance(images[:TRAIN].numpy()), Covariance(texts[:TRAIN].numpy()))
    return alike, retrieve(*vectors, torch.arange(HELD_OUT)).metrics()


def test_alignment_succeeds_where_cka_is_high_and_nowhere_else() -> None:
    generator = torch.Generator().manual_seed(5)
    one, other = (torch.randn(TRAIN + HELD_OUT, LATENT, generator=generator) for _ in range(2))
    images = frozen(one, 1)
    (alike, good), (apart, bad) = joined(images, frozen(one, 2)), joined(images, frozen(other, 2))
    assert alike.debiased > 0.3 > 0.02 > abs(apart.debiased)
    assert alike.debiased > 20 * alike.debiased_permuted_most
    assert good["tr_at_1"] > 0.4 and good["ir_at_1"] > 0.4  # chance is 0.005
    assert bad["tr_at_5"] < 0.1 and bad["ir_at_5"] < 0.1  # chance is 0.025
