from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.testing.postgres import PostgresServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that tests share, each with a database and a slot of its own."""
    with PostgresServer(Path(tmp_path_factory.mktemp("pg"))) as server:
        yield server
