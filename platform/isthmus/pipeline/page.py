"""What every HTML page of results shares: one template folder, one style, pictures inside the page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 160


def render(template: str, **values: Any) -> str:
    """A page that loads nothing and runs nothing. Values are escaped; SVG of our own plots is marked safe in templates.

    Args:
        template: file of this folder; extends ``base.html``, which shows ``title``, ``lead`` and ``tiles``.
        values: what the template names.
    """
    from jinja2 import Environment, PackageLoader

    return (
        Environment(autoescape=True, loader=PackageLoader("isthmus", "pipeline")).get_template(template).render(values)
    )


def thumbnail(image: Image.Image) -> str:
    """A data URL of the image, at most 160 pixels in width and height."""
    image.thumbnail((_SIDE, _SIDE))
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"
