"""The one HTML page: drop an image, read its caption. Self-contained, under a policy that allows nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse, Response


async def page_response() -> Response:
    """The page with its Content-Security-Policy."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@functools.cache
def _page() -> tuple[str, str]:
    html = resources.files("isthmus.serving").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(html: str, tag: str) -> str:
    """CSP source of the page's only inline element of this kind, so that no other one runs."""
    inner = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert inner is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(inner[1].encode()).digest()).decode()
