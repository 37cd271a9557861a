"""Model files by the names that people give them, and the shapes of the tables that they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from headrace.change import TableId, TableSchema
from headrace.config import MODELS_FOLDER, Project
from headrace.defaults import ModelDefaults
from headrace.errors import HeadraceError, ModelError, UserError
from headrace.log.sqlite import SQLiteLog
from headrace.mart import Mart
from headrace.sources.postgres.tables import captured_tables
from headrace.transform.header import model_paths
from headrace.transform.linking import Linked, link
from headrace.transform.mart import OFF, SUFFIXES, read_file
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.sql import ModelText

Shapes = dict[TableId, TableSchema]


@dataclass(frozen=True, slots=True)
class Found:
    """A model that was asked for: of a file, or the mirror of `table` of `source`, which has none."""

    name: str
    source: str
    table: str
    text: ModelText | None = None
    path: Path | None = None


def read_files(project: Project) -> Iterator[tuple[str, ModelText | Mart | HeadraceError]]:
    """Yield the name of every file in use with what it says, or with what is wrong."""
    for path in model_paths(project.models):
        try:
            yield path.stem, read_file(path, project.destination.type)
        except HeadraceError as error:
            yield path.stem, error


def read_models(project: Project) -> Iterator[tuple[str, ModelText | HeadraceError]]:
    """Yield the name of every row model's file in use with what it says, or of any file what is wrong."""
    for name, text in read_files(project):
        if not isinstance(text, Mart):
            yield name, text


def all_models(project: Project, shapes: Mapping[str, Shapes]) -> Iterator[Found]:
    """Yield the models of all files in use, and the mirrors of tables (by source) that none of them reads.

    Raises ModelError for a file that does not read.
    """
    taken = set()
    for name, text in read_models(project):
        if isinstance(text, HeadraceError):
            raise text
        taken.add((text.source, text.table))
        yield Found(name, text.source, text.table, text, model_file(project, name))
    for source, tables in shapes.items():
        for label in sorted(table.label for table in tables):
            if (source, label) not in taken:
                yield Found(f"{source}.{label}", source, label)


def model_file(project: Project, name: str) -> Path:
    """Return the file of a model in use."""
    paths = [project.models / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def _bare(path: Path) -> str:
    """Return the name of the model that a file is, or would be."""
    stem = path.name.removesuffix(OFF)
    return stem[: stem.rindex(".")]


def find_model(project: Project, wanted: str) -> Found:
    """Find a row model; see `find_any`. Raises UserError for a mart."""
    found = find_any(project, wanted)
    if isinstance(found, Mart):
        raise UserError(
            f"{found.name} is a mart: it is computed from tables of the destination.",
            f'`headrace query "FROM {found.name}"` shows it, `headrace status` how it stands.',
        )
    return found


def find_any(project: Project, wanted: str) -> Found | Mart:
    """Find a model or a mart by its name (`sales`, `shop.orders` for a mirror), or by a path to a file.

    A name is first that of a file in use, then of one that is not (`sales.sql.off`), then of a mirror;
    whether the table of a mirror is captured is not looked at. Raises ModelError for a file that does not
    read, UserError where there is none.
    """
    ends = tuple(suffix + off for off in ("", OFF) for suffix in SUFFIXES)
    places = [Path(wanted), project.root / wanted] if wanted.endswith(ends) else []
    names = [wanted] if places else [wanted + end for end in ends]
    if wanted.endswith(SUFFIXES):
        names.append(wanted + OFF)
    if not any(separator in wanted for separator in ("/", "\\")):
        places += [project.models / name for name in names]
    for path in places:
        if path.is_file():
            name = _bare(path)
            text = read_file(path, project.destination.type, name)
            if isinstance(text, Mart):
                return text
            return Found(text.name, text.source, text.table, text, path)
    source, dot, table = wanted.partition(".")
    if dot and source in {item.name for item in project.sources}:
        return Found(wanted, source, table)
    raise _unknown(project, wanted)


def bind_found(found: Found, shapes: Shapes, defaults: ModelDefaults) -> RowModel:
    """Bind a model to the newest shape of its table.

    Raises UserError where the table is not among `shapes`, and what `bind` raises.
    """
    return bind_text(found.text, found.source, found.table, shapes, defaults)


def bind_text(
    text: ModelText | None, source: str, label: str, shapes: Shapes, defaults: ModelDefaults
) -> RowModel:
    """Bind a file, or the mirror of a table, to the shape that a table of this label has."""
    for table, schema in shapes.items():
        if table.label == label:
            return bind(text, schema, defaults) if text else mirror(source, schema, defaults)
    what = f"Model {text.name} reads raw.{source}.{label}" if text else f"There is no mirror {source}.{label}"
    near = get_close_matches(label, [table.label for table in shapes], 1)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    raise ModelError(
        f"{what}: no table {label} of {source} is known.",
        f"{hint}`headrace tables list` names the captured ones.",
    )


def link_source(
    texts: Mapping[str, ModelText],
    source: str,
    shapes: Mapping[TableId, TableSchema],
    defaults: ModelDefaults,
) -> Linked:
    """Bind and link all models of a source, of files and mirrors; those that do not bind are left out."""
    mine = {name: text for name, text in texts.items() if text.source == source}
    bound = list[RowModel]()
    for schema in shapes.values():
        files = [text for text in mine.values() if text.table == schema.table.label]
        for text in files:
            with suppress(HeadraceError):
                bound.append(bind(text, schema, defaults))
        if not files:
            bound.append(mirror(source, schema, defaults))
    return link(bound, mine, mine.keys() - {model.name for model in bound})


def logged_shapes(project: Project, source: str) -> Shapes:
    """Return the newest shape of every captured table, as its log has it; empty before it has run."""
    path = project.log_path(source)
    if not path.exists():
        return {}
    log = SQLiteLog(path, read_only=True)
    try:
        captured = set(captured_tables(log))
        return {table: schema for table, schema in log.schemas().items() if table in captured}
    finally:
        log.close()


def _unknown(project: Project, wanted: str) -> UserError:
    off = [path for suffix in SUFFIXES for path in project.models.glob(f"*{suffix}{OFF}")]
    known = [_bare(path) for path in [*model_paths(project.models), *off]]
    near = get_close_matches(wanted, known, 1)
    hint = f'Did you mean "{near[0]}"?' if near else f"Models are: {', '.join(sorted(known)) or 'none yet'}."
    return UserError(
        f'There is no model "{wanted}".',
        f"{hint} A mirror is SOURCE.TABLE, a file outside of {MODELS_FOLDER}/ is named by its path.",
    )
