"""Stage 1 of BLIP-2 written plainly, the peer of ``stage1_step.py``: LAVIS's four passes on transformers' modules.

As LAVIS does it: texts are padded to a fixed length, the trainable norm is applied to the image tokens themselves, each
pass projects keys and values of every image that it reads (the matching pass three times as many images as the batch
holds), every row of every layer is made, and the language-model head runs at every position. The captioning pass reads
the queries' keys and values from the image pass, which is LAVIS's cache.

It shares its parameters with one of our modules, so both have the same weights, gradients and optimizer.

Shape letters: B batch, N image tokens, D image width, Q queries, T text tokens, M width, E shared width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.contracts import Batch, LossTerms
from isthmus.losses.matching import Negatives
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.models.lavis import lavis_names

ensure_torchvision()
from transformers import BertConfig, Blip2QFormerConfig  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.bert.modeling_bert import BertLMPredictionHead  # noqa: E402
from transformers.models.blip_2.modeling_blip_2 import (  # noqa: E402
    Blip2QFormerModel,
    Blip2TextEmbeddings,
    eager_attention_forward,
)

IGNORED = -100
SMOOTHING = 0.1


class PlainStage1(nn.Module):
    """The plain counterpart of ``ours``, on its parameters.

    Args:
        ours: gives shape and parameters.
        attention: transformers' name of the attention, ``sdpa`` (its default) or ``eager`` (what LAVIS has).
        text_length: T that every text is padded to.
    """

    def __init__(self, ours: Blip2Stage1, attention: str = "sdpa", text_length: int = 32) -> None:
        super().__init__()
        c, words = ours.config.qformer, ours.qformer.words
        assert words is not None and ours.qformer.positions is not None
        self.queries, self.text_length = c.queries, text_length
        shape = {
            "vocab_size": words.num_embeddings,
            "hidden_size": c.width,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "intermediate_size": c.feed_forward,
            "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout,
            "max_position_embeddings": ours.qformer.positions.num_embeddings,
        }
        config = Blip2QFormerConfig(
            **shape,
            cross_attention_frequency=c.cross_every,
            encoder_hidden_size=ours.ln_vision.normalized_shape[0],
            use_qformer_text_input=True,
        )
        config._attn_implementation = attention
        with torch.device("meta"):
            self.qformer = Blip2QFormerModel(config)
            self.head = BertLMPredictionHead(BertConfig(**shape, layer_norm_eps=config.layer_norm_eps))
        self.embeddings = Blip2TextEmbeddings(config)
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=ours.ln_vision.eps)
        self.vision_proj, self.text_proj, self.itm_head = ours.vision_proj, ours.text_proj, ours.itm_head
        self.temperature, self.query_tokens, self.dec_id = ours.temperature, ours.qformer.queries, ours.qformer.dec_id
        self._share(ours, c.layers)

    def _share(self, ours: Blip2Stage1, layers: int) -> None:
        parameters = dict(ours.named_parameters(remove_duplicate=False))
        parts: dict[str, dict[str, nn.Parameter]] = {"qformer": {}, "embeddings": {}, "head": {}, "ln_vision": {}}
        for lavis, name in lavis_names(layers).items():
            if name not in parameters:  # a layer without cross-attention, or stage 2's projection
                continue
            if lavis.startswith("Qformer.cls.predictions."):
                parts["head"][lavis.removeprefix("Qformer.cls.predictions.")] = parameters[name]
            elif lavis.startswith("Qformer.bert.embeddings.LayerNorm."):
                parts["qformer"][lavis.replace("Qformer.bert.embeddings.LayerNorm", "layernorm")] = parameters[name]
            elif lavis.startswith("Qformer.bert.embeddings."):
                parts["embeddings"][lavis.removeprefix("Qformer.bert.embeddings.")] = parameters[name]
            elif lavis.startswith("Qformer.bert."):
                key = lavis.removeprefix("Qformer.bert.").replace("attention.self.", "attention.attention.")
                parts["qformer"][key] = parameters[name]
            elif lavis.startswith("ln_vision."):
                parts["ln_vision"][lavis.removeprefix("ln_vision.")] = parameters[name]
        parts["head"]["decoder.weight"] = parts["embeddings"]["word_embeddings.weight"]
        parts["head"]["decoder.bias"] = parts["head"]["bias"]
        parts["embeddings"]["position_ids"] = self.embeddings.position_ids
        for part, state in parts.items():
            known = set(getattr(self, part).state_dict())
            getattr(self, part).load_state_dict({k: v for k, v in state.items() if k in known}, assign=True)

    def forward(self, batch: Batch, negatives: Negatives | None = None) -> LossTerms:
        """Losses of one batch; ``negatives`` are drawn as LAVIS draws them where they are not given."""
        assert batch.ids_BT is not None and batch.mask_BT is not None and batch.features_BND is not None
        more = self.text_length - batch.ids_BT.shape[1]
        ids_BT, mask_BT = F.pad(batch.ids_BT, (0, more)), F.pad(batch.mask_BT, (0, more))
        with torch.autocast(batch.features_BND.device.type, enabled=False):
            image_BND = self.ln_vision(batch.features_BND.float())
        queries_BQM = self.query_tokens.expand(len(image_BND), -1, -1)

        past: list[tuple[Tensor, Tensor]] = []
        with self._kept(past):
            seen_BQM = self.qformer(query_embeds=queries_BQM, encoder_hidden_states=image_BND).last_hidden_state
        text_BTM = self.qformer(
            query_embeds=self.embeddings(input_ids=ids_BT), query_length=0, attention_mask=mask_BT
        ).last_hidden_state
        itc, i2t_BB, t2i_BB = self._contrast(seen_BQM, text_BTM)
        negatives = negatives or _draw(i2t_BB, t2i_BB)
        itm = self._match(image_BND, ids_BT, mask_BT, negatives)
        itg = self._generate(ids_BT, mask_BT, past)
        parts = {"itc": itc, "itm": itm, "itg": itg}
        return LossTerms(itc + itm + itg, {name: part.detach() for name, part in parts.items()})

    def _contrast(self, seen_BQM: Tensor, text_BTM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images_BQE = F.normalize(self.vision_proj(seen_BQM).float(), dim=-1)
        texts_BE = F.normalize(self.text_proj(text_BTM[:, 0]).float(), dim=-1)
        i2t = torch.einsum("bqe,ge->bgq", images_BQE, texts_BE.detach()).amax(-1) / self.temperature
        t2i = torch.einsum("be,gqe->bgq", texts_BE, images_BQE.detach()).amax(-1) / self.temperature
        own = torch.arange(len(i2t), device=i2t.device)
        losses = [F.cross_entropy(logits, own, label_smoothing=SMOOTHING) for logits in (i2t, t2i)]
        return (losses[0] + losses[1]) / 2, i2t.detach(), t2i.detach()

    def _match(self, image_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor, negatives: Negatives) -> Tensor:
        B = len(image_BND)
        images = torch.cat([image_BND, image_BND[negatives.image_B], image_BND])
        ids = torch.cat([ids_BT, ids_BT, ids_BT[negatives.text_B]])
        mask = torch.cat([mask_BT, mask_BT, mask_BT[negatives.text_B]])
        queries = self.query_tokens.expand(3 * B, -1, -1)
        hidden = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=queries),
            query_length=self.queries,
            attention_mask=torch.cat([mask.new_ones(3 * B, self.queries), mask], 1),
            encoder_hidden_states=images,
        ).last_hidden_state
        logits = self.itm_head(hidden[:, : self.queries]).float().mean(1)
        return F.cross_entropy(logits, (torch.arange(3 * B, device=ids.device) < B).long())

    def _generate(self, ids_BT: Tensor, mask_BT: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        ids_BT = ids_BT.clone()
        ids_BT[:, 0] = self.dec_id
        T = ids_BT.shape[1]
        earlier_TT = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).tril()
        text_BTT = mask_BT.bool().unsqueeze(1) & earlier_TT
        allowed = torch.cat([text_BTT.new_ones(len(ids_BT), T, self.queries), text_BTT], 2).unsqueeze(1)
        x_BTM = self.qformer.dropout(self.qformer.layernorm(self.embeddings(input_ids=ids_BT)))
        for layer, (key, value) in zip(self.qformer.encoder.layer, past, strict=True):
            attention = layer.attention.attention
            q, k, v = (_heads(part(x_BTM), attention) for part in (attention.query, attention.key, attention.value))
            seen_BTHd, _ = ALL_ATTENTION_FUNCTIONS.get_interface(
                attention.config._attn_implementation, eager_attention_forward
            )(
                attention,
                q,
                torch.cat([key, k], 2),
                torch.cat([value, v], 2),
                _additive(allowed, q) if attention.config._attn_implementation == "eager" else allowed,
                dropout=attention.attention_dropout if self.training else 0.0,
                scaling=attention.scaling,
            )
            x_BTM = layer.feed_forward_chunk(layer.attention.output(seen_BTHd.flatten(2), x_BTM))
        labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
        logits_BTV = self.head(x_BTM)[:, :-1].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), label_smoothing=SMOOTHING)

    def _kept(self, past: list[tuple[Tensor, Tensor]]) -> _Hooks:
        return _Hooks([layer.attention.attention for layer in self.qformer.encoder.layer], past)


class _Hooks:
    """Inside the block each attention's keys and values go to ``past``: LAVIS's ``use_cache``."""

    def __init__(self, attentions: list[nn.Module], past: list[tuple[Tensor, Tensor]]) -> None:
        self.attentions, self.past, self.handles = attentions, past, []
        self.found: dict[int, Tensor] = {}

    def __enter__(self) -> None:
        for attention in self.attentions:
            for part in (attention.key, attention.value):
                self.handles.append(part.register_forward_hook(lambda m, _, out: self.found.update({id(m): out})))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for a in self.attentions:
            self.past.append((_heads(self.found[id(a.key)], a), _heads(self.found[id(a.value)], a)))


def _heads(x_BSM: Tensor, attention: nn.Module) -> Tensor:
    return x_BSM.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)


@torch.no_grad()
def _draw(i2t_BB: Tensor, t2i_BB: Tensor) -> Negatives:
    own = torch.eye(len(i2t_BB), dtype=torch.bool, device=i2t_BB.device)
    image_B, text_B = (
        torch.multinomial(logits.masked_fill(own, -10000.0).softmax(1), 1)[:, 0] for logits in (t2i_BB, i2t_BB)
    )
    return Negatives(image_B, text_B, torch.ones_like(image_B, dtype=torch.bool))
