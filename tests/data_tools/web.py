"""A web server on this machine, with files and faults."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator

Handler = http.server.BaseHTTPRequestHandler


class Web:
    """Paths and what answers them: bytes, a status, or a function of (handler, number of the request)."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.pages: dict[str, bytes | int | Callable[[Handler, int], None]] = {}
        self.asked: Counter[str] = Counter()
        self.release = threading.Event()
        """Set at the end: what a page that stalls waits for."""

    def answer(self, handler: Handler) -> None:
        self.asked[handler.path] += 1
        page = self.pages.get(handler.path, 404)
        if isinstance(page, int):
            send(handler, b"", page)
        elif isinstance(page, bytes):
            send(handler, page)
        else:
            page(handler, self.asked[handler.path])


def send(handler: Handler, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@contextlib.contextmanager
def web() -> Iterator[Web]:
    """A running server, ended on leaving."""

    class Answering(Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                site.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Answering) as server:
        site = Web(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield site
        finally:
            site.release.set()
            server.shutdown()
            thread.join()
