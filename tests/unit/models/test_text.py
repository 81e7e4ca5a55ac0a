"""Tokenizer, BERT weights and the frozen sentence encoder."""

import pytest
import torch

from isthmus.config.parts import TextConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.text import build_sentence_encoder, load_bert, load_tokenizer
from isthmus.testing.backbones import tiny_bert, tiny_lm, tiny_t5


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TextConfig:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def test_bert_tensors_come_under_bert_names(config):
    facts, state = load_bert(config.weights)
    assert facts["hidden_size"] == 32
    assert state["embeddings.word_embeddings.weight"].shape == (facts["vocab_size"], 32)
    assert "encoder.layer.1.attention.self.query.weight" in state
    assert not any(name.startswith("bert.") for name in state)


def test_other_families_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'gpt2' model"):
        load_bert(tiny_lm(tmp_path, "gpt2").weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError):
        load_bert(str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))


def test_padding_changes_no_sentence(config):
    encoder = build_sentence_encoder(config)
    short, long = "a red cat", "a small blue bird on the house with a red hat"
    _, alone_BD = encoder(*encoder.tokenize([short]))
    tokens_BTD, both_BD = encoder(*encoder.tokenize([short, long]))
    assert torch.allclose(alone_BD[0], both_BD[0], atol=1e-5)
    assert not torch.allclose(both_BD[0], both_BD[1], atol=1e-2)
    assert tokens_BTD.shape == (2, 13, 32)
    assert encoder.width == 32


def test_pooling_is_the_mean_over_real_tokens(config):
    encoder = build_sentence_encoder(config)
    ids_BT, mask_BT = encoder.tokenize(["a red cat", "a dog in the tree"])
    tokens_BTD, pooled_BD = encoder(ids_BT, mask_BT)
    assert torch.allclose(pooled_BD[0], tokens_BTD[0, : int(mask_BT[0].sum())].mean(0), atol=1e-6)


def test_long_texts_are_cut(config):
    ids_BT, _ = build_sentence_encoder(config).tokenize(["cat " * 50])
    assert ids_BT.shape == (1, 16)


def test_it_never_leaves_eval_mode_and_takes_no_gradient(config):
    encoder = build_sentence_encoder(config).train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.base.role == "text"
    assert encoder.base.digest == build_sentence_encoder(config).base.digest


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5"])
def test_language_models_encode_sentences_too(family, tmp_path):
    config = tiny_t5(tmp_path) if family == "t5" else tiny_lm(tmp_path, family)
    encoder = build_sentence_encoder(TextConfig(weights=config.weights, max_length=16))
    short, long = "a red cat", "two dogs in a house"
    _, alone_BD = encoder(*encoder.tokenize([short]))
    tokens_BTD, both_BD = encoder(*encoder.tokenize([short, long]))
    assert torch.allclose(alone_BD[0], both_BD[0], atol=1e-5)
    assert tokens_BTD.shape[-1] == encoder.width == 32
    assert not torch.allclose(both_BD[0], both_BD[1], atol=1e-2)


def test_a_text_without_a_token_is_read_as_padding(tmp_path):
    encoder = build_sentence_encoder(TextConfig(weights=tiny_lm(tmp_path, "llama").weights))
    encoder.tokenizer = Letters()
    for texts, width in ((["", ""], 1), (["ab", ""], 2)):
        ids_BT, mask_BT = encoder.tokenize(texts)
        assert ids_BT.shape == mask_BT.shape == (2, width)
        assert mask_BT.sum(1).tolist() == [max(1, len(text)) for text in texts]
        assert encoder(ids_BT, mask_BT)[1].abs().sum(1).min() > 0


class Letters:
    """A tokenizer that adds nothing of its own, as those of some decoder-only models are: a token a letter."""

    pad_token_id, eos_token_id = None, 2

    def __call__(self, texts: list[str], **_: object) -> dict[str, torch.Tensor]:
        longest = max(map(len, texts))
        rows = [[5] * len(text) + [0] * (longest - len(text)) for text in texts]
        ids_BT = torch.tensor(rows).reshape(len(texts), longest)
        return {"input_ids": ids_BT, "attention_mask": (ids_BT > 0).long()}
