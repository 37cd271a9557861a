"""Real receivers of alerts: a web server that fails as it is told to, and a mail server."""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import struct
import threading
import time
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple

CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""Of localhost, with its key."""


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


class _Speaker(socketserver.StreamRequestHandler):
    """What a mail server says in one connection."""

    mail: Mail

    def handle(self) -> None:
        if self.mail.tls == "smtps":
            self._encrypt()
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            verb = line.split()[0].upper().rstrip()
            if verb == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(self._answer(verb, line))
            if verb == b"STARTTLS":
                self._encrypt()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def _encrypt(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        self.request = context.wrap_socket(self.request, server_side=True)
        self.setup()
        self.mail.encrypted += 1

    def _answer(self, verb: bytes, line: bytes) -> bytes:
        if verb == b"EHLO":
            offer = b"250-STARTTLS\r\n" if self.mail.tls == "starttls" else b""
            return b"250-here\r\n" + offer + b"250 AUTH PLAIN\r\n"
        if verb == b"STARTTLS":
            return b"220 go on\r\n"
        if verb == b"AUTH":
            self.mail.logins.append(line.split()[2].decode())
            return b"235 welcome\r\n"
        if verb.startswith(b"RCPT") and self.mail.refuse:
            return self.mail.refuse
        if verb == b"DATA":
            self.wfile.write(b"354 go on\r\n")
            lines = []
            while (text := self.rfile.readline()) != b".\r\n":
                lines.append(text.removeprefix(b"."))
            read = message_from_bytes(b"".join(lines), policy=policy.default)
            assert isinstance(read, EmailMessage)
            self.mail.mails.append(read)
        return b"250 ok\r\n"


class _MailServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who does not trust the certificate hangs up."""


class Mail:
    """Takes mail over SMTP; `refuse` is answered to RCPT while it is set. It asks for no password but takes
    one. With `tls` it speaks TLS from the start, or once it is asked to."""

    def __init__(self, tls: Literal["", "smtps", "starttls"] = "") -> None:
        self.tls = tls
        self.mails: list[EmailMessage] = []
        self.refuse = b""
        self.logins: list[str] = []
        self.encrypted = 0
        """How many connections were."""
        self._server = _MailServer(("127.0.0.1", 0), type("Speaker", (_Speaker,), {"mail": self}))
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
