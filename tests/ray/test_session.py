"""The cluster that a command starts for itself, seen from outside the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

PROGRAM = """
import json, psutil
{first}
import os, ray, signal
from isthmus.ray_session import ray_session

def interrupted(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupted)
with ray_session(cpus=10):
    @ray.remote
    def double(x):
        return 2 * x

    answer = ray.get(double.remote(21))
    family = psutil.Process().children(recursive=True)
    listening = {{c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"}}
    facts = {{"answer": answer, "cpus": ray.cluster_resources()["CPU"], "listening": sorted(listening)}}
    facts["mode"] = os.environ.get("RAY_AUTH_MODE")
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        facts["interrupted"] = True
left = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and "raylet" in p.name()]
print(json.dumps(facts | {{"over": not ray.is_initialized(), "left": left}}))
"""


FIRST = {
    # What captioning, embedding and serving import before they start Ray.
    "bulk and service": "import isthmus.inference.caption, isthmus.inference.embed, isthmus.serving.app",
    # A user's own program.
    "Ray itself": "import ray",
}


@pytest.mark.parametrize("case", ["bulk and service", pytest.param("Ray itself", marks=pytest.mark.slow)])
def test_it_works_listens_on_loopback_alone_and_ends_with_the_command(case: str, tmp_path: Path) -> None:
    # conftest's own settings must not help it, and a token of its own is made in an empty home
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM.format(first=FIRST[case])]
    for attempt in range(3):  # a machine that is very busy can fail to start a node in time
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "timed out during startup" not in ran.stderr or attempt == 2:
            break
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["mode"] == "token"
    assert facts["interrupted"], "Ray's core would have aborted the process"
    assert (tmp_path / ".ray" / "auth_token").exists()
    assert facts["answer"] == 42
    assert facts["cpus"] >= 14
    assert {ip.removeprefix("::ffff:") for ip in facts["listening"]} == {"127.0.0.1"}
    assert facts["over"]
    assert facts["left"] == []
