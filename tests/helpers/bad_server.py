"""A loopback HTTP server that drops, stalls, lies and refuses, request by request, as it is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """What one GET does wrong.

    `drop`: the connection ends after `n` body bytes; `stall`: it falls silent there; `status`: HTTP `n` without the
    object; `length`: Content-Length is `n` too large (negative: too small); `whole`: the range is ignored; `flip`: one
    bit of body byte `n` (modulo its length) is wrong; `shift`: the bytes from `n` further on, and Content-Range says
    so; `unsaid`: the same, and Content-Range hides it; `total`: Content-Range gives an object `n` bytes longer; `more`:
    `n` bytes beyond the range, announced; `garbage`: no HTTP at all.
    """

    kind: str
    n: int = 0


class BadServer(ThreadingHTTPServer):
    """Serves `files` (path without its first slash: bytes) with ranges, and folders as pages of links.

    `faults` gives the fault (or None) of one GET after the other and may be endless; after its end all goes well.
    `log` has (method, path, Range header) of each request. Use as a context manager.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], faults: Iterable[Fault | None] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.log: list[tuple[str, str, str]] = []
        self.released = threading.Event()
        self._faults, self._lock = iter(faults), threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> BadServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def next_fault(self, *entry: str) -> Fault:
        with self._lock:
            self.log.append((entry[0], entry[1], entry[2]))
            return (next(self._faults, None) or Fault("none")) if entry[0] == "GET" else Fault("none")

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.lstrip("/").partition("?")[0]
        asked = self.headers.get("Range", "")
        kind, n = self.server.next_fault(self.command, path, asked)
        if kind == "garbage":
            self.wfile.write(b"\x00\xffno status line\r\n\r\n")
            self.close_connection = True
        elif kind == "status":
            self._send(n, b"" if n in (204, 304) else b"refused", {})
        elif path in self.server.files:
            self._send_object(self.server.files[path], re.fullmatch(r"bytes=(\d+)-(\d+)", asked), kind, n)
        else:
            inside = sorted(name[len(path) :] for name in self.server.files if not path or name.startswith(path))
            links = "".join(f'<a href="{name}">{name}</a>' for name in inside if path == "" or path.endswith("/"))
            self._send(200 if links else 404, links.encode(), {"Content-Type": "text/html"}, kind, n)

    def _send_object(self, data: bytes, match: re.Match[str] | None, kind: str, n: int) -> None:
        if match is None or kind == "whole":
            return self._send(200, data, {}, kind, n)
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        begin = start + (n if kind in ("shift", "unsaid") else 0)
        said = begin if kind == "shift" else start
        stop = min(stop + (n if kind == "more" else 0), len(data))
        body = data[begin : begin + stop - start]
        total = len(data) + (n if kind == "total" else 0)
        ranges = f"bytes {said}-{said + len(body) - 1}/{total}"
        return self._send(206, body, {"Content-Range": ranges}, kind, n)

    def _send(self, status: int, body: bytes, headers: Mapping[str, Any], kind: str = "", n: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + (n if kind == "length" else 0)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "flip" and body:
            flipped = bytearray(body)
            flipped[n % len(body)] ^= 1
            body = bytes(flipped)
        self.wfile.write(body[:n] if kind in ("drop", "stall") else body)
        if kind in ("drop", "stall", "length"):
            self.wfile.flush()
            # A length that is too large is noticed only while the connection stays open, or when it ends.
            self.server.released.wait(30 if kind == "stall" else 0)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing: the log is a list."""
