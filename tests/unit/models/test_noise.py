"""Dropout by keys: the right share, the same for the same row wherever it is, and different everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.config import QFormerConfig
from isthmus.contracts import LocalComm
from isthmus.data.order import mix
from isthmus.models.attention import ImageTokens
from isthmus.models.noise import KeyedDropout, batch_keys, number_sites, row_keys, subkeys
from isthmus.models.qformer import QFormer

P, B, N, D, V, T = 0.3, 6, 10, 12, 30, 7
SHAPE = QFormerConfig(layers=3, width=16, heads=4, feed_forward=24, queries=3, dropout=P, embed=8)


def rows(*numbers: int) -> torch.Tensor:
    return row_keys(1, 2, 3, torch.tensor(numbers))


def dropout(p: float = P, site: int = 0) -> KeyedDropout:
    out = KeyedDropout(p).train()
    out.site = site
    return out


def test_the_share_is_right_and_the_mean_stays() -> None:
    x = torch.ones(4000, 500)
    seen = dropout()(x, rows(*range(4000)))
    assert seen.unique().tolist() == pytest.approx([0.0, 1 / (1 - P)])
    # Of rows: the table's own deviation and 4000 x 500 draws that overlap somewhat; six standard errors of the former.
    assert abs(float((seen == 0).float().mean()) - P) < 6 * (P * (1 - P) / 2**22) ** 0.5 + 1e-3
    assert abs(float(seen.mean()) - 1) < 2e-3
    by_column = (seen == 0).float().mean(0)
    assert float((by_column - P).abs().max()) < 6 * (P * (1 - P) / 4000) ** 0.5


def test_masks_of_two_rows_sites_steps_or_passes_agree_by_chance_only() -> None:
    x, numbers = torch.ones(2000, 200), torch.arange(2000)
    keys = row_keys(1, 2, 3, numbers)
    first = dropout()(x, keys) == 0
    chance = P * P + (1 - P) * (1 - P)
    others = {
        "row": dropout()(x, keys.roll(1)),
        "site": dropout(site=1)(x, keys),
        "seed": dropout()(x, row_keys(2, 2, 3, numbers)),
        "step": dropout()(x, row_keys(1, 3, 3, numbers)),
        "pass": dropout()(x, row_keys(1, 2, 4, numbers)),
    }
    for name, other in others.items():
        agreement = float((first == (other == 0)).float().mean())
        assert abs(agreement - chance) < 0.005, name
    assert torch.equal(first, dropout()(x, keys) == 0)


def test_asleep_or_without_keys_it_is_torchs() -> None:
    x = torch.randn(5, 6)
    assert dropout().eval()(x, rows(*range(5))) is x
    assert dropout(0.0)(x, rows(*range(5))) is x
    torch.manual_seed(0)
    seen = dropout()(x, None)
    torch.manual_seed(0)
    assert torch.equal(seen, torch.nn.functional.dropout(x, P))


def test_gradients_pass_where_values_do() -> None:
    x = torch.randn(50, 20, requires_grad=True)
    seen = dropout()(x, rows(*range(50)))
    seen.sum().backward()
    assert torch.equal(x.grad, torch.where(seen != 0, torch.tensor(1 / (1 - P)), torch.tensor(0.0)))


def test_keys_are_those_of_any_process() -> None:
    class Second(LocalComm):
        rank = 1

    cpu = torch.device("cpu")
    whole = batch_keys(5, 6, 7, 8, LocalComm(), cpu)
    assert torch.equal(batch_keys(5, 6, 7, 4, Second(), cpu), whole[4:])
    assert len(whole.unique()) == 8


def test_subkeys_are_splitmix64() -> None:
    """Against numpy's unsigned arithmetic, which the order of samples is drawn with."""
    for number in (0, 1, 12345, 2**62):
        assert np.int64(np.uint64(mix(number))) == int(subkeys(torch.tensor(number), 0))


def test_every_place_has_a_site_of_its_own() -> None:
    qformer = QFormer(SHAPE, D, V)
    sites = [m.site for m in qformer.modules() if isinstance(m, KeyedDropout)]
    assert len(sites) == len(set(sites)) == 1 + 3 * 4 + 2 * 2, "embedding; attention twice, two FFNs; crossing twice"
    one, two = torch.nn.Sequential(KeyedDropout(0.1)), torch.nn.Sequential(KeyedDropout(0.1), KeyedDropout(0.1))
    number_sites(one, two)
    assert [m.site for m in (*one, *two)] == [0, 1, 2]


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(0)
    return QFormer(SHAPE, D, V, positions=20).train()


def passes(qformer: QFormer, some: slice, longest: int, uses: float = 0.0) -> list[torch.Tensor]:
    """All kinds of pass over some of the rows, their texts padded to ``longest``."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(B, N, D, generator=generator)[some]
    ids = torch.randint(1, V, (B, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor([7, 3, 5, 2, 6, 4]).unsqueeze(1)).long()
    ids, mask = (torch.nn.functional.pad(x, (0, longest - T))[some] for x in (ids, mask))
    keys = [row_keys(0, 0, purpose, torch.arange(B))[some] for purpose in range(4)]
    memory = qformer.remember(ImageTokens(image), uses)
    seen = qformer(memory, noise_B=keys[0])
    joint = qformer(memory, ids, mask, noise_B=keys[2])
    text = qformer(None, ids, mask, past=seen.past, noise_B=keys[3]).text_BTM
    real = mask.bool()
    return [
        seen.queries_BQM,
        qformer.pooled_text(ids, mask, keys[1]),
        joint.queries_BQM,
        torch.cat([row[keep] for row, keep in zip(joint.text_BTM, real, strict=True)]),
        torch.cat([row[keep] for row, keep in zip(text, real, strict=True)]),
    ]


def test_a_row_does_not_notice_who_is_beside_it(qformer: QFormer) -> None:
    """Other rows on other ranks, other padding, the other form of cross-attention: the same masks."""
    whole = passes(qformer, slice(None), T)
    assert not torch.allclose(whole[0][0], whole[0][1]), "rows draw masks of their own"
    halves = [passes(qformer, part, T + 4) for part in (slice(0, 2), slice(2, 6))]
    for name, one in enumerate(whole):
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), one, rtol=0, atol=1e-5)
    for one, two in zip(whole, passes(qformer, slice(None), T, uses=1e9), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_recomputed_activations_drop_the_same(qformer: QFormer) -> None:
    torch.manual_seed(0)
    again = QFormer(SHAPE, D, V, positions=20, recompute=True).train()
    gradients = []
    for model in (qformer, again):
        sum(out.square().sum() for out in passes(model, slice(None), T)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
