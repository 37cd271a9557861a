"""What docs/sources-postgres.md lets an administrator run is enough; a url's TLS reaches every connection."""

from __future__ import annotations

import re
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from headrace.config import Project, load_project
from headrace.errors import SourceUnavailable
from headrace.pipeline import Pipeline
from headrace.sources.postgres.connection import connect, connect_bulk
from headrace.sources.postgres.health import slot_health
from headrace.sources.postgres.preflight import inspect
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

PAGE = Path(__file__).parents[2] / "docs" / "sources-postgres.md"


def make_project(folder: Path, url: str) -> Project:
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{url}"\n')
    return load_project(folder)


@pytest.mark.parametrize("version", [16, 18])
def test_the_documented_rights_are_enough(version: int, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    needed = [block for block in blocks if "pg_monitor" not in block]
    assert (len(blocks), len(needed)) == (3, 2)
    with PostgresServer(tmp_path / "pg", version) as server:
        server.psql("CREATE ROLE shop_owner; CREATE DATABASE shop")
        server.psql(
            "GRANT CREATE ON DATABASE shop TO shop_owner; GRANT CREATE ON SCHEMA public TO shop_owner"
        )
        server.psql("GRANT CREATE ON SCHEMA public TO shop_owner", "shop")
        server.psql(
            "SET ROLE shop_owner;"
            "CREATE TABLE customers (id int PRIMARY KEY); INSERT INTO customers VALUES (1);"
            "CREATE TABLE orders (id int, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);"
            "CREATE TABLE orders_1 PARTITION OF orders FOR VALUES IN (1); INSERT INTO orders VALUES (1, 1)",
            "shop",
        )
        for block in needed:
            server.psql(block, "shop")
        url = f"postgresql://headrace@127.0.0.1:{server.port}/shop"
        project = make_project(tmp_path, url)
        assert [found for found in inspect(project.sources[0], fresh=True) if found.level == "fail"] == []
        Pipeline(project).run_once()
        server.psql("UPDATE customers SET id = 2; INSERT INTO orders VALUES (2, 1)", "shop")
        Pipeline(project).run_once()
        assert all(finding.ok for finding in verify(project).findings)

        assert slot_health(url, "headrace_shop").restart_age_s is None
        server.psql(next(block for block in blocks if "pg_monitor" in block), "shop")
        assert slot_health(url, "headrace_shop").restart_age_s is not None
        rights = "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = 'headrace'"
        assert server.psql(rights) == "f|f|f"


# ------------------------------------------------------------------------------------------------- TLS


def make_certificates(folder: Path) -> None:
    """A CA and one that is not, and certificates of the first for localhost and for a client."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("localhost", "headrace"):
        (folder / f"{name}.ext").write_text(f"subjectAltName=DNS:{name}\n")
        openssl("req", *key[:-2], "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    (folder / "headrace.key").chmod(0o600)


class TLSFront:
    """Speaks TLS as a server with ssl=on does, asks for a client's certificate, and passes on what it says.

    The binaries of the tests are built without OpenSSL.
    """

    REQUEST = struct.pack(">ii", 8, 80877103)

    def __init__(self, port: int, folder: Path) -> None:
        self._target = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
        self._context.load_cert_chain(folder / "localhost.pem", folder / "localhost.key")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.clients: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            request = client.recv(8, socket.MSG_WAITALL)
            if request != self.REQUEST:
                return
            client.sendall(b"S")
            with (
                self._context.wrap_socket(client, server_side=True) as inner,
                socket.create_connection(("127.0.0.1", self._target)) as server,
            ):
                certificate: dict[str, Any] = dict(inner.getpeercert() or {})
                self.clients += [value for rdn in certificate["subject"] for _, value in rdn]
                self._pass_on(inner, server)

    def _pass_on(self, client: ssl.SSLSocket, server: socket.socket) -> None:
        client.settimeout(0.005)
        server.settimeout(0.005)
        pairs = [(client, server), (server, client)]
        while True:
            for source, sink in pairs:
                try:
                    data = source.recv(1 << 16)
                except TimeoutError:
                    continue
                if not data:
                    return
                sink.settimeout(10)
                sink.sendall(data)
                sink.settimeout(0.005)


@contextmanager
def front(port: int, folder: Path) -> Iterator[TLSFront]:
    tls = TLSFront(port, folder)
    try:
        yield tls
    finally:
        tls.close()


def test_tls_reaches_every_connection(tmp_path: Path) -> None:
    certificates = tmp_path / "tls"
    certificates.mkdir()
    make_certificates(certificates)
    with PostgresServer(tmp_path / "pg") as server, front(server.port, certificates) as tls:
        server.psql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)")

        def url(ca: str, host: str = "localhost") -> str:
            return (
                f"postgresql://postgres@{host}:{tls.port}/postgres?sslmode=verify-full"
                f"&sslrootcert={certificates}/{ca}.pem"
                f"&sslcert={certificates}/headrace.pem&sslkey={certificates}/headrace.key"
            )

        project = make_project(tmp_path, url("ca"))
        Pipeline(project).run_once()
        assert all(finding.ok for finding in verify(project).findings)
        # Catalog, stream and the copy's bulk connection at least.
        assert len(tls.clients) >= 4
        assert set(tls.clients) == {"headrace"}

        for wrong in (url("other"), url("ca", "127.0.0.1")):
            tried = len(tls.clients)
            with pytest.raises(SourceUnavailable, match="certificate") as refused:
                connect(wrong)
            assert "sslrootcert" in refused.value.remedy
            with pytest.raises(SourceUnavailable, match="certificate"):
                connect_bulk(wrong)
            assert len(tls.clients) - tried <= 2
