"""``ray job submit`` against a real local cluster that demands a token: the way people use a shared cluster."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isthmus import storage
from isthmus.data.manifest import Manifest
from isthmus.evaluation.samples import read_bulk_captions
from isthmus.testing import s3
from isthmus.testing.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
READY_S = 120
ATTEMPTS = 3
STEADY_ANSWERS = 8
FIRST_PORT, LAST_PORT = 20_000, 32_000  # below what the system hands out by itself, above Ray's own range


@dataclass(frozen=True)
class JobCluster:
    """A running head node.

    Attributes:
        address: of its job port.
        environment: what a client needs, the token included.
    """

    address: str
    environment: dict[str, str]

    def submit(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` of the repository with ``infra/runtime_env.yaml``; waits for the job's end."""
        environment = dict(self.environment)
        if not token:
            del environment["RAY_AUTH_TOKEN_PATH"]
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [str(BIN / "ray"), "job", "submit", "--address", self.address]
        command += ["--runtime-env", "infra/runtime_env.yaml", "--", "python", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)

    def answer(self, *words: str) -> dict[str, Any]:
        """The JSON that a job of these words printed; the job must have succeeded."""
        done = self.submit(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))


@pytest.fixture(scope="module")
def job_cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[JobCluster]:
    folder = tmp_path_factory.mktemp("jobs")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= s3_server.environment | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    for attempt in range(1, ATTEMPTS + 1):
        with _head(folder / f"head{attempt}.log", environment) as (head, address):
            if _comes_up(head, address, token.read_text(), folder / f"head{attempt}.log"):
                yield JobCluster(address, environment)
                return
    pytest.fail(f"no head node came up; the last one said:\n{(folder / f'head{ATTEMPTS}.log').read_text()[-3000:]}")


@contextlib.contextmanager
def _head(log: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    temporary = Path(tempfile.mkdtemp(prefix="isr"))  # short: sockets lie below it, and their paths are limited
    gcs, dashboard, agent, client, metrics, raylet, objects = _free_ports(7)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=8", "--num-gpus=0"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *(f"--node-manager-port={raylet}", f"--object-manager-port={objects}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={200 * 2**20}"),
    ]
    with log.open("w") as out:
        head = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield head, f"http://127.0.0.1:{dashboard}"
    finally:
        _end(head)
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Shapes:
    """Drawn image-text pairs in a bucket, with room beside them for results, and tiny language models on this disk.

    Attributes:
        url: below it ``train``, ``heldout`` and whatever a test writes.
        folder: holds ``text`` and ``language``, the models, and ``mlflow.db``.
    """

    url: str
    folder: Path

    @property
    def tracking(self) -> str:
        return f"tracking.uri=sqlite:///{self.folder}/mlflow.db"

    def use(self, model: str, out: str) -> tuple[str, ...]:
        """Words for a command that uses a model on the training images."""
        return (f"model={model}", f"data={self.url}/train", f"out={self.url}/{out}", self.tracking, "--json")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Shapes:
    from isthmus.data.sources import fetch
    from isthmus.testing.backbones import tiny_bert, tiny_lm

    found = Shapes(s3_server.url("shapes"), tmp_path_factory.mktemp("shapes"))
    with s3.environment(s3_server.environment):
        fetch("all", found.url, synthetic=True, limit=24, heldout=8)
    tiny_bert(found.folder / "text")
    tiny_lm(found.folder / "language")
    return found


def test_a_job_without_the_token_is_refused(job_cluster: JobCluster) -> None:
    refused = job_cluster.submit("jobs/data.py", "--help", token=False)
    assert refused.returncode != 0
    assert "Usage: isthmus" not in refused.stdout
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(f"{job_cluster.address}/api/jobs/", timeout=20)
    assert answer.value.code in (401, 403)


