"""`headrace init`: a project for a database, ready to run as it is."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter

from headrace.authoring.cases import FOLDER as TESTS_FOLDER
from headrace.change import TableId
from headrace.cli.example import Example, write_example
from headrace.cli.example_test import write_example_test
from headrace.config import (
    FILE_NAME,
    MAX_SOURCE_NAME,
    MODELS_FOLDER,
    STATE_FOLDER,
    read_url,
    source_config,
)
from headrace.errors import UserError
from headrace.secret import Secret, has_password
from headrace.sources.postgres.catalog import read_shapes
from headrace.sources.postgres.connection import connect
from headrace.sources.postgres.preflight import Summary, TableSummary, summarise
from headrace.transform.names import OWN_SCHEMAS

# A schema of one of these names would mean something else in DuckDB.
_TAKEN = {*OWN_SCHEMAS, "main", "raw", "temp", "system"}
_WAREHOUSE = "warehouse"
_IGNORED = (f"{STATE_FOLDER}/", "*.duckdb*")
_EXAMPLES_TRIED = 5

_FILE = """\
# A Headrace project. What is commented out shows its default.

[source.{name}]
# Where the database is; ${{env:NAME}} and ${{file:PATH}} are filled in when this file is read.
url = {url}
# Patterns schema.table; the last one that fits a table decides, and ! leaves it out.
tables = [
{tables}
]
{slot}
# publication = "headrace_{name}"
# heartbeat = "10s"

[destination]
type = "duckdb"
path = "{warehouse}.duckdb"

# [staging]
# path = "{state}/staging"

# [scale]
# freshness = "10s"       # the time to aim for, from the source's commit to visible here
"""


class _Address(NamedTuple):
    """How the source's url stands in the file, and what must be set for it."""

    written: str
    literal: bool
    to_export: str


def init(
    url: Annotated[str, Parameter(help="postgresql://user:password@host:port/database, or ${env:NAME}.")],
    directory: Annotated[Path, Parameter(help="The project's folder; made if there is none.")] = Path(),
    *,
    name: Annotated[str | None, Parameter(help="The source's name; by default the database's.")] = None,
) -> int:
    """Look at a database and make a project for it: settings, an example of a model, .gitignore.

    A password is never written: the settings then name an environment variable.
    """
    root = directory.expanduser().resolve()
    if (root / FILE_NAME).exists():
        raise UserError(f"{root / FILE_NAME} exists already.", "Name another folder, or move the file away.")
    if name is not None and (not re.fullmatch("[a-z][a-z0-9_]*", name) or len(name) > MAX_SOURCE_NAME):
        raise UserError(
            "The source's name cannot be used.",
            f"It is 1 to {MAX_SOURCE_NAME} of a-z, 0-9 and _, and begins with a letter.",
        )
    secret = read_url(url, root)
    summary = summarise(source_config("source", secret))
    name = name or source_name(summary.database)
    address = _address(url, name)
    example = _example(secret, summary, name)
    made = _write(root, _settings(name, address, summary), example, private=address.literal)
    _report(directory, made, address, summary, name)
    return 0


def source_name(database: str) -> str:
    """Derive a source's name from its database's; `source` where nothing usable is left."""
    name = re.sub("[^a-z0-9_]+", "_", database.lower()).strip("_")[:MAX_SOURCE_NAME]
    return name if re.match("[a-z]", name) and name not in _TAKEN else "source"


def _address(url: str, name: str) -> _Address:
    if "${" in url or not has_password(url):
        return _Address(url, "${" not in url, "")
    own = f"{name.upper()}_URL"
    plain = [key for key in sorted(os.environ) if re.fullmatch("[A-Z][A-Z0-9_]*", key)]
    holding = [key for key in (own, *plain) if os.environ.get(key) == url]
    variable = holding[0] if holding else own
    return _Address(f"${{env:{variable}}}", False, "" if holding else variable)


# --------------------------------------------------------------------------------------- settings


def _settings(name: str, address: _Address, summary: Summary) -> str:
    slot = f"headrace_{name}"
    line = f'# slot = "{slot}"'
    if slot in summary.slots:
        number = next(n for n in range(2, len(summary.slots) + 3) if f"{slot}_{n}" not in summary.slots)
        line = (
            f'# The server has a slot {slot} already, of another project perhaps.\nslot = "{slot}_{number}"'
        )
    # A file and a schema of one name cannot be told apart in DuckDB.
    warehouse = _WAREHOUSE if name != _WAREHOUSE else "analytics"
    return _FILE.format(
        name=name,
        url=_toml(address.written),
        tables="\n".join(_table_lines(summary)),
        slot=line,
        warehouse=warehouse,
        state=STATE_FOLDER,
    )


