"""A project's settings: headrace.toml, read strictly, every mistake reported at once with its line.

Hand-written checks instead of pydantic: it costs three times the import of everything else here, and
its messages quote the input, which may hold a password.
"""

from __future__ import annotations

import codecs
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from headrace.change import TableId
from headrace.errors import ConfigError

FILE_NAME = "headrace.toml"
STATE_FOLDER = ".headrace"
MODELS_FOLDER = "models"

MAX_FILE_BYTES = 1 << 20
MAX_SECRET_FILE_BYTES = 64 << 10
MAX_MISTAKES = 50
MAX_SOURCE_NAME = 40
"""Characters; `headrace_<source>` then fits the 63 bytes that Postgres allows a slot's name."""


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """`[source.NAME]`: a database whose changes are captured. `heartbeat` in seconds.

    `tables` are patterns for `select_tables`; `publication` is any Postgres identifier, to be quoted.
    """

    name: str
    type: Literal["postgres"]
    url: Secret
    tables: tuple[str, ...]
    slot: str
    publication: str
    heartbeat: float


@dataclass(frozen=True, slots=True)
class LogConfig:
    """`[log]`: how large a group of transactions grows (bytes), how long it waits for more (seconds)."""

    max_group_bytes: int = 16 << 20
    group_linger: float = 0.05


@dataclass(frozen=True, slots=True)
class StagingConfig:
    """`[staging]`: the local folder of the raw tables, absolute."""

    path: Path


@dataclass(frozen=True, slots=True)
class DestinationConfig:
    """`[destination]`: the DuckDB file that models are applied to, absolute."""

    type: Literal["duckdb"]
    path: Path


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """`[scale]`: the freshness to aim for, from source commit to visible, in seconds."""

    freshness: float = 10.0


@dataclass(frozen=True, slots=True)
class Project:
    """A project folder's settings, checked. `root` is absolute; sources stand in the file's order."""

    root: Path
    sources: tuple[SourceConfig, ...]
    log: LogConfig
    staging: StagingConfig
    destination: DestinationConfig
    scale: ScaleConfig

    @property
    def state(self) -> Path:
        """The folder of everything that Headrace itself remembers."""
        return self.root / STATE_FOLDER

    @property
    def models(self) -> Path:
        """The folder of model files; it need not exist."""
        return self.root / MODELS_FOLDER


def load_project(folder: Path) -> Project:
    """Read `folder/headrace.toml`, with `${env:NAME}` and `${file:PATH}` in a source's url filled in.

    Raises `ConfigError` that lists every mistake, a line `headrace.toml:LINE: …` for each; none of
    them quotes a url or what an environment variable or secret file holds.
    """
    root = Path(folder).expanduser().resolve()
    document = _Document(_read(root))
    sources = _sources(document, root)
    log = document.section("log", _LOG)
    staging = document.section("staging", {"path": _path_in(root, "folder")})
    destination = document.section("destination", {"type": _only("duckdb"), "path": _path_in(root, "file")})
    scale = document.section("scale", _SCALE)
    document.raise_mistakes()
    return Project(
        root=root,
        sources=sources,
        log=LogConfig(**log),
        staging=StagingConfig(**{"path": root / STATE_FOLDER / "staging", **staging}),
        destination=DestinationConfig(**{"type": "duckdb", "path": root / "warehouse.duckdb", **destination}),
        scale=ScaleConfig(**scale),
    )


def select_tables(patterns: Iterable[str], available: Iterable[TableId]) -> tuple[TableId, ...]:
    """Choose tables by patterns `schema.table` with `*` and `?`, in sorted order; raises nothing.

    The last pattern that fits a table decides, `!` in front of it excludes; a table that none fits
    is left out. Case counts. The schema's pattern ends at the first dot.
    """
    rules = []
    for pattern in patterns:
        schema, _, name = pattern.removeprefix("!").replace("[", "[[]").partition(".")
        rules.append((not pattern.startswith("!"), schema, name))
    rules.reverse()

    def chosen(table: TableId) -> bool:
        fits = (
            include
            for include, schema, name in rules
            if fnmatchcase(table.schema, schema) and fnmatchcase(table.name, name)
        )
        return next(fits, False)

    return tuple(sorted({table for table in available if chosen(table)}))


