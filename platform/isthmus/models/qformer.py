"""The Q-Former of BLIP-2 (Li et al. 2023, section 3.1): learned queries that read a frozen image encoder's tokens.

One BERT-shaped, post-norm transformer over two kinds of row. Query rows and text rows share self-attention; only query
rows cross-attend to the image, in every ``cross_every``-th layer; each kind has its own feed-forward network. Which
rows see which decides the pass:

========  ======================  ==================================  ==================
pass      call                    self-attention                      used by
========  ======================  ==================================  ==================
image     image                   queries <-> queries                 ITC, stage 2
text      ids                     text <-> text                       ITC
joint     image, ids              all <-> all                         ITM
generate  image, ids, causal      queries blind to text; text sees    ITG, one pass
          or ids, past            queries and earlier text            ITG, cached queries
========  ======================  ==================================  ==================

Rows are held without padding (see :mod:`isthmus.models.packing`).

Shape letters: B batch, N image tokens, D image width, Q queries, T text tokens, R rows of all sequences without
padding, M width, V vocabulary, K chosen rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.config import QFormerConfig
from isthmus.errors import WeightsError
from isthmus.models.attention import CrossAttention, ImageMemory, ImageTokens, KeyValue, SelfAttention
from isthmus.models.noise import KeyedDropout, number_sites, subkeys
from isthmus.models.packing import Packing

EPS = 1e-12  # BERT's
POSITIONS = 512  # BERT's
INIT_STD = 0.02


@dataclass(frozen=True)
class QFormerOutput:
    """Last hidden states of the rows that were given (of padding: zero), and each layer's keys and values for a later
    cached pass."""

    queries_BQM: Tensor | None
    text_BTM: Tensor | None
    past: tuple[KeyValue, ...]


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear, dropout, residual, post-norm."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x_RM: Tensor, noise_R: Tensor | None = None) -> Tensor:
        return self.norm(self.dropout(self.down(nn.functional.gelu(self.up(x_RM))), noise_R) + x_RM)


class QFormerLayer(nn.Module):
    """Self-attention over all rows, cross-attention of the query rows, one feed-forward network per kind of row."""

    def __init__(self, config: QFormerConfig, image_width: int, crosses: bool, text: bool) -> None:
        super().__init__()
        M, inner, p = config.width, config.feed_forward, config.dropout
        self.attention = SelfAttention(M, config.heads, p, EPS)
        self.cross = CrossAttention(M, image_width, config.heads, p, EPS) if crosses else None
        self.query_ffn = FeedForward(M, inner, p)
        self.text_ffn = FeedForward(M, inner, p) if text else None

    def forward(
        self,
        x_RM: Tensor,
        packing: Packing,
        allowed: Tensor | None,
        image: ImageTokens | None,
        kv: KeyValue | None,
        past: KeyValue | None,
        leading: int | None = None,
        noise_BS: Tensor | None = None,
    ) -> tuple[Tensor, Packing, KeyValue]:
        """``x_RM`` holds all query rows, then all text rows; either may be none. ``leading`` leaves only so many first
        places of each sequence."""
        x_RM, packing, keys_values = self.attention(x_RM, packing, allowed, past, leading, noise_BS)
        noise_BS = noise_BS[:, : packing.length] if noise_BS is not None else None
        noise_R = packing.collect_keys(noise_BS)
        queries, parts = packing.query_rows, []
        if queries:
            query_BQM = x_RM[:queries].view(packing.sequences, packing.queries, -1)
            if self.cross is not None and image is not None:
                noise_BQ = noise_BS[:, : packing.queries] if noise_BS is not None else None
                query_BQM = self.cross(query_BQM, image, kv, noise_BQ)
            parts.append(self.query_ffn(query_BQM.flatten(0, 1), noise_R[:queries] if noise_R is not None else None))
        if len(x_RM) > queries and self.text_ffn is not None:
            parts.append(self.text_ffn(x_RM[queries:], noise_R[queries:] if noise_R is not None else None))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), packing, keys_values


class LanguageHead(nn.Module):
    """BERT's prediction head: Linear, GELU, norm, then the word embeddings as output matrix, and a bias.

    ``words`` is the embedding matrix itself, registered here a second time: tied, and whole under sharding.
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        V, M = words.shape
        self.dense, self.norm = nn.Linear(M, M), nn.LayerNorm(M, eps=EPS)
        self.words, self.bias = words, nn.Parameter(torch.zeros(V))

    def forward(self, x_KM: Tensor) -> Tensor:
        """Logits [K, V]."""
        return nn.functional.linear(self.norm(nn.functional.gelu(self.dense(x_KM))), self.words, self.bias)


