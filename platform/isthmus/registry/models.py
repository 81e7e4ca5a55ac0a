"""Registered models: register, resolve to a local folder, list, show, promote."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import isthmus
from isthmus.config import TrackingConfig
from isthmus.config.run import alias_fault, name_fault
from isthmus.contracts import ModelVersion
from isthmus.errors import RegistryError, nearest
from isthmus.registry import store

ARTEFACT_FILES = ("recipe.yaml", "model.safetensors", "bases.json")
_REFERENCE = re.compile(r"^(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


def register(
    artefact: str | Path,
    name: str,
    alias: str,
    run_id: str,
    *,
    uri: str,
    lineage: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Log the artefact folder as an MLflow model of run ``run_id``, register it, move ``alias`` to it.

    Registering the same bytes of the same run again moves the alias only, so a driver that died in between may repeat.

    Raises:
        RegistryError: the folder is no artefact, or the tracking store is out of reach.
    """
    _check_names(name, alias)
    folder = Path(artefact).absolute()
    missing = [file for file in ARTEFACT_FILES if not (folder / file).is_file()]
    if missing:
        raise RegistryError(f"{folder} is no model artefact: it lacks {', '.join(missing)}.")
    api, digest = store.client(uri), _folder_digest(folder)
    for known in api.search_model_versions(f"name = '{name}'"):
        if known.tags.get("artefact_sha256") == digest and known.run_id == run_id:
            api.set_registered_model_alias(name, alias, known.version)
            return _to_version(api, known, alias, uri)
    model_id = _log_model(folder, run_id, uri)
    if not any(found.name == name for found in api.search_registered_models(f"name = '{name}'")):
        api.create_registered_model(name)
    facts = {"artefact_sha256": digest, "lineage": json.dumps(lineage, sort_keys=True)[:5000], **(tags or {})}
    made = api.create_model_version(name, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=facts)
    api.set_registered_model_alias(name, alias, made.version)
    return _to_version(api, made, alias, uri)


def register_folder(
    artefact: str | Path, name: str, alias: str, tracking: TrackingConfig | None = None
) -> ModelVersion:
    """Registers a model folder that no run of this package trained, in an MLflow run of its own.

    Raises:
        RegistryError: as :func:`register`.
    """
    _check_names(name, alias)
    settings, uri, folder = tracking or TrackingConfig(), store.tracking_uri(tracking), Path(artefact)
    file = folder / "lineage.json"
    lineage = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    run_id = store.start_run(uri, settings.experiment, f"import-{name}")
    try:
        version = register(folder, name, alias, run_id, uri=uri, lineage=lineage)
    except BaseException:
        store.end_run(uri, run_id, "FAILED")
        raise
    store.end_run(uri, run_id)
    return version


def _check_names(name: str, alias: str) -> None:
    """Before anything is logged: MLflow itself would tell of an alias when the version is made."""
    if fault := name_fault(name) or alias_fault(alias):
        raise RegistryError(f"{fault}.")


def _log_model(folder: Path, run_id: str, uri: str) -> str:
    mlflow = store.quiet_mlflow()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"artefact": str(folder)},
            pip_requirements=[f"isthmus=={isthmus.__version__}"],  # given, else MLflow imports everything to guess
        )
    return str(info.model_id)


def resolve(
    model: str,
    tracking: TrackingConfig | None = None,
    *,
    cache: str | None = None,
) -> ModelVersion:
    """The model named by ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a local artefact folder, with its path.

    Artefacts that lie on this file system are used in place; others are fetched once into ``cache`` (default
    ``$ISTHMUS_CACHE/models``).

    Raises:
        RegistryError: no such model, version or alias (with the known ones), or the store is out of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    uri = store.tracking_uri(tracking)
    found = _REFERENCE.match(model)
    if not found:
        raise RegistryError(
            f"'{model}' names no model and is no folder.", "Write models:/NAME@ALIAS, models:/NAME/VERSION or a path."
        )
    api = _existing_client(uri, model)
    entry = _find(api, found["name"], found["version"], found["alias"], model)
    version = _to_version(api, entry, found["alias"] or "", uri)
    return ModelVersion(**{**version.__dict__, "path": str(_fetch(api, entry, uri, cache))})


def list_models(tracking: TrackingConfig | None = None) -> list[dict[str, Any]]:
    """One row per registered model: name, newest version, number of versions, aliases with their versions."""
    api = _existing_client(store.tracking_uri(tracking), None)
    if api is None:
        return []
    rows = []
    for model in _registered(api):
        versions = api.search_model_versions(f"name = '{model.name}'")
        newest = max((int(v.version) for v in versions), default=0)
        aliases = {alias: str(number) for alias, number in model.aliases.items()}
        rows.append({"name": model.name, "newest": str(newest), "versions": len(versions), "aliases": aliases})
    return rows


def show_model(model: str, tracking: TrackingConfig | None = None) -> dict[str, Any]:
    """All that the registry knows of one version: aliases, lineage, parameters and last metrics of its run, path."""
    version = resolve(model, tracking)
    shown: dict[str, Any] = {
        "name": version.name, "version": version.version, "uri": version.uri, "path": version.path,
        "lineage": dict(version.lineage),
    }  # fmt: skip
    if version.version:
        api = store.client(store.tracking_uri(tracking))
        entry = api.get_model_version(version.name, version.version)
        shown["aliases"] = list(entry.aliases)
        shown["run_id"] = entry.run_id
        if entry.run_id:
            data = api.get_run(entry.run_id).data
            shown["params"], shown["metrics"] = dict(data.params), dict(data.metrics)
    return shown


def promote(model: str, alias: str, tracking: TrackingConfig | None = None) -> ModelVersion:
    """Move ``alias`` to the version that ``model`` names; the alias's former version stays registered."""
    _check_names("any", alias)
    version = resolve(model, tracking)
    if not version.version:
        raise RegistryError(
            f"{model} is a folder, not a registered model.", "Train with a 'model' section to register."
        )
    api = store.client(store.tracking_uri(tracking))
    api.set_registered_model_alias(version.name, alias, version.version)
    changed = {"alias": alias, "uri": f"models:/{version.name}@{alias}"}
    return ModelVersion(**{**version.__dict__, **changed})


