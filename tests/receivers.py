"""Real receivers of alerts: a web server that fails as it is told to, and a mail server."""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
import time
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Got(NamedTuple):
    """A post: its headers, its raw body, and what it got for an answer."""

    headers: dict[str, str]
    body: bytes
    answer: object

    @property
    def event(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self.body)
        return read


class Web:
    """Answers posts as `plan` says, one after another, then with 200: a status, "reset" or "hang"."""

    def __init__(self) -> None:
        self.posts: list[Got] = []
        self.plan: list[object] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = web.plan.pop(0) if web.plan else 200
                headers = {name.lower(): value for name, value in self.headers.items()}
                web.posts.append(Got(headers, body, answer))
                if answer == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                elif answer == "hang":
                    time.sleep(2)
                else:
                    assert isinstance(answer, int)
                    self.send_response(answer)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def finish(self) -> None:
                try:
                    super().finish()
                except OSError:
                    return  # it was reset

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hunter2"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def taken(self) -> list[dict[str, Any]]:
        """Return the events that were answered with 200."""
        return [post.event for post in self.posts if post.answer == 200]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Mail:
    """Takes mail over SMTP; `refuse` is answered to RCPT while it is set. It asks for no password but takes
    one."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.refuse = b""
        self.logins: list[str] = []
        mail = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 here\r\n")
                while line := self.rfile.readline():
                    verb = line.split()[0].upper().rstrip()
                    if verb == b"QUIT":
                        self.wfile.write(b"221 bye\r\n")
                        return
                    self.wfile.write(self._answer(verb, line))

            def _answer(self, verb: bytes, line: bytes) -> bytes:
                if verb == b"EHLO":
                    return b"250-here\r\n250 AUTH PLAIN\r\n"
                if verb == b"AUTH":
                    mail.logins.append(line.split()[2].decode())
                    return b"235 welcome\r\n"
                if verb.startswith(b"RCPT") and mail.refuse:
                    return mail.refuse
                if verb == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = []
                    while (text := self.rfile.readline()) != b".\r\n":
                        lines.append(text.removeprefix(b"."))
                    read = message_from_bytes(b"".join(lines), policy=policy.default)
                    assert isinstance(read, EmailMessage)
                    mail.mails.append(read)
                return b"250 ok\r\n"

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
