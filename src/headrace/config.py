"""A project's settings: headrace.toml, read strictly, every mistake reported at once with its line.

`headrace.NAME.toml` lies over it in the environment NAME, which has a state folder of its own.

Hand-written checks instead of pydantic: it costs three times the import of everything else here, and
its messages quote the input, which may hold a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from headrace import values
from headrace.change import TableId
from headrace.channels import DEFAULT_ALERTS, AlertsConfig, read_alerts
from headrace.defaults import NO_DEFAULTS, ModelDefaults, read_defaults
from headrace.document import FILE_NAME, Document, Invalid, Parser, read_texts
from headrace.errors import ConfigError, UserError
from headrace.references import SecretParsers, read_reference
from headrace.scale_settings import ScaleConfig, read_scale
from headrace.schema_policy import Rules, parse_rules
from headrace.secret import Secret

__all__ = [
    "ENVIRONMENT",
    "FILE_NAME",
    "MAX_SOURCE_NAME",
    "MODELS_FOLDER",
    "STATE_FOLDER",
    "DestinationConfig",
    "LogConfig",
    "Project",
    "ScaleConfig",
    "Secret",
    "SourceConfig",
    "StagingConfig",
    "load_project",
    "read_url",
    "select_tables",
    "source_config",
    "state_folder",
]

STATE_FOLDER = ".headrace"
ENVIRONMENT = "HEADRACE_ENV"
"""The environment variable of a project's environment."""
MODELS_FOLDER = "models"

MAX_SOURCE_NAME = 40
"""Characters; `headrace_<source>` then fits the 63 bytes that Postgres allows a slot's name."""

_URL_REMEDY = "It is postgresql://user:password@host:port/database."


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """`[source.NAME]`: a database whose changes are captured.

    `heartbeat` and `restart_age_alarm` are in seconds; `spool_max`, `lag_alarm` and `peek_temp_max` in
    bytes (`peek_temp_max` 0: never read in bulk). `on_rewrite` says what becomes of a table whose rows
    the source changed without a word in the stream: copied again, or only told of. `failover` is None
    where it is left to what the server can do; `standby_url` names the standby that is to take the slot
    over.
    `tables` are patterns for `select_tables`; `publication` is any Postgres identifier, to be quoted.
    Copies: how many connections read at once, how many bytes per second all of them may read (0: no
    limit), how large a chunk is on the source's disk (bytes), how old a snapshot grows (seconds).
    With an `upstream` nothing is captured: that project's staging of the same source is read.
    `pii` are patterns `table.column` of columns whose values are shown nowhere beside the data.
    `exclude` and `hash` are patterns `schema.table.column` of columns that are left out or hashed with
    `hash_salt`; `where` holds pairs of a pattern of tables and the condition of the rows to capture.
    """

    name: str
    type: Literal["postgres"]
    url: Secret
    tables: tuple[str, ...]
    slot: str
    publication: str
    heartbeat: float
    copy_workers: int = 2
    copy_rate: int = 0
    chunk_bytes: int = 16 << 20
    max_snapshot_age: float = 900.0
    on_rewrite: Literal["copy", "alert"] = "copy"
    exclude: tuple[str, ...] = ()
    hash: tuple[str, ...] = ()
    hash_salt: Secret | None = None
    where: tuple[tuple[str, str], ...] = ()
    origin: Literal["any", "none"] = "any"
    spool_max: int = 64 << 30
    peek_temp_max: int = 1 << 30
    lag_alarm: int = 5 << 30
    restart_age_alarm: float = 900.0
    failover: bool | None = None
    standby_url: Secret | None = None
    schema_changes: Rules = ()
    pii: tuple[str, ...] = ()
    upstream: Project | None = None

    @property
    def place(self) -> str:
        """Where its changes come from, for people."""
        return f"the staging of {self.upstream.root}" if self.upstream else self.url.redacted()


@dataclass(frozen=True, slots=True)
class LogConfig:
    """`[log]`: how large a group of transactions grows (bytes), how long it waits for more (seconds), and
    what is kept.

    Entries stay for `keep` seconds (None: for ever), and less only where the log would be larger than
    `keep_bytes` (0: no limit); what is not applied yet stays in any case. A consumer that would hold more
    than `hold_max` bytes beyond that is lost. Every `anchor_every` seconds (0: never) the log's head is
    appended to `anchor_file` and posted to `anchor_url`, signed with `anchor_key` if there is one.
    """

    max_group_bytes: int = 16 << 20
    group_linger: float = 0.05
    keep: float | None = 7 * 86_400.0
    keep_bytes: int = 0
    hold_max: int = 10 << 30
    anchor_every: float = 0.0
    anchor_file: Path | None = None
    anchor_url: Secret | None = None
    anchor_key: Secret | None = None


