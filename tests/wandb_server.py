"""As much of W&B's server as takes in lines of runs, and may go away."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_ENTITY = {"id": "e", "name": "me"}
_TYPES = ("__type", "QueryType", "MutationType", "ServerInfoType", "CreateArtifactInput")  # what it is asked about


class WandbServer:
    """Keeps the lines of each run, by its id. While `gone` exists every answer is that it can't answer."""

    def __init__(self, gone: Path) -> None:
        self.gone = gone
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def variables(self) -> dict[str, str]:
        """The environment of who uses it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._server.server_port}", "WANDB_API_KEY": "k" * 40}

    @contextmanager
    def running(self) -> Iterator[WandbServer]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, said: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            if told := said.get("files", {}).get("wandb-history.jsonl"):
                lines, offset = self.lines.setdefault(path.split("/")[-2], []), told["offset"]
                lines[offset : offset + len(told["content"])] = map(json.loads, told["content"])
            return {"exitcode": None, "limits": {}}
        identity = said.get("variables", {}).get("name") or ""
        lines = self.lines.get(identity, [])
        bucket = {
            "id": "b", "name": identity, "displayName": identity, "description": "", "config": "{}",
            "wandbConfig": "{}", "summaryMetrics": "{}", "sweepName": None, "tags": [], "notes": "",
            "project": {"id": "p", "name": "test", "entity": _ENTITY},
            "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "eventsTail": "[]",
        }  # fmt: skip
        versions = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
        known = {name: {"fields": [], "inputFields": []} for name in _TYPES}
        data = {
            "viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": versions,
            "model": {"bucket": bucket if lines else None},
            "upsertBucket": {"bucket": bucket, "inserted": not lines},
            "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
            "project": None,
        }
        return {"data": data | known}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                try:
                    said = json.loads(body)
                except ValueError:  # a file, or what W&B measures of itself
                    said = {}
                self._send({} if server.gone.exists() else server.answer(self.path, said))

            def do_PUT(self) -> None:
                self.do_POST()

            def do_GET(self) -> None:
                self._send({})

            def _send(self, answer: dict[str, Any]) -> None:
                content = json.dumps(answer).encode()
                self.send_response(503 if server.gone.exists() else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
