"""Asking the running pipeline, over a Unix socket: queries, how it stands, and what people have done by it.

A request is one line of JSON; the answer is a line of JSON, and for queries an Arrow IPC stream per
query behind it, each after its length, or of a scan before a line that says it is whole. While a
pipeline runs it alone has the destination open; when none runs, queries open the file themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cells import json_of, rows_from_json, rows_of
from headrace.config import Project
from headrace.errors import HeadraceError, UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.protocols import Destination, Scanned

logger = logging.getLogger("headrace.server")

_WHERE = "socket"
_MAX_REQUEST = 16 << 20
_INLINE_ROWS = 1000  # larger results go as Arrow: rendering them would take time from the pipeline
_LENGTH = struct.Struct(">q")
_OK = b'{"ok": true}\n'
_LONGEST = 107  # bytes of a socket's path on Linux

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def socket_path(state: Path) -> Path:
    """Return where the pipeline of a state folder listens, as the pipeline wrote it there."""
    known = state / _WHERE
    return Path(known.read_text()) if known.exists() else state / "no-socket"


def _new_socket_path(state: Path) -> Path:
    """Choose where to listen: a short path, since they are limited to 107 bytes, in a folder of this
    user's own."""
    name = f"{hashlib.blake2b(str(state.resolve()).encode(), digest_size=12).hexdigest()}.sock"
    folder = Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"
    if len(os.fsencode(folder / name)) > _LONGEST:
        folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077 or folder.is_symlink():
        raise UserError(
            f"{folder} belongs to somebody else or is open to others.", "Remove it or set TMPDIR."
        )
    return folder / name


class Server:
    """Answers requests while the pipeline runs, one thread per connection."""

    def __init__(self, state: Path, destination: Destination, handlers: dict[str, Handler]) -> None:
        """`handlers` answer every request but `query`, by its `op`."""
        self._path = _new_socket_path(state)
        self._destination = destination
        self._handlers = handlers
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen(16)
        (state / f"{_WHERE}.new").write_text(str(self._path))
        (state / f"{_WHERE}.new").rename(state / _WHERE)
        self._thread = threading.Thread(target=self._accept, name="server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rwb") as stream:
            line = stream.readline(_MAX_REQUEST)
            if not line:
                return
            try:
                self._answer(json.loads(line), stream)
            except HeadraceError as error:
                stream.write(json.dumps({"error": str(error), "remedy": error.remedy}).encode() + b"\n")
            except (KeyError, TypeError, ValueError) as error:
                stream.write(json.dumps({"error": f"bad request: {error!r}", "remedy": ""}).encode() + b"\n")
            except OSError:
                raise
            except Exception as error:
                logger.exception("a request failed")
                words = f"the pipeline failed at it: {type(error).__name__}"
                stream.write(json.dumps({"error": words, "remedy": "Its log says more."}).encode() + b"\n")

    def _answer(self, request: dict[str, Any], stream: Any) -> None:
        if request["op"] == "scan":
            with self._destination.scan(request["sql"]) as results:
                _send_results(stream, results)
            return
        if request["op"] != "query":
            answer = self._handlers[request["op"]](request)
            stream.write(json.dumps({"ok": True, **answer}).encode() + b"\n")
            return
        tables = self._destination.read(request["sql"])
        if request.get("inline") and len(tables) == 1 and tables[0].num_rows <= _INLINE_ROWS:
            stream.write(_inline(tables[0]))
            return
        stream.write(_OK)
        for table in tables:
            _send_table(stream, table)


def _inline(table: pa.Table) -> bytes:
    """Render a small result: a client then needs no Arrow, whose import takes longer than the query."""
    rows = json_of(list(rows_of(table)))
    return f'{{"ok": true, "columns": {json_of(table.column_names)}, "rows": {rows}}}\n'.encode()


