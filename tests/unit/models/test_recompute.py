"""Gradient checkpointing of a frozen language model: the same values and gradients, fewer bytes held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.config import LanguageConfig
from isthmus.contracts import Batch
from isthmus.models.language import build_language
from isthmus.models.language_base import FrozenLanguage
from isthmus.models.recompute import recompute_layers
from planning_cases import FAMILIES, kept_bytes, language_config

TEXTS = ["a red cat on the grass with a house", "blue fish"] * 4


def built(config: LanguageConfig, *, recompute: bool) -> tuple[FrozenLanguage, Batch, Tensor]:
    language = build_language(config, recompute=recompute)
    rows = torch.arange(len(TEXTS))
    prefixes = ["a photo of the", "a photo"] * 4 if language.splits else None
    batch = Batch(rows, rows >= 0, **language.token_members(TEXTS, prefixes))
    torch.manual_seed(0)
    return language, batch, torch.randn(len(TEXTS), 4, language.width, requires_grad=True)


@pytest.mark.parametrize("dropout", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_same_and_less_is_held(family: str, dropout: bool, tmp_path: Path) -> None:
    config = language_config(family, tmp_path).model_copy(update={"dropout": dropout})
    found = []
    for recompute in (False, True):
        language, batch, soft_BQL = built(config, recompute=recompute)
        language.train()
        kept = kept_bytes(lambda: language.batch_loss(soft_BQL, batch).total, language.parameters())  # noqa: B023
        torch.manual_seed(1)
        loss = language.batch_loss(soft_BQL, batch).total
        loss.backward()
        found.append((float(loss.detach()), soft_BQL.grad, kept))
    (plain, gradient, held), (again, other, less) = found
    assert again == plain
    torch.testing.assert_close(other, gradient, rtol=0, atol=1e-6)
    assert less < 0.5 * held, (less, held)  # of two layers; the output layer's share stays


def test_a_frozen_model_stays_in_eval_mode_and_generates_as_before(tmp_path: Path) -> None:
    config = language_config("opt", tmp_path)
    plain, *_ = built(config, recompute=False)
    language, batch, soft_BQL = built(config, recompute=True)
    language.train()
    language.batch_loss(soft_BQL, batch).total.backward()
    assert not any(module.training for module in language.modules())
    assert language.base == plain.base
    assert language.generate(soft_BQL, max_new_tokens=5) == plain.generate(soft_BQL, max_new_tokens=5)


def test_a_model_without_layers_that_can_be_checkpointed_is_left_alone() -> None:
    assert recompute_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) == 0
