"""A double of a broken network: what a real server sends is altered on its way."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from headrace.testing.postgres import PostgresServer

Alter = Callable[[bytes], bytes]
"""Takes a pgoutput message of the stream, and returns what arrives in its place."""

_XLOG_DATA = 25


class CorruptingProxy:
    """Passes connections on to a server; messages of a replication stream go through `alter`."""

    def __init__(self, server: PostgresServer, alter: Alter) -> None:
        self.alter = alter
        self.alter_copy: Alter = bytes
        """Takes a row that COPY sends."""
        self.url = ""
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = server.url.replace(f":{server.port}/", f":{port}/") + "?sslmode=disable&gssencmode=disable"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream = socket.create_connection(("127.0.0.1", self._server.port))
        pending = bytearray()
        with client, upstream, suppress(OSError):
            while True:
                for ready in select.select([client, upstream], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is client:
                        upstream.sendall(data)
                    else:
                        pending += data
                        client.sendall(self._altered(pending))

    def _altered(self, pending: bytearray) -> bytes:
        """Take whole messages of the server from what has arrived."""
        out = bytearray()
        while len(pending) >= 5:
            (length,) = struct.unpack_from(">i", pending, 1)
            if len(pending) < length + 1:
                break
            kind, body = bytes(pending[:1]), bytes(pending[5 : length + 1])
            del pending[: length + 1]
            if kind == b"d" and body[:1] == b"w" and not body.endswith(b"\n"):
                body = body[:_XLOG_DATA] + self.alter(body[_XLOG_DATA:])
            elif kind == b"d" and body.endswith(b"\n"):
                body = self.alter_copy(body)
            out += kind + struct.pack(">i", len(body) + 4) + body
        return bytes(out)


@contextmanager
def corrupting(server: PostgresServer, alter: Alter) -> Iterator[CorruptingProxy]:
    proxy = CorruptingProxy(server, alter)
    try:
        yield proxy
    finally:
        proxy.close()
