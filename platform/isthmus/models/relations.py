"""A relational head: how image tokens and words fit one another, reasoned over as a graph (Diao et al. 2021, SGRAF).

Every word gathers the image tokens that it is about; how the two differ is the word's node, how the means differ is the
global node; the nodes exchange messages; the global one is read. That relational reasoning means this graph is our
completion.

Shape letters: P pairs, K image tokens, T text tokens, E shared width, S node width, G nodes (1 + T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAK = 0.1  # SCAN's leaky ReLU of similarities


class RelationalHead(nn.Module):
    """One logit for each image-text pair.

    Args:
        embed: E of the tokens.
        width: S of the nodes.
        steps: rounds of messages.
        smoothing: inverse temperature of the words' attention to image tokens.
    """

    def __init__(self, embed: int, width: int, steps: int, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.local, self.whole = nn.Linear(embed, width), nn.Linear(embed, width)
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.key = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(steps))  # softmax sees no bias
        self.message = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.score = nn.Linear(width, 1)

    def forward(self, image_PKE: Tensor, text_PTE: Tensor, words_PT: Tensor) -> Tensor:
        """Logits, float32 [P].

        Args:
            image_PKE, text_PTE: unit vectors.
            words_PT: bool, the text tokens that are words.
        """
        context_PTE = attended(image_PKE, text_PTE, words_PT, self.smoothing)
        mean_PE = F.normalize(image_PKE.mean(1), dim=-1)
        count_P1 = words_PT.sum(1, keepdim=True).clamp(min=1)
        text_PE = F.normalize((text_PTE * words_PT.unsqueeze(2)).sum(1) / count_P1, dim=-1)
        local_PTS = F.normalize(self.local((context_PTE - text_PTE) ** 2), dim=-1)
        whole_PS = F.normalize(self.whole((mean_PE - text_PE) ** 2), dim=-1)
        nodes_PGS = torch.cat([whole_PS.unsqueeze(1), local_PTS], 1)
        there_PG = F.pad(words_PT, (1, 0), value=True)
        for query, key, message in zip(self.query, self.key, self.message, strict=True):
            scores_PGG = query(nodes_PGS) @ key(nodes_PGS).transpose(1, 2)
            weights = scores_PGG.float().masked_fill(~there_PG.unsqueeze(1), -torch.inf).softmax(2)
            nodes_PGS = F.relu(message(weights.to(nodes_PGS.dtype) @ nodes_PGS))
        return self.score(nodes_PGS[:, 0]).float().squeeze(1)


def attended(image_PKE: Tensor, text_PTE: Tensor, words_PT: Tensor, smoothing: float) -> Tensor:
    """What each word is about: a unit vector of the image tokens' mean by attention, [P, T, E] (SCAN, Lee et al. 2018).

    Similarities are leaky-rectified and, for each image token, normalised over the words, so that a token speaks to the
    words that it fits best; then a softmax over the image tokens.
    """
    sims_PKT = F.leaky_relu(image_PKE @ text_PTE.transpose(1, 2), LEAK)
    sims_PKT = F.normalize(sims_PKT * words_PT.unsqueeze(1), dim=2)
    weights = (smoothing * sims_PKT.float()).softmax(1).to(image_PKE.dtype)
    return F.normalize(weights.transpose(1, 2) @ image_PKE, dim=-1)
