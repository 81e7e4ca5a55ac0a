"""The HTTP front: OpenAI-compatible routes over model handles. Knows nothing of Ray, so it is tested in-process."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from isthmus.errors import nearest
from isthmus.serving.answers import Caption, Card, Refusal, Vector
from isthmus.serving.media import Medium
from isthmus.serving.metrics import NoRecorder, Recorder
from isthmus.serving.page import page_response
from isthmus.serving.problems import (
    ApiError,
    bad_request,
    error_response,
    from_validation,
    internal,
    timed_out,
)
from isthmus.serving.schema import ChatRequest, EmbeddingRequest, chat_question, embedding_items, token_budget
from isthmus.serving.security import Gate, GateSettings, read_json

R = TypeVar("R", bound=BaseModel)
HEALTH_SECONDS = 5.0
"""How long a health check waits for a model replica."""


class ModelHandle(Protocol):
    """One served model, seen from the front. Every method may raise ApiError (503) when it cannot take the call."""

    async def card(self) -> Card: ...

    async def caption(self, image: bytes, prompt: str, max_new_tokens: int) -> Caption | Refusal: ...

    async def embed(self, items: list[str | bytes | Medium]) -> list[Vector | Refusal]: ...


@dataclass(frozen=True)
class FrontSettings:
    """Limits of the front; see ServeConfig for their meaning and units."""

    token: bytes | None
    max_in_flight: int
    max_body_bytes: int
    timeout_s: float
    max_new_tokens: int


def create_front(settings: FrontSettings, models: Mapping[str, ModelHandle], recorder: Recorder | None = None) -> Gate:
    """The ASGI application: routes behind the gate.

    Args:
        settings: limits and the token's digest.
        models: served name -> handle.
        recorder: where requests are counted.
    """
    app = FastAPI(title="Isthmus", docs_url=None, redoc_url=None, openapi_url=None)
    _Routes(settings, models, recorder or NoRecorder()).mount(app)

    @app.exception_handler(ApiError)
    async def _known(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            said = f"There is no route {request.url.path}. Routes: /v1/chat/completions, /v1/embeddings, /v1/models."
            return error_response(ApiError(404, said, code="unknown_url"))
        if error.status_code == 405:
            said = f"{request.url.path} does not answer {request.method}."
            return error_response(ApiError(405, said, code="method_not_allowed", headers=error.headers or {}))
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def _unknown(request: Request, _: Exception) -> Response:
        return error_response(internal(request.scope["isthmus_request_id"]))

    return Gate(app, GateSettings(settings.token, settings.max_in_flight))


class _Routes:
    def __init__(self, settings: FrontSettings, models: Mapping[str, ModelHandle], recorder: Recorder) -> None:
        self._settings = settings
        self._models = models
        self._recorder = recorder

    def mount(self, app: FastAPI) -> None:
        app.get("/", response_model=None)(page_response)
        app.get("/health", response_model=None)(self.health)
        app.get("/v1/models", response_model=None)(self.list_models)
        app.get("/v1/models/{name:path}", response_model=None)(self.show_model)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/v1/embeddings", response_model=None)(self.embeddings)

    async def health(self) -> Response:
        """200 when every model answers, 503 with the ones that do not."""
        waiting = [name for name, ready in zip(self._models, await self._ready(), strict=True) if not ready]
        body = {"status": "starting" if waiting else "ok", "models": list(self._models), "waiting_for": waiting}
        return JSONResponse(body, 503 if waiting else 200, {"Retry-After": "2"} if waiting else None)

    async def _ready(self) -> list[bool]:
        async def one(handle: ModelHandle) -> bool:
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    await handle.card()
            except TimeoutError:
                return False
            except ApiError as error:
                return error.code == "overloaded"  # a full queue means that the model is there, and busy
            return True

        return await asyncio.gather(*(one(handle) for handle in self._models.values()))

    async def list_models(self) -> Response:
        async with self._deadline():
            cards = await asyncio.gather(*(handle.card() for handle in self._models.values()))
        data = [_model_object(name, card) for name, card in zip(self._models, cards, strict=True)]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, name: str) -> Response:
        handle = self._handle(name)
        async with self._deadline():
            return JSONResponse(_model_object(name, await handle.card()))

    async def chat(self, request: Request) -> Response:
        """One caption per request: a prompt and exactly one image."""
        async with self._observed("chat") as seen:
            body = await self._read(request, ChatRequest)
            handle = self._handle(body.model)
            seen.model = body.model
            prompt, images = chat_question(body)
            if len(images) != 1:
                raise bad_request(
                    f"The request holds {len(images)} images; a captioner takes exactly one per request, as a part "
                    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.',
                    "messages",
                )
            async with self._deadline():
                answer = await handle.caption(images[0], prompt, token_budget(body, self._settings.max_new_tokens))
            caption = _accepted(answer)
            headers = {"X-Isthmus-Batch-Size": str(caption.batch)}
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                return StreamingResponse(
                    _stream(body.model, caption, usage), media_type="text/event-stream", headers=headers
                )
            return JSONResponse(_completion(body.model, caption), headers=headers)

    async def embeddings(self, request: Request) -> Response:
        """One vector per text or image, in the order given."""
        async with self._observed("embeddings") as seen:
            body = await self._read(request, EmbeddingRequest)
            handle = self._handle(body.model)
            seen.model = body.model
            items = embedding_items(body)
            async with self._deadline():
                answers = await handle.embed(items)
            vectors = [_accepted(a, None if len(items) == 1 else f"input.{i}") for i, a in enumerate(answers)]
            width = len(vectors[0].values)
            if body.dimensions not in (None, width):
                raise bad_request(f"'dimensions' must be {width}, the model's own.", "dimensions", "unsupported_value")
            tokens = sum(vector.tokens for vector in vectors)
            return JSONResponse(
                {
                    "object": "list",
                    "data": [_embedding(i, vector, body) for i, vector in enumerate(vectors)],
                    "model": body.model,
                    "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                }
            )

    def _handle(self, name: str) -> ModelHandle:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404,
                f"There is no model '{name[:100]}'.{nearest(name, self._models)} Served: {known}.",
                code="model_not_found",
                param="model",
            )
        return self._models[name]

    async def _read(self, request: Request, kind: type[R]) -> R:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                body = await read_json(request, self._settings.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, "The request body did not arrive in time.", code="timeout") from None
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False, include_context=False)) from None

    def _deadline(self) -> _Deadline:
        return _Deadline(self._settings.timeout_s)

    def _observed(self, route: str) -> _Observed:
        return _Observed(self._recorder, route)


class _Deadline:
    """``asyncio.timeout`` whose expiry is the client's 504."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *details: Any) -> None:
        try:
            await self._timeout.__aexit__(*details)
        except TimeoutError:
            raise timed_out(self._seconds) from None


