"""The service as a Ray Serve application: one front, one deployment per served model.

``build_app`` is the builder for Serve's own tools (``serve build``, ``serve deploy``, a RayService); ``serve`` starts
the application from Python or the command line.
"""

# No `from __future__ import annotations` here: Ray Serve reads the class of build_app's annotation.

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from isthmus.config import ServeConfig, anchored, load_config
from isthmus.errors import ConfigError, IsthmusError
from isthmus.ray_session import joins_cluster
from isthmus.serving.answers import Caption, Card, Refusal, Vector
from isthmus.serving.lifecycle import claim_address, leave_ray, pin_models, shutdown, start, start_ray, wait_for_stop
from isthmus.serving.media import Medium
from isthmus.serving.metrics import RayRecorder
from isthmus.serving.openai import FrontSettings, create_front
from isthmus.serving.problems import overloaded, unavailable
from isthmus.serving.replica import LoadModel, ModelReplica, load_registered
from isthmus.serving.security import token_digest

T = TypeVar("T")
SPARE_REQUESTS = 16
"""Requests that the front may hold beyond what replicas and queues hold: those still sending their body."""


def serve(config: ServeConfig, *, block: bool = True, load: LoadModel = load_registered) -> str:
    """Start the service and return its base URL.

    Args:
        config: see ServeConfig. Port 0 takes a free port.
        block: wait for Ctrl-C or SIGTERM, then stop the service. False returns as soon as every model has loaded;
            :func:`shutdown` stops it.
        load: how a replica gets its model; picklable.

    Raises:
        ConfigError: no models, a missing token, an open address without a token, limits that contradict each other.
        RegistryError: a model that the registry does not hold.
        IsthmusError: the port is taken, or a model could not be loaded.
    """
    config = anchored(config)
    _check(config)
    token_digest(config)
    try:
        if joins_cluster():
            start_ray(config)  # only from inside can one see whether Serve runs there already, and where it listens
        host, port = claim_address(config)
        if load is load_registered:
            config = pin_models(config)
    except IsthmusError:
        leave_ray()
        raise
    url = start(assemble(config, load), config, host, port)
    if block:
        print(f"Serving {', '.join(config.models)} at {url} (Ctrl-C stops)", flush=True)
        try:
            wait_for_stop()
        finally:
            shutdown()
    return url


def build_app(config: ServeConfig) -> ray_serve.Application:
    """The Serve application, for ``serve build isthmus.serving.app:build_app`` and ``serve deploy``.

    The address is set in Serve's own file there (``http_options``), and the token's variable must be set where the
    application is built.

    Raises:
        ConfigError: as :func:`serve`.
    """
    checked = config if isinstance(config, ServeConfig) else load_config(ServeConfig, None, values=dict(config))
    return assemble(anchored(checked), load_registered)


def assemble(config: ServeConfig, load: LoadModel) -> ray_serve.Application:
    """The application's graph; nothing is started.

    Raises:
        ConfigError: as :func:`serve`.
    """
    _check(config)
    per_model = config.replicas * config.max_ongoing + config.max_queued
    in_flight = len(config.models) * per_model + SPARE_REQUESTS
    settings = FrontSettings(
        token=token_digest(config),
        max_in_flight=in_flight,
        max_body_bytes=int(config.max_body_mb * 2**20),
        timeout_s=config.timeout_s,
        max_new_tokens=config.max_new_tokens,
    )
    models = {
        name: _model_deployment(name, i, config).bind(name, model, config, load)
        for i, (name, model) in enumerate(config.models.items())
    }
    front = ray_serve.deployment(
        name="front",
        ray_actor_options={"num_cpus": 0},
        # The gate counts requests itself, to refuse in OpenAI's notation; Serve's own limits only lie behind it.
        max_ongoing_requests=2 * in_flight,
        max_queued_requests=in_flight,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )(ray_serve.ingress()(Front))
    return front.bind(settings, models)


class Front:
    """The ingress deployment."""

    def __init__(self, settings: FrontSettings, models: Mapping[str, DeploymentHandle]) -> None:
        self._settings = settings
        self._models = models

    def __serve_build_asgi_app__(self) -> Any:
        handles = {name: RemoteModel(name, handle) for name, handle in self._models.items()}
        return create_front(self._settings, handles, RayRecorder())


class RemoteModel:
    """A model deployment, its faults translated to what a client can act on."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name = name
        self._handle = handle

    async def card(self) -> Card:
        return await self._call(lambda: self._handle.card.remote())

    async def caption(self, image: bytes, prompt: str, max_new_tokens: int) -> Caption | Refusal:
        return await self._call(lambda: self._handle.caption.remote(image, prompt, max_new_tokens))

    async def embed(self, items: list[str | bytes | Medium]) -> list[Vector | Refusal]:
        return await self._call(lambda: self._handle.embed.remote(items))

    async def _call(self, send: Any) -> Any:
        """One call. Answers do not depend on earlier ones, so a call whose replica died is sent once more."""
        try:
            return await _answer(send())
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, DeploymentUnavailableError):
            pass
        try:
            return await _answer(send())
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, DeploymentUnavailableError):
            raise unavailable(f"The model '{self._name}' is not available right now.") from None


async def _answer(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()  # the client gave up or the time is over: free the replica's slot
        raise


def _model_deployment(name: str, index: int, config: ServeConfig) -> ray_serve.Deployment:
    return ray_serve.deployment(
        name=f"model-{index}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=config.max_ongoing,
        max_queued_requests=config.max_queued,
        max_constructor_retry_count=1,  # a model that cannot be loaded is told at once
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
    )(ModelReplica)


def _check(config: ServeConfig) -> None:
    if not config.models:
        raise ConfigError("'models' names nothing to serve.", "Add a line such as 'captioner: models:/NAME@ALIAS'.")
    if config.max_ongoing < config.max_batch:
        raise ConfigError(
            f"max_ongoing {config.max_ongoing} is below max_batch {config.max_batch}, so no batch could ever fill.",
            f"Set max_ongoing to {config.max_batch} or more.",
        )


__all__ = ["assemble", "build_app", "serve", "shutdown"]