@dataclass(frozen=True, slots=True)
class StagingConfig:
    """`[staging]`: the local folder of the raw tables, absolute; which part of one core's time their
    maintenance may take (0: none is done), and for how long a replaced file stays for readers (seconds)."""

    path: Path
    maintenance_cpu: float = 0.1
    grace: float = 300.0


@dataclass(frozen=True, slots=True)
class DestinationConfig:
    """`[destination]`: where models are applied to.

    Of type `duckdb`, the file `path`, absolute; unless `publish` is None, it is where a copy for readers is
    made, absolute, at most every `publish_every` seconds. Of type `postgres`, the database of `url`: models
    without a schema in their name are tables of `schema`; a statement waits for a lock for `lock_timeout`
    seconds and takes `statement_timeout` seconds at most (0: no limit).
    """

    type: Literal["duckdb", "postgres"]
    path: Path
    publish: Path | None = None
    publish_every: float = 10.0
    url: Secret | None = None
    schema: str = "public"
    lock_timeout: float = 30.0
    statement_timeout: float = 3600.0

    @property
    def name(self) -> str:
        """What it is, for people."""
        return self.url.redacted() if self.url else str(self.path)

    @property
    def is_there(self) -> bool | None:
        """Whether there is such a file; None for what only its server knows."""
        return None if self.url else self.path.exists()


@dataclass(frozen=True, slots=True)
class QuarantineConfig:
    """`[quarantine]`: how many open records, and bytes of them, there may be; a model with more waits."""

    max_records: int = 10_000_000
    max_bytes: int = 16 << 30


@dataclass(frozen=True, slots=True)
class Project:
    """A project folder's settings, checked. `root` is absolute; sources stand in the file's order; `env` is
    the environment, '' for none."""

    root: Path
    sources: tuple[SourceConfig, ...]
    log: LogConfig
    staging: StagingConfig
    destination: DestinationConfig
    scale: ScaleConfig
    quarantine: QuarantineConfig
    env: str = ""
    alerts: AlertsConfig = DEFAULT_ALERTS
    defaults: ModelDefaults = NO_DEFAULTS

    @property
    def state(self) -> Path:
        """The folder of everything that Headrace itself remembers."""
        return state_folder(self.root, self.env)

    def log_path(self, source: str) -> Path:
        """Return the file of a source's log; it need not exist."""
        upstream = self._upstream(source)
        return upstream.log_path(source) if upstream else self.state / "log" / f"{source}.db"

    def staging_path(self, source: str) -> Path:
        """Return the folder of the raw tables of a source and others."""
        upstream = self._upstream(source)
        return upstream.staging.path if upstream else self.staging.path

    def refuse_reading_only(self, source: str, what: str) -> None:
        """Raise UserError for what only who captures a source can do."""
        if upstream := self._upstream(source):
            raise UserError(
                f"This project only reads the staging of source {source}: {what} is for the one that "
                "captures it.",
                f"Run it there: --project {upstream.root}" + (f" --env {upstream.env}" * bool(upstream.env)),
            )

    def _upstream(self, source: str) -> Project | None:
        return next((known.upstream for known in self.sources if known.name == source), None)

    @property
    def models(self) -> Path:
        """The folder of model files; it need not exist."""
        return self.root / MODELS_FOLDER

    @property
    def versions(self) -> Path:
        """The folder that keeps every version of a model's file."""
        return self.state / "versions"


def state_folder(root: Path, env: str | None = None) -> Path:
    """Return the folder of all that Headrace remembers of a project in an environment; by default in the one
    that the environment variable HEADRACE_ENV names."""
    env = os.environ.get(ENVIRONMENT, "") if env is None else env
    return root / STATE_FOLDER / "env" / env if env else root / STATE_FOLDER


def load_project(folder: Path, *, env: str | None = None, secrets: bool = True) -> Project:
    """Read `folder/headrace.toml`, with `${env:NAME}` and `${file:PATH}` in secrets filled in.

    In an environment, `env` or else what HEADRACE_ENV says, `folder/headrace.ENV.toml` lies over it.
    Without `secrets` these stay empty and unread, for what needs neither source nor destination.

    Raises `ConfigError` that lists every mistake, a line `FILE:LINE: …` for each; none of them quotes a
    secret or what an environment variable or secret file holds.
    """
    env = os.environ.get(ENVIRONMENT, "") if env is None else env
    return _load(Path(folder).expanduser().resolve(), env, secrets=secrets)


