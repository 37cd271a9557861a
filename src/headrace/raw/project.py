"""Raw tables read in Python: `headrace.open_project`, beside the pipeline or without one.

Every table of a source can be read as it was at any place since its first copy, and so can all changes that
made it so; nothing is asked of the source, and nothing is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.change import Offset
from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.keys import quoted
from headrace.raw.place import AsOf
from headrace.raw.query import Session, names_in, read_query
from headrace.staging.named import find_tables

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["AsOf", "OpenProject", "open_project"]


class OpenProject:
    """A project whose raw tables are read. Each call sees what is staged by then.

    Tables are named by source and table: `shop.orders`, `shop.sales.items` outside of the schema public.
    `as_of` is an offset, an LSN (`0/16B3748`), or a time of commit (ISO text, or a datetime; in UTC unless it
    says otherwise): whole transactions that were committed there or earlier count.

    Columns are the source's, with its types as of that place, and `_op`, `_epoch`, `_commit`, `_ordinal`,
    `_offset`, `_committed_at`, `_txid` of the change that a row is of. A cell whose text is no value of its
    type is null; `text=True` gives every cell as the source wrote it. All results are read batch by batch and
    need not fit in memory.
    """

    def __init__(self, project: Project, *, env: str | None = None) -> None:
        self._project = project
        self._env = env

    def tables(self) -> list[str]:
        """Return the tables that can be read, by source and table."""
        found = []
        with Session(self._project) as session:
            for source in self._project.sources:
                if self._project.log_path(source.name).exists():
                    _, staging = session.source(source.name)
                    known = find_tables({source.name: staging}, source.name, "") if staging.tables() else []
                    found += [f"{source.name}.{table.label}" for _, table in known]
        return found

    def raw(
        self,
        table: str,
        *,
        as_of: AsOf | None = None,
        columns: Sequence[str] | None = None,
        text: bool = False,
    ) -> pa.RecordBatchReader:
        """Return the rows that a table had: of each key the latest, deletes gone, in no order.

        Cells that the source did not send since they had not changed have their values. Raises UserError for
        an unknown table, and for a place before the table's first copy.
        """
        return self._read("raw", table, as_of, columns, text=text)

    def changes(
        self,
        table: str,
        *,
        after: Offset = 0,
        as_of: AsOf | None = None,
        columns: Sequence[str] | None = None,
        text: bool = False,
    ) -> pa.RecordBatchReader:
        """Return all changes and copied rows (`_op` is `r`) of a table behind an offset, in no order; sort by
        `_epoch`, `_commit`, `_ordinal`.

        `_unchanged` (list of names) and `_before` (map of the old row's known cells) are there too. Only
        files with changes behind `after` are read.
        """
        return self._read("changes", table, as_of, columns, text=text, after=after)

    def query(self, sql: str, *, as_of: AsOf | None = None) -> pa.RecordBatchReader:
        """Run a query over `raw.SOURCE.TABLE`, `changes.…`, `raw_text.…` and `changes_text.…`.

        Tables of the destination may stand beside them, without `as_of`: raw then counts up to where the
        destination stands. Raises UserError for what is no query, or does not run.
        """
        project = self._project
        if names_in(sql).others:  # with the secrets that the destination may need
            project = load_project(project.root, env=self._env)
        return read_query(project, sql, as_of)

    def _read(
        self,
        catalog: str,
        table: str,
        as_of: AsOf | None,
        columns: Sequence[str] | None,
        *,
        text: bool,
        after: Offset = 0,
    ) -> pa.RecordBatchReader:
        source, dot, label = table.partition(".")
        if not dot:
            raise UserError(f"{table} names no source.", "Write SOURCE.TABLE, such as shop.orders.")
        session = Session(self._project)
        try:
            rows = session.relation(f"{catalog}_text" if text else catalog, source, label, as_of, after)
            chosen = "*" if columns is None else ", ".join(map(quoted, columns))
            return session.reader(f"SELECT {chosen} FROM ({rows})")
        except BaseException:
            session.close()
            raise


def open_project(folder: Path | str, *, env: str | None = None) -> OpenProject:
    """Open a project to read its raw tables; needs no right but to read its state folder, and no secrets.

    `env` names its environment, by default what HEADRACE_ENV says. Raises ConfigError.
    """
    return OpenProject(load_project(Path(folder), env=env, secrets=False), env=env)