class QFormer(nn.Module):
    """Queries, transformer and text branch.

    Args:
        config: shape.
        image_width: D.
        vocab: V of the tokenizer; the embedding has one row more, ``[DEC]``, the start of generation. None builds no
            text branch (stage 2), so that no parameter is left without a gradient.
        head: with the language-model head of ITG.
        positions: length of the position table.
        recompute: gradient checkpointing, layer by layer.
    """

    def __init__(
        self,
        config: QFormerConfig,
        image_width: int,
        vocab: int | None,
        *,
        head: bool = True,
        positions: int = POSITIONS,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        M = config.width
        self.queries = nn.Parameter(torch.empty(1, config.queries, M))
        self.embedding_norm, self.dropout = nn.LayerNorm(M, eps=EPS), KeyedDropout(config.dropout)
        self.words = nn.Embedding(vocab + 1, M) if vocab is not None else None
        self.positions = nn.Embedding(positions, M) if vocab is not None else None
        self.layers: list[QFormerLayer] = nn.ModuleList(  # type: ignore[assignment]
            QFormerLayer(config, image_width, i % config.cross_every == 0, vocab is not None)
            for i in range(config.layers)
        )
        self.lm_head = LanguageHead(self.words.weight) if self.words is not None and head else None
        self._initialise()
        number_sites(self)

    @property
    def dec_id(self) -> int:
        """Token id of ``[DEC]``."""
        assert self.words is not None
        return self.words.num_embeddings - 1

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, INIT_STD)
        self.copy_text_ffn()

    def copy_text_ffn(self) -> None:
        """The query feed-forward networks start as copies of the text's."""
        for layer in self.layers:
            if layer.text_ffn is not None:
                layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())

    def remember(self, image: ImageTokens, uses: float = 1.0) -> ImageMemory:
        """What passes over these images read, made once.

        Args:
            image: the encoder's tokens, in this module's dtype.
            uses: in how many passes an image takes part on average; with few uses of few queries the tokens
                themselves are read and nothing is projected (see :class:`CrossAttention`).
        """
        c = self.config
        if CrossAttention.direct_is_cheaper(c.queries, image.tokens_BND.shape[1], c.width, c.heads, uses):
            return ImageMemory(image)
        return ImageMemory(image, tuple(layer.cross.project(image) for layer in self.layers if layer.cross is not None))

    def forward(
        self,
        image: ImageMemory | None = None,
        ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        *,
        causal: bool = False,
        past: tuple[KeyValue, ...] | None = None,
        leading: int | None = None,
        noise_B: Tensor | None = None,
    ) -> QFormerOutput:
        """One pass; the table at the top of this file says which.

        Args:
            image: gives the query rows.
            ids_BT, mask_BT: give the text rows; int64 ids and 0/1 mask, padded on the right. With ``past`` the mask
                covers the past text too, [B, past text + T].
            causal: text rows see earlier text only, and queries see no text.
            past: keys and values of the queries (and earlier text); the rows given are text, and causal.
            leading: the caller reads only so many first rows (queries come first): the last layer makes no others.
            noise_B: int64 keys of the sequences (:func:`isthmus.models.noise.row_keys`), for dropout; without them it
                is drawn from the process's generator.
        """
        c = self.config
        now_BT = None  # the mask of the tokens that this pass is given
        if ids_BT is not None:
            now_BT = mask_BT[:, -ids_BT.shape[1] :] if mask_BT is not None else torch.ones_like(ids_BT)
        sequences = len(image) if image is not None else len(ids_BT) if ids_BT is not None else 0
        packing = Packing.of(sequences, c.queries if image is not None else 0, now_BT)
        parts = []
        if image is not None:
            parts.append(self.queries.expand(len(image), -1, -1).flatten(0, 1))
        if ids_BT is not None and now_BT is not None:
            before = past[0][0].shape[2] - c.queries if past is not None else 0
            parts.append(self._embed_text(ids_BT, now_BT, before))
        noise_BS = None
        if noise_B is not None and self.dropout.awake:
            noise_BS = subkeys(noise_B.unsqueeze(1), torch.arange(packing.length, device=noise_B.device))
        embedded_RM = self.embedding_norm(torch.cat(parts) if len(parts) > 1 else parts[0])
        x_RM = self.dropout(embedded_RM, packing.collect_keys(noise_BS))
        allowed = None
        if ids_BT is not None and mask_BT is not None:
            allowed = _allowed(mask_BT, ids_BT.shape[1], packing.queries, c.queries if past is not None else 0, causal)
        x_RM, packing, kept = self._run(x_RM, packing, allowed, image, past, leading, noise_BS)
        queries = packing.query_rows
        return QFormerOutput(
            x_RM[:queries].view(sequences, packing.queries, -1) if image is not None else None,
            packing.spread(x_RM)[:, packing.queries :] if len(x_RM) > queries else None,
            kept,
        )

    def pooled_text(self, ids_BT: Tensor, mask_BT: Tensor, noise_B: Tensor | None = None) -> Tensor:
        """One vector for each text from the text pass, [B, M]: its first token's last hidden state, or, with
        ``text_pool: mean``, the mean over its tokens."""
        if self.config.text_pool == "first":
            return self(None, ids_BT, mask_BT, leading=1, noise_B=noise_B).text_BTM[:, 0]
        hidden_BTM = self(None, ids_BT, mask_BT, noise_B=noise_B).text_BTM
        return hidden_BTM.sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)  # hidden states of padding are zero

    def _run(
        self,
        x_RM: Tensor,
        packing: Packing,
        allowed: Tensor | None,
        image: ImageMemory | None,
        past: tuple[KeyValue, ...] | None,
        leading: int | None,
        noise_BS: Tensor | None,
    ) -> tuple[Tensor, Packing, tuple[KeyValue, ...]]:
        """All layers over embedded rows; the rows' packing and each layer's keys and values beside the result."""
        kept: list[KeyValue] = []
        crossed = 0
        for i, layer in enumerate(self.layers):
            kv = None
            if image is not None and image.kv is not None and layer.cross is not None:
                kv, crossed = image.kv[crossed], crossed + 1
            earlier = past[i] if past is not None else None
            lead = leading if i + 1 == len(self.layers) else None
            tokens = image.image if image is not None else None
            arguments = (x_RM, packing, allowed, tokens, kv, earlier, lead, noise_BS)
            if self.recompute and self.training:
                x_RM, packing, keys_values = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_RM, packing, keys_values = layer(*arguments)
            kept.append(keys_values)
        return x_RM, packing, tuple(kept)

    def _embed_text(self, ids_BT: Tensor, mask_BT: Tensor, before: int) -> Tensor:
        """Embeddings [K, M] of the tokens that are no padding, the first of them in place ``before``."""
        assert self.words is not None and self.positions is not None, "this Q-Former was built without a text branch"
        row_K, place_K = mask_BT.nonzero(as_tuple=True)
        return self.words(ids_BT[row_K, place_K]) + self.positions(place_K + before)

    def logits(self, text_KM: Tensor) -> Tensor:
        """Next-token logits [K, V+1] of chosen text rows."""
        assert self.lm_head is not None, "this Q-Former was built without its language-model head"
        return self.lm_head(text_KM)

    @torch.no_grad()
    def greedy(self, image: ImageMemory, end_id: int, max_new_tokens: int, min_new_tokens: int = 0) -> list[list[int]]:
        """Token ids after ``[DEC]`` up to ``end_id`` (exclusive), the most likely one at each step."""
        past = self(image).past
        B, device = len(image), self.queries.device
        current_B1 = torch.full((B, 1), self.dec_id, device=device)
        done_B = torch.zeros(B, dtype=torch.bool, device=device)
        found: list[Tensor] = []
        for step in range(max_new_tokens):
            mask = torch.ones(B, step + 1, dtype=torch.long, device=device)
            out = self(None, current_B1, mask, past=past)
            past = out.past
            scores_BV = self.logits(out.text_BTM[:, -1])
            scores_BV[:, self.dec_id] = -torch.inf
            if step < min_new_tokens:
                scores_BV[:, end_id] = -torch.inf
            next_B = scores_BV.argmax(-1).masked_fill(done_B, end_id)
            found.append(next_B)
            done_B = done_B | (next_B == end_id)
            current_B1 = next_B.unsqueeze(1)
            if bool(done_B.all()):
                break
        rows = torch.stack(found, 1).tolist() if found else [[] for _ in range(B)]
        return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def _allowed(mask: Tensor, rows: int, queries: int, past_queries: int, causal: bool) -> Tensor:
    """Which row may look at which, bool [B, 1, rows of this pass, all rows]; queries precede text on both sides."""
    B, total = mask.shape
    device = mask.device
    keys_BT = mask.bool()
    if past_queries:
        earlier = total - rows
        order = torch.arange(total, device=device) <= torch.arange(earlier, total, device=device).unsqueeze(1)
        text_BTT = keys_BT.unsqueeze(1) & order
        return torch.cat([torch.ones(B, rows, past_queries, dtype=torch.bool, device=device), text_BTT], 2).unsqueeze(1)
    keys = torch.cat([torch.ones(B, queries, dtype=torch.bool, device=device), keys_BT], 1)
    if not causal:
        return keys[:, None, None, :]
    size = queries + total
    place = torch.arange(size, device=device)
    order = (place <= place.unsqueeze(1)) | ((place < queries) & (place.unsqueeze(1) < queries))
    return (keys.unsqueeze(1) & order).unsqueeze(1)


