"""The small image encoder of these tests is the same in all of them, and is measured once."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from isthmus.config import VisionConfig
from isthmus.planning import subject
from isthmus.planning.shapes import Vision


@pytest.fixture(autouse=True, scope="session")
def _encoders_measured_once() -> Iterator[None]:
    measure, known = subject.measure_vision, dict[str, Vision]()

    def once(config: VisionConfig) -> Vision:
        key = config.model_dump_json()
        if key not in known:
            known[key] = measure(config)
        return known[key]

    with mock.patch.object(subject, "measure_vision", once):
        yield
