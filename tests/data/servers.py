"""An HTTP server of a folder, or in front of another server, that fails as told."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Request:
    path: str
    query: str
    range: str | None
    user_agent: str | None


@dataclass
class Fault:
    """What goes wrong with one answer; `after`: bytes of the body that are sent before.

    status: that answer instead. reset: the connection breaks. cut: it ends before Content-Length; cut on release:
    once `Server.release` is set. short: it ends, and Content-Length says so. flip: a byte is another. stall: no
    more bytes until `Server.release`. trickle: in many pieces with pauses. long: more bytes than there are. html: a
    login page with status 200. garbled: no HTTP, as of a balancer that restarts.
    """

    kind: str
    after: int = 0
    status: int = 500


@dataclass
class Server:
    """Serves `folder`, or what `upstream` (host:port) says. `faults`: by file name, one for each next answer."""

    folder: Path | None = None
    upstream: str | None = None
    ranges: bool = True
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    on_request: Callable[[str], Any] = lambda name: None

    def __post_init__(self) -> None:
        self.stalled = threading.Semaphore(0)  # one release an answer that has stalled
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    server.answer(self)

            do_HEAD = do_GET  # noqa: N815

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self._httpd.block_on_close = False
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._httpd.server_port}"
        self.url = f"http://{self.address}"

    def close(self) -> None:
        self.release.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def count(self, suffix: str) -> int:
        return sum(request.path.endswith(suffix) for request in list(self.requests))

    def _content(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        if self.upstream is not None:
            connection = http.client.HTTPConnection(self.upstream)
            connection.request(handler.command, handler.path, headers=dict(handler.headers))
            response = connection.getresponse()
            body = response.read()
            hop = ("connection", "transfer-encoding", "content-length", "server", "date")
            headers = {name: value for name, value in response.getheaders() if name.lower() not in hop}
            connection.close()
            return response.status, headers, body
        assert self.folder is not None
        path = self.folder / urlsplit(handler.path).path.lstrip("/")
        if not path.is_file():
            return 404, {}, b"not here"
        body = path.read_bytes()
        asked = handler.headers.get("Range")
        if asked and self.ranges:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            last = min(int(end) if end else len(body) - 1, len(body) - 1)
            if int(begin) >= len(body):
                return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            header = {"Content-Range": f"bytes {begin}-{last}/{len(body)}"}
            return 206, header, body[int(begin) : last + 1]
        return 200, {}, body

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        name = parts.path.rpartition("/")[2]
        self.requests.append(
            Request(parts.path, parts.query, handler.headers.get("Range"), handler.headers.get("User-Agent"))
        )
        self.on_request(name)
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else None
        status, headers, body = self._content(handler)
        kind, after = (fault.kind, min(fault.after, len(body))) if fault else ("", len(body))
        if fault and kind == "status":
            status, headers, body, after = fault.status, {}, b"told to fail", len(b"told to fail")
        elif kind == "html":
            headers, body = {"Content-Type": "text/html"}, b"<html>please log in</html>"
            after = len(body)
        elif kind == "flip":
            body = body[:after] + bytes([body[after] ^ 1]) + body[after + 1 :]
            after = len(body)
        elif kind == "long":
            body, after = body + b"more", len(body) + 4
        elif kind == "garbled":
            handler.wfile.write(b"\x15\x03\x01 no HTTP\r\nat all\r\n\r\n")
            handler.close_connection = True
            return
        length = after if kind == "short" else len(body)
        handler.send_response(status)
        for header, value in headers.items():
            handler.send_header(header, value)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if kind == "trickle":
            pieces = 12
            for piece in range(pieces):
                handler.wfile.write(body[piece * len(body) // pieces : (piece + 1) * len(body) // pieces])
                self.release.wait(0.05)
            return
        handler.wfile.write(body[:after])
        handler.wfile.flush()
        if kind == "stall":
            self.stalled.release()
            self.release.wait(60)
            handler.wfile.write(body[after:])
        elif kind == "reset":
            # Let what was sent arrive, then break: with no lingering, closing sends a reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
        elif kind == "cut":
            handler.close_connection = True
        elif kind == "cut on release":
            self.release.wait(60)
            handler.close_connection = True
