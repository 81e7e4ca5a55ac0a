"""Rows without padding: of texts that differ in length, only the tokens go through the linear layers.

Captions of a batch are padded to its longest, which is about twice their mean, and a linear layer does not know padding
from words. So a pass holds its rows as one list, and the attention alone, where rows of a sequence meet, sees them as a
padded grid.

Shape letters: B sequences, S places of a sequence, R rows (places that are no padding), M width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each row of a pass stands.

    Rows are ordered by kind: the query rows of all sequences, then their text rows; so each kind is one slice.

    Attributes:
        places_R: int64, b * S + s of each row; None where the grid has no padding and is in this order already.
        sequences, length: B and S.
        queries: of the S places, so many first ones are query rows, and never padding.
    """

    places_R: Tensor | None
    sequences: int
    length: int
    queries: int

    @staticmethod
    def of(sequences: int, queries: int, mask_BT: Tensor | None) -> Packing:
        """Of ``queries`` query rows a sequence, and the text rows that ``mask_BT`` (1 at tokens) leaves.

        Reads the mask's content, which on an accelerator waits for it.
        """
        text = mask_BT.shape[1] if mask_BT is not None else 0
        length = queries + text
        if mask_BT is None or (not queries and bool(mask_BT.all())):
            return Packing(None, sequences, length, queries)
        row, token = mask_BT.nonzero(as_tuple=True)
        text_K = row * length + queries + token
        if not queries:
            return Packing(text_K, sequences, length, queries)
        first_B1 = torch.arange(sequences, device=mask_BT.device).unsqueeze(1) * length
        query_BQ = first_B1 + torch.arange(queries, device=mask_BT.device)
        return Packing(torch.cat([query_BQ.flatten(), text_K]), sequences, length, queries)

    @property
    def query_rows(self) -> int:
        """How many of the R rows are query rows; they come first."""
        return self.sequences * self.queries

    def spread(self, x_RM: Tensor) -> Tensor:
        """The padded grid [B, S, M], zero at padding."""
        if self.places_R is None:
            return x_RM.view(self.sequences, self.length, -1)
        grid = x_RM.new_zeros(self.sequences * self.length, x_RM.shape[1])
        return grid.index_copy_(0, self.places_R, x_RM).view(self.sequences, self.length, -1)

    def collect(self, x_BSM: Tensor) -> Tensor:
        """The rows [R, M] of a padded grid."""
        x = x_BSM.reshape(self.sequences * self.length, -1)
        return x if self.places_R is None else x.index_select(0, self.places_R)

    def collect_keys(self, keys_BS: Tensor | None) -> Tensor | None:
        """The rows' keys [R] of a grid's; None of None."""
        if keys_BS is None:
            return None
        return keys_BS.flatten() if self.places_R is None else keys_BS.flatten().index_select(0, self.places_R)

    def leading(self, x_RM: Tensor, length: int) -> tuple[Packing, Tensor]:
        """Each sequence's first ``length`` places alone: their packing, and their rows of ``x_RM``."""
        queries = min(self.queries, length)
        if self.places_R is None:
            first = x_RM.view(self.sequences, self.length, -1)[:, :length]
            return Packing(None, self.sequences, length, queries), first.flatten(0, 1)
        kept = (self.places_R % self.length < length).nonzero().squeeze(1)
        places = self.places_R[kept]
        moved = torch.div(places, self.length, rounding_mode="floor") * length + places % self.length
        return Packing(moved, self.sequences, length, queries), x_RM.index_select(0, kept)