def is_running(project: Project) -> bool:
    """Whether a pipeline of this project listens."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path(project.state)))
        return True
    return False


def ask(project: Project, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the running pipeline and return its answer.

    Raises UserError with the pipeline's words when it refuses, OSError when none runs.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path(project.state)))
        with connection.makefile("rwb") as stream:
            return _exchange(stream, request)


def read_rows(project: Project, sql: str) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Run one query and return its column names and rows; from the running pipeline a small result
    comes as JSON has it (times and bytes as text). Raises what `read` raises."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path(project.state)))
            with connection.makefile("rwb") as stream:
                answer = _exchange(stream, {"op": "query", "sql": [sql], "inline": True})
                if "rows" in answer:
                    return answer["columns"], answer["rows"]
                table = _receive_table(stream)
    except (FileNotFoundError, ConnectionRefusedError):
        (table,) = read(project, [sql])
    return table.column_names, rows_of(table)


def read(project: Project, queries: Sequence[str]) -> list[pa.Table]:
    """Run queries on the destination in one read transaction: in the running pipeline, else here.

    Raises UserError for a query that does not run, DestinationBusy when neither can be.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path(project.state)))
            with connection.makefile("rwb") as stream:
                _exchange(stream, {"op": "query", "sql": list(queries)})
                return [_receive_table(stream) for _ in queries]
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    with _opened(project) as destination:
        return destination.read(queries, read_only=True)


@contextmanager
def _opened(project: Project) -> Iterator[Destination]:
    """Open the destination here, where no pipeline runs. Raises UserError where there is none yet."""
    absent = UserError(
        f"There is no destination at {project.destination.name} yet.", "Start the pipeline: `headrace run`."
    )
    if project.destination.is_there is False:
        raise absent
    # Not above: a question to the running pipeline needs no engine here, and its import takes longer.
    from headrace.destinations import open_destination

    with closing(open_destination(project.destination)) as destination:
        if not destination.exists():
            raise absent
        yield destination


@contextmanager
def scan(project: Project, queries: Sequence[str]) -> Iterator[Iterator[Scanned]]:
    """Run queries on the destination in one read transaction, as `read` does, but read their results (schema
    and batches) batch by batch: they need not fit in memory. Each is read to its end before the next is asked
    for.

    Raises what `read` raises; the batches raise HeadraceError where a query fails on the way, or the pipeline
    ends: a result that was read to its end is whole.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(socket_path(project.state)))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        with _opened(project) as destination, destination.scan(queries, read_only=True) as results:
            yield results
        return
    with connection, connection.makefile("rwb") as stream:
        _exchange(stream, {"op": "scan", "sql": list(queries)})
        yield (_receive_result(stream) for _ in queries)


def _exchange(stream: Any, request: dict[str, Any]) -> dict[str, Any]:
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    return _answered(stream)


def _answered(stream: Any) -> dict[str, Any]:
    answer: dict[str, Any] = rows_from_json(
        stream.readline() or b'{"error": "the pipeline ended", "remedy": ""}'
    )
    if "error" in answer:
        raise UserError(answer["error"], answer["remedy"])
    return answer


def _send_table(stream: Any, table: pa.Table) -> None:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    stream.write(_LENGTH.pack(data.size))
    stream.write(data)


def _send_results(stream: Any, results: Iterator[Scanned]) -> None:
    """Send results one behind another: each a stream of Arrow IPC and a line that says it is whole, since a
    stream that breaks off looks as if it had ended."""
    import pyarrow as pa

    result = next(results, None)  # what does not run at all is told before the first byte of a result
    stream.write(_OK)
    while result is not None:
        schema, batches = result
        with pa.ipc.new_stream(stream, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        stream.write(_OK)
        result = next(results, None)


def _receive_result(stream: Any) -> Scanned:
    import pyarrow as pa

    reader = pa.ipc.open_stream(stream)
    return reader.schema, _received(stream, reader)


def _received(stream: Any, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        yield from reader
    except (pa.ArrowException, OSError) as error:
        raise HeadraceError("The pipeline ended while it answered.", "Try again.") from error
    _answered(stream)


def _receive_table(stream: Any) -> pa.Table:
    import pyarrow as pa

    (size,) = _LENGTH.unpack(stream.read(_LENGTH.size))
    return pa.ipc.open_stream(stream.read(size)).read_all()
