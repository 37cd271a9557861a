"""Reading the file of a Python model.

Which raw table it reads is found in its text; the text itself is run in a worker, never in this process. Its
version is a hash of the text, and of those of the helper modules beside it (`models/_*.py`) that it imports,
directly or through one another.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.document import Invalid
from headrace.errors import ModelBroken, ModelError
from headrace.transform.alerting import alert_settings_of
from headrace.transform.foreign import foreign_keys_of, said_of
from headrace.transform.handling import handling_of
from headrace.transform.header import version_of
from headrace.transform.kind import kind_of
from headrace.transform.python.process import Script, describe
from headrace.transform.sql import Check, ModelText, checked, rules_of
from headrace.values import duration, size

SUFFIX = ".py"
_MARK = "model"


@dataclass(frozen=True, slots=True)
class PythonText(ModelText):
    """A Python model's file, and what it says of itself when it is run.

    `outputs` are its columns, each standing for itself. `reads` are the raw columns that it is given, None
    for all; `takes` is `row` or `batch`. `memory` is in bytes, `timeout` in seconds. Where the file cannot be
    run `fault` says why, with file and line, and there are no outputs.
    """

    script: Script = Script("", "", "", ())  # noqa: RUF009 - frozen
    takes: str = "row"
    reads: tuple[str, ...] | None = None
    memory: int = 0
    timeout: float = 0.0
    fault: str = ""

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}{SUFFIX}"


def read_python(path: Path, name: str = "") -> PythonText:
    """Read a Python model; its name is the file's without the suffix, unless given.

    Raises ModelError, naming file and line, when it is not Python, or has not one function marked with
    `@headrace.model(reads="raw.<source>.<table>")`.
    """
    text = outline(path, name)
    try:
        return _filled(text, describe(text.script))
    except ModelBroken as error:
        return replace(text, fault=str(error))


def outline(path: Path, name: str = "") -> PythonText:
    """Return what `read_python` does as far as the text alone tells: no columns, no key."""
    name = name or path.name.removesuffix(SUFFIX)
    file = f"models/{name}{SUFFIX}"
    code = _text(path)
    source, table = _reads(file, _parsed(file, code))
    helpers = tuple(sorted(_helpers(path.parent, code)))
    script = Script(name, file, code, helpers)
    return PythonText(name, source, table, table, (), "", (), (), (), _version(script), script=script)


def helper_paths(folder: Path) -> list[Path]:
    """Return the modules of a folder that its Python models may import."""
    return sorted(folder.glob(f"_*{SUFFIX}"))


def python_version(folder: Path, code: str) -> str:
    """Return the version of a model's text with the helpers that stand in a folder now."""
    return _version(Script("", "", code, tuple(sorted(_helpers(folder, code)))))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}.") from error


def _version(script: Script) -> str:
    if not script.helpers:
        return version_of(script.code)
    parts = [script.code, *(part for helper in script.helpers for part in helper)]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def _parsed(file: str, code: str) -> ast.Module:
    try:
        return ast.parse(code, file)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ModelError(f"{file}:{line}: {getattr(error, 'msg', None) or error}.", "Mend it.") from error


def _reads(file: str, tree: ast.Module) -> tuple[str, str]:
    """Return source and table of the one model in a file."""
    marks = [
        mark
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).split(".")[-1] == _MARK
    ]
    if len(marks) != 1:
        raise ModelError(
            f"{file}: it has {len(marks) or 'no'} functions marked with @headrace.model, and is to have one.",
            f"Mark one, or name a module of helpers with an underscore: _{file.rpartition('/')[2]}.",
        )
    (mark,) = marks
    found = next((keyword.value for keyword in mark.keywords if keyword.arg == "reads"), None)
    path = found.value if isinstance(found, ast.Constant) else None
    parts = path.split(".", 2) if isinstance(path, str) else []
    if len(parts) != 3 or parts[0] != "raw" or not all(parts):
        raise ModelError(
            f"{file}:{mark.lineno}: the model does not say which raw table it reads.",
            'Write it out: reads="raw.<source>.<table>", outside of public "raw.<source>.<schema>.<table>".',
        )
    return parts[1], parts[2].replace('"', "")


def _helpers(folder: Path, code: str, known: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield name and text of the helpers that a text imports, and of those that they do."""
    for name in sorted(_imported(code) - known):
        path = folder / f"{name}{SUFFIX}"
        if name.startswith("_") and path.is_file():
            known |= {name}
            text = _text(path)
            yield name, text
            for more in _helpers(folder, text, known):
                known |= {more[0]}
                yield more


def _imported(code: str) -> set[str]:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return set()  # the worker says so, with file and line
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _filled(text: PythonText, said: Mapping[str, Any]) -> PythonText:
    """Return a text with what its file says of itself. Raises ModelError for what no model can have."""
    file, definition = text.script.file, said["definition"]
    handling = handling_of(file, definition["settings"], list(said["rules"]))
    types, checks = list[tuple[str, str]](), list[Check]()
    for column, rules in said["rules"].items():
        if column.startswith("_"):
            raise ModelError(f"{file}: the output name {column!r} begins with an underscore.")
        type_ = ""
        for rule in rules:
            found, more = rules_of(file, column, rule, handling.on_violation)
            type_ = found or type_
            checks += (check for check in more if check not in checks)
        if not type_:
            raise ModelError(
                f"{file}: the type of column {column} is not known: a Decimal has no precision by itself.",
                f'Write {column}: Annotated[Decimal, headrace.contract("DECIMAL(12,2)")].',
            )
        types.append((column, type_))
    names = [name.lower() for name, _ in types]
    if not names or len(set(names)) != len(names):
        raise ModelError(f"{file}: a model has output columns, each with a name of its own.")
    key = _key(file, definition["key"], dict(types))
    try:
        memory = size("16MiB", "1024GiB")(definition["memory"])
        timeout = duration("100ms", "1h")(definition["timeout"])
    except Invalid as error:
        raise ModelError(f"{file}: memory or timeout: {error}.") from error
    return replace(
        text,
        outputs=tuple((name, name) for name, _ in types),
        key=key,
        kind=kind_of(file, definition["settings"], names),
        handling=handling,
        alerts=alert_settings_of(file, definition["settings"]),
        foreign_keys=foreign_keys_of(file, definition["settings"], [name for name, _ in types]),
        said=said_of(file, definition["settings"]),
        types=tuple(types),
        checks=checked(file, key, checks, handling),
        takes=said["kind"],
        reads=None if said["reads"] is None else tuple(said["reads"]),
        memory=memory,
        timeout=timeout,
    )


def _key(file: str, key: list[str], types: Mapping[str, str]) -> tuple[str, ...]:
    for name in key:
        if name not in types:
            raise ModelError(f"{file}: key names {name!r}, which is no output column.")
    return tuple(key)
