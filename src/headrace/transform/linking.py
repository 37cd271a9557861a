"""Foreign keys between the models of a source: whether they can be kept, and what models know of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from headrace.errors import HeadraceError, ModelError
from headrace.prepared import Reference
from headrace.transform.foreign import ForeignKey
from headrace.transform.kind import LATEST
from headrace.transform.model import RowModel
from headrace.transform.source_checks import Unlike
from headrace.transform.source_constraints import SourceKey, held_apart
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
    """Link bound models of one source by the foreign keys in their files, and those that they take over.

    `texts` are the files by model, `away` models that are there and do not bind now: what refers to them is
    not looked at. A model with a fault is left out; a foreign key of the source that cannot be kept is told
    of in `RowModel.left_out`.
    """
    if not any(text.foreign_keys for text in texts.values()) and not any(each.source_keys for each in models):
        return Linked(models, {})
    bound = {model.name: model for model in models}
    faults: dict[str, HeadraceError] = {}
    found: list[Reference] = []
    models = list(models)
    for i, model in enumerate(models):
        text = texts.get(model.name)
        try:
            keys = text.foreign_keys if text else ()
            found += [_reference(model, each, bound, texts) for each in keys if each.references not in away]
        except ModelError as error:
            faults[model.name] = error
            continue
        taken = _taken_over(model, bound, texts, away)
        found += taken.references
        models[i] = replace(
            model,
            foreign_keys=(*model.foreign_keys, *taken.names),
            left_out=(*model.left_out, *taken.left_out),
        )
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


@dataclass(slots=True)
class _TakenOver:
    """What becomes of a model's foreign keys of the source. `names` are of those that it has, also where they
    are not looked at now."""

    references: list[Reference] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def _taken_over(
    model: RowModel, models: Mapping[str, RowModel], texts: Mapping[str, ModelText], away: Collection[str]
) -> _TakenOver:
    """Choose for each foreign key of the source the model whose rows it refers to."""
    found = _TakenOver()
    for each in model.source_keys:
        is_away = any(texts[name].table == each.table.label for name in away if name in texts)
        try:
            parent, to = _parent(model, each, models)
            reference = _reference(model, ForeignKey(each.name, each.columns, parent, to), models, texts)
            found.references.append(reference)
        except (Unlike, ModelError) as why:
            if not is_away:
                found.left_out.append(f"{each.name}: {why}")
                continue
        found.names.append(each.name)
    return found


def _parent(model: RowModel, key: SourceKey, models: Mapping[str, RowModel]) -> tuple[str, tuple[str, ...]]:
    """Return the model that a foreign key of the source refers to, and its outputs. Raises Unlike where it is
    none, or one of several."""
    of_table = [each for each in models.values() if each.table == key.table]
    if not of_table:
        raise Unlike(f"{key.table} is not captured")
    whole, reasons = dict[str, tuple[str, ...]](), list[str]()
    for each in of_table:
        try:
            whole[each.name] = held_apart(each, key.to)
        except Unlike as why:
            reasons.append(str(why))
    if not whole:
        raise Unlike("; ".join(reasons))
    # A table's own rows are meant where it refers to itself, and then those that keep constraints alike.
    alike = [name for name in whole if models[name].constraints == "source"]
    for chosen in ([model.name] if model.name in whole else [], alike, list(whole)):
        if len(chosen) == 1:
            return chosen[0], whole[chosen[0]]
    raise Unlike(f"it may refer to any of {', '.join(sorted(whole))}")


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