def _load(root: Path, env: str, *, secrets: bool, is_upstream: bool = False) -> Project:
    """Read a project; of one that `is_upstream` of another, only the sources that it captures itself."""
    document = Document(read_texts(root, env))
    secret = SecretParsers(root, read=secrets)
    sources = _sources(document, secret, None if is_upstream else (root, env))
    log = _log(document, root, secret)
    share, grace = values.share, values.duration("0s", "24h")
    folder_of = values.path_in(root, "folder")
    staging = document.section("staging", {"path": folder_of, "maintenance_cpu": share, "grace": grace})
    destination = _destination(document, root, secret)
    bounds = {"max_records": values.count(1, 1 << 40), "max_bytes": values.size("64KiB", "1048576GiB")}
    quarantine = document.section("quarantine", bounds)
    scale = read_scale(document)
    alerts = read_alerts(document, secret)
    defaults = read_defaults(document)
    document.raise_mistakes()
    return Project(
        root=root,
        sources=sources,
        log=LogConfig(**log),
        staging=StagingConfig(**{"path": state_folder(root, env) / "staging", **staging}),
        destination=DestinationConfig(**destination),
        scale=scale,
        quarantine=QuarantineConfig(**quarantine),
        env=env,
        alerts=alerts,
        defaults=defaults,
    )


def source_config(name: str, url: Secret, **given: Any) -> SourceConfig:
    """Return a source's settings, with the defaults for all that `given` does not say."""
    default = f"headrace_{name}"
    defaults = {"type": "postgres", "tables": ("public.*",), "heartbeat": 10.0}
    return SourceConfig(
        **{"name": name, "url": url, "slot": default, "publication": default, **defaults, **given}
    )


def read_url(text: str, root: Path) -> Secret:
    """Read a source's url as it may stand in the file, with its references filled in.

    Raises `ConfigError`, which quotes nothing of it.
    """
    try:
        return read_reference(text, Path(root))
    except Invalid as error:
        raise ConfigError(f"The url {'; '.join(error.args)}.", _URL_REMEDY) from None


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


# ------------------------------------------------------------------------------------- the source


def _log(document: Document, root: Path, secret: SecretParsers) -> dict[str, Any]:
    parsers: dict[str, Parser] = {
        "max_group_bytes": values.size("64KiB", "1GiB"),
        "group_linger": values.duration("0ms", "10s"),
        "keep": values.duration_or_forever("1s", "36500d"),
        "keep_bytes": values.size("0B", "1048576GiB"),
        "hold_max": values.size("0B", "1048576GiB"),
        "anchor_every": values.duration("0s", "365d"),
        "anchor_file": values.path_in(root, "file"),
        "anchor_url": secret.web_address,
        "anchor_key": secret.salt,
    }
    log = document.section("log", parsers)
    if log.get("anchor_every") and not ("anchor_file" in log or "anchor_url" in log):
        document.fail(("log", "anchor_every"), "needs anchor_file or anchor_url, to say where the anchors go")
    return log


def _destination(document: Document, root: Path, secret: SecretParsers) -> dict[str, Any]:
    of_type: dict[str, dict[str, Parser]] = {
        "duckdb": {
            "path": values.path_in(root, "file"),
            "publish": values.path_in(root, "file"),
            "publish_every": values.duration("100ms", "24h"),
        },
        "postgres": {
            "url": secret.url,
            "schema": values.publication,
            "lock_timeout": values.duration("0ms", "1h"),
            "statement_timeout": values.duration("0ms", "24h"),
        },
    }
    type_ = {"type": values.only(*of_type)}
    section = document.values.get("destination", {})
    named = section.get("type", "duckdb") if isinstance(section, dict) else "duckdb"
    known = of_type.get(named, {}) if isinstance(named, str) else {}
    if not known:  # the type is what is wrong
        known = {key: parser for parsers in of_type.values() for key, parser in parsers.items()}
    destination = document.section("destination", type_ | known)
    if named == "postgres" and "url" not in section:
        document.fail(("destination", "url"), 'missing; add for example url = "${env:WAREHOUSE_URL}"')
    destination = {"type": "duckdb", "path": root / "warehouse.duckdb", **destination}
    if "publish_every" in destination and "publish" not in section:
        document.fail(("destination", "publish_every"), "needs publish, to say where the copy goes")
    if destination.get("publish") == destination["path"]:
        document.fail(("destination", "publish"), "is the destination's own file; name another")
    return destination


