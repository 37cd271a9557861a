"""HTTP for whoever scales workers or watches: `GET /scale` (JSON) and `GET /metrics` (Prometheus)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from headrace.errors import UserError
from headrace.scaling.metrics import CONTENT_TYPE, exposition

_PATIENCE = 10.0
"""Seconds that a client may take for its request."""


class Endpoint:
    """Answers until it is closed. It tells numbers and models' names, and nothing can be changed by it."""

    def __init__(self, address: tuple[str, int], report: Callable[[], dict[str, Any]]) -> None:
        """Listen on host and port; `report` is that of a Controller. Raises UserError where it cannot."""
        try:
            self._server = _Server(address, _handler(report))
        except OSError as error:
            host, port = address
            raise UserError(
                f"Nothing can listen on {host}:{port}: {error.strerror or error}.",
                "Name another address: listen in [scale] of headrace.toml.",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="http", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave a client that has gone away unmentioned."""


def _handler(report: Callable[[], dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "headrace"
        sys_version = ""
        timeout = _PATIENCE

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/scale":
                self._answer(200, "application/json", json.dumps(report()))
            elif path == "/metrics":
                self._answer(200, CONTENT_TYPE, exposition(report()))
            else:
                self._answer(404, "text/plain; charset=utf-8", "There are /scale and /metrics.\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Log nothing: who asks does so every few seconds."""

    return Handler
