"""What is refused before anything starts."""

from __future__ import annotations

import socket

import pytest

from isthmus.config import ServeConfig
from isthmus.errors import ConfigError, IsthmusError
from isthmus.serving.app import assemble, build_app, serve
from isthmus.serving.lifecycle import claim_address
from isthmus.serving.security import is_loopback, token_digest, token_matches


def config(**values: object) -> ServeConfig:
    return ServeConfig(**({"models": {"a": "models:/a@champion"}} | values))


def test_a_missing_token_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="MY_KEY"):
        token_digest(config(token_env="MY_KEY"), {})
    with pytest.raises(ConfigError, match="not set"):
        token_digest(config(), {"ISTHMUS_API_KEY": "  "})


def test_an_open_address_wants_a_real_token() -> None:
    with pytest.raises(ConfigError, match="at least"):
        token_digest(config(host="0.0.0.0"), {"ISTHMUS_API_KEY": "short"})
    with pytest.raises(ConfigError, match="other machines"):
        token_digest(config(host="0.0.0.0", auth="none"), {})
    assert token_digest(config(auth="none"), {}) is None


def test_the_token_is_compared_whole() -> None:
    digest = token_digest(config(), {"ISTHMUS_API_KEY": "secret"})
    assert digest is not None
    assert token_matches("Bearer secret", digest) and token_matches("bearer secret", digest)
    assert not any(token_matches(h, digest) for h in ("Bearer secre", "Bearer secrets", "secret", "", None))


@pytest.mark.parametrize(
    ("host", "yes"), [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("0.0.0.0", False), ("x.org", False)]
)
def test_loopback(host: str, yes: bool) -> None:
    assert is_loopback(host) is yes


def test_contradicting_limits_and_empty_models() -> None:
    with pytest.raises(ConfigError, match="max_batch 8"):
        build_app(config(auth="none", max_ongoing=4))
    with pytest.raises(ConfigError, match="nothing to serve"):
        build_app(config(auth="none", models={}))


def test_the_builder_reads_what_serve_deploy_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    monkeypatch.setenv("ISTHMUS_API_KEY", "secret")
    app = call(build_app, {"models": {"a": "models:/a@champion"}, "replicas": 2})
    assert app is not None
    with pytest.raises(ConfigError, match="unknown key 'replica'"):
        build_app({"models": {"a": "b"}, "replica": 2})  # type: ignore[arg-type]


def test_a_taken_port_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr("isthmus.serving.lifecycle.start_ray", lambda _: pytest.fail("Ray was started"))
        monkeypatch.setattr("isthmus.serving.lifecycle._running_address", lambda: None)
        with pytest.raises(IsthmusError, match=f"Port {port} on 127.0.0.1 is already in use"):
            serve(config(auth="none", port=port), load=lambda *_: pytest.fail("loaded"))


def test_port_zero_is_any_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.serving.lifecycle._running_address", lambda: None)
    assert claim_address(config(port=0))[1] > 0
    with pytest.raises(IsthmusError, match="address of this machine"):
        claim_address(config(host="203.0.113.7", port=0))


def test_an_application_is_only_a_graph() -> None:
    assert assemble(config(auth="none"), lambda *_: pytest.fail("loaded")) is not None
