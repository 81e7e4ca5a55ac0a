"""Tokenizers on the way to and from Hugging Face.

``Blip2Processor`` puts one ``<image>`` token into the text for every query. The language model's embedding must have a
row for it, though the row is never read, and its output layer must keep its width, or beams would be scored against
another sum. So no row is added: a row that text never uses is found instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from isthmus.compat import ensure_torchvision
from isthmus.errors import ConfigError, WeightsError

ensure_torchvision()
from tokenizers import Tokenizer  # noqa: E402

IMAGE, DEC = "<image>", "[DEC]"
_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))
"""Bytes that no UTF-8 text holds, so that the tokens that stand for them are never made of text."""


def place_image_token(tokenizer: Any, rows: int, keep: set[int]) -> int:
    """Gives ``tokenizer`` the token ``<image>``, in place, and returns its id, below ``rows``.

    In this order: it is there; the embedding has rows beyond the tokenizer's; a byte that no text holds gives up its
    token; a special token that neither this package nor the chat template uses is renamed.

    Args:
        tokenizer: of transformers, backed by the tokenizers library.
        rows: of the language model's embedding.
        keep: ids that must keep their meaning (beginning, end, padding).

    Raises:
        ConfigError: there is no such row.
    """
    known = tokenizer.get_vocab()
    if IMAGE in known:
        if known[IMAGE] >= rows:
            raise ConfigError(
                f"The tokenizer's {IMAGE} has id {known[IMAGE]}, and the language model has {rows} embeddings.",
                "Enlarge the language model's embedding.",
            )
        return int(known[IMAGE])
    if max(known.values()) + 1 < rows:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
        return int(tokenizer.convert_tokens_to_ids(IMAGE))
    for token in (*_unwritable(tokenizer), *_unused_special(tokenizer)):
        if token in known and known[token] not in keep and _rename(tokenizer, token):
            return int(known[token])
    raise ConfigError(
        f"The language model's {rows} embeddings are all in use, and Hugging Face's class needs one for {IMAGE}.",
        "Take a language model with a reserved token, or with more embeddings than its tokenizer has tokens.",
    )


def add_dec(tokenizer: Any) -> int:
    """Adds ``[DEC]`` as the begin-of-sequence token, as BLIP-2 does to BERT's; returns its id."""
    tokenizer.add_special_tokens({"bos_token": DEC})
    return int(tokenizer.convert_tokens_to_ids(DEC))


def without_tokens_from(tokenizer: Any, first: int) -> None:
    """Takes the added tokens from id ``first`` on out of ``tokenizer``, in place (``[DEC]`` and ``<image>``).

    Raises:
        WeightsError: a token of that id or above belongs to the vocabulary proper.
    """

    def edit(value: dict[str, Any]) -> bool:
        value["added_tokens"] = [token for token in value["added_tokens"] if token["id"] < first]
        return True

    names = {token for token, number in tokenizer.get_vocab().items() if number >= first}
    for role in ("bos_token",):
        if getattr(tokenizer, role, None) in names:
            setattr(tokenizer, role, None)
    _edit(tokenizer, edit)
    if len(tokenizer) != first:
        raise WeightsError(
            f"The tokenizer has {len(tokenizer)} tokens, and the Q-Former's text branch was trained with {first}.",
            "Give the tokenizer that belongs to the checkpoint.",
        )


def _edit(tokenizer: Any, edit: Callable[[dict[str, Any]], bool]) -> bool:
    """Rebuilds the tokenizer from its serialised form after ``edit``, unless that declines."""
    value = json.loads(tokenizer.backend_tokenizer.to_str())
    if not edit(value):
        return False
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(value))
    return True


def _rename(tokenizer: Any, token: str) -> bool:
    """``token`` becomes ``<image>``, a special token; declined where a merge makes it of other tokens."""

    def edit(value: dict[str, Any]) -> bool:
        model = value["model"]
        vocab, merges = model.get("vocab"), model.get("merges", [])
        if any(token in (pair if isinstance(pair, list) else pair.split(" ")) for pair in merges):
            return False
        number = tokenizer.convert_tokens_to_ids(token)
        if isinstance(vocab, dict):
            if token in vocab:
                vocab[IMAGE] = vocab.pop(token)
        elif isinstance(vocab, list):  # unigram: pairs of piece and score
            model["vocab"] = [[IMAGE, score] if piece == token else [piece, score] for piece, score in vocab]
        entry = {
            "id": number, "content": IMAGE, "special": True, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }  # fmt: skip
        added = [*(t for t in value["added_tokens"] if t["content"] != token), entry]
        value["added_tokens"] = sorted(added, key=lambda t: t["id"])
        return True

    return _edit(tokenizer, edit)


def _unwritable(tokenizer: Any) -> list[str]:
    """Tokens of single bytes that no text holds, as a byte-level or a byte-fallback tokenizer writes them."""
    value = json.loads(tokenizer.backend_tokenizer.to_str())
    if any(kind == "ByteLevel" for kind in _kinds(value.get("pre_tokenizer"))):
        return [chr(byte) for byte in reversed(_NEVER)]
    return [f"<0x{byte:02X}>" for byte in reversed(_NEVER)] if value["model"].get("byte_fallback") else []


def _kinds(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("pretokenizers", []):
            yield from _kinds(inner)


def _unused_special(tokenizer: Any) -> list[str]:
    """Special tokens without a role, the last ones first."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    added = sorted(json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"], key=lambda t: -t["id"])
    return [t["content"] for t in added if t["special"] and t["content"] not in roles and t["content"] not in template]