# ---------------------------------------------------------------------------------- the document


class _Invalid(Exception):  # noqa: N818 - a value's verdict, never seen outside this module
    """What is wrong with a value: one message for each argument."""


_Parser = Callable[[Any], Any]
_SECTIONS = ("source", "log", "staging", "destination", "scale")


class _Document:
    """headrace.toml while it is read: its values, where they stand, and what is wrong with them."""

    def __init__(self, text: str) -> None:
        self._mistakes: list[tuple[int, str]] = []
        self._lines: dict[tuple[str, ...], int] = {}
        self.values: dict[str, Any] = {}
        fault = ""
        try:
            self.values = tomllib.loads(text)
        except RecursionError:
            fault = "nested too deeply"
        except ValueError as error:
            fault = str(error)
        if fault:
            self._syntax(fault, text)
            self.raise_mistakes()
        self._lines = _lines(text)
        for key, value in self.values.items():
            if key not in _SECTIONS:
                self._unknown((key,), _SECTIONS, section=isinstance(value, dict))

    def _syntax(self, fault: str, text: str) -> None:
        place = re.search(r" \(at line (\d+), column \d+\)", fault)
        line = int(place[1]) if place else text.rstrip().count("\n") + 1
        # The parser quotes keys, and a key may be a misplaced url.
        fault = re.sub(r"\(['\"].*['\"],?\)", "this table", fault[: place.start()] if place else fault)
        fault = re.sub(r" key ['\"].*['\"]", " key", fault)
        self._mistakes.append((line, f"not valid TOML: {fault}"))

    def fail(self, path: tuple[str, ...], message: str, *, section: bool = False) -> None:
        """Note a mistake in a key, or in a whole section."""
        names = [_shown(name) or "***" for name in path]
        table, key = (names, "") if section else (names[:-1], names[-1])
        place = " ".join(part for part in (f"[{'.'.join(table)}]" if table else "", key) if part)
        self._mistakes.append((self._line(path), f"{place}: {message}"))

    def _line(self, path: tuple[str, ...]) -> int:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _unknown(self, path: tuple[str, ...], known: Iterable[str], *, section: bool = False) -> None:
        known = tuple(known)
        close = get_close_matches(path[-1].lower(), known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        self.fail(path, f"unknown {'section' if section else 'key'}; {hint}", section=section)

    def section(self, name: str, parsers: dict[str, _Parser]) -> dict[str, Any]:
        """Parse the top-level table `name`; keys that are absent or wrong are left out."""
        return self.table((name,), self.values.get(name, {}), parsers)

    def table(self, path: tuple[str, ...], raw: object, parsers: dict[str, _Parser]) -> dict[str, Any]:
        """Parse the table at `path`; keys that are absent or wrong are left out."""
        parsed: dict[str, Any] = {}
        if not isinstance(raw, dict):
            self.fail(path, f"must be a table, not {_kind(raw)}", section=True)
            return parsed
        for key, value in raw.items():
            if key not in parsers:
                self._unknown((*path, key), parsers)
                continue
            try:
                parsed[key] = parsers[key](value)
            except _Invalid as error:
                for message in error.args:
                    self.fail((*path, key), message)
        return parsed

    def raise_mistakes(self) -> None:
        """Raise `ConfigError` if there was any mistake."""
        if self._mistakes:
            ordered = sorted(self._mistakes, key=lambda mistake: mistake[0])
            lines = [f"{FILE_NAME}:{line}: {text}" for line, text in ordered[:MAX_MISTAKES]]
            more = len(ordered) - len(lines)
            raise ConfigError("\n".join(lines) + (f"\n… and {more} more" if more else ""))


def _read(root: Path) -> str:
    path = root / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"There is no {FILE_NAME} in {root}.", "Make a project with: headrace init URL"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Mend its access rights.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes.", "Is it the right file?")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    raise ConfigError(f"{FILE_NAME}:{line}: not UTF-8 text; save the file as UTF-8")


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


# ------------------------------------------------------------------------------------ the values


def _shown(value: object) -> str:
    """Give a text as it may be quoted in a message; '' for what might be a misplaced url or password."""
    if not isinstance(value, str) or not 0 < len(value) <= 64:
        return ""
    return value if value.isprintable() and not set(value) & set(':@=%"$') else ""


def _quoted(value: str) -> str:
    return f'"{value}"' if _shown(value) else "this value"


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}
    return {**names, list: "an array", dict: "a table"}.get(type(value), "a date or time")


