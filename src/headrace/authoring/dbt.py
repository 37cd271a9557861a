"""A project's destination tables as sources of dbt, so that it goes on from here.

The YAML is written by hand: every text as a double-quoted scalar, whose escapes are those of TOML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.authoring.catalogue import OutputColumn, columns_of
from headrace.authoring.files import Found, all_models, logged_shapes
from headrace.authoring.recorded import read_shapes, toml_string
from headrace.config import Project
from headrace.destinations import open_destination
from headrace.errors import UserError
from headrace.keys import literal

_HEAD = """\
# The tables of {destination} as sources of dbt 1.10 and later, written by `headrace models export-dbt`.
version: 2

sources:
"""
_MAIN = "headrace"
"""What the source of the models' own tables is called: `main`, their schema, would say little."""

_WARN, _ERROR = 15, 60  # minutes


@dataclass(frozen=True, slots=True)
class _Table:
    name: str
    model: str
    description: str
    columns: Sequence[OutputColumn]


def export_dbt(project: Project) -> str:
    """Return a sources.yml: every model's table with its columns, types and freshness.

    Types are those of the captured tables, or of the recorded ones where nothing has run. How fresh a table
    is comes from headrace.models: the source committed all that it holds until then. Raises UserError for a
    model whose table is not known, ModelError for one that does not read.
    """
    shapes = {
        source.name: logged_shapes(project, source.name) or read_shapes(project, source.name)
        for source in project.sources
    }
    schemas: dict[str, list[_Table]] = {}
    destination = open_destination(project.destination)
    for found in all_models(project, shapes):
        columns, unbound = columns_of(project, found, shapes.get(found.source, {}))
        if unbound:
            raise UserError(
                f"Model {found.name} has no types yet: {unbound}", "Mend it, or run the pipeline first."
            )
        schema, name = destination.place_of(found.name)
        schemas.setdefault(schema, []).append(_Table(name, found.name, _description(found), columns))
    if not schemas:
        raise UserError("There is no table to export yet.", "Run the pipeline first: `headrace run --once`.")
    head = _HEAD.format(destination=project.destination.name)
    return head + "".join(
        line + "\n" for schema in sorted(schemas) for line in _source(schema, schemas[schema])
    )


def _description(found: Found) -> str:
    raw = f"raw.{found.source}.{found.table}"
    return f"{raw} as models/{found.text.file} makes it." if found.text else f"Mirror of {raw}."


def _source(schema: str, tables: Sequence[_Table]) -> Iterator[str]:
    name = _MAIN if schema == "main" else schema
    yield f"  - name: {toml_string(name)}"
    yield f"    schema: {toml_string(schema)}"
    yield "    tables:"
    for table in tables:
        yield f"      - name: {toml_string(table.name)}"
        yield f"        description: {toml_string(table.description)}"
        yield "        config:"
        yield f"          loaded_at_field: {toml_string(_loaded_at(table.model))}"
        yield "          freshness:"
        yield f"            warn_after: {{count: {_WARN}, period: minute}}"
        yield f"            error_after: {{count: {_ERROR}, period: minute}}"
        yield "        columns:"
        for column in table.columns:
            yield f"          - name: {toml_string(column.name)}"
            yield f"            data_type: {toml_string(column.type)}"
            yield f"            description: {toml_string(_plain(column.expression))}"


def _plain(expression: str) -> str:
    """Return an expression in one line, in which dbt, which renders descriptions, finds no Jinja."""
    return re.sub(r"\{(?=[{%#])|\}(?=\})", r"\g<0> ", " ".join(expression.split()))


def _loaded_at(model: str) -> str:
    """Return the time until which a model's table holds all that the source committed, as an expression."""
    return (
        f"(SELECT to_timestamp(committed_at / 1000000.0) FROM headrace.models WHERE model = {literal(model)})"
    )