def _schemas(summary: Summary) -> list[str]:
    """Choose the schemas to mirror: public, or all others where it has nothing to capture."""
    usable = sorted({item.table.id.schema for item in summary.tables if not item.obstacle})
    return ["public"] if "public" in usable or not usable else usable


def _table_lines(summary: Summary) -> list[str]:
    schemas = _schemas(summary)
    lines = [f"  {_toml(_pattern(TableId(schema, '*')))}," for schema in schemas]
    lines += [
        f"  {_toml('!' + _pattern(item.table.id))},  # {_plain(item.obstacle)}"
        for item in summary.tables
        if item.obstacle and item.table.id.schema in schemas
    ]
    others = sorted({item.table.id.schema for item in summary.tables} - set(schemas))
    lines += [f"  # {_toml(_pattern(TableId(schema, '*')))},  # another schema of it" for schema in others]
    return lines


def _pattern(table: TableId) -> str:
    """Write a table as a pattern; `?` stands for what a pattern cannot say."""
    schema = re.sub(r"^!|\.|^\s|\s$", "?", table.schema)
    name = re.sub(r"^\s|\s$", "?", table.name)
    return _plain(f"{schema}.{name}").replace("://", ":?/")


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _example(url: Secret, summary: Summary, name: str) -> Example | None:
    """Make an example of the largest table for which one can be made."""
    schemas = _schemas(summary)
    usable = [item.table for item in summary.tables if not item.obstacle and item.table.id.schema in schemas]
    usable.sort(key=lambda table: (-table.pages, -table.rows, table.id))
    candidates = [table.id for table in usable[:_EXAMPLES_TRIED]]
    if not candidates:
        return None
    with connect(url.reveal()) as db:
        shapes = read_shapes(db, candidates)
    for schema in (shapes[table] for table in candidates if table in shapes):
        if example := write_example(name, schema):
            return example._replace(test=write_example_test(example, schema))
    return None


# ------------------------------------------------------------------------------------------ files


def _write(root: Path, settings: str, example: Example | None, *, private: bool) -> list[Path]:
    """Write the files; headrace.toml last, so that what was interrupted can be tried again."""
    made = []
    try:
        (root / MODELS_FOLDER).mkdir(parents=True, exist_ok=True)
        if example:
            path = root / MODELS_FOLDER / f"{example.name}.sql.off"
            if not path.exists():
                path.write_text(example.text, encoding="utf-8")
                made += [path, *_write_test(root, example)]
        ignore = root / ".gitignore"
        known = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
        lines = [line for line in _IGNORED if line not in known]
        if lines:
            ignore.write_text("\n".join([*known, *lines]) + "\n", encoding="utf-8")
            made.append(ignore)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(root / FILE_NAME, flags, 0o600 if private else 0o644), "w") as file:
            file.write(settings)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its .gitignore is not UTF-8 text"
        remedy = "Name a folder that you may write to: headrace init URL DIR"
        raise UserError(f"The project cannot be made in {root}: {reason}.", remedy) from error
    return [root / FILE_NAME, *made]


def _write_test(root: Path, example: Example) -> list[Path]:
    path = root / TESTS_FOLDER / f"{example.name}.toml"
    if not example.test or path.exists():
        return []
    path.parent.mkdir(exist_ok=True)
    path.write_text(example.test, encoding="utf-8")
    return [path]


def _report(directory: Path, made: Sequence[Path], address: _Address, summary: Summary, name: str) -> None:
    left_out = [
        item for item in summary.tables if item.obstacle and item.table.id.schema in _schemas(summary)
    ]
    mirrored = [
        item for item in summary.tables if not item.obstacle and item.table.id.schema in _schemas(summary)
    ]
    print(f"{summary.place}: {_counted(mirrored)} to mirror as {name}.<table>" + _but(left_out) + ".")
    print("Made:")
    for path in made:
        print(f"  {path}{_NOTES.get(path.parent.name if path.suffix == '.toml' else path.suffix, '')}")
    where = "" if directory == Path() else f" --project {shlex.quote(str(directory))}"
    print("Next:")
    if address.to_export:
        print(f"  export {address.to_export}='…'   # the url that you gave here, with its password")
    print(f"  headrace check{where}")
    print(f"  headrace run --once{where}")
    print(f"  headrace verify{where}")


_NOTES = {
    ".off": "  (an example; rename it to .sql to use it)",
    TESTS_FOLDER: "  (a test of it: headrace test)",
}


def _counted(tables: Sequence[object]) -> str:
    return "1 table" if len(tables) == 1 else f"{len(tables)} tables"


def _but(left_out: Iterable[TableSummary]) -> str:
    names = [str(item.table.id) for item in left_out]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; left out, with the reason in {FILE_NAME}: {', '.join(names[:5])}{more}" if names else ""
