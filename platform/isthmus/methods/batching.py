"""From samples to the tensors every method needs: chosen captions, stacked pixels or features, validity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.contracts import Batch, Sample
from isthmus.data.transforms import clean_caption
from isthmus.losses.counting import uniform

CAPTION_DRAW = 2  # sets the draw of captions apart from those of negatives
PREFIX_DRAW = 3  # and that of the place where a caption is split from both


def choose_caption(sample: Sample, seed: int, epoch: int) -> str:
    """One of the sample's captions for this visit, cleaned; a pure function of (seed, visit, sample id).

    A sample without captions (a padding row) gives an empty one.
    """
    if not sample.captions:
        return ""
    u = float(uniform(seed, sample.visit_in(epoch), sample.id, CAPTION_DRAW))
    return clean_caption(sample.captions[int(u * len(sample.captions))])


def own_tokenizer(tokenizer: Any) -> Any:
    """A copy for a collate function, which works in a thread of its own: a fast tokenizer keeps the padding and
    truncation of its last call, so two threads cannot share one."""
    return copy.deepcopy(tokenizer)


def split_caption(text: str, sample_id: int, seed: int, visit: int) -> tuple[str, str]:
    """(prefix, suffix) of a caption for prefix language modelling: its first k words and the rest.

    k is uniform in 0 .. n - 1 for n words, so that the suffix is never empty; a pure function of (seed, visit, sample
    id). BLIP-2 (Li et al. 2023, section 3.3) splits each caption and does not say where.
    """
    words = text.split()
    k = int(float(uniform(seed, visit, sample_id, PREFIX_DRAW)) * len(words))
    return " ".join(words[:k]), " ".join(words[k:])


def cut_captions(texts: Sequence[str], limit: int, tokens: Callable[[str], Sequence[int]]) -> Tensor:
    """bool [B]: captions of more than ``limit`` tokens, special ones included. No token is shorter than a byte, so most
    captions need not be counted."""
    special = len(tokens(""))
    return torch.tensor([len(text.encode()) > limit - special and len(tokens(text)) > limit for text in texts])


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """int64 ids and mask [B, T], padded on the right to the longest text."""
    tokens = tokenizer(list(texts), padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def stack(samples: Sequence[Sample], step: int, epoch: int) -> dict[str, Any]:
    """The members of a :class:`isthmus.contracts.Batch` that do not depend on the method.

    A sample with a negative id, or with neither pixels nor features, becomes a row of zeros that is not valid.
    """
    pixels = _stack([sample.pixels_CHW for sample in samples])
    features = _stack([sample.features_ND for sample in samples])
    if pixels is None and features is None:
        raise ValueError("a batch holds not one image")
    valid = [s.id >= 0 and (s.pixels_CHW is not None or s.features_ND is not None) for s in samples]
    return {
        "sample_ids_B": torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        "image_ids_B": torch.tensor(
            [sample.id if sample.image_id is None else sample.image_id for sample in samples], dtype=torch.int64
        ),
        "valid_B": torch.tensor(valid, dtype=torch.bool),
        "step": step,
        "epoch": epoch,
        "pixels_BCHW": pixels,
        "features_BND": features,
        **_sounds(samples),
    }


def _sounds(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Patches of the samples' sounds and their mask, where there are any."""
    values = _stack([sample.audio_NF for sample in samples])
    masks = _stack([sample.audio_mask_N for sample in samples])
    return {} if values is None or masks is None else {"audio_BNF": values, "audio_mask_BN": masks.long()}


def _stack(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    first = next((array for array in arrays if array is not None), None)
    if first is None:
        return None
    whole = _whole(arrays)
    if whole is not None:
        return torch.from_numpy(whole)
    out = np.zeros((len(arrays), *first.shape), dtype=first.dtype)
    for row, array in zip(out, arrays, strict=True):
        if array is not None:
            row[...] = array
    return torch.from_numpy(out)


def _whole(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The array of which ``arrays`` are all rows in order, if there is one: it is the batch already."""
    first = arrays[0]
    base = first.base if first is not None else None
    if first is None or not isinstance(base, np.ndarray) or base.shape != (len(arrays), *first.shape):
        return None
    if not (base.flags.c_contiguous and base.flags.writeable and base.dtype == first.dtype):
        return None
    expected = base[:].__array_interface__["data"][0]
    for array in arrays:
        if array is None or array.base is not base or array.shape != first.shape or not array.flags.c_contiguous:
            return None
        if array.__array_interface__["data"][0] != expected:
            return None
        expected += array.nbytes
    return base


class CollateCaptions:
    """Samples -> Batch with BERT tokens. Picklable."""

    def __init__(self, tokenizer: Any, max_length: int, seed: int) -> None:
        tokenizer = own_tokenizer(tokenizer)
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        texts = tuple(choose_caption(sample, self.seed, epoch) for sample in samples)
        ids_BT, mask_BT = tokenise(self.tokenizer, texts, self.max_length)
        cut_B = cut_captions(texts, self.max_length, lambda text: self.tokenizer(text, verbose=False)["input_ids"])
        return Batch(**stack(samples, step, epoch), ids_BT=ids_BT, mask_BT=mask_BT, texts=texts, cut_B=cut_B)
