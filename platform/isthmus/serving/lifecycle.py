"""Starting and stopping the service on this machine's Ray, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve

from isthmus.config import ServeConfig
from isthmus.errors import IsthmusError
from isthmus.ray_session import begin, end
from isthmus.serving.security import is_loopback

APP = "isthmus"
"""Name of the Serve application; another one in the same cluster is left alone."""
PROXY_PATIENCE_S = "60"
"""How long Serve's controller lets its HTTP proxy start before it kills it. By itself it gives it five seconds, which
a process that has torch to import does not always keep on a busy machine."""
STOP_S = 60.0
_owned: set[str] = set()
"""What this process started and therefore stops: ``ray``, ``serve``."""


def pin_models(config: ServeConfig) -> ServeConfig:
    """Every model fixed to the version that its alias names now.

    So all replicas, also one that is restarted after the alias has moved, serve the same weights.

    Raises:
        RegistryError: a model that the registry does not hold, or a registry out of reach.
    """
    from isthmus.registry import store

    tracking = config.tracking.model_copy(update={"uri": store.tracking_uri(config.tracking)})
    models = {}
    for name, model in config.models.items():
        if Path(model).expanduser().is_dir():
            store.resolve(model, tracking)
            models[name] = str(Path(model).expanduser().absolute())
        else:
            version = store.resolve(model, tracking)
            models[name] = f"models:/{version.name}/{version.version}"
    return config.model_copy(update={"models": models, "tracking": tracking})


def claim_address(config: ServeConfig) -> tuple[str, int]:
    """Host and port to listen on, checked to be free before anything is started. Port 0 finds a free one.

    Where Serve already runs in the Ray cluster of this process, its one HTTP address is the answer.

    Raises:
        IsthmusError: the port is taken, the host is no address of this machine, or the running Serve listens elsewhere.
    """
    running = _running_address()
    if running is not None:
        if config.port in (0, running[1]) and config.host == running[0]:
            return running
        raise IsthmusError(
            f"Ray Serve already runs in this cluster on {running[0]}:{running[1]}, and it has one address only.",
            f"Set host: {running[0]} and port: {running[1]}, or stop it first (serve shutdown).",
        )
    return config.host, _free_port(config.host, config.port)


def _running_address() -> tuple[str, int] | None:
    if not ray.is_initialized():
        return None
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    return str(options.host), int(options.port)


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a listener
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise IsthmusError(*_why_not(host, port, error)) from error
        return int(probe.getsockname()[1])


def _why_not(host: str, port: int, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is already in use.", "Choose another with port=..., or port=0 for any free one."
    if error.errno == errno.EACCES:
        return f"Port {port} on {host} needs special rights.", "Choose a port above 1023."
    return f"{host}:{port} cannot be listened on: {error.strerror or error}.", "Set host to an address of this machine."


def start(app: Any, config: ServeConfig, host: str, port: int) -> str:
    """Start Ray and Serve where they do not run yet, deploy ``app``, wait until every model has loaded.

    Returns:
        The base URL.

    Raises:
        IsthmusError: a model could not be loaded, with the reason its replica gave.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process's own lines; the replicas' are set below
    start_ray(config)
    try:
        _start_serve(config, host, port)
        ray_serve.run(
            app, name=APP, route_prefix="/", logging_config={"log_level": "WARNING", "enable_access_log": False}
        )
    except BaseException as error:
        reason = _reason()
        shutdown()
        if isinstance(error, (RuntimeError, TimeoutError, ray.exceptions.RayError)):
            raise IsthmusError(f"The service did not start: {reason or error}", "Mend that and start again.") from error
        raise
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared with, not bound
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def start_ray(config: ServeConfig) -> None:
    """Ray, if this process has none yet; :func:`leave_ray` undoes it."""
    needed = len(config.models) * config.replicas * config.cpus_per_replica
    if begin(needed):
        _owned.add("ray")
    total = ray.cluster_resources().get("CPU", 0)
    if needed > total:
        print(
            f"The replicas ask for {needed:g} CPUs, and the cluster has {total:g}: the service waits for more nodes.",
            file=sys.stderr,
        )


def _start_serve(config: ServeConfig, host: str, port: int) -> None:
    if _running_address() is not None:
        return
    ray_serve.start(
        # On loopback a proxy on any other node would be reachable by nobody.
        proxy_location="HeadOnly" if is_loopback(host) else "EveryNode",
        # The front answers a timeout itself; the proxy's limit only catches a front that hangs.
        http_options={"host": host, "port": port, "request_timeout_s": config.timeout_s * 2 + 10},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PROXY_PATIENCE_S}}},
    )
    _owned.add("serve")


def _reason() -> str:
    """The last error line of the first deployment that failed, without its traceback."""
    try:
        application = ray_serve.status().applications.get(APP)
    except Exception:  # Serve itself may be what failed
        return ""
    for deployment in (application.deployments if application else {}).values():
        lines = [line.strip() for line in (deployment.message or "").splitlines()]
        faults = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b.*: ", line)]
        if faults:
            return re.sub(r"^[\w.]*\.", "", faults[-1])
    return ""


def wait_for_stop() -> None:
    """Return at Ctrl-C or SIGTERM."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(0.5):
            pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shutdown() -> None:
    """Stop this application; also Serve and Ray where :func:`start` started them and nothing else uses them."""
    if not ray.is_initialized():
        _owned.clear()
        return
    if _running_address() is not None:
        applications = ray_serve.status().applications
        if APP in applications:
            ray_serve.delete(APP)
        if "serve" in _owned and set(applications) <= {APP}:
            _stop_serve()
    _owned.discard("serve")
    leave_ray()


def _stop_serve() -> None:
    """What ``serve.shutdown`` does, without its call that the controller dies under: Ray reports that as an error."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.context import _set_global_client

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    ray.get(controller.graceful_shutdown.remote(wait=False), timeout=STOP_S)
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(ValueError):  # the name is gone when the controller is
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.1)
    _set_global_client(None)


def leave_ray() -> None:
    """Stop or leave the Ray cluster that :func:`start_ray` started or joined."""
    if "ray" in _owned:
        end()
        _owned.discard("ray")
