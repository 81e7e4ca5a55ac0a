"""Faults that a client of the service is told about, in the shape that OpenAI clients parse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response


@dataclass
class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: what is wrong and what to send instead; shown to the client as it is.
        kind: OpenAI's ``type``.
        code: a stable word that programs may test.
        param: dotted path of the faulty field in the request body.
        headers: further response headers, such as ``Retry-After``.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


def error_response(error: ApiError) -> Response:
    """The error as ``{"error": {message, type, param, code}}``."""
    body = {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
    return Response(json.dumps(body), error.status, dict(error.headers), "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never succeed as it is."""
    return ApiError(400, message, code=code, param=param)


def overloaded(retry_after_s: int = 1) -> ApiError:
    """503: the queue is full; the same request may succeed later."""
    return ApiError(
        503,
        f"The service is busy and its queue is full. Try again in {retry_after_s} s.",
        "server_error",
        "overloaded",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(message: str) -> ApiError:
    """503: a model is not loaded, or its replica went away."""
    return ApiError(503, message, "server_error", "model_unavailable", headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    """504: the model did not answer in time."""
    return ApiError(504, f"The model did not answer within {seconds:g} s.", "server_error", "timeout")


def internal(request_id: str) -> ApiError:
    """500: our fault. The client gets an id to report, the log gets the traceback under that id."""
    return ApiError(500, f"Internal error. Report it with request id {request_id}.", "server_error", "internal_error")


def from_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first fault that pydantic found, naming its field."""
    fault = min(faults, key=lambda f: (f["type"] != "extra_forbidden", -len(f["loc"])))
    path = ".".join(str(part) for part in fault["loc"] if part not in _UNION_TAGS)
    if fault["type"] == "extra_forbidden":
        return bad_request(f"Unknown parameter '{path}'. Leave it out.", path, "unknown_parameter")
    if fault["type"] == "missing":
        return bad_request(f"The parameter '{path}' is missing.", path, "missing_parameter")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return bad_request(f"'{path or 'body'}': {message}." if not message.endswith(".") else message, path or None)


_UNION_TAGS = frozenset({"text", "image_url", "str", "list", "parts", "plain"})
"""Names that pydantic puts into a fault's path to say which arm of a union it tried."""
