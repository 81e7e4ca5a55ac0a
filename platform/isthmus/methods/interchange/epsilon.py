"""What the epsilon of the norm on the image features does to the queries.

It is 1e-5 here and in LAVIS. transformers takes that of the image encoder's blocks, 1e-6 in what is published: a token
of variance v comes out larger there by the factor 1 + 4.5e-6 / v.

Shape letters: B images, Q queries, M Q-Former width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.models.attention import ImageTokens


def noise(side: int) -> Tensor:
    """Two images of noise, float32 [2, 3, side, side], always the same."""
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def query_outputs(module: Any, image: ImageTokens) -> Tensor:
    """The queries' outputs [B, Q, M] of a stage's module."""
    found: Tensor = module.qformer(module.qformer.remember(image)).queries_BQM
    return found


@torch.no_grad()
def epsilon_difference(module: Any, eps: float) -> float | None:
    """Root mean square difference of the queries' outputs, which have unit variance, between the module as it is and
    with ``eps`` in its norm, on :func:`noise`; None where that is its epsilon already.

    Args:
        module: of stage 1 or 2, with its image encoder.
        eps: the other epsilon.
    """
    norm, own = module.ln_vision, module.ln_vision.eps
    if eps == own:
        return None
    features_BND = module.encode_images(noise(module.vision.transform.size))
    found = []
    try:
        for value in (own, eps):
            norm.eps = value
            found.append(query_outputs(module, norm(features_BND, module.qformer.queries.dtype)))
    finally:
        norm.eps = own
    return float((found[0] - found[1]).pow(2).mean().sqrt())