def _text(value: object, example: str = "") -> str:
    if not isinstance(value, str):
        raise _Invalid(f"must be a string{example}, not {_kind(value)}")
    return value


def _only(allowed: str) -> _Parser:
    def parse(value: object) -> str:
        if _text(value) != allowed:
            raise _Invalid(f'{_quoted(_text(value))} is not supported; it must be "{allowed}"')
        return allowed

    return parse


_MILLISECONDS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _scaled(text: str, units: dict[str, int]) -> int | None:
    match = re.fullmatch(r"([0-9]{1,12})([A-Za-z]+)", text)
    return int(match[1]) * units[match[2]] if match and match[2] in units else None


def _ranged(number: int | None, shown: str, units: dict[str, int], least: str, most: str) -> int:
    if number is None:
        what, like = ("duration", '"250ms", "10s", "5m" or "2h"')
        if units is _BYTES:
            what, like = ("size", '"64KiB", "16MiB" or "1GiB", or as an integer of bytes')
        raise _Invalid(f"{shown} is not a {what}; write it like {like}")
    if not (_scaled(least, units) or 0) <= number <= (_scaled(most, units) or 0):
        raise _Invalid(f'{shown} is out of range; allowed are "{least}" to "{most}"')
    return number


def _duration(least: str, most: str) -> _Parser:
    """Parse to seconds, within `least` and `most`."""

    def parse(value: object) -> float:
        text = _text(value, ' such as "10s"')
        number = _scaled(text, _MILLISECONDS)
        return _ranged(number, _quoted(text), _MILLISECONDS, least, most) / 1_000

    return parse


def _size(least: str, most: str) -> _Parser:
    """Parse to bytes, within `least` and `most`."""

    def parse(value: object) -> int:
        if type(value) is int:
            return _ranged(value, "this number of bytes", _BYTES, least, most)
        text = _text(value, ' such as "16MiB", or an integer of bytes')
        return _ranged(_scaled(text, _BYTES), _quoted(text), _BYTES, least, most)

    return parse


def _path_in(root: Path, what: str) -> _Parser:
    def parse(value: object) -> Path:
        text = _text(value)
        if "${" in text:
            raise _Invalid("${…} is filled in only in the url of a source")
        if not text.strip() or not text.isprintable() or "://" in text:
            raise _Invalid(f"must be the path of a local {what}; addresses are not supported")
        return Path(os.path.normpath(root / _home(text)))

    return parse


def _home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise _Invalid("begins with ~ and there is no such home folder") from None


def _slot(value: object) -> str:
    if not re.fullmatch("[a-z0-9_]{1,63}", _text(value)):
        raise _Invalid(f"{_quoted(_text(value))} cannot name a slot; allowed are 1 to 63 of a-z, 0-9 and _")
    return _text(value)


def _publication(value: object) -> str:
    if not 0 < len(_text(value).encode()) <= 63 or not _text(value).isprintable():
        raise _Invalid("must be a name of 1 to 63 bytes without control characters")
    return _text(value)


def _patterns(value: object) -> tuple[str, ...]:
    example = 'such as ["public.*", "!public.audit"]'
    if not isinstance(value, list):
        raise _Invalid(f"must be an array of patterns {example}, not {_kind(value)}")
    wrong = [fault for pattern in value if (fault := _pattern_fault(pattern))]
    if not wrong and all(pattern.startswith("!") for pattern in value):
        wrong = [f"includes no table; begin with what to include, {example}"]
    if wrong:
        raise _Invalid(*wrong)
    return tuple(value)