class _Observed:
    """Counts one request when it is answered, by route, known model and status."""

    def __init__(self, recorder: Recorder, route: str) -> None:
        self._recorder = recorder
        self._route = route
        self._started = time.monotonic()
        self.model = "unknown"  # a client's own words never become a label

    async def __aenter__(self) -> _Observed:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        status = 200 if error is None else error.status if isinstance(error, ApiError) else 500
        if isinstance(error, asyncio.CancelledError):
            status = 499
        self._recorder.request(self._route, self.model, status, time.monotonic() - self._started)


A = TypeVar("A", Caption, Vector)


def _accepted(answer: A | Refusal, param: str | None = None) -> A:
    if isinstance(answer, Refusal):
        raise bad_request(answer.message, param, answer.code)
    return answer


def _model_object(name: str, card: Card) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "isthmus",
        "version": card.version,
        "capabilities": list(card.capabilities),
    }


def _usage(caption: Caption) -> dict[str, int]:
    total = caption.prompt_tokens + caption.completion_tokens
    return {
        "prompt_tokens": caption.prompt_tokens,
        "completion_tokens": caption.completion_tokens,
        "total_tokens": total,
    }


def _completion(model: str, caption: Caption) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": caption.text, "refusal": None},
                "finish_reason": "length" if caption.cut else "stop",
                "logprobs": None,
            }
        ],
        "usage": _usage(caption),
    }


async def _stream(model: str, caption: Caption, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The whole caption is known by now (a batch ends as one), so it is sent word by word."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time())}

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "model": model, "choices": [choice]} | ({"usage": None} if include_usage else {}))

    yield event({"role": "assistant", "content": ""})
    for i, word in enumerate(caption.text.split(" ")):
        yield event({"content": f" {word}" if i else word})
    yield event({}, "length" if caption.cut else "stop")
    if include_usage:
        yield _event({**head, "model": model, "choices": [], "usage": _usage(caption)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _embedding(index: int, vector: Vector, body: EmbeddingRequest) -> dict[str, Any]:
    if body.encoding_format == "base64":
        value: Any = base64.b64encode(vector.values.astype("<f4").tobytes()).decode()
    else:
        value = vector.values.tolist()
    out = {"object": "embedding", "index": index, "embedding": value}
    if body.all_vectors and vector.every is not None:
        out["vectors"] = vector.every.tolist()
    return out
