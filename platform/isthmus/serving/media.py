"""Images, sounds and clips as they arrive in a request: ``data:`` URLs only. Nothing is ever fetched on a client's
behalf."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Literal

from isthmus.data.media import container_of
from isthmus.serving.problems import bad_request

SOUNDS = ("wav", "ogg", "flac", "mp3")
CLIPS = ("mov", "matroska")
"""FFmpeg's names of containers: mov is MP4 too, matroska is WebM."""

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<options>(?:;[\w=.+-]+)*),", re.ASCII)
_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp")
_EXAMPLE = "Send the image itself as data:image/png;base64,... (PNG, JPEG or WebP)."


@dataclass(frozen=True)
class Medium:
    """A sound or a clip, encoded."""

    kind: Literal["audio", "video"]
    data: bytes


def medium_of(text: str) -> Literal["audio", "video"] | None:
    """What a string is meant as, where it is an inline sound or clip."""
    for kind in ("audio", "video"):
        if text[:11].lower() == f"data:{kind}/":
            return kind  # type: ignore[return-value]
    return None


def read_medium(url: str, kind: Literal["audio", "video"], param: str) -> Medium:
    """A sound or a clip given as a base64 ``data:`` URL; as :func:`read_data_url` does it.

    The container is told by its first bytes, whatever the URL claims; limits of seconds and pixels are the decoder's.

    Raises:
        ApiError: 400 for any other scheme, another media type, broken base64, an empty or foreign content.
    """
    formats = "WAV, Ogg, FLAC or MP3" if kind == "audio" else "MP4, WebM or Matroska"
    example = f"Send the {'sound' if kind == 'audio' else 'clip'} itself as data:{kind}/...;base64,... ({formats})."
    head = _DATA_URL.match(url[:128])
    if head is None or not (head["type"] or "").lower().startswith(f"{kind}/"):
        raise bad_request(f"This is no data: URL of type {kind}/. {example}", param, f"unsupported_{kind}")
    data = _decoded(url, head, example, param, f"invalid_{kind}")
    if container_of(data) not in (SOUNDS if kind == "audio" else CLIPS):
        raise bad_request(f"The content is not {formats}. {example}", param, f"unsupported_{kind}")
    return Medium(kind, data)


def is_image_url(text: str) -> bool:
    """Whether a string is meant as an inline image."""
    return text[:11].lower() == "data:image/"


def read_data_url(url: str, param: str) -> bytes:
    """The bytes of an image given as a base64 ``data:`` URL.

    The first bytes are compared with the three accepted formats, whatever the URL claims, so that no other decoder of
    the imaging library is reached from outside. The picture itself is decoded later, under the pixel limit.

    Args:
        url: ``data:image/png;base64,...``; also ``image/jpeg`` and ``image/webp``.
        param: the field's path, for the error.

    Raises:
        ApiError: 400 for any other scheme, another media type, broken base64, an empty or foreign content.
    """
    scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
    if scheme != "data":
        shown = f"{scheme}:" if scheme else "this"
        raise bad_request(f"A {shown} URL is not fetched by this service. {_EXAMPLE}", param, "image_url_not_supported")
    head = _DATA_URL.match(url[:128])
    if head is None or (head["type"] or "").lower() not in _TYPES:
        given = head["type"] if head and head["type"] else "no media type"
        raise bad_request(f"The data: URL has {given[:60]}. {_EXAMPLE}", param, "unsupported_image")
    data = _decoded(url, head, _EXAMPLE, param, "invalid_image")
    if not sniff(data):
        raise bad_request(f"The content is no PNG, JPEG or WebP image. {_EXAMPLE}", param, "unsupported_image")
    return data


def _decoded(url: str, head: re.Match[str], example: str, param: str, code: str) -> bytes:
    if not head["options"].lower().endswith(";base64"):
        raise bad_request(f"The data: URL is not base64. {example}", param, code)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"The {code.rpartition('_')[2]}'s base64 text is broken.", param, code) from None


def sniff(data: bytes) -> str:
    """``png``, ``jpeg``, ``webp`` by the first bytes, or an empty string."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return ""
