"""A store of shards on loopback, over HTTP, that fails as it is told; and shards for it."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from limoe_dist.data.fetchers import Wanted

Fault = Literal["403", "429", "500", "503", "cut", "corrupt", "hang", "reset", "whole"]
"""A status; half of the body; one bit of it changed; no answer until the server ends; a reset connection; all of the
body though a range was asked for."""


class Store:
    """Serves `files` by path, ranges too. Each request takes the next of its path's `faults`, until there is none."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.asked: list[tuple[str, str]] = []
        """(path, Range header) of every request."""
        self.latency_s = 0.0
        self.bytes_per_s = float("inf")
        """Of all answers together."""
        self.most_at_once = 0
        self.gate = threading.Event()
        """Answers wait for it."""
        self.gate.set()
        self.lock = threading.Lock()
        self.line = threading.Lock()
        self._at_once = 0
        self._ended = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Answer)
        self._server.store = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def put(self, path: str, content: bytes) -> Wanted:
        self.files[path] = content
        return Wanted(self.url(path), len(content), hashlib.sha256(content).hexdigest())

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    def requests(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    def close(self) -> None:
        self._ended.set()
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: _Answer) -> None:
        path = handler.path.lstrip("/")
        with self.lock:
            self.asked.append((path, handler.headers.get("Range", "")))
            fault = self.faults[path].pop(0) if self.faults[path] else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.latency_s)
            self.gate.wait()
            self._answer(handler, path, fault)
        finally:
            with self.lock:
                self._at_once -= 1

    def _answer(self, handler: _Answer, path: str, fault: Fault | None) -> None:
        if fault == "hang":
            self._ended.wait()
            return
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if path not in self.files or (fault is not None and fault.isdigit()):
            handler.send_error(int(fault) if fault is not None and fault.isdigit() else 404)
            return
        body, start = self.files[path], 0
        asked = handler.headers.get("Range", "")
        if asked and fault != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            body = body[start : int(last) + 1]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        handler.send_response(206 if asked and fault != "whole" else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        self._send(handler, body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            # A client drops what it has not read yet when it sees the end.
            time.sleep(0.1)
            handler.close_connection = True

    def _send(self, handler: _Answer, body: bytes) -> None:
        step = 1 << 16
        for begin in range(0, len(body), step):
            part = body[begin : begin + step]
            if self.bytes_per_s != float("inf"):
                with self.line:
                    time.sleep(len(part) / self.bytes_per_s)
            handler.wfile.write(part)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    store: Store

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what is tested: nothing is told."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self.server.store.answer(self)

    def log_message(self, format: str, *given: object) -> None:
        """The test reads `asked`."""


def shard_bytes(size_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)