def test_from_a_bucket_to_captions_in_it_by_jobs(job_cluster: JobCluster, shapes: Shapes, s3_server: S3Server) -> None:
    listed = job_cluster.answer("jobs/data.py", "index", f"{shapes.url}/train", "--json")
    assert (listed["samples"], listed["problems"]) == (16, [])
    first = job_cluster.answer("jobs/train.py", "pipelines/demo/stage1.yaml", *_small_stage1(shapes))
    assert first["uri"] == "models:/one@candidate"
    second = job_cluster.answer("jobs/train.py", "pipelines/demo/stage2.yaml", *_small_stage2(shapes, first["uri"]))
    lake = job_cluster.answer("jobs/caption.py", *shapes.use(second["uri"], "captions"), "max_new_tokens=4")
    assert (lake["expected"], lake["captioned"], lake["quarantined"]) == (16, 16, 0)
    with s3.environment(s3_server.environment):
        assert storage.exists(f"{shapes.url}/runs/one/artefact/model.safetensors")
        manifest = Manifest.load(f"{shapes.url}/train")
        assert set(read_bulk_captions(f"{shapes.url}/captions", manifest).captions) == set(
            manifest.table["id"].to_pylist()
        )


@pytest.mark.slow
def test_evaluate_and_embed_as_jobs(job_cluster: JobCluster, shapes: Shapes) -> None:
    job_cluster.answer("jobs/data.py", "index", f"{shapes.url}/train", "--json")
    first = job_cluster.answer("jobs/train.py", "pipelines/demo/stage1.yaml", *_small_stage1(shapes))
    figures = job_cluster.answer("jobs/evaluate.py", *shapes.use(first["uri"], "figures"))
    assert figures["samples"] == 16 and 0 <= figures["tr_at_5"] <= 1
    vectors = job_cluster.answer("jobs/embed.py", *shapes.use(first["uri"], "vectors"))
    assert (vectors["expected"], vectors["images"], vectors["quarantined"]) == (16, 16, 0)


@pytest.mark.slow
def test_results_may_not_go_where_the_job_s_files_are(job_cluster: JobCluster, shapes: Shapes) -> None:
    failed = job_cluster.submit("jobs/train.py", "pipelines/demo/projector.yaml", f"data.train={shapes.url}/train")
    assert failed.returncode != 0
    assert "'storage' is the relative path runs, which in a submitted job is a folder that Ray deletes" in failed.stdout


def test_a_job_that_fails_says_so_to_its_submitter(job_cluster: JobCluster) -> None:
    failed = job_cluster.submit("jobs/train.py", "pipelines/demo/stage1.yml")
    assert failed.returncode != 0
    assert "There is no recipe at pipelines/demo/stage1.yml. Did you mean 'stage1.yaml'?" in failed.stdout


def _run(shapes: Shapes, name: str) -> tuple[str, ...]:
    return (
        "--json", f"name={name}", f"model.name={name}", f"storage={shapes.url}/runs", shapes.tracking,
        f"data.train={shapes.url}/train", "data.placement=inline", "data.cache=null",
        "train.steps=3", "train.global_batch=8", "train.warmup_steps=1", "cluster.workers=2",
        "data.max_cut_share=1",  # the small tokenizers spell most words
    )  # fmt: skip


def _small_stage1(shapes: Shapes) -> tuple[str, ...]:
    """Overrides that make a run of three steps of the shipped recipe."""
    return (
        *_run(shapes, "one"),
        "method.vision.name=vit_tiny_patch16_224", "method.vision.weights=random", "method.vision.image_size=32",
        f"method.text.weights={shapes.folder / 'text'}", "method.qformer.init=null", "method.qformer.layers=1",
        "method.qformer.width=16", "method.qformer.heads=2", "method.qformer.feed_forward=32",
    )  # fmt: skip


def _small_stage2(shapes: Shapes, parent: str) -> tuple[str, ...]:
    return (*_run(shapes, "two"), f"parent={parent}", f"method.language.weights={shapes.folder / 'language'}")


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


def _comes_up(head: subprocess.Popen[bytes], address: str, token: str, log: Path) -> bool:
    """Whether the node answers and stays: on a busy machine one of its parts may give up, and takes all with it."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + READY_S
    answers = 0
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            answers += "will now block" in log.read_text(errors="replace")  # from then on it watches its parts
        if answers > STEADY_ANSWERS:
            return True
        time.sleep(0.5)
    return False


def _end(head: subprocess.Popen[bytes]) -> None:
    """Ends the head's own process group, which is all that it started; never ``ray stop``, which ends everybody's."""
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(5)  # of its own accord it takes half a minute
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