def run_id_of(model: ModelVersion) -> str | None:
    """The MLflow run that made ``model``, to which its evaluations are logged; None for a bare folder."""
    value = model.lineage.get("run_id")
    return str(value) if value else None


def _existing_client(uri: str, model: str | None) -> Any:
    """A client; a SQLite store that does not exist yet is not created merely to be found empty."""
    if uri.startswith("sqlite:") and not store.database_file(uri).exists():
        if model is None:
            return None
        raise RegistryError(
            f"'{model}' cannot be found: there is no registry at {store.database_file(uri)} yet.",
            "Train and register a model first, or set MLFLOW_TRACKING_URI or tracking.uri.",
        )
    return store.client(uri)


def _registered(api: Any) -> Iterator[Any]:
    """All registered models; MLflow gives a hundred at a time."""
    token = None
    while True:
        page = api.search_registered_models(page_token=token)
        yield from page
        if not (token := page.token):
            return


def _find(api: Any, name: str, version: str | None, alias: str | None, model: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        api.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [entry.name for entry in _registered(api)]
        known = f"Known models: {', '.join(sorted(names))}." if names else "No model is registered there yet."
        raise RegistryError(
            f"No model is called '{name}' (asked for as {model}).{nearest(name, names)}", known
        ) from None
    try:
        if alias:
            return api.get_model_version_by_alias(name, alias)
        return api.get_model_version(name, version)
    except MlflowException as error:
        entry = api.get_registered_model(name)
        aliases = ", ".join(f"{key} (version {value})" for key, value in sorted(entry.aliases.items())) or "none"
        versions = ", ".join(map(str, sorted(int(v.version) for v in api.search_model_versions(f"name = '{name}'"))))
        asked = f"alias '{alias}'" if alias else f"version {version}"
        close = nearest(alias, entry.aliases) if alias else ""
        raise RegistryError(
            f"Model '{name}' has no {asked}.{close}",
            f"Aliases: {aliases}. Versions: {versions}.",
        ) from error


def _to_version(api: Any, entry: Any, alias: str, uri: str) -> ModelVersion:
    try:
        lineage = json.loads(entry.tags.get("lineage", "{}"))
    except json.JSONDecodeError:  # cut at the tag's length; the whole of it is in the artefact
        lineage = {}
    reference = f"{entry.name}@{alias}" if alias else f"{entry.name}/{entry.version}"
    path = _local(_location(api, entry))
    return ModelVersion(
        entry.name, str(entry.version), alias, f"models:/{reference}", str(path) if path else "",
        {**lineage, "run_id": entry.run_id, "tracking_uri": uri},
    )  # fmt: skip


def _location(api: Any, entry: Any) -> str:
    """URL of the folder that holds a version's artefact folder (MLflow keeps the latter's name at logging time)."""
    if entry.source.startswith("models:/m-"):
        place = api.get_logged_model(entry.source.removeprefix("models:/")).artifact_location
    else:
        place = entry.source
    return f"{place.rstrip('/')}/artifacts"


def _local(url: str) -> Path | None:
    """The artefact folder below ``url`` where that is a folder of this file system."""
    parts = urlparse(url)
    path = Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
    if path is None or not path.is_dir():
        return None
    return next((folder for folder in sorted(path.iterdir()) if (folder / "recipe.yaml").is_file()), None)


def _fetch(api: Any, entry: Any, uri: str, cache: str | None) -> Path:
    url = _location(api, entry)
    if (here := _local(url)) is not None:
        return here
    root = Path(cache or Path(os.environ.get("ISTHMUS_CACHE", "~/.cache/isthmus")).expanduser() / "models")
    home = root / entry.name / f"{entry.version}-{entry.tags.get('artefact_sha256', entry.run_id or 'x')[:16]}"
    if not home.exists():
        mlflow = store.quiet_mlflow()
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as temporary:
            try:
                got = mlflow.artifacts.download_artifacts(artifact_uri=url, dst_path=temporary, tracking_uri=uri)
            except Exception as error:
                raise RegistryError(
                    f"The files of {entry.name} version {entry.version} cannot be read at {url}: {error}"
                ) from error
            shutil.move(str(_local(got) or got), home)  # a rename: another process sees all of it or nothing
    return home


def _from_folder(folder: Path) -> ModelVersion:
    missing = [file for file in ARTEFACT_FILES if not (folder / file).is_file()]
    if missing:
        raise RegistryError(f"The folder {folder} holds no model: it lacks {', '.join(missing)}.")
    file = folder / "lineage.json"
    lineage = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return ModelVersion(folder.resolve().name, "", "", str(folder), str(folder.resolve()), lineage)


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
