"""Sizes of frozen parts that are only named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.config import TextConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.language import build_language
from isthmus.models.vision import build_vision
from isthmus.planning.frozen import measure_language, measure_vision, text_sizes
from isthmus.testing.backbones import tiny_bert, tiny_cnn_config, tiny_vision_config
from planning_cases import FAMILIES, language_config


@pytest.mark.parametrize(
    ("weights", "parameters", "width"),
    [
        ("hf:facebook/opt-2.7b@main", 2_651_596_800, 2560),
        ("hf:facebook/opt-6.7b@main", 6_658_473_984, 4096),
        ("hf:google/flan-t5-xl@main", 2_849_757_184, 2048),  # 2.85 billion, as Chung et al. 2022 round it to 3B
        ("pkg:smollm2-135m-instruct", 134_515_008, 576),
    ],
)
def test_published_language_models(weights: str, parameters: int, width: int) -> None:
    found = measure_language(weights)
    assert (found.parameters, found.width) == (parameters, width)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_a_config_counts_as_the_loaded_model(family: str, tmp_path: Path) -> None:
    config = language_config(family, tmp_path)
    model = build_language(config).model
    found = measure_language(config.weights)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.vocab == model.get_output_embeddings().weight.shape[0]
    assert (found.encoder is not None) == (family == "t5")


def test_a_language_model_by_three_sizes() -> None:
    found = measure_language("somewhere/else", parameters=2.65e9, width=2560, layers=32)
    assert found.parameters == pytest.approx(2.65e9, rel=0.01)
    assert (found.width, found.decoder.layers) == (2560, 32)


def test_unknown_language_models_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"'opt-2\.7b'\?.*--language-params, --language-width and --language-layers"):
        measure_language("hf:facebook/opt-2.8b@main")
    with pytest.raises(ConfigError, match="needs three"):
        measure_language("x", parameters=1e9, width=1024)
    with pytest.raises(ConfigError, match="more than 1,000 parameters"):
        measure_language("x", parameters=1000, width=1024, layers=2)


@pytest.mark.parametrize("config", [tiny_vision_config(), tiny_cnn_config()], ids=["vit", "cnn"])
def test_an_image_encoder_is_measured_without_weights(config: object) -> None:
    encoder = build_vision(config)  # type: ignore[arg-type]
    found = measure_vision(config)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = encoder(torch.zeros(1, 3, found.image_size, found.image_size))
    assert (found.tokens, found.width) == tuple(tokens.shape[1:])
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_vit_operations_follow_the_formula() -> None:
    found = measure_vision(tiny_vision_config())
    rows, width = found.tokens, found.width
    block = 2 * rows * width * width * 12 + 4 * rows * rows * width
    patches = 2 * (rows - 1) * 3 * 16 * 16 * width
    assert found.flops == pytest.approx(12 * block + patches)
    assert found.widest == rows * 4 * width


def test_text_sizes(tmp_path: Path) -> None:
    assert text_sizes(TextConfig(weights="hf:google-bert/bert-base-uncased@main")) == (30522, 512)
    bert = tiny_bert(tmp_path / "bert")
    vocab, positions = text_sizes(bert)
    assert vocab > 100
    assert positions > bert.max_length
    with pytest.raises(WeightsError, match="'bert-base-uncased'"):
        text_sizes(TextConfig(weights="hf:someone/bert-base-uncase@main"))