def _pattern_fault(pattern: object) -> str:
    if not isinstance(pattern, str):
        return f"a pattern must be a string, not {_kind(pattern)}"
    schema, _, name = pattern.removeprefix("!").partition(".")
    clean = pattern.isprintable() and "://" not in pattern
    if not (schema and name and clean) or schema != schema.strip() or name != name.strip():
        return f'{_quoted(pattern)} is not a pattern schema.table, such as "public.orders" or "!public.tmp_*"'
    return ""


# ------------------------------------------------------------------------------------- the source

_LOG = {"max_group_bytes": _size("64KiB", "1GiB"), "group_linger": _duration("0ms", "10s")}
_SCALE = {"freshness": _duration("100ms", "24h")}


def _sources(document: _Document, root: Path) -> tuple[SourceConfig, ...]:
    parsers: dict[str, _Parser] = {
        "type": _only("postgres"),
        "url": lambda value: _url(value, root),
        "tables": _patterns,
        "slot": _slot,
        "publication": _publication,
        "heartbeat": _duration("100ms", "1h"),
    }
    tables = document.values.get("source", {})
    example = '[source.shop] with url = "${env:SHOP_URL}"'
    if not isinstance(tables, dict) or not tables:
        document.fail(("source",), f"a project needs at least one source: add {example}", section=True)
        return ()
    found = []
    for name, table in tables.items():
        path = ("source", name)
        if not isinstance(table, dict):
            document.fail(path, f"a source is a table with a name of its own, such as {example}")
            continue
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or len(name) > MAX_SOURCE_NAME:
            rule = f"a source's name is 1 to {MAX_SOURCE_NAME} of a-z, 0-9 and _, and begins with a letter"
            document.fail(path, rule, section=True)
        values = document.table(path, table, parsers)
        if "url" not in table:
            document.fail((*path, "url"), 'missing; add for example url = "${env:SHOP_URL}"')
        if "url" in values:
            default = f"headrace_{name}"
            defaults = {"type": "postgres", "tables": ("public.*",), "heartbeat": 10.0}
            names = {"name": name, "slot": default, "publication": default}
            found.append(SourceConfig(**{**defaults, **names, **values}))
    return tuple(found)


def _url(value: object, root: Path) -> Secret:
    text = _text(value)
    missing: list[str] = []

    def fill(reference: re.Match[str]) -> str:
        try:
            return _referred(reference["kind"], reference["name"], root)
        except _Invalid as error:
            missing.extend(error.args)
            return ""

    unclosed = re.sub(r"\$\{[^{}]*\}", "", text)
    if "${" in unclosed:
        missing.append("a ${ without its }")
    text = re.sub(r"\$\{(?P<kind>[^{}:]*):?(?P<name>[^{}]*)\}", fill, text)
    if missing:
        raise _Invalid(*missing)
    try:
        _place(text)
    except ValueError as error:
        raise _Invalid(str(error)) from None
    return Secret(text)


def _referred(kind: str, name: str, root: Path) -> str:
    """Give what `${kind:name}` stands for."""
    if kind == "file" and name.strip() and name.isprintable():
        return _secret_file(name, root)
    if kind != "env" or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        # What stands between the braces is not quoted: it may be a part of a password.
        raise _Invalid("unknown ${…}; there are ${env:NAME} and ${file:PATH} (write $ itself as %24)")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        raise _Invalid(f"${{env:{name}}}: the environment variable {name} is {state}")
    return value


def _secret_file(name: str, root: Path) -> str:
    path = root / _home(name)
    fault = ""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SECRET_FILE_BYTES + 1).decode().rstrip("\r\n")
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        fault = "is not UTF-8 text"
    else:
        if not text or len(text) > MAX_SECRET_FILE_BYTES:
            fault = f"is larger than {MAX_SECRET_FILE_BYTES} bytes" if text else "is empty"
    if fault:
        raise _Invalid(f"${{file:{name}}}: {path} {fault}")
    return text


# -------------------------------------------------------------- secrets and connection strings


