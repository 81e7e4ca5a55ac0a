"""Who may ask, and how much: bearer token, host check, body limit, requests in flight, safe headers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.config import ServeConfig
from isthmus.errors import ConfigError
from isthmus.serving.problems import ApiError, bad_request, error_response, internal, overloaded

log = logging.getLogger("ray.serve")

MIN_TOKEN_CHARS = 16
"""Shortest token that is accepted when the service can be reached from other machines."""
_OPEN_PATHS = frozenset({"/", "/health"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be reached from this machine."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def token_digest(config: ServeConfig, environ: Mapping[str, str] | None = None) -> bytes | None:
    """SHA-256 of the bearer token, or None for ``auth: none``. Only the digest is handed to the replicas.

    Raises:
        ConfigError: the variable that should hold the token is unset or its token is too short for an open address, or
            authentication is switched off on an address that other machines reach.
    """
    if config.auth == "none":
        if not is_loopback(config.host):
            raise ConfigError(
                f"auth is 'none' while host is {config.host}, which other machines can reach.",
                "Bind to 127.0.0.1, or use auth: token.",
            )
        return None
    token = (os.environ if environ is None else environ).get(config.token_env, "").strip()
    if not token:
        raise ConfigError(
            f"The service wants a bearer token, and the environment variable {config.token_env} is not set.",
            f"Set it (for example: export {config.token_env}=$(openssl rand -hex 24)), "
            "or use auth: none on a loopback host.",
        )
    if len(token) < MIN_TOKEN_CHARS and not is_loopback(config.host):
        raise ConfigError(
            f"The token in {config.token_env} has {len(token)} characters; on {config.host} at least "
            f"{MIN_TOKEN_CHARS} are needed.",
            "Make one with: openssl rand -hex 24",
        )
    return hashlib.sha256(token.encode()).digest()


def token_matches(header: str | None, expected: bytes) -> bool:
    """Constant-time comparison of an ``Authorization`` header with the token's digest."""
    scheme, _, token = (header or "").partition(" ")
    given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
    return hmac.compare_digest(given, expected) and scheme.lower() == "bearer"


async def read_json(request: Request, max_bytes: int) -> Any:
    """The request's JSON body, counted while it arrives.

    Raises:
        ApiError: 413 as soon as more than ``max_bytes`` are announced or received, 415 for another media type, 400 for
            broken JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the request as Content-Type: application/json.", code="unsupported_media_type")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON.", code="invalid_json") from None


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body exceeds {max_bytes / 2**20:g} MiB. Send less at once, or something smaller.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


@dataclass(frozen=True)
class GateSettings:
    """What the gate enforces.

    Attributes:
        token: digest of the bearer token; None where ``auth: none`` was asked for.
        max_in_flight: API requests held at once, bodies included; bounds the memory of the front.
    """

    token: bytes | None
    max_in_flight: int


class Gate:
    """The outermost ASGI layer: nothing behind it sees a request that may not pass, and no traceback leaves it."""

    def __init__(self, app: ASGIApp, settings: GateSettings) -> None:
        self._app = app
        self._settings = settings
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["isthmus_request_id"], ours = _request_id(scope)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if ours:
                    headers["X-Request-ID"] = scope["isthmus_request_id"]
            await send(message)

        counted = False
        try:
            self._check(scope)
            counted = self._enter(scope)
            await self._app(scope, receive, answer)
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", scope["isthmus_request_id"])
            if not started:
                await error_response(internal(scope["isthmus_request_id"]))(scope, receive, answer)
        finally:
            self._in_flight -= counted

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._settings.token is None:
            # Without a token, a web page that resolves its own name to 127.0.0.1 must not reach the service.
            if not is_loopback(_hostname(headers.get("host", ""))):
                raise ApiError(403, "This service answers on loopback names only.", code="host_not_allowed")
            return
        if scope["path"] in _OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
            return
        if not token_matches(headers.get("authorization"), self._settings.token):
            raise ApiError(
                401,
                "The bearer token is missing or wrong. Send it as 'Authorization: Bearer <token>'.",
                "authentication_error",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _enter(self, scope: Scope) -> bool:
        if scope["method"] != "POST":
            return False
        if self._in_flight >= self._settings.max_in_flight:
            raise overloaded()
        self._in_flight += 1
        return True


def _hostname(header: str) -> str:
    return header.partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def _request_id(scope: Scope) -> tuple[str, bool]:
    """The request's id and whether we made it. Serve's proxy sends an id along and returns it to the client itself."""
    given = Headers(scope=scope).get("x-request-id", "")
    return (given, False) if _REQUEST_ID.fullmatch(given) else (uuid.uuid4().hex, not given)
