"""How far a share among the evaluated images may be from that of all such images: 95 % intervals.

Images are what is drawn. A share with one outcome an image has Wilson's interval (Wilson 1927), which stays within 0
and 1 and is no point where all or none succeeded. A share with several outcomes an image, such as the recall of all its
captions, has the percentile bootstrap over images: captions of one image are not independent of one another.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

Z = 1.959963984540054
"""97.5 % of the standard normal distribution lie below."""

DRAWS = 2000
METHOD = f"Wilson's; with several captions an image the bootstrap of {DRAWS} draws of the images"

Interval = tuple[float, float]


def wilson(hits: float, trials: int) -> Interval:
    """95 % interval of a share that was ``hits / trials``."""
    share, z2 = hits / trials, Z * Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    # At the ends the two roots cancel but for rounding.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == trials else middle + half)


def clustered(hits_C: Tensor, owner_C: Tensor, images: int, seed: int = 0) -> Interval:
    """95 % interval of the mean of ``hits_C``, outcomes 0 or 1 of which each image owns some.

    Args:
        owner_C: int64, the image of each outcome.
        images: how many there are.
        seed: of the draws.
    """
    hit = np.bincount(owner_C.numpy(), weights=hits_C.double().numpy(), minlength=images)
    count = np.bincount(owner_C.numpy(), minlength=images)
    total, outcomes = float(hit.sum()), int(count.sum())
    if count.max() == 1:
        return wilson(total, outcomes)
    if total in (0.0, float(outcomes)):  # every draw would be the same
        return wilson(images if total else 0, images)
    random = np.random.default_rng(seed)
    shares = np.empty(DRAWS)
    for draw in range(DRAWS):
        times = np.bincount(random.integers(0, images, images), minlength=images)
        shares[draw] = (times @ hit) / (times @ count)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def rounded(interval: Interval) -> list[float]:
    """As results have it: [low, high]."""
    return [round(interval[0], 5), round(interval[1], 5)]