def load_bert_layers(qformer: QFormer, bert: Mapping[str, object], state: Mapping[str, Tensor]) -> None:
    """Starts the shared and text parts from a BERT-family model, then copies the text feed-forward to the queries'.

    Args:
        qformer: a fresh one with a text branch.
        bert: the BERT configuration's values (``hidden_size`` and so on).
        state: its tensors under BERT's own names. A missing prediction head stays random.

    Raises:
        WeightsError: width, heads, feed-forward width or depth do not allow it.
    """
    c = qformer.config
    wanted = {
        "hidden_size": ("width", c.width),
        "num_attention_heads": ("heads", c.heads),
        "intermediate_size": ("feed_forward", c.feed_forward),
    }
    wrong = [
        f"qformer.{ours} {size} against {bert[name]}" for name, (ours, size) in wanted.items() if bert[name] != size
    ]
    if wrong:
        raise WeightsError(
            f"The Q-Former cannot start from these text weights: {', '.join(wrong)}.",
            "Set the qformer fields to the text model's sizes, or qformer.init: null for a random start.",
        )
    if c.layers > int(str(bert["num_hidden_layers"])):
        raise WeightsError(
            f"The Q-Former cannot start from these text weights: qformer.layers {c.layers}, "
            f"and they hold {bert['num_hidden_layers']}.",
            "Ask for fewer layers, or set qformer.init: null for a random start.",
        )
    source = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    target = dict(qformer.named_parameters())
    with torch.no_grad():
        for theirs, ours in bert_names(c.layers, head=qformer.lm_head is not None).items():
            if theirs not in source:
                if theirs.startswith("cls."):
                    continue
                raise WeightsError(f"The text weights lack the tensor '{theirs}'.", "Give a BERT-family checkpoint.")
            rows = min(len(target[ours]), len(source[theirs]))  # [DEC]'s row is ours alone
            target[ours][:rows].copy_(source[theirs][:rows])
        segment = source.get("embeddings.token_type_embeddings.weight")
        if segment is not None and c.init_segment == "fold":
            target["positions.weight"].add_(segment[0])
    qformer.copy_text_ffn()


def bert_names(layers: int, head: bool = True) -> dict[str, str]:
    """BERT's parameter names -> those of :class:`QFormer`, for what the two share."""
    names = {
        "embeddings.word_embeddings.weight": "words.weight",
        "embeddings.position_embeddings.weight": "positions.weight",
    }
    pairs = [("embeddings.LayerNorm", "embedding_norm")]
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
        pairs += [(f"{theirs}.attention.self.{part}", f"{ours}.attention.{part}") for part in ("query", "key", "value")]
        pairs += [
            (f"{theirs}.attention.output.dense", f"{ours}.attention.output"),
            (f"{theirs}.attention.output.LayerNorm", f"{ours}.attention.norm"),
            (f"{theirs}.intermediate.dense", f"{ours}.text_ffn.up"),
            (f"{theirs}.output.dense", f"{ours}.text_ffn.down"),
            (f"{theirs}.output.LayerNorm", f"{ours}.text_ffn.norm"),
        ]
    if head:
        names["cls.predictions.bias"] = "lm_head.bias"
        pairs += [
            ("cls.predictions.transform.dense", "lm_head.dense"),
            ("cls.predictions.transform.LayerNorm", "lm_head.norm"),
        ]
    for theirs, ours in pairs:
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return names
