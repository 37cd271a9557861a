"""Reading the files of a project's models, and marts: any query over tables of the destination."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sqlglot
from sqlglot import exp

from headrace.document import Invalid
from headrace.errors import ModelError
from headrace.mart import Mart
from headrace.transform import alerting
from headrace.transform.header import settings_of, version_of
from headrace.transform.python.text import SUFFIX, python_version, read_python
from headrace.transform.sql import ModelText, read_model
from headrace.values import duration

OFF = ".off"
"""What is put behind the name of a model file that the pipeline is not to take up."""

SUFFIXES = (".sql", SUFFIX)

_ALERTS = tuple(key for key in alerting.KEYS if key != "freshness")  # its own is `refresh_every`
_KEYS = ("materialize", "refresh_every", *_ALERTS)
_REFRESH_EVERY = "10s"


def tables_in(text: str, dialect: str) -> list[tuple[str, ...]] | None:
    """Return the paths of the tables that a query reads, those of its own WITH among them, which may have the
    names of what they are made of; None if it is no query."""
    try:
        parsed = sqlglot.parse_one(text, read=dialect)
    except sqlglot.errors.SqlglotError:
        return None
    if not isinstance(parsed, exp.Query):
        return None
    paths = (tuple(part.name for part in table.parts) for table in parsed.find_all(exp.Table))
    return [path for path in paths if path != ("",)]


def read_file(path: Path, dialect: str, name: str = "") -> ModelText | Mart:
    """Read a model's file: Python, and SQL that reads a raw table, is a row model, any other query a mart.

    Its name is the file's, unless given. Raises ModelError, naming file and line.
    """
    if path.name.removesuffix(OFF).endswith(SUFFIX):
        return read_python(path, name)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    tables = tables_in(text, dialect)
    if tables is None or any(path[0].lower() == "raw" for path in tables):
        return read_model(path, name)
    return read_mart(name or path.stem, text, dialect)


def version_in(path: Path, text: str) -> str:
    """Return the version that a model's file has, or would have, with this text."""
    return python_version(path.parent, text) if path.suffix == SUFFIX else version_of(text)


def read_mart(name: str, text: str, dialect: str) -> Mart:
    """Read a mart. Raises ModelError, naming the file, where it is no single query."""
    file = f"{name}.sql"
    if "." in name:
        raise ModelError(f"{file}: the name of a mart has no dot.", "Name the file otherwise.")
    settings = settings_of(file, text, _KEYS)
    try:
        statements = [part for part in sqlglot.parse(text, read=dialect) if part is not None]
    except sqlglot.errors.SqlglotError as error:
        found = (getattr(error, "errors", None) or [{}])[0]
        place = f"{file}:{found['line']}" if "line" in found else file
        what = found.get("description", "it does not parse").rstrip(".")
        raise ModelError(
            f"{place}: {what}.", "A mart is one SELECT over tables of the destination."
        ) from error
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        raise ModelError(f"{file}: a mart is one SELECT.", "Remove what is beside it.")
    reads = dict.fromkeys(".".join(path) for path in tables_in(text, dialect) or ())
    if raw := [path for path in reads if path.lower().startswith("raw.")]:
        raise ModelError(
            f"{file}: a mart reads tables of the destination, and {raw[0]} is none.",
            "Read its mirror or a row model of it instead.",
        )
    kind = settings.get("materialize", "view")
    if kind not in ("view", "table"):
        raise ModelError(f'{file}: materialize must be "view" or "table".')
    try:
        every = duration("0s", "30d")(settings.get("refresh_every", _REFRESH_EVERY))
    except Invalid as error:
        raise ModelError(f"{file}: refresh_every: {error}.") from error
    version, alerts = version_of(text), alerting.alert_settings_of(file, settings)
    return Mart(name, text.rstrip().rstrip(";"), tuple(reads), kind, every, version, alerts)


def in_order(marts: Iterable[Mart], main: str) -> tuple[list[Mart], list[str]]:
    """Return marts so that each comes behind those that it reads, without those that read each other in a
    circle, and these circles: `a → b → a`. `main` is the schema of those that name none."""
    known = {mart.name: mart for mart in marts}
    circles = list[str]()
    while True:
        inputs = {name: inputs_of(mart, known, main) for name, mart in known.items()}
        try:
            return [known[name] for name in TopologicalSorter(inputs).static_order()], circles
        except CycleError as error:
            circles.append(" → ".join(error.args[1]))
            known = {name: mart for name, mart in known.items() if name not in error.args[1]}


def inputs_of(mart: Mart, known: Collection[str], main: str) -> list[str]:
    """Return which of the tables `known` a mart reads, `main` being the schema of those that name none; an
    engine may take upper and lower case for the same."""
    folded = {name.casefold(): name for name in known if name != mart.name}
    found = (folded.get(name.casefold().removeprefix(f"{main.casefold()}.")) for name in mart.reads)
    return list(dict.fromkeys(name for name in found if name is not None))
