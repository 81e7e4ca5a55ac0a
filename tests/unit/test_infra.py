"""Files for clusters: each parses, fits its schema where one is at hand, and agrees with the code it starts."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import isthmus
from isthmus.config import ServeConfig, load_config
from isthmus.config.load import apply_overrides

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = sorted((INFRA / "kubernetes").glob("*.yaml"))
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def cluster_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in KUBERNETES:
        for doc in documents(path):
            spec = doc.get("spec", {})
            if doc["apiVersion"] == "ray.io/v1":
                yield path.name, spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, cluster in cluster_specs():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield f"{name}:{group.get('groupName', 'head')}", group["template"]["spec"]


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.y*ml")), ids=lambda p: str(p.relative_to(INFRA)))
def test_every_yaml_file_parses_and_is_no_stub(path: Path) -> None:
    assert all(isinstance(doc, dict) and doc for doc in documents(path))


def test_cluster_file_fits_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(raw))
    broken = raw | {"max_wrokers": 3}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(broken))


def test_cluster_file_has_the_three_groups_and_ships_what_exists() -> None:
    raw = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    groups = raw["available_node_types"]
    assert set(groups) == {"head", "trainer", "encoder"}
    assert groups["trainer"]["resources"]["GPU"] >= 1
    assert groups["head"]["resources"] == {"CPU": 0}
    assert sum(g["max_workers"] for g in groups.values()) <= raw["max_workers"]
    for local in raw["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    assert "--dashboard-host=127.0.0.1" in " ".join(raw["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in " ".join(raw["setup_commands"])
    assert not re.search(r"(?<!\d)0\.0\.0\.0", json.dumps(raw)), "open to everybody"


def test_runtime_env_is_accepted_by_ray_and_names_what_exists() -> None:
    from ray.runtime_env import RuntimeEnv

    raw = yaml.safe_load((INFRA / "runtime_env.yaml").read_text(encoding="utf-8"))
    RuntimeEnv(**{k: v for k, v in raw.items() if k not in ("working_dir", "py_modules")})
    assert all((ROOT / module / "__init__.py").is_file() for module in raw["py_modules"])
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv/", "/data/", "/runs/"} <= set(ignored), "a job would carry them along"
    package = {p.name for p in (ROOT / "platform/isthmus").iterdir()}
    assert not {pattern.strip("/") for pattern in raw["excludes"]} & package
    assert not {"/jobs/", "/pipelines/", "/platform/"} & set(raw["excludes"])


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_kubernetes_objects_are_whole(path: Path) -> None:
    known = {"Namespace", "ConfigMap", "NetworkPolicy", "RayCluster", "RayJob", "RayService"}
    for doc in documents(path):
        assert doc["kind"] in known
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", doc["metadata"]["name"])
        assert doc["kind"] == "Namespace" or doc["metadata"]["namespace"] == "isthmus"


def test_kubernetes_pods_run_our_image_without_privileges() -> None:
    seen = dict(pods())
    assert len(seen) >= 6
    for name, pod in seen.items():
        container = pod["containers"][0]
        assert container["image"] == f"isthmus:{isthmus.__version__}", name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}, name


def test_kubernetes_secrets_and_settings_are_those_that_base_names() -> None:
    base = (INFRA / "kubernetes/base.yaml").read_text(encoding="utf-8")
    for name, pod in pods():
        container = pod["containers"][0]
        sources = [next(iter(source.values()))["name"] for source in container["envFrom"]]
        sources += [item["valueFrom"]["secretKeyRef"]["name"] for item in container.get("env", [])]
        for source in sources:
            assert re.search(rf"(name: |generic ){source}\b", base), (name, source)
        assert "stringData" not in base


def test_ray_clusters_demand_a_token_and_the_tested_version() -> None:
    specs = list(cluster_specs())
    assert len(specs) == 3
    for name, spec in specs:
        assert spec["authOptions"] == {"mode": "token"}, name
        assert spec["rayVersion"] == PINS["ray"], name
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name


def test_the_ray_job_starts_a_script_that_exists_with_valid_overrides() -> None:
    (doc,) = documents(INFRA / "kubernetes/rayjob.yaml")
    python, script, recipe, *overrides = doc["spec"]["entrypoint"].split()
    assert python == "python"
    for path in (script, recipe):
        assert (ROOT / path.removeprefix("/home/ray/isthmus/")).is_file(), path
    values = yaml.safe_load((ROOT / recipe.removeprefix("/home/ray/isthmus/")).read_text(encoding="utf-8"))
    run = apply_overrides(values, overrides)
    assert run["train"]["global_batch"] % run["cluster"]["workers"] == 0
    assert set(yaml.safe_load(doc["spec"]["runtimeEnvYAML"])) == {"env_vars"}


def test_the_ray_service_builds_from_a_valid_config() -> None:
    (doc,) = documents(INFRA / "kubernetes/rayservice.yaml")
    served = yaml.safe_load(doc["spec"]["serveConfigV2"])
    (application,) = served["applications"]
    module, function = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    config = load_config(ServeConfig, None, values=application["args"])
    assert config.auth == "token"
    assert config.port == served["http_options"]["port"]
    head = doc["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert config.token_env in [item["name"] for item in head["env"]]
    assert config.port in [p["containerPort"] for p in head["ports"]]


def test_the_image_copies_what_exists_and_runs_as_nobody_special() -> None:
    lines = (INFRA / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    assert "USER ray" in lines
    assert f"isthmus:{isthmus.__version__}" in "\n".join(lines)
    assert any("-c constraints.txt" in line for line in lines)


@pytest.mark.parametrize("folder", ["tracking", "monitoring"])
def test_compose_files_publish_on_loopback_and_mount_what_exists(folder: str) -> None:
    compose = yaml.safe_load((INFRA / folder / "compose.yaml").read_text(encoding="utf-8"))
    named = set(compose["volumes"])
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in named or source.startswith("${") or (INFRA / folder / source).is_file(), volume
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        assert ":latest" not in service.get("image", "")
    text = (INFRA / folder / "compose.yaml").read_text(encoding="utf-8")
    assert not re.search(r"(PASSWORD|SECRET\w*|KEY\w*): (?!\$\{)\S", text), "a secret is written into the file"


def test_tracking_needs_every_secret_of_its_example_and_the_tested_mlflow() -> None:
    text = (INFRA / "tracking/compose.yaml").read_text(encoding="utf-8")
    example = (INFRA / "tracking/env.example").read_text(encoding="utf-8")
    names = re.findall(r"^([A-Z_]+)=$", example, flags=re.M)
    assert len(names) == 3
    for name in names:
        assert f"${{{name}:?" in text, name
    assert f"mlflow=={PINS['mlflow']} " in (INFRA / "tracking/Dockerfile").read_text(encoding="utf-8")


def test_dashboard_and_alerts_ask_for_metrics_that_the_service_exports() -> None:
    source = (ROOT / "platform/isthmus/serving/metrics.py").read_text(encoding="utf-8")
    exported = set(re.findall(r'"(isthmus_[a-z_]+)"', source))
    dashboard = json.loads((INFRA / "monitoring/grafana/isthmus.json").read_text(encoding="utf-8"))
    asked = " ".join(t["expr"] for p in dashboard["panels"] for t in p["targets"])
    asked += (INFRA / "monitoring/alerts.yml").read_text(encoding="utf-8")
    names = {re.sub(r"_(total|bucket|sum|count)$", "", n) for n in re.findall(r"ray_(isthmus_[a-z_]+)", asked)}
    assert names == exported
    sources = yaml.safe_load((INFRA / "monitoring/grafana/datasource.yaml").read_text(encoding="utf-8"))["datasources"]
    assert {p["datasource"]["uid"] for p in dashboard["panels"]} == {s["uid"] for s in sources}
