"""The cluster that a command starts for itself, seen from outside the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = """
import json, psutil, ray
from isthmus.ray_session import ray_session

with ray_session(cpus=10):
    @ray.remote
    def double(x):
        return 2 * x

    answer = ray.get(double.remote(21))
    family = psutil.Process().children(recursive=True)
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"}
    facts = {"answer": answer, "cpus": ray.cluster_resources()["CPU"], "listening": sorted(listening)}
left = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and "raylet" in p.name()]
print(json.dumps(facts | {"over": not ray.is_initialized(), "left": left}))
"""


def test_it_works_listens_on_loopback_alone_and_ends_with_the_command() -> None:
    # conftest's own settings must not help it
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == "RAY_AUTH_MODE"}
    for attempt in range(3):  # a machine that is very busy can fail to start a node in time
        ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        if "timed out during startup" not in ran.stderr or attempt == 2:
            break
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["answer"] == 42
    assert facts["cpus"] >= 14
    assert {ip.removeprefix("::ffff:") for ip in facts["listening"]} == {"127.0.0.1"}
    assert facts["over"]
    assert facts["left"] == []
