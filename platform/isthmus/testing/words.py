"""Text models small enough to be trained on the spot: a vocabulary of whole words, and a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import LanguageConfig

ensure_torchvision()
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402


def word_tokenizer(texts: Sequence[str]) -> BertTokenizer:
    """A BERT tokenizer that knows each word of ``texts`` whole."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: number for number, token in enumerate([*special, *_words(texts)])}
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def trained_lm(
    folder: str | Path,
    documents: Sequence[Sequence[str]],
    *,
    steps: int,
    sentences: int = 4,
    batch: int = 64,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    seed: int = 0,
    lr: float = 3e-3,
) -> tuple[LanguageConfig, float]:
    """Trains a Llama of whole words and writes it in Hugging Face layout.

    A row is several sentences of one document in random order, each between ``<s>`` and ``</s>``. What a document is
    about can be read off its earlier sentences, so the model learns to let what it writes depend on what came before:
    without that, no soft prompt could tell it anything.

    Args:
        folder: where it goes.
        documents: sentences that belong together.
        sentences: of a row.
        steps, batch, lr: of AdamW with a cosine.
        layers, width, heads: shape.
        seed: of weights and draws.

    Returns:
        a LanguageConfig that points at it, and the loss of its last step in nats a token.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _causal_tokenizer([text for document in documents for text in document])
    tokenizer.save_pretrained(out)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, intermediate_size=4 * width, max_position_embeddings=128, **ids,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss = torch.zeros(())
        for _ in range(steps):
            chosen = [documents[i] for i in torch.randint(len(documents), (batch,)).tolist()]
            orders = [torch.randperm(len(document))[:sentences].tolist() for document in chosen]
            told = [
                " ".join(f"<s> {document[i]} </s>" for i in order)
                for document, order in zip(chosen, orders, strict=True)
            ]
            rows = tokenizer(told, padding=True, add_special_tokens=False, return_tensors="pt")
            labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
            loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(out, safe_serialization=True)
    return LanguageConfig(weights=str(out)), float(loss.detach())


def _words(texts: Sequence[str]) -> list[str]:
    return sorted({word for text in texts for word in text.split()})


def _causal_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_words(texts)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106 - a token of text
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
