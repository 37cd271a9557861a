"""Which values of a model are not to be shown: what its source and its header mark, and all made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.masking import Masked, marked_in, masks_key
from headrace.transform.lineage import Reads, lineage
from headrace.transform.model import RowModel
from headrace.transform.python.text import PythonText
from headrace.transform.sql import ModelText


def marked(model: RowModel, text: ModelText | None, patterns: Sequence[str]) -> RowModel:
    """Return a model that knows what is masked of it; `patterns` are those of its source, `text` is its file.

    A raw column is masked that its source marks, or that a marked output reads; an output is that reads one
    of these. Of Python nobody knows which output is made of what: if the function is given one, all are.
    """
    columns = [column.name for column in model.schema.columns]
    cells = set(marked_in(patterns, model.table, columns))
    if text is None:
        outputs = {name for name, _, _ in model.outputs if name in cells}
    else:
        reads = {read.name: _read(read, text, columns) for read in lineage(text) if read.name}
        for output in text.handling.pii:
            cells |= reads[output]
        outputs = {name for name, read in reads.items() if read & cells or name in text.handling.pii}
    if not cells and not outputs:
        return model
    return replace(model, masked=Masked(frozenset(cells), frozenset(outputs), masks_key(model.schema, cells)))


def _read(read: Reads, text: ModelText, columns: Sequence[str]) -> set[str]:
    """Return the raw columns that an output may be made of, as the table spells them."""
    if isinstance(text, PythonText) and text.reads is None:
        return set(columns)
    named = {name.lower() for name in read.columns}
    return {column for column in columns if column.lower() in named}
