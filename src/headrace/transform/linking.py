"""Foreign keys between the models of a source: whether they can be kept, and what models know of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from headrace.errors import HeadraceError, ModelError
from headrace.prepared import Reference
from headrace.transform.foreign import ForeignKey
from headrace.transform.kind import LATEST
from headrace.transform.model import RowModel
from headrace.transform.sql import ModelText

_WHOLE = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UINTEGER"}
_KEPT = _WHOLE | {
    "VARCHAR",
    "UUID",
    "BOOLEAN",
    "DATE",
    "TIME",
    "TIMESTAMP",
    "TIMESTAMP WITH TIME ZONE",
}
"""Types, beside decimals, whose values are found again by their text."""


@dataclass(frozen=True, slots=True)
class Linked:
    """Models that know the references from and to their rows, and by name what is wrong with others."""

    models: Sequence[RowModel]
    faults: Mapping[str, HeadraceError]


def link(models: Sequence[RowModel], texts: Mapping[str, ModelText], away: Collection[str] = ()) -> Linked:
    """Link bound models of one source by the foreign keys in their files.

    `texts` are the files by model, `away` models that are there and do not bind now: what refers to them is
    not looked at. A model with a fault is left out.
    """
    if not any(text.foreign_keys for text in texts.values()):
        return Linked(models, {})
    bound = {model.name: model for model in models}
    faults: dict[str, HeadraceError] = {}
    found: list[Reference] = []
    for model in models:
        text = texts.get(model.name)
        try:
            keys = text.foreign_keys if text else ()
            found += [_reference(model, each, bound, texts) for each in keys if each.references not in away]
        except ModelError as error:
            faults[model.name] = error
    parents: dict[str, set[str]] = {}
    for each in found:
        parents.setdefault(each.model, set()).add(each.parent)
    found = [replace(each, cycle=each.model in _reached(each.parent, parents)) for each in found]
    kept = []
    for model in models:
        if model.name not in faults:
            mine = tuple(
                each for each in found if model.name in (each.model, each.parent) and each.model not in faults
            )
            kept.append(replace(model, references=mine) if mine else model)
    return Linked(kept, faults)


def _reached(model: str, parents: Mapping[str, Collection[str]]) -> set[str]:
    """Return the models that one refers to, itself among them, directly or over others."""
    found, due = {model}, [model]
    while due:
        new = set(parents.get(due.pop(), ())) - found
        found |= new
        due += new
    return found


def _reference(
    child: RowModel, key: ForeignKey, models: Mapping[str, RowModel], texts: Mapping[str, ModelText]
) -> Reference:
    """Return a foreign key as it is kept. Raises ModelError where it cannot be."""
    head = f"Model {child.name}: its foreign key {key.name}"
    parent = models.get(key.references)
    if parent is None:
        near = get_close_matches(key.references, models, 1)
        hint = f'Did you mean "{near[0]}"?' if near else f"There are {', '.join(sorted(models))}."
        what = f"{head} refers to {key.references}, which is no model of source {child.source}."
        raise ModelError(what, hint)
    for model in (child, parent):
        if model.kind != LATEST or not model.schema.key:
            what = "keeps rows of the past" if model.kind != LATEST else "has a table without a key"
            raise ModelError(
                f"{head} cannot be kept: {model.name} {what}.",
                "A foreign key is between models that show the present, of tables with keys.",
            )
    to = key.to or tuple(_key_of(parent, texts.get(parent.name)))
    outputs = [{name: type_ for name, _, type_ in model.outputs} for model in (child, parent)]
    if len(to) != len(key.columns):
        raise ModelError(
            f"{head} has {len(key.columns)} columns, and the key of {parent.name} is {list(to)}.",
            f"Name the columns of {parent.name} that it refers to: to = [...].",
        )
    for mine, other in zip(key.columns, to, strict=True):
        _check_types(head, parent.name, mine, other, *outputs)
    types = tuple(outputs[1][name] for name in to)
    return Reference(child.name, key.name, key.columns, parent.name, to, types, _by_key(parent, to))


def _check_types(
    head: str, parent: str, mine: str, other: str, own: Mapping[str, str], others: Mapping[str, str]
) -> None:
    if other not in others:
        raise ModelError(
            f"{head} refers to {parent}.{other}, which there is not.", f"{parent} has {', '.join(others)}."
        )
    types = own[mine], others[other]
    if not all(type_ in _KEPT or type_.startswith("DECIMAL") for type_ in types):
        raise ModelError(
            f"{head} is of {mine} {types[0]} and {parent}.{other} {types[1]}, which cannot be held to agree.",
            "Cast both to a plain type.",
        )
    if types[0] != types[1] and not set(types) <= _WHOLE:
        raise ModelError(
            f"{head}: {mine} is {types[0]}, and {parent}.{other} is {types[1]}.", "Cast one as the other."
        )


def _key_of(model: RowModel, text: ModelText | None) -> Iterator[str]:
    """Yield the columns of a model's key: that of its file, or the outputs that hold that of its table."""
    if text and text.key:
        yield from text.key
        return
    for column in model.schema.key:
        yield from model.holding(column)[:1]


def _by_key(parent: RowModel, to: Sequence[str]) -> tuple[int, ...]:
    """See `Reference.by_key`."""
    places = []
    for column in parent.schema.key:
        holding = [to.index(name) for name in parent.holding(column) if name in to]
        if not holding:
            return ()
        places.append(holding[0])
    return tuple(places) if len(places) == len(to) else ()
