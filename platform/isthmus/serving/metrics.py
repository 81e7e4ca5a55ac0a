"""Counters of the service, exported by Ray's Prometheus endpoint as ``ray_isthmus_*``."""

from __future__ import annotations

from typing import Protocol

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


class Recorder(Protocol):
    """Where the front reports each answered API request."""

    def request(self, route: str, model: str, status: int, seconds: float) -> None: ...


class NoRecorder:
    """Records nothing; for use without Ray."""

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        """Nothing happens."""


class RayRecorder:
    """``isthmus_requests`` by route, model and status; ``isthmus_request_seconds`` by route and model."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._requests = Counter("isthmus_requests", "API requests answered", ("route", "model", "status"))
        self._seconds = Histogram("isthmus_request_seconds", "time to answer", _SECONDS, ("route", "model"))

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "model": model, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-6), {"route": route, "model": model})


class BatchRecorder:
    """``isthmus_batch_size`` and ``isthmus_batch_seconds`` by model and kind (caption, image, text)."""

    def __init__(self, model: str) -> None:
        from ray.util.metrics import Histogram

        tags = ("model", "kind")
        self._size = Histogram("isthmus_batch_size", "items per forward pass", _SIZES, tags)
        self._seconds = Histogram("isthmus_batch_seconds", "time of one forward pass", _SECONDS, tags)
        self._model = model

    def batch(self, kind: str, size: int, seconds: float) -> None:
        """One finished forward pass."""
        tags = {"model": self._model, "kind": kind}
        self._size.observe(size, tags)
        self._seconds.observe(max(seconds, 1e-6), tags)
