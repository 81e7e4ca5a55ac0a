"""Logits from hidden states against the model's own full forward, for heads that scale and cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.compat import ensure_torchvision
from isthmus.config import LanguageConfig
from isthmus.errors import WeightsError
from isthmus.models.language import LanguageModel, build_language, check_logits
from isthmus.models.text import load_tokenizer
from isthmus.testing.backbones import tiny_lm

ensure_torchvision()
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
RIGHT = [
    ("granite", {"logits_scaling": 5.0}),
    ("cohere", {"logit_scale": 0.2}),
    ("gemma2", {"final_logit_softcapping": 0.5}),
    ("gemma3_text", {"final_logit_softcapping": 0.5}),
    ("minicpm3", {"dim_model_base": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}),
    ("llama", {}),
    ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 48, "do_layer_norm_before": False}),  # as OPT-350m
    ("hyperclovax", {"logits_scaling": 1.0}),
]
WRONG = [
    ("hyperclovax", {"logits_scaling": 0.4}, "HyperCLOVAXForCausalLM"),
    ("hyperclovax", {"logits_scaling": 1.001}, "HyperCLOVAXForCausalLM"),
    ("falcon_h1", {"lm_head_multiplier": 0.3, **MAMBA}, "FalconH1ForCausalLM"),
]


def written(folder: Path, family: str, more: dict[str, Any]) -> LanguageConfig:
    """A tiny model of ``family`` with drawn weights and Llama's small tokenizer."""
    tiny_lm(folder, "llama")
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(folder))
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(family, **{**SHAPE, **more, **ids, "bos_token_id": tokenizer.bos_token_id})
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return LanguageConfig(weights=str(folder), max_length=16)


@pytest.mark.parametrize(("family", "more"), RIGHT)
@torch.no_grad()
def test_logits_are_the_model_s_own(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    language: Any = build_language(written(tmp_path, family, more))
    ids = torch.tensor([[5, 90, 41, 200, 7]])
    own = language.logits(language.model.base_model(input_ids=ids).last_hidden_state)
    whole = language.model(input_ids=ids).logits
    torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-6)
    if family not in ("llama", "hyperclovax", "opt"):
        bare = language.model.get_output_embeddings()(language.model.base_model(input_ids=ids).last_hidden_state)
        assert float((bare - whole).abs().max()) > 0.1 * float(whole.abs().max()), "the option does something"


@pytest.mark.parametrize(("family", "more", "name"), WRONG)
def test_a_head_that_is_not_known_here_is_refused(tmp_path: Path, family: str, more: dict[str, Any], name: str) -> None:
    with pytest.raises(WeightsError, match=rf"is a {name} \('{family}'\), whose logits .* differ by"):
        build_language(written(tmp_path, family, more))


def test_bfloat16_rounding_is_accepted_and_a_factor_is_not(tmp_path: Path) -> None:
    language: Any = build_language(written(tmp_path, "granite", {"logits_scaling": 5.0}), bf16=True)
    assert isinstance(language, LanguageModel) and {p.dtype for p in language.parameters()} == {torch.bfloat16}
    check_logits(language)
    logits = language.logits
    language.logits = lambda hidden: logits(hidden) * 1.1
    with pytest.raises(WeightsError, match="GraniteForCausalLM"):
        check_logits(language)
    language.logits = lambda hidden: logits(hidden) * float("nan")
    with pytest.raises(WeightsError, match="differ by nan"):
        check_logits(language)
