"""Starts the service on a free loopback port, asks it about one image over HTTP, and stops it."""

from __future__ import annotations

import base64
import time
from typing import Any

import httpx

from isthmus.config import ServeConfig
from isthmus.data.manifest import Manifest
from isthmus.data.readers import RawSample, read_rows
from isthmus.errors import DataError, IsthmusError


def serve_check(config: ServeConfig, data: str, row: int) -> dict[str, Any]:
    """The answer of the first served model to 'what is in this image', with the time it took.

    Raises:
        DataError: the image cannot be read.
        IsthmusError: the service answers with an error.
    """
    from isthmus.serving.app import serve, shutdown

    sample = next(iter(read_rows(Manifest.load(data), [row])))
    if not isinstance(sample, RawSample):
        raise DataError(f"Row {row} of {data} cannot be read: {sample.reason}.", "Choose another row.")
    name = next(iter(config.models))
    started = time.monotonic()
    url = serve(config, block=False)
    ready = time.monotonic() - started
    try:
        asked = time.monotonic()
        answer = httpx.post(f"{url}/v1/chat/completions", json=_question(name, sample.image), timeout=config.timeout_s)
        seconds = time.monotonic() - asked
    finally:
        shutdown()
    if answer.status_code != httpx.codes.OK:
        raise IsthmusError(
            f"The service answered {answer.status_code}: {answer.text[:300]}",
            "Start it by hand with `isthmus serve` to see its log.",
        )
    return {
        "url": url,
        "key": sample.key,
        "answer": answer.json()["choices"][0]["message"]["content"],
        "reference": sample.captions[0] if sample.captions else "",
        "ready_seconds": round(ready, 2),
        "answer_seconds": round(seconds, 3),
    }


def _question(model: str, image: bytes) -> dict[str, Any]:
    kind = "webp" if image[8:12] == b"WEBP" else "png" if image[:4] == b"\x89PNG" else "jpeg"
    data = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    return {
        "model": model,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data}}]}],
        "max_tokens": 16,
    }
