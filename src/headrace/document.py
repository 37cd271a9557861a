"""headrace.toml as a document, with an environment's file over it: where each key stands, and every mistake
at once."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError

FILE_NAME = "headrace.toml"
MAX_FILE_BYTES = 1 << 20
MAX_MISTAKES = 50


class Invalid(Exception):
    """What is wrong with a value: one message for each argument."""


Parser = Callable[[Any], Any]
SECTIONS = ("source", "log", "staging", "destination", "models", "quarantine", "scale", "alerts")


class Document:
    """headrace.toml while it is read: its values, where they stand, and what is wrong with them."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Read files, given as texts by name, each over the ones before: tables are merged key by key, all
        else is replaced."""
        self._files = list(texts)
        self._mistakes: list[tuple[str, int, str]] = []
        self._lines: dict[tuple[str, ...], tuple[str, int]] = {}
        self.values: dict[str, Any] = {}
        for file, text in texts.items():
            fault = ""
            try:
                _merge(self.values, tomllib.loads(text))
            except RecursionError:
                fault = "nested too deeply"
            except ValueError as error:
                fault = str(error)
            if fault:
                self._syntax(file, fault, text)
            else:
                self._lines.update((path, (file, line)) for path, line in _lines(text).items())
        self.raise_mistakes()
        for key, value in self.values.items():
            if key not in SECTIONS:
                self._unknown((key,), SECTIONS, section=isinstance(value, dict))

    def _syntax(self, file: str, fault: str, text: str) -> None:
        place = re.search(r" \(at line (\d+), column \d+\)", fault)
        line = int(place[1]) if place else text.rstrip().count("\n") + 1
        # The parser quotes keys, and a key may be a misplaced url.
        fault = re.sub(r"\(['\"].*['\"],?\)", "this table", fault[: place.start()] if place else fault)
        fault = re.sub(r" key ['\"].*['\"]", " key", fault)
        self._mistakes.append((file, line, f"not valid TOML: {fault}"))

    def fail(self, path: tuple[str, ...], message: str, *, section: bool = False) -> None:
        """Note a mistake in a key, or in a whole section."""
        names = [shown(name) or "***" for name in path]
        table, key = (names, "") if section else (names[:-1], names[-1])
        place = " ".join(part for part in (f"[{'.'.join(table)}]" if table else "", key) if part)
        self._mistakes.append((*self._place(path), f"{place}: {message}"))

    def _place(self, path: tuple[str, ...]) -> tuple[str, int]:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, (self._files[0], 1))

    def _unknown(self, path: tuple[str, ...], known: Iterable[str], *, section: bool = False) -> None:
        known = tuple(known)
        close = get_close_matches(path[-1].lower(), known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        self.fail(path, f"unknown {'section' if section else 'key'}; {hint}", section=section)

    def section(self, name: str, parsers: dict[str, Parser]) -> dict[str, Any]:
        """Parse the top-level table `name`; keys that are absent or wrong are left out."""
        return self.table((name,), self.values.get(name, {}), parsers)

    def table(self, path: tuple[str, ...], raw: object, parsers: dict[str, Parser]) -> dict[str, Any]:
        """Parse the table at `path`; keys that are absent or wrong are left out."""
        parsed: dict[str, Any] = {}
        if not isinstance(raw, dict):
            self.fail(path, f"must be a table, not {kind_of(raw)}", section=True)
            return parsed
        for key, value in raw.items():
            if key not in parsers:
                self._unknown((*path, key), parsers)
                continue
            try:
                parsed[key] = parsers[key](value)
            except Invalid as error:
                for message in error.args:
                    self.fail((*path, key), message)
        return parsed

    def raise_mistakes(self) -> None:
        """Raise `ConfigError` if there was any mistake."""
        if self._mistakes:
            ordered = sorted(self._mistakes, key=lambda mistake: (self._files.index(mistake[0]), mistake[1]))
            lines = [f"{file}:{line}: {text}" for file, line, text in ordered[:MAX_MISTAKES]]
            more = len(ordered) - len(lines)
            raise ConfigError("\n".join(lines) + (f"\n… and {more} more" if more else ""))


def read_texts(root: Path, env: str = "") -> dict[str, str]:
    """Read `root/headrace.toml`, and `root/headrace.ENV.toml` if an environment is given, by their names.

    Raises `ConfigError` where one is not there or is no text of fair size.
    """
    names = [FILE_NAME]
    if env:
        if not re.fullmatch("[a-z][a-z0-9_-]{0,39}", env):
            raise ConfigError(
                "The environment's name cannot be used.",
                "It is 1 to 40 of a-z, 0-9, _ and -, and begins with a letter.",
            )
        names.append(f"headrace.{env}.toml")
    return {name: _read_text(root, name) for name in names}


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def _read_text(root: Path, name: str) -> str:
    path = root / name
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        remedy = "Make a project with: headrace init URL"
        if name != FILE_NAME:
            known = sorted(path.name.split(".")[1] for path in root.glob("headrace.*.toml"))
            remedy = f"Environments here: {', '.join(known) or 'none'}."
        raise ConfigError(f"There is no {name} in {root}.", remedy) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Mend its access rights.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes.", "Is it the right file?")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    raise ConfigError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8")


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of every table header and key in a text that is valid TOML.

    tomllib gives no lines, but it can say where a statement ends: where the lines since the last one
    first parse by themselves. So quoted, dotted and inline keys need no second grammar here.
    """
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        start = start if statement else number
        statement += line + "\n"
        if number > start and not re.search(r"[]}]|\"{3}|'{3}", line):
            continue  # a value of several lines cannot end here
        try:
            paths = list(_paths(tomllib.loads(statement)))
        except ValueError:
            continue
        if statement.lstrip().startswith("["):
            table = paths[-1]
            found[table] = start
        else:
            paths = [table + path for path in paths]
        for path in paths:
            found.setdefault(path, start)
        statement = ""
    return found


def _paths(value: object, depth: int = 4) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all keys, outer ones first, down to a depth that no known key reaches."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in _paths(inner, depth - 1))


def shown(value: object) -> str:
    """Give a text as it may be quoted in a message; '' for what might be a misplaced url or password."""
    if not isinstance(value, str) or not 0 < len(value) <= 64:
        return ""
    return value if value.isprintable() and not set(value) & set(':@=%"$') else ""


def quoted(value: str) -> str:
    """Quote a text for a message, where it may be shown."""
    return f'"{value}"' if shown(value) else "this value"


def kind_of(value: object) -> str:
    """Name the TOML type of a value."""
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}
    return {**names, list: "an array", dict: "a table"}.get(type(value), "a date or time")
