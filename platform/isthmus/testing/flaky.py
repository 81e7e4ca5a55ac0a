"""A proxy before a real object store that fails on order: errors, resets, stalls, slow and cut answers.

    with flaky(server.endpoint, every(3, "reset")) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint

Requests go through unchanged, the Host header included, so signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["error", "reset", "stall", "slow", "cut"]
"""503 with S3's SlowDown; the connection reset before an answer; no answer for :data:`STALL_S`; the body in small
pieces with pauses; half the body, then a reset."""

Rule = Callable[[str, str, int], Fault | None]
"""(method, path, number of the request) -> what goes wrong with it."""

STALL_S, SLOW_S, PIECE = 30.0, 0.02, 4096
_BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


def every(nth: int, fault: Fault, *, method: str = "GET") -> Rule:
    """The ``nth``, 2 ``nth``, ... request of ``method`` fails."""
    count, lock = Counter[str](), threading.Lock()

    def rule(asked: str, _path: str, _number: int) -> Fault | None:
        if asked != method:
            return None
        with lock:
            count[asked] += 1
            return fault if count[asked] % nth == 0 else None

    return rule


class Flaky(socketserver.ThreadingTCPServer):
    """The proxy; ``faults`` counts what was done to requests, ``requests`` how many there were."""

    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str, rule: Rule) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        there = urlsplit(upstream)
        self.upstream, self.rule = (str(there.hostname), int(there.port or 80)), rule
        self.faults, self.requests, self.lock = Counter[str](), 0, threading.Lock()

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:PORT``"""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def judge(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests += 1
            number = self.requests
        fault = self.rule(method, path, number)
        if fault is not None:
            with self.lock:
                self.faults[fault] += 1
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is nothing to report."""


@contextlib.contextmanager
def flaky(upstream: str, rule: Rule) -> Iterator[Flaky]:
    """A running proxy before ``upstream`` (``http://HOST:PORT``)."""
    server = Flaky(upstream, rule)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Connection(socketserver.StreamRequestHandler):
    server: Flaky

    def handle(self) -> None:
        while line := self.rfile.readline(65536).strip():
            method, path, _ = line.decode("latin-1").split(" ", 2)
            headers = http.client.parse_headers(self.rfile)
            body = self._body(headers)
            fault = self.server.judge(method, path)
            if fault == "error":
                self._answer(503, "Service Unavailable", [("Content-Type", "application/xml")], _BUSY, method)
            elif fault == "reset":
                return self._reset()
            elif fault == "stall":
                time.sleep(STALL_S)
                return self._reset()
            elif not self._forward(method, path, headers, body, fault):
                return None
        return None

    def _body(self, headers: Any) -> bytes:
        """The body as it was sent, chunks and trailers included."""
        if headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            del headers["Expect"]  # the store gets the body at once
        if headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("Content-Length") or 0))
        parts = [line := self.rfile.readline()]
        while size := int(line.partition(b";")[0], 16):
            parts += [self.rfile.read(size + 2), line := self.rfile.readline()]
        while line.strip():
            parts.append(line := self.rfile.readline())
        return b"".join(parts)

    def _forward(self, method: str, path: str, headers: Any, body: bytes, fault: Fault | None) -> bool:
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        try:
            upstream.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
            return self._answer(answer.status, answer.reason, kept, data, method, fault)
        finally:
            upstream.close()

    def _answer(
        self,
        status: int,
        reason: str,
        headers: list[tuple[str, str]],
        data: bytes,
        method: str,
        fault: Fault | None = None,
    ) -> bool:
        """Send it; False when the connection is gone."""
        if method != "HEAD" and not any(name.lower() == "content-length" for name, _ in headers):
            headers = [*headers, ("Content-Length", str(len(data)))]
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers), "", ""]
        self.wfile.write("\r\n".join(lines).encode("latin-1"))
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self._reset()
            return False
        if fault == "slow":
            for start in range(0, len(data), PIECE):
                self.wfile.write(data[start : start + PIECE])
                time.sleep(SLOW_S)
        else:
            self.wfile.write(data)
        self.wfile.flush()
        return True

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
