"""Small backbones with seeded weights, built offline, in the layout that real ones have.

Everything here is quick (well under a second each) and deterministic: the same call gives the same tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import LanguageConfig, TextConfig, VisionConfig

ensure_torchvision()
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()

Family = Literal["opt", "llama", "gpt2"]

WORDS = (  # noqa: SIM905
    "a an the of on in and with red green blue yellow black white small large round cat dog bird fish tree flower "
    "house car boat ball star heart circle square face person man woman child sitting standing running smiling "
    "photo picture drawing icon sun moon apple banana cup book hat shoe left right two three"
).split()
"""The words that the small tokenizers know whole; any other text is spelt in pieces."""


def tiny_vision_config(image_size: int = 32, *, weights: str = "random") -> VisionConfig:
    """A ViT of 12 blocks of 192 that timm knows; at 32 pixels it has 1 + 4 tokens."""
    return VisionConfig(name="vit_tiny_patch16_224", weights=weights, image_size=image_size, layer=-1, final_norm=True)


def tiny_cnn_config(image_size: int = 64) -> VisionConfig:
    """A small CNN with random weights: 4 tokens of 1280 at 64 pixels."""
    return VisionConfig(name="tf_efficientnet_lite0", weights="random", image_size=image_size, layer=-1)


def tiny_bert(folder: str | Path, *, layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0) -> TextConfig:
    """Writes a BERT with a WordPiece tokenizer in Hugging Face layout.

    Returns:
        a TextConfig that points at it (``config.weights`` is the folder), 16 tokens long.
    """
    out = _aside(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS) - set(letters)), *letters]
    vocab += [f"##{letter}" for letter in letters] + list(".,!?'-")
    index = {token: i for i, token in enumerate(vocab)}
    (out / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizer(vocab=index, do_lower_case=True).save_pretrained(out)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    )
    _save(_seeded(lambda: BertModel(config), seed), out)
    _put(out, folder)
    return TextConfig(weights=str(folder), max_length=16)


def tiny_lm(
    folder: str | Path, family: Family = "llama", *, layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0
) -> LanguageConfig:
    """Writes a causal language model with a byte-level BPE tokenizer in Hugging Face layout.

    The families differ as their real relatives do: OPT's tokenizer puts ``</s>`` in front, Llama's ``<s>``, GPT-2's
    nothing; OPT and GPT-2 have learned positions, Llama rotary ones. OPT has dropout 0.1, so that a test can wake it.

    Returns:
        a LanguageConfig that points at it.
    """
    out = _aside(folder)
    tokenizer = _bpe(family)
    tokenizer.save_pretrained(out)
    _save(_seeded(lambda: _language_model(family, tokenizer, layers, width, heads), seed), out)
    _put(out, folder)
    return LanguageConfig(weights=str(folder), max_length=16)


def tiny_t5(
    folder: str | Path, *, tied: bool = False, layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0
) -> LanguageConfig:
    """Writes a T5 with a BPE tokenizer in Hugging Face layout, as FLAN-T5 is published, or with ``tied`` as T5 v1.0 is.

    FLAN-T5 has gated feed-forward networks and an output matrix of its own; dropout is 0.1, so that a test can wake it.

    Returns:
        a LanguageConfig that points at it.
    """
    out = _aside(folder)
    tokenizer = _t5_tokenizer()
    tokenizer.save_pretrained(out)
    feed_forward = "relu" if tied else "gated-gelu"
    published: dict[str, Any] = {"tie_word_embeddings": tied, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=len(tokenizer) + 3,  # the real one has spare rows too
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj=feed_forward,
        **published,
    )

    def build() -> T5ForConditionalGeneration:
        model = T5ForConditionalGeneration(config)
        if not tied:  # transformers 5 ties what it builds from a configuration
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    _save(_seeded(build, seed), out)
    _put(out, folder)
    return LanguageConfig(weights=str(folder), max_length=16)


def _language_model(
    family: Family, tokenizer: PreTrainedTokenizerFast, layers: int, width: int, heads: int
) -> PreTrainedModel:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "opt":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                ffn_dim=4 * width,
                max_position_embeddings=128,
                word_embed_proj_dim=width,
                dropout=0.1,
                **ids,
            )
        )
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                intermediate_size=2 * width,
                max_position_embeddings=128,
                **ids,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=128,
            **ids,
        )
    )


def _bpe(family: Family) -> PreTrainedTokenizerFast:
    bos, eos, pad = {
        "opt": ("</s>", "</s>", "<pad>"),
        "llama": ("<s>", "</s>", "<pad>"),
        "gpt2": ("<|endoftext|>", "<|endoftext|>", None),
    }[family]
    special = list(dict.fromkeys(token for token in (bos, eos, pad) if token))
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # Each word with and without a space before it, so that both are single tokens.
    core.train_from_iterator([" ".join(["", *WORDS]), *WORDS] * 4, trainer)
    if family != "gpt2":
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    """Pads with id 0 and puts ``</s>``, id 1, behind; spaces are part of words."""
    special = ["<pad>", "</s>", "<unk>"]
    core = Tokenizer(models.BPE(unk_token=special[2]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, show_progress=False, initial_alphabet=[chr(c) for c in range(33, 127)]
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _seeded(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Weights wide enough that different inputs give clearly different outputs (the usual 0.02 hides mistakes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                parameter.data.normal_(0.0, 0.15)
    return model.float().eval()


def _aside(folder: str | Path) -> Path:
    """Where files are written before :func:`_put`: two ranks may make one backbone, and read each other's files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".writing-", dir=Path(folder).parent))


def _put(out: Path, folder: str | Path) -> None:
    for file in out.iterdir():
        file.replace(Path(folder) / file.name)  # the same content as that of another rank, whole at any time
    out.rmdir()


def _save(model: PreTrainedModel, out: Path) -> None:
    model.save_pretrained(out, safe_serialization=True)