def _sources(
    document: Document, secret: SecretParsers, here: tuple[Path, str] | None
) -> tuple[SourceConfig, ...]:
    """Parse the sources; `here`, root and environment, is where other projects are looked for."""
    own, root = _source_parsers(secret), here[0] if here else Path()
    # What a project does not capture it needs no secrets of: an environment may lie over one that does.
    reading = _source_parsers(SecretParsers(root, read=False)) | {
        "staging_of": values.path_in(root, "folder"),
        "staging_env": values.string,
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
        if "staging_of" in table:
            given = document.table(path, table, reading)
            if here and "staging_of" in given and (upstream := _upstream(document, path, given, here)):
                pii = (*next(s.pii for s in upstream.sources if s.name == name), *given.get("pii", ()))
                found.append(source_config(name, Secret(""), upstream=upstream, pii=pii))
            continue
        given = document.table(path, table, own)
        if "url" not in table:
            document.fail((*path, "url"), 'missing; add for example url = "${env:SHOP_URL}"')
        if "where" in given:
            given["where"] = _conditions(document, (*path, "where"), given["where"])
        if "schema_changes" in given:
            changes = (*path, "schema_changes")
            given["schema_changes"] = parse_rules(document, changes, given["schema_changes"])
        if given.get("hash") and "hash_salt" not in table:
            example_salt = 'missing; hash needs it: hash_salt = "${env:HEADRACE_HASH_SALT}"'
            document.fail((*path, "hash_salt"), example_salt)
        if "url" in given:
            found.append(source_config(name, **given))
    return tuple(found)


def _upstream(
    document: Document, path: tuple[str, ...], given: dict[str, Any], here: tuple[Path, str]
) -> Project | None:
    """Return the project whose staging a source reads, or note why it cannot be."""
    root, env, name = given["staging_of"], given.get("staging_env", ""), path[-1]
    fault = ""
    try:
        if (root.resolve(), env) == here:
            fault = "is this project itself; another environment of it needs staging_env or --env"
        else:
            project = _load(root.resolve(), env, secrets=False, is_upstream=True)
            if all(source.name != name for source in project.sources):
                fault = f"{root} captures no source {name}"
    except ConfigError as error:
        fault = f"{root} cannot be read: {error.paragraph()}"
    if fault:
        document.fail((*path, "staging_of"), fault)
    return None if fault else project


def _source_parsers(secret: SecretParsers) -> dict[str, Parser]:
    return {
        "type": values.only("postgres"),
        "url": secret.url,
        "tables": values.patterns,
        "slot": values.slot,
        "publication": values.publication,
        "heartbeat": values.duration("100ms", "1h"),
        "copy_workers": values.count(1, 64),
        "copy_rate": values.size("0B", "100GiB"),
        "chunk_bytes": values.size("64KiB", "1GiB"),
        "max_snapshot_age": values.duration("1s", "24h"),
        "on_rewrite": values.only("copy", "alert"),
        "exclude": values.columns,
        "hash": values.columns,
        "hash_salt": secret.salt,
        "where": lambda value: value,
        "origin": values.only("any", "none"),
        "spool_max": values.size("1MiB", "65536GiB"),
        "peek_temp_max": values.size("0B", "64GiB"),
        "lag_alarm": values.size("1MiB", "1024GiB"),
        "restart_age_alarm": values.duration("10s", "24h"),
        "failover": values.boolean,
        "standby_url": secret.url,
        "schema_changes": lambda value: value,
        "pii": values.marked_columns,
    }


def _conditions(document: Document, path: tuple[str, ...], raw: object) -> tuple[tuple[str, str], ...]:
    """Parse the table `where`: each key a pattern of tables, each value a condition."""
    parsers: dict[str, Parser] = dict.fromkeys(raw, values.condition) if isinstance(raw, dict) else {}
    for pattern in parsers:
        fault = values.pattern_fault(pattern)
        if pattern.startswith("!"):
            fault = "a pattern of where includes; it cannot begin with !"
        if fault:
            document.fail((*path, pattern), fault)
    return tuple(document.table(path, raw, parsers).items())
