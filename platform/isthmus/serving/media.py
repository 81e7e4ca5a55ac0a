"""Images as they arrive in a request: ``data:`` URLs only. Nothing is ever fetched on a client's behalf."""

from __future__ import annotations

import base64
import binascii
import re

from isthmus.serving.problems import bad_request

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<options>(?:;[\w=.+-]+)*),", re.ASCII)
_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp")
_EXAMPLE = "Send the image itself as data:image/png;base64,... (PNG, JPEG or WebP)."


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
    if not head["options"].lower().endswith(";base64"):
        raise bad_request(f"The data: URL is not base64. {_EXAMPLE}", param, "invalid_image")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("The image's base64 text is broken.", param, "invalid_image") from None
    if not sniff(data):
        raise bad_request(f"The content is no PNG, JPEG or WebP image. {_EXAMPLE}", param, "unsupported_image")
    return data


def sniff(data: bytes) -> str:
    """``png``, ``jpeg``, ``webp`` by the first bytes, or an empty string."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return ""