class Secret:
    """A text that no repr, str, format or error message shows. Not a dataclass: `asdict` would open it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def reveal(self) -> str:
        """Give the text itself: for the driver that connects, never for a log or a message."""
        return self._text

    def redacted(self) -> str:
        """Say where a connection string leads: `postgresql://user@host:port/db`, or `***` if unclear.

        Only user, host, port and database are taken over, so a password can stand anywhere else.
        """
        try:
            place = _place(self._text)
        except ValueError:
            return "***"
        user, host, port, database = (
            "***" if part and not re.fullmatch(plain, part) else part
            for part, plain in zip(place, _PLAIN, strict=True)
        )
        socket = host.startswith("/")
        text = "postgresql://" + (f"{user}@" if user else "") + ("" if socket else host)
        text += f":{port}" if port else ""
        text += f"/{database}" if database else ""
        return text + (f"?host={host}" if socket else "")


class _Place(NamedTuple):
    """Where a connection string leads; '' for what it leaves to libpq."""

    user: str
    host: str
    port: str
    database: str


# What is shown of each part: anything else might be a password in the wrong place.
_PLAIN_HOST = r"(?:[\w./-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?"
_PLAIN = (r"[\w.-]+", rf"{_PLAIN_HOST}(?:,{_PLAIN_HOST})*", r"[0-9,]+", r"[\w.-]+")

_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::[^@/]*)?@)?(?P<hosts>[^@/?]*)"
    r"(?:/(?P<database>[^@?]*))?(?:\?(?P<query>[^@]*))?"
)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(?P<port>[0-9]{0,5}))?")
_PAIR = re.compile(
    r"\s*(?P<key>[a-z_]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?:(?!')(?:[^\s\\]|\\.)+)?)(?=\s|$)", re.DOTALL
)


def _place(text: str) -> _Place:
    """Read a connection string as libpq does; `ValueError`, which quotes nothing of it, if it cannot be one.

    libpq's own messages quote what they do not understand, so it is judged before libpq sees it.
    """
    if re.match(r"postgres(ql)?://", text):
        return _place_of_url(text)
    if "=" in text and not re.match(r"\s*[^\s=]*:", text):
        return _place_of_pairs(text)
    raise ValueError(
        "must begin with postgres:// or postgresql://, or be key=value pairs as libpq takes them"
    )


def _place_of_url(text: str) -> _Place:
    if not text.isprintable() or " " in text:
        raise ValueError("has a blank or control character; write a blank as %20")
    if re.search("%(?![0-9A-Fa-f]{2})|%00", text):
        raise ValueError("has a % without two hex digits after it; write % itself as %25")
    match = _URL.fullmatch(text)
    advice = "in user and password write @ as %40, / as %2F and : as %3A"
    if not match:
        raise ValueError(f"is not postgresql://user:password@host:port/database; {advice}")
    hosts = match["hosts"].split(",")
    for host in hosts:
        part = _HOST.fullmatch(host)
        if not part or int(part["port"] or 1) not in range(1, 65536):
            raise ValueError(f"has no host:port with a port of 1 to 65535 where they belong; {advice}")
    pairs = [pair.split("=") for pair in (match["query"] or "").split("&") if pair]
    if any(len(pair) != 2 or not pair[0] for pair in pairs):
        raise ValueError("must have key=value pairs joined by & after the ?")
    options = {unquote(key): unquote(value) for key, value in pairs}
    return _Place(
        options.get("user") or unquote(match["user"] or ""),
        options.get("host") or unquote(match["hosts"]),
        options.get("port", ""),
        options.get("dbname") or unquote(match["database"] or ""),
    )


def _place_of_pairs(text: str) -> _Place:
    options, at = {}, 0
    while text[at:].strip():
        pair = _PAIR.match(text, at)
        if not pair or "\0" in text:
            raise ValueError("is not key=value pairs as libpq takes them; put '…' around a value with blanks")
        value = pair["value"]
        value = value[1:-1] if value.startswith("'") else value
        options[pair["key"]], at = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL), pair.end()
    get = options.get
    return _Place(get("user", ""), get("host", get("hostaddr", "")), get("port", ""), get("dbname", ""))
