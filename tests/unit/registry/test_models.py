"""Registering, resolving and promoting against a real SQLite store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isthmus.config import TrackingConfig
from isthmus.errors import RegistryError
from isthmus.registry import (
    check_tracking,
    list_models,
    promote,
    register,
    resolve,
    show_model,
    start_run,
    tracking_uri,
)
from isthmus.registry.store import client, log_metrics, log_params


def write_artefact(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder / "model.safetensors").write_bytes(content)
    (folder / "bases.json").write_text("[]")
    (folder / "lineage.json").write_text(json.dumps({"data": {"digest": "d"}}))
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrackingConfig, Path]:
    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root}/mlflow.db"
    run_id = start_run(uri, "isthmus", "first")
    log_params(uri, run_id, {"lr": 0.1})
    log_metrics(uri, run_id, {"loss": 2.0}, step=3)
    for number in (1, 2):
        folder = write_artefact(root / f"artefact{number}", b"weights" * number)
        made = register(folder, "bridge", "candidate", run_id, uri=uri, lineage={"data": {"digest": "d"}})
        assert made.version == str(number)
    return uri, TrackingConfig(uri=uri), root


def test_resolves_alias_version_and_folder_to_a_local_artefact(shop) -> None:
    _, tracking, root = shop
    newest = resolve("models:/bridge@candidate", tracking)
    assert (newest.name, newest.version, newest.alias) == ("bridge", "2", "candidate")
    assert (Path(newest.path) / "model.safetensors").read_bytes() == b"weights" * 2
    assert newest.lineage["data"] == {"digest": "d"}
    older = resolve("models:/bridge/1", tracking)
    assert (Path(older.path) / "model.safetensors").read_bytes() == b"weights"
    assert older.uri == "models:/bridge/1"
    folder = resolve(str(root / "artefact1"), tracking)
    assert folder.path == str((root / "artefact1").resolve())
    assert folder.lineage == {"data": {"digest": "d"}}


def test_what_is_not_there_is_refused_with_what_is(shop) -> None:
    _, tracking, root = shop
    with pytest.raises(
        RegistryError, match=r"no alias 'canditate'\. Did you mean 'candidate'\?.*candidate \(version 2\)"
    ):
        resolve("models:/bridge@canditate", tracking)
    with pytest.raises(RegistryError, match=r"no version 9.*Versions: 1, 2"):
        resolve("models:/bridge/9", tracking)
    with pytest.raises(RegistryError, match=r"'brigde'.*Did you mean 'bridge'\?.*Known models: bridge"):
        resolve("models:/brigde@candidate", tracking)
    with pytest.raises(RegistryError, match="names no model and is no folder"):
        resolve("bridge:candidate", tracking)
    with pytest.raises(RegistryError, match=r"lacks recipe\.yaml"):
        resolve(str(root), tracking)
    with pytest.raises(RegistryError, match="no registry at"):
        resolve("models:/bridge@candidate", TrackingConfig(uri=f"sqlite:///{root}/none/mlflow.db"))
    assert not (root / "none").exists()


def test_registering_the_same_bytes_again_makes_no_new_version(shop) -> None:
    uri, tracking, root = shop
    entry = show_model("models:/bridge/2", tracking)
    again = register(root / "artefact2", "bridge", "again", entry["run_id"], uri=uri, lineage={})
    assert again.version == "2"
    assert list_models(tracking)[0]["versions"] == 2


def test_a_registry_may_hold_more_models_than_one_page(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = start_run(uri, "isthmus", "many")
    for number in range(102):
        client(uri).create_registered_model(f"a{number:03d}")
    register(write_artefact(tmp_path / "artefact"), "zebra", "candidate", run_id, uri=uri, lineage={})
    tracking = TrackingConfig(uri=uri)
    assert resolve("models:/zebra@candidate", tracking).version == "1"
    assert len(list_models(tracking)) == 103
    with pytest.raises(RegistryError, match=r"Did you mean 'zebra'\?"):
        resolve("models:/zebr@candidate", tracking)


def test_promote_moves_the_alias_and_show_tells_what_is_known(shop) -> None:
    _, tracking, _ = shop
    promoted = promote("models:/bridge/1", "production", tracking)
    assert (promoted.version, promoted.uri) == ("1", "models:/bridge@production")
    promote("models:/bridge/2", "production", tracking)
    shown = show_model("models:/bridge@production", tracking)
    assert shown["version"] == "2"
    assert shown["params"] == {"lr": "0.1"}
    assert shown["metrics"] == {"loss": 2.0}
    assert list_models(tracking)[0]["aliases"]["production"] == "2"


def test_tracking_uri_prefers_recipe_then_environment_then_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(TrackingConfig(uri="http://one")) == "http://one"
    assert tracking_uri(TrackingConfig()) == "http://127.0.0.1:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{Path.cwd()}/runs/mlflow.db"


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"No tracking server answers at http://127\.0\.0\.1:9 "):
        check_tracking("http://127.0.0.1:9")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RegistryError, match="cannot be made"):
        check_tracking(f"sqlite:///{blocked}/mlflow.db")


@pytest.mark.slow
def test_a_real_tracking_server_keeps_the_model_and_its_files(tmp_path: Path) -> None:
    """Over HTTP with proxied artifacts: nothing of the artefact lies where the client could read it in place."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "store"),
    ]  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            _wait_for(uri, server)
            run_id = start_run(uri, "isthmus", "far")
            register(write_artefact(tmp_path / "artefact"), "far", "candidate", run_id, uri=uri, lineage={"a": 1})
            cache = tmp_path / "cache"
            got = resolve("models:/far@candidate", TrackingConfig(uri=uri), cache=str(cache))
            assert Path(got.path).is_relative_to(cache)
            assert (Path(got.path) / "model.safetensors").read_bytes() == b"weights"
            assert got.lineage["a"] == 1
            before = (Path(got.path) / "model.safetensors").stat().st_mtime_ns
            again = resolve("models:/far/1", TrackingConfig(uri=uri), cache=str(cache))
            assert (Path(again.path) / "model.safetensors").stat().st_mtime_ns == before, "fetched once"
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def _wait_for(uri: str, server: subprocess.Popen) -> None:
    for _ in range(1200):
        assert server.poll() is None, "the server ended"
        try:
            return check_tracking(uri)
        except RegistryError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
