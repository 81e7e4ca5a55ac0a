"""Requests and answers in OpenAI's notation. What this service cannot honour is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from isthmus.serving.media import Medium, is_image_url, medium_of, read_data_url, read_medium
from isthmus.serving.problems import bad_request

MAX_PROMPT_CHARS = 4000
"""Longest prompt of a chat request; a caption prompt is a phrase, and language models have short contexts."""
MAX_INPUTS = 256
"""Most texts and images in one embeddings request."""
MAX_TEXT_CHARS = 32_000
"""Longest single text of an embeddings request; the model reads its first tokens only."""


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageUrl(Strict):
    """The image of a chat message."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    """A piece of the prompt."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """An image, inline."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("plain")] | Annotated[list[Part], Tag("parts")],
    Discriminator(lambda value: "plain" if isinstance(value, str) else "parts"),
]


class Message(Strict):
    """One message. There is no conversation: every text part of the request goes into one prompt."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted only with the value that says "as this service does it anyway"; see _FIXED.
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None
    store: bool | None = None
    # Without bearing on a deterministic answer.
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class ImageInput(Strict):
    """An image to embed."""

    image: str


class TextInput(Strict):
    """A text to embed, in the explicit notation."""

    text: str


class EmbeddingRequest(Strict):
    """Body of ``POST /v1/embeddings``. ``all_vectors`` is an addition of this service."""

    model: str
    input: str | dict[str, Any] | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(gt=0)] | None = None
    user: str | None = None
    all_vectors: bool = Field(False, description="also return every query's vector of an image")


_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((0, None), "decoding is greedy; send 0 or leave it out"),
    "top_p": ((1, None), "decoding is greedy; send 1 or leave it out"),
    "n": ((1, None), "one answer is given per request; send 1 or leave it out"),
    "presence_penalty": ((0, None), "no penalties are applied; send 0 or leave it out"),
    "frequency_penalty": ((0, None), "no penalties are applied; send 0 or leave it out"),
    "logprobs": ((False, None), "log-probabilities are not returned; leave it out"),
    "response_format": (({"type": "text"}, None), "answers are plain text; leave it out"),
    "store": ((False, None), "nothing is stored; leave it out"),
}


def chat_question(request: ChatRequest) -> tuple[str, list[bytes]]:
    """The prompt (text parts joined by line breaks) and the inline images of a chat request, in order.

    Raises:
        ApiError: 400 for a parameter whose value cannot be honoured, an over-long prompt, an unusable image.
    """
    for name, (allowed, reason) in _FIXED.items():
        if getattr(request, name) not in allowed:
            raise bad_request(f"'{name}' is not supported here: {reason}.", name, "unsupported_value")
    texts: list[str] = []
    images: list[bytes] = []
    for m, message in enumerate(request.messages):
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for p, part in enumerate(message.content):
            if isinstance(part, TextPart):
                texts.append(part.text)
            elif message.role != "user":
                raise bad_request("Images belong into a message of role 'user'.", f"messages.{m}.content.{p}")
            else:
                images.append(read_data_url(part.image_url.url, f"messages.{m}.content.{p}.image_url.url"))
    prompt = "\n".join(text.strip() for text in texts if text.strip())
    if len(prompt) > MAX_PROMPT_CHARS:
        raise bad_request(
            f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARS} are read.",
            "messages",
            "context_length_exceeded",
        )
    return prompt, images


def token_budget(request: ChatRequest, cap: int) -> int:
    """Most new tokens for this request: what it asks for, never more than the service's cap."""
    return min(cap, request.max_completion_tokens or request.max_tokens or cap)


def embedding_items(request: EmbeddingRequest) -> list[str | bytes | Medium]:
    """What to embed: texts as str, images as bytes, sounds and clips as :class:`Medium`, in order.

    Raises:
        ApiError: 400 for an empty or over-long list, token ids, or an unusable image.
    """
    given = request.input if isinstance(request.input, list) else [request.input]
    if not given:
        raise bad_request("'input' is empty.", "input")
    if len(given) > MAX_INPUTS:
        raise bad_request(f"'input' has {len(given)} entries; at most {MAX_INPUTS} fit one request.", "input")
    single = not isinstance(request.input, list)
    return [_item(entry, "input" if single else f"input.{i}") for i, entry in enumerate(given)]


def _item(entry: Any, param: str) -> str | bytes | Medium:
    if isinstance(entry, (int, list)):
        raise bad_request("Token ids are not accepted; send the text itself.", param, "unsupported_value")
    if isinstance(entry, dict) and set(entry) in ({"image"}, {"text"}):
        key, value = next(iter(entry.items()))
        if isinstance(value, str):
            return read_data_url(value, f"{param}.image") if key == "image" else _text(value, f"{param}.text")
    if isinstance(entry, dict) and set(entry) in ({"audio"}, {"video"}):
        name, value = next(iter(entry.items()))
        if isinstance(value, str):
            return read_medium(value, name, f"{param}.{name}")
    if isinstance(entry, str) and (kind := medium_of(entry)):
        return read_medium(entry, kind, param)
    if isinstance(entry, str):
        return read_data_url(entry, param) if is_image_url(entry) else _text(entry, param)
    raise bad_request(
        'Expected a text, or {"image": "data:image/png;base64,..."}, {"audio": "data:audio/wav;base64,..."}, '
        '{"video": "data:video/mp4;base64,..."}.',
        param,
    )


def _text(text: str, param: str) -> str:
    if not text.strip():
        raise bad_request("The text is empty.", param)
    if len(text) > MAX_TEXT_CHARS:
        raise bad_request(f"The text has {len(text)} characters; at most {MAX_TEXT_CHARS} are accepted.", param)
    return text
