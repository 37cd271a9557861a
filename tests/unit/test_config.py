from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.change import TableId
from headrace.config import (
    DestinationConfig,
    LogConfig,
    Project,
    QuarantineConfig,
    ScaleConfig,
    Secret,
    SourceConfig,
    StagingConfig,
    load_project,
    select_tables,
)
from headrace.document import MAX_FILE_BYTES, MAX_MISTAKES, _lines
from headrace.errors import ConfigError
from headrace.references import MAX_SECRET_FILE_BYTES
from headrace.scale_settings import cores

URL = "postgresql://app:hunter2@db.example:5432/shop"
SOURCE = f'[source.shop]\nurl = "{URL}"\n'


def load(folder: Path, text: str | bytes) -> Project:
    data = text.encode() if isinstance(text, str) else text
    (folder / "headrace.toml").write_bytes(data)
    return load_project(folder)


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 2
    whole = caught.value.paragraph() + repr(caught.value) + repr(caught.value.args)
    assert "hunter2" not in whole
    assert "hunter%32" not in whole
    return str(caught.value)


def source_with(key_value: str) -> str:
    return f"{SOURCE}{key_value}\n"


# ------------------------------------------------------------------------------------ what is read


def test_the_url_alone_is_enough(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    assert load(tmp_path, SOURCE) == Project(
        root=root,
        sources=(
            SourceConfig(
                name="shop",
                type="postgres",
                url=Secret(URL),
                tables=("public.*",),
                slot="headrace_shop",
                publication="headrace_shop",
                heartbeat=10.0,
                origin="any",
                spool_max=64 << 30,
            ),
        ),
        log=LogConfig(max_group_bytes=16 * 1024 * 1024, group_linger=0.05),
        staging=StagingConfig(path=root / ".headrace" / "staging"),
        destination=DestinationConfig(type="duckdb", path=root / "warehouse.duckdb"),
        scale=ScaleConfig(freshness=10.0),
        quarantine=QuarantineConfig(max_records=10_000_000, max_bytes=16 << 30),
    )


def test_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_URL", URL)
    project = load(
        tmp_path,
        """
        [source.shop]
        type = "postgres"
        url = "${env:SHOP_URL}"
        tables = [
          "public.*",  # all
          "!public.audit",
        ]
        slot = "my_slot_1"
        publication = "My publication"
        heartbeat = "250ms"
        origin = "none"
        spool_max = "1GiB"
        lag_alarm = "64MiB"
        restart_age_alarm = "1h"
        failover = false
        standby_url = "${env:SHOP_URL}"
        [log]
        max_group_bytes = "64KiB"
        group_linger = "0ms"
        [staging]
        path = "/var/lib/staging"
        maintenance_cpu = 0.25
        grace = "1h"
        [destination]
        type = "duckdb"
        path = "out/../dwh.duckdb"
        [scale]
        freshness = "5m"
        """,
    )
    assert project.sources == (
        SourceConfig(
            name="shop",
            type="postgres",
            url=Secret(URL),
            tables=("public.*", "!public.audit"),
            slot="my_slot_1",
            publication="My publication",
            heartbeat=0.25,
            origin="none",
            spool_max=1 << 30,
            lag_alarm=64 << 20,
            restart_age_alarm=3600.0,
            failover=False,
            standby_url=Secret(URL),
        ),
    )
    assert project.log == LogConfig(max_group_bytes=65536, group_linger=0.0)
    assert project.staging == StagingConfig(Path("/var/lib/staging"), maintenance_cpu=0.25, grace=3600.0)
    assert project.destination.path == tmp_path.resolve() / "dwh.duckdb"
    assert project.scale.freshness == 300.0


def test_a_postgres_destination(tmp_path: Path) -> None:
    settings = (
        f'type = "postgres"\nurl = "{URL}"\nschema = "mart"\nlock_timeout = "5s"\nstatement_timeout = "0ms"'
    )
    destination = load(tmp_path, f"{SOURCE}[destination]\n{settings}").destination
    assert destination == DestinationConfig(
        type="postgres",
        path=tmp_path.resolve() / "warehouse.duckdb",
        url=Secret(URL),
        schema="mart",
        lock_timeout=5.0,
        statement_timeout=0.0,
    )
    assert destination.name == Secret(URL).redacted()
    assert destination.is_there is None


def test_a_copy_for_readers(tmp_path: Path) -> None:
    settings = 'publish = "public/shop_read.duckdb"\npublish_every = "1m"'
    destination = load(tmp_path, f"{SOURCE}[destination]\n{settings}").destination
    assert destination.publish == tmp_path.resolve() / "public" / "shop_read.duckdb"
    assert destination.publish_every == 60.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('type = "postgres"', "[destination] url: missing"),
        (f'url = "{URL}"', "[destination] url: unknown key"),
        (f'type = "postgres"\nurl = "{URL}"\npath = "x"', "[destination] path: unknown key"),
        (f'type = "postgres"\nurl = "{URL}"\npublish = "x"', "[destination] publish: unknown key"),
        ('publish_every = "5s"', "[destination] publish_every: needs publish"),
        ('publish = "./warehouse.duckdb"', "[destination] publish: is the destination's own file"),
    ],
)
def test_each_destination_has_its_own_settings(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"{SOURCE}[destination]\n{settings}")
    assert words in str(caught.value)
    assert URL not in str(caught.value)


def test_project_is_frozen_and_hashable_and_knows_its_folders(tmp_path: Path) -> None:
    project = load(tmp_path, SOURCE)
    assert hash(project) == hash(load(tmp_path, SOURCE))
    assert project.state == tmp_path.resolve() / ".headrace"
    assert project.models == tmp_path.resolve() / "models"
    with pytest.raises(dataclasses.FrozenInstanceError):
        project.root = Path("/")  # type: ignore[misc]


def test_a_relative_folder_gives_an_absolute_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "headrace.toml").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    assert load_project(Path()).root == tmp_path.resolve()


def test_several_sources_in_the_order_of_the_file(tmp_path: Path) -> None:
    project = load(tmp_path, f'source.zoo.url = "{URL}"\nsource.ant = {{ url = "{URL}" }}\n')
    assert [(s.name, s.slot) for s in project.sources] == [("zoo", "headrace_zoo"), ("ant", "headrace_ant")]


def test_a_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load(tmp_path, SOURCE + '[staging]\npath = "~/raw"').staging.path == Path("/home/me/raw")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + SOURCE.replace("\n", "\r\n").encode()).sources
    assert "headrace.toml:3: [source.shop] x:" in refusal(tmp_path, source_with("x=1").replace("\n", "\r\n"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("100ms", 0.1), ("1s", 1.0), ("90s", 90.0), ("5m", 300.0), ("2h", 7200.0)]
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    assert load(tmp_path, SOURCE + f'[scale]\nfreshness = "{text}"').scale.freshness == seconds


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ('"64KiB"', 65536),
        ('"65536B"', 65536),
        ('"16MiB"', 16777216),
        ('"1GiB"', 1 << 30),
        ("1_000_000", 1000000),
    ],
)
def test_sizes(tmp_path: Path, value: str, size: int) -> None:
    assert load(tmp_path, SOURCE + f"[log]\nmax_group_bytes = {value}").log.max_group_bytes == size


# ------------------------------------------------------------------------------------ what is refused


def test_the_message_as_promised(tmp_path: Path) -> None:
    text = '[source.shop]\nurl = "postgresql://h/db"\n\ntabels = ["public.*"]\n'
    expected = 'headrace.toml:4: [source.shop] tabels: unknown key; did you mean "tables"?'
    assert refusal(tmp_path, text) == expected


def test_all_mistakes_at_once_in_the_order_of_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOP_URL", raising=False)
    lines = refusal(
        tmp_path,
        """# a project
[scale]
freshness = 10
[source.shop]
type = "mysql"
url = "${env:SHOP_URL}"
tables = ["orders", 3]
slot = "My-Slot"
hartbeat = "10s"
[source.Other]
heartbeat = "10 parsecs"
[log]
max_group_bytes = "16MB"
group_linger = "1h"
[logs]
x = 1
[destination]
type = "snowflake"
path = ""
""",
    ).splitlines()
    assert lines == [
        'headrace.toml:3: [scale] freshness: must be a string such as "10s", not an integer',
        'headrace.toml:5: [source.shop] type: "mysql" is not supported; it must be "postgres"',
        "headrace.toml:6: [source.shop] url: ${env:SHOP_URL}: the environment variable SHOP_URL is not set",
        'headrace.toml:7: [source.shop] tables: "orders" is not a pattern schema.table, '
        'such as "public.orders" or "!public.tmp_*"',
        "headrace.toml:7: [source.shop] tables: a pattern must be a string, not an integer",
        'headrace.toml:8: [source.shop] slot: "My-Slot" cannot name a slot; '
        "allowed are 1 to 63 of a-z, 0-9 and _",
        'headrace.toml:9: [source.shop] hartbeat: unknown key; did you mean "heartbeat"?',
        "headrace.toml:10: [source.Other]: a source's name is 1 to 40 of a-z, 0-9 and _, "
        "and begins with a letter",
        'headrace.toml:10: [source.Other] url: missing; add for example url = "${env:SHOP_URL}"',
        'headrace.toml:11: [source.Other] heartbeat: "10 parsecs" is not a duration; '
        'write it like "250ms", "10s", "5m" or "2h"',
        'headrace.toml:13: [log] max_group_bytes: "16MB" is not a size; '
        'write it like "64KiB", "16MiB" or "1GiB", or as an integer of bytes',
        'headrace.toml:14: [log] group_linger: "1h" is out of range; allowed are "0ms" to "10s"',
        'headrace.toml:15: [logs]: unknown section; did you mean "log"?',
        'headrace.toml:18: [destination] type: "snowflake" is not supported; '
        'it must be "duckdb" or "postgres"',
        "headrace.toml:19: [destination] path: must be the path of a local file; addresses are not supported",
    ]


def test_the_list_of_mistakes_is_bounded(tmp_path: Path) -> None:
    lines = refusal(tmp_path, SOURCE + "".join(f"k{n} = 1\n" for n in range(MAX_MISTAKES + 7))).splitlines()
    assert len(lines) == MAX_MISTAKES + 1
    assert lines[-1] == "… and 7 more"


@pytest.mark.parametrize("text", ["", "# nothing\n", "[source]\n", "[log]\n", "source = 3\n", "[[source]]\n"])
def test_no_source_at_all(tmp_path: Path, text: str) -> None:
    message = "[source]: a project needs at least one source: add [source.shop] with url = "
    assert f"headrace.toml:1: {message}" in refusal(tmp_path, text)


def test_a_source_without_a_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, f'[source]\nurl = "{URL}"\n')
    assert message.startswith("headrace.toml:2: [source] url: a source is a table with a name of its own")


def test_unknown_key_without_a_likeness_lists_what_is_known(tmp_path: Path) -> None:
    message = refusal(tmp_path, SOURCE + "[scale]\nzzz = 1\n[monitor]\n")
    assert "headrace.toml:4: [scale] zzz: unknown key; known here: freshness" in message
    assert "headrace.toml:5: [monitor]: unknown section; known here: source, log," in message


def test_a_section_that_is_no_table(tmp_path: Path) -> None:
    message = refusal(tmp_path, f'log = "x"\nstaging = 2024-01-01\n{SOURCE}[[scale]]\n')
    assert "headrace.toml:1: [log]: must be a table, not a string" in message
    assert "headrace.toml:2: [staging]: must be a table, not a date or time" in message
    assert "headrace.toml:5: [scale]: must be a table, not an array" in message


@pytest.mark.parametrize(
    "name", ["Shop", "1shop", "_shop", "shop-1", "my shop", "", "é", "a" * 41, "shop.one", "shop\\n"]
)
def test_source_names(tmp_path: Path, name: str) -> None:
    assert "a source's name is 1 to 40" in refusal(tmp_path, f'[source."{name}"]\nurl = "{URL}"\n')


def test_the_longest_source_name_makes_a_valid_slot(tmp_path: Path) -> None:
    assert len(load(tmp_path, f'[source.{"a" * 40}]\nurl = "{URL}"\n').sources[0].slot) <= 63


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("type = 1", "type: must be a string, not an integer"),
        ("tables = []", "tables: includes no table; begin with what to include"),
        ('tables = ["!public.audit"]', "tables: includes no table"),
        ('tables = "public.*"', "tables: must be an array of patterns"),
        ('tables = ["."]', 'tables: "." is not a pattern'),
        ('tables = ["public."]', "is not a pattern"),
        ('tables = ["! public.a"]', "is not a pattern"),
        ('tables = [""]', "tables: this value is not a pattern"),
        ('tables = ["public.a", ["public.b"]]', "a pattern must be a string, not an array"),
        ('slot = ""', "slot: this value cannot name a slot"),
        (f'slot = "{"a" * 64}"', "cannot name a slot"),
        ('publication = ""', "publication: must be a name of 1 to 63 bytes"),
        (f'publication = "{"é" * 32}"', "publication: must be a name of 1 to 63 bytes"),
        ('publication = "a\\nb"', "without control characters"),
        ("failover = 1", "failover: must be true or false, not an integer"),
        ('lag_alarm = "1B"', "lag_alarm"),
        ('standby_url = "${env:NOPE_URL}"', "NOPE_URL is not set"),
        ("heartbeat = true", 'heartbeat: must be a string such as "10s", not a boolean'),
        ("heartbeat = 1.5", "not a float"),
        ('origin = "some"', 'origin: "some" is not supported; it must be "any" or "none"'),
        ("spool_max = 1000", 'this number of bytes is out of range; allowed are "1MiB" to "65536GiB"'),
        ('heartbeat = ""', "heartbeat: this value is not a duration"),
        ('heartbeat = "10"', "is not a duration"),
        ('heartbeat = "-1s"', "is not a duration"),
        ('heartbeat = "1.5s"', "is not a duration"),
        ('heartbeat = "10 s"', "is not a duration"),
        ('heartbeat = "10S"', "is not a duration"),
        ('heartbeat = "1٣s"', "is not a duration"),
        ('heartbeat = "0s"', '"0s" is out of range; allowed are "100ms" to "1h"'),
        ('heartbeat = "999999999999h"', "out of range"),
    ],
)
def test_bad_values_of_a_source(tmp_path: Path, setting: str, message: str) -> None:
    found = refusal(tmp_path, source_with(setting))
    assert found.startswith("headrace.toml:3: [source.shop] ")
    assert message in found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"16"', '"16" is not a size'),
        ('"16mib"', "is not a size"),
        ('"1.5MiB"', "is not a size"),
        ("true", 'must be a string such as "16MiB", or an integer of bytes, not a boolean'),
        ("-1", 'this number of bytes is out of range; allowed are "64KiB" to "1GiB"'),
        ('"2GiB"', "out of range"),
        ("9" * 4000, "out of range"),
    ],
)
def test_bad_sizes(tmp_path: Path, value: str, message: str) -> None:
    assert message in refusal(tmp_path, SOURCE + f"[log]\nmax_group_bytes = {value}\n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "must be a string, not an integer"),
        ('"s3://bucket/prefix"', "addresses are not supported"),
        (
            '"${env:HOME}/x"',
            "${…} is filled in only in url, standby_url and hash_salt of a source, in anchor_url and "
            "anchor_key of [log], and in url and secret of a channel of [alerts]",
        ),
        ('"a\\u0000b"', "must be the path of a local folder"),
        ('"~nosuchuser_/x"', "no such home folder"),
    ],
)
def test_bad_paths(tmp_path: Path, value: str, message: str) -> None:
    assert message in refusal(tmp_path, SOURCE + f"[staging]\npath = {value}\n")


def test_where_anchors_go_is_filled_in_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHOR_URL", "https://anchors.example/hunter2")
    monkeypatch.setenv("ANCHOR_KEY", "hunter2 hunter2 hunter2")
    log = '[log]\nanchor_every = "1h"\nanchor_url = "${env:ANCHOR_URL}"\nanchor_key = "${env:ANCHOR_KEY}"\n'
    (tmp_path / "headrace.toml").write_text(SOURCE + log)
    config = load_project(tmp_path).log
    assert config.anchor_url == Secret("https://anchors.example/hunter2")
    assert config.anchor_key == Secret("hunter2 hunter2 hunter2")
    assert "hunter2" not in repr(config)
    found = refusal(tmp_path, SOURCE + '[log]\nanchor_key = "hunter2"\n')
    assert "anchor_key: must have at least 16 characters; a shorter secret can be guessed" in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"0.1"', "must be a number from 0 to 1, not a string"),
        ("true", "must be a number from 0 to 1, not a boolean"),
        ("1.5", "1.5 is out of range; allowed are 0 to 1"),
        ("nan", "out of range"),
    ],
)
def test_bad_shares(tmp_path: Path, value: str, message: str) -> None:
    assert message in refusal(tmp_path, SOURCE + f"[staging]\nmaintenance_cpu = {value}\n")


# ------------------------------------------------------------------------------- the file itself


def test_no_file(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"There is no headrace\.toml in /") as caught:
            load_project(folder)
        assert "headrace init URL" in caught.value.remedy


def test_a_file_in_place_of_the_folder_and_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_project(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"There is no headrace\.toml"):
        load_project(tmp_path / "file")


def test_not_utf8_says_where(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"\xef\xbb\xbf# a\n# \xff\n").startswith("headrace.toml:2: not UTF-8")


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    assert "is larger than" in refusal(tmp_path, b"#" * (MAX_FILE_BYTES + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "headrace.toml:2: not valid TOML: "),
        ("[log]\nx = 1\n\n[log]\n", "headrace.toml:4: not valid TOML: Cannot declare this table twice"),
        ('[log]\nx = "1"\nx = 2\n', "headrace.toml:3: not valid TOML: Cannot overwrite a value"),
        ("source = {a = 1, a = 2}", "headrace.toml:1: not valid TOML: Duplicate inline table key"),
        ("url = postgres://u:hunter2@h/db", "headrace.toml:1: not valid TOML: "),
        ('url = "postgres://u:hunter2@h/db\nx = 1', "headrace.toml:1: not valid TOML: "),
        ("[log\n", "headrace.toml:1: not valid TOML: "),
        ("a = [1,\n2\n\n", "not valid TOML: "),
        ("a = " + "[" * 5000, "headrace.toml:1: not valid TOML: nested too deeply"),
        ("a = " + "9" * 5000, "headrace.toml:1: not valid TOML: "),
        ('["postgres://u:hunter2@h"]\n["postgres://u:hunter2@h"]\n', "headrace.toml:2: not valid TOML: "),
        ('[a."it\'s hunter2"]\n[a."it\'s hunter2"]\n', "headrace.toml:2: not valid TOML: "),
        ('x = {"hunter2" = 1, "hunter2" = 1}', "headrace.toml:1: not valid TOML: "),
        ('x = {}\n["x"."hunter2"]\n', "headrace.toml:2: not valid TOML: "),
    ],
)
def test_syntax_errors_have_a_line_and_quote_no_key(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message) or message in refusal(tmp_path, text)


# ----------------------------------------------------------------------------------- line numbers


LINES = [
    "# [source.none]",
    'top = """',
    "[source.fake]",
    '"quoted" = 1 \\""\\" """""',
    "",
    "\"quoted key\" = 'it'",
    '[source."shop"]  # the [header]',
    'url = "a # no comment"',
    "'sl\\ot' = '''",
    "x = 1",
    "[x]",
    "'''",
    "tables = [",
    '  "public.*", # ] no end',
    '  "a]b.c",',
    "  { inner = 1 },",
    "]",
    'a . "b.c" . d = 1',
    'inline = { p = 1, q.r = "}", "s" = { t = 2 } }',
    "[ source . zoo . deep ]",
    "[source.zoo]",
    "[[many]]",
    "x = 1",
    "[[many]]",
    "y = 1",
]


def test_lines_of_everything_toml_can_write() -> None:
    text = "\n".join(LINES)
    assert tomllib.loads(text)
    assert _lines(text) == {
        ("top",): 2,
        ("quoted key",): 6,
        ("source",): 7,
        ("source", "shop"): 7,
        ("source", "shop", "url"): 8,
        ("source", "shop", "sl\\ot"): 9,
        ("source", "shop", "tables"): 13,
        ("source", "shop", "a"): 18,
        ("source", "shop", "a", "b.c"): 18,
        ("source", "shop", "a", "b.c", "d"): 18,
        ("source", "shop", "inline"): 19,
        ("source", "shop", "inline", "p"): 19,
        ("source", "shop", "inline", "q"): 19,
        ("source", "shop", "inline", "q", "r"): 19,
        ("source", "shop", "inline", "s"): 19,
        ("source", "shop", "inline", "s", "t"): 19,
        ("source", "zoo"): 21,
        ("source", "zoo", "deep"): 20,
        ("many",): 24,
        ("many", "x"): 23,
        ("many", "y"): 25,
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('source.shop.url = "postgres:///a"\nsource.shop.bad = 1', 2),
        ('source.shop = { url = "postgres:///a", bad = 1 }', 1),
        ('[source]\n\nshop.url = "postgres:///a"\nshop."bad" = 1', 4),
        ('["source".\'shop\']\nurl = """\npostgres:///a"""\n\n"b\\u0061d" = """\n\n"""', 5),
        ('[source.shop.bad]\n[source.shop]\nurl = "postgres:///a"', 1),
        ("[source.shop]\nurl = '''postgres:///a'''\nbad.x = 1", 3),
    ],
)
def test_the_line_of_a_key_however_it_is_written(tmp_path: Path, text: str, line: int) -> None:
    assert refusal(tmp_path, text).startswith(f"headrace.toml:{line}: [source.shop] bad: unknown key")


def test_a_very_deep_dotted_key_is_just_unknown(tmp_path: Path) -> None:
    assert "[a]: unknown section" in refusal(tmp_path, ".".join("a" * 1_000) + " = 1\n" + SOURCE)


# ----------------------------------------------------------------------------- ${env:…}, ${file:…}


def test_references_are_filled_in_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_USER", "app")
    (tmp_path / "secret").write_text("p${env:NOT_READ}w\n")
    project = load(tmp_path, '[source.shop]\nurl = "postgresql://${env:DB_USER}:${file:secret}@h/db"\n')
    # What a reference stands for is not searched for references again; here it is not even a valid host.
    assert project.sources[0].url.reveal() == "postgresql://app:p${env:NOT_READ}w@h/db"


def test_secret_file_absolute_and_with_windows_line_end(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere"
    secret.write_bytes(URL.encode() + b"\r\n")
    (tmp_path / "p").mkdir()
    project = load(tmp_path / "p", f'[source.shop]\nurl = "${{file:{secret}}}"')
    assert project.sources[0].url == Secret(URL)


def test_empty_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_URL", "")
    message = refusal(tmp_path, '[source.shop]\nurl = "${env:SHOP_URL}"')
    assert message.endswith("url: ${env:SHOP_URL}: the environment variable SHOP_URL is empty")


def test_two_missing_variables_are_two_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HR_A", raising=False)
    monkeypatch.delenv("HR_B", raising=False)
    message = refusal(tmp_path, '[source.shop]\nurl = "postgres://${env:HR_A}:${env:HR_B}@h/db"')
    assert [line.split(": ")[2] for line in message.splitlines()] == ["${env:HR_A}", "${env:HR_B}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"hunter2\xff", "is not UTF-8 text"),
        (b"hunter2\0", "must begin with postgres://"),
        (b"x" * (MAX_SECRET_FILE_BYTES + 1), "is larger than"),
    ],
)
def test_secret_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "pw").write_bytes(content)
    assert message in refusal(tmp_path, '[source.shop]\nurl = "${file:pw}"')


def test_a_secret_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == "pw":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(tmp_path, '[source.shop]\nurl = "${file:pw}"')
    assert message.endswith(f"${{file:pw}}: {tmp_path.resolve() / 'pw'} cannot be read: Permission denied")


def test_a_folder_in_place_of_a_secret_file(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in refusal(tmp_path, '[source.shop]\nurl = "${file:.}"')


@pytest.mark.parametrize(
    "reference",
    ["${vault:x}", "${hunter2}", "${}", "${env:}", "${env:a b}", "${file:}", "${ENV:X}", "${file: }"],
)
def test_unknown_kinds_of_reference(tmp_path: Path, reference: str) -> None:
    message = refusal(tmp_path, f'[source.shop]\nurl = "postgres://u:{reference}@h/db"')
    assert "url: unknown ${…}; there are ${env:NAME} and ${file:PATH}" in message


@pytest.mark.parametrize("url", ["${env:SHOP_URL", "postgres://u:${hunter2@h/db", "${env:${env:X}}"])
def test_unclosed_references(tmp_path: Path, url: str) -> None:
    assert "a ${ without its }" in refusal(tmp_path, f'[source.shop]\nurl = "{url}"')


# ------------------------------------------------------------------------------------------- urls


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("postgres://u:hunter2@h/db", "postgresql://u@h/db"),
        ("postgresql://u:hunter2@h:5432/db?sslmode=require", "postgresql://u@h:5432/db"),
        ("postgresql://u:hunter%32@h/db", "postgresql://u@h/db"),
        ("postgresql://u:hunter%322@h/db", "postgresql://u@h/db"),
        ("postgresql://u:hunter2:#?[]!$&'()*+,;=@h/db", "postgresql://u@h/db"),
        ("postgresql://:hunter2@h/db", "postgresql://h/db"),
        ("postgresql://u@h", "postgresql://u@h"),
        ("postgresql://", "postgresql://"),
        ("postgresql:///db?host=/tmp/sock&port=5433", "postgresql://:5433/db?host=/tmp/sock"),
        ("postgresql://%2Ftmp%2Fsock/db", "postgresql:///db?host=/tmp/sock"),
        ("postgresql://h/db?password=hunter2&user=u", "postgresql://u@h/db"),
        ("postgresql://h/db?pass%77ord=hunter2", "postgresql://h/db"),
        ("postgresql://h/db?sslpassword=hunter2&application_name=hunter2", "postgresql://h/db"),
        ("postgresql://u:hunter2@[::1]:5432/db", "postgresql://u@[::1]:5432/db"),
        ("postgresql://u:hunter2@h1:1,h2:2/db", "postgresql://u@h1:1,h2:2/db"),
        ("postgresql://u%3Ahunter2@h/db", "postgresql://***@h/db"),
        ("postgresql://u%3Ahunter2%40h/db", "postgresql://***/db"),
        ("postgresql://h?dbname=postgres://u:hunter2", "postgresql://h/***"),
        ("host=h user=u password=hunter2 dbname=d port=5432", "postgresql://u@h:5432/d"),
        ("host = h password = 'hunter2 \\' \\\\ x' user=u", "postgresql://u@h"),
        ("host=/tmp/sock user=u password=hunter\\ 2 dbname=d", "postgresql://u@/d?host=/tmp/sock"),
        ("passfile='' host=h\npassword=hunter2", "postgresql://h"),
        ("hostaddr=10.0.0.1 password=''", "postgresql://10.0.0.1"),
    ],
)
def test_urls_that_are_taken_and_what_is_shown_of_them(tmp_path: Path, url: str, redacted: str) -> None:
    (tmp_path / "url").write_text(url)
    project = load(tmp_path, '[source.shop]\nurl = "${file:url}"')
    secret = project.sources[0].url
    assert secret.reveal() == url
    assert secret.redacted() == redacted
    assert "hunter" not in repr(project) + str(project) + f"{secret} {secret!r}" + secret.redacted()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:hunter2@h/db", "must begin with postgres:// or postgresql://"),
        ("mysql://u:hunter2@h/db?a=b", "must begin with"),
        ("jdbc:postgresql://u:hunter2@h/db?a=b", "must begin with"),
        ("Postgres://u:hunter2@h/db", "must begin with"),
        ("postgresql:/u:hunter2@h/db", "must begin with"),
        (" postgresql://u:hunter2@h/db", "must begin with"),
        ("u:hunter2@h/db", "must begin with"),
        ("hunter2", "must begin with"),
        ("", "must begin with"),
        ("postgresql://u:hunter2@x@h/db", "write @ as %40"),
        ("postgresql://u:12/hunter2@h/db", "write @ as %40, / as %2F"),
        ("postgresql://u:hunter2/db", "a port of 1 to 65535"),
        ("postgresql://u:hunter2@h:99999/db", "a port of 1 to 65535"),
        ("postgresql://u:x@h:hunter2/db", "a port of 1 to 65535"),
        ("postgresql://u:x@h:" + "9" * 5000, "a port of 1 to 65535"),
        ("postgresql://u:x@[hunter2]/db", "a port of 1 to 65535"),
        ("postgresql://u:hunter2%@h/db", "write % itself as %25"),
        ("postgresql://u:hunter2%zz@h/db", "write % itself as %25"),
        ("postgresql://u:hunter2%00@h/db", "a % without two hex digits"),
        ("postgresql://u:hunter2 x@h/db", "write a blank as %20"),
        ("postgresql://u:hunter2\n@h/db", "has a blank or control character"),
        ("postgresql://u:x@h/db?hunter2", "key=value pairs joined by &"),
        ("postgresql://u:x@h/db?a=hunter2=x", "key=value pairs joined by &"),
        ("host=h password=hunter2 x", "is not key=value pairs"),
        ("host=h password='hunter2", "is not key=value pairs"),
        ("host=h password='hunter2'x", "is not key=value pairs"),
        ("host=h password=hunter2\0", "is not key=value pairs"),
        ("hunter2 = ", "is not key=value pairs"),
    ],
)
def test_urls_that_are_refused_without_a_word_of_them(tmp_path: Path, url: str, message: str) -> None:
    found = refusal(tmp_path, f"[source.shop]\nurl = {json.dumps(url)}\n")
    assert found.startswith("headrace.toml:2: [source.shop] url: ")
    assert message in found
    assert Secret(url).redacted() == "***"


def test_url_of_a_wrong_type_or_missing(tmp_path: Path) -> None:
    assert "url: must be a string, not an array" in refusal(tmp_path, '[source.shop]\nurl = ["hunter2"]')
    assert "headrace.toml:2: [source.shop] url: missing;" in refusal(tmp_path, "\n[source.shop]\n\n")


@pytest.mark.parametrize(
    "text",
    [
        source_with('password = "hunter2"'),
        source_with(f'"{URL}" = 1'),
        source_with('"host=h password=hunter2" = 1'),
        source_with(f'type = "{URL}"'),
        source_with(f'slot = "{URL}"'),
        source_with(f'publication = "{URL * 2}"'),
        source_with(f'tables = ["{URL}"]'),
        source_with('tables = ["password=hunter2"]'),
        source_with(f'heartbeat = "{URL}"'),
        SOURCE + f'[destination]\npath = "{URL}"',
        SOURCE + f'[destination]\ntype = "{URL}"',
        SOURCE + f'[log]\nmax_group_bytes = "{URL}"',
        f'[source."{URL}"]\n',
        f'[source]\n"{URL}" = 1\n',
        f'"{URL}" = 1\n{SOURCE}',
        f'["{URL}"]\n{SOURCE}',
        f'[source.shop]\nurl = "${{env:{URL}}}"',
    ],
)
def test_a_url_in_the_wrong_place_is_not_echoed(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text)


def test_the_secret_stays_closed(tmp_path: Path) -> None:
    project = load(tmp_path, SOURCE)
    secret = project.sources[0].url
    assert repr(secret) == str(secret) == f"{secret}" == "***"
    assert "hunter2" not in repr(dataclasses.asdict(project))
    with pytest.raises(TypeError):
        json.dumps(secret)
    assert secret == Secret(URL)
    assert secret != Secret("x")
    assert secret != URL
    assert copy.deepcopy(secret) == secret == pickle.loads(pickle.dumps(secret))
    assert len({secret, Secret(URL)}) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            "postgresql://u:{}@h/db",
            "postgresql://u:{}@h:5432/db?x=y",
            "postgres://u{}:x@h/db",
            "postgresql://u@h/db?password={}",
            "host=h password={} user=u",
            "host=h password='{}' user=u",
        ],
    ),
)
def test_no_password_is_ever_shown(password: str, form: str) -> None:
    planted = f"Zq7{password}9Xk"
    shown = Secret(form.format(planted)).redacted()
    if form.startswith("postgres://u{}"):
        assert shown == "***" or "@h/db" in shown
    else:
        assert "Zq7" not in shown
        assert "9Xk" not in shown


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_redacting_never_fails(text: str) -> None:
    assert Secret(text).redacted()
    assert Secret("postgresql://" + text).redacted()


# ----------------------------------------------------------------------------------- select_tables


def tables(*names: str) -> list[TableId]:
    return [TableId(*name.split(".", 1)) for name in names]


AVAILABLE = tables("public.orders", "public.audit", "public.Orders", "sales.orders", "public.order_items")


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["public.*"], ["public.Orders", "public.audit", "public.order_items", "public.orders"]),
        (["public.*", "!public.audit"], ["public.Orders", "public.order_items", "public.orders"]),
        (["!public.audit", "public.a*"], ["public.audit"]),
        (["*.*", "!public.*", "public.order?"], ["public.orders", "sales.orders"]),
        (["*.orders"], ["public.orders", "sales.orders"]),
        (["s?les.o*s"], ["sales.orders"]),
        (["public.order"], []),
        (["public.ORDERS"], []),
        (["!public.audit"], []),
        (["orders", "", "!", ".", "public"], []),
        (["public.[o]rders"], []),
        ([], []),
    ],
)
def test_select_tables(patterns: list[str], chosen: list[str]) -> None:
    assert [str(table) for table in select_tables(patterns, AVAILABLE)] == chosen


def test_select_tables_takes_names_literally_and_each_once() -> None:
    odd = [TableId("public", "a[b]"), TableId("public", "a.b"), TableId("public", "new\nline")]
    assert select_tables(["public.a[b]"], odd) == (odd[0],)
    assert select_tables(["public.a.b"], odd) == (odd[1],)
    assert select_tables(("public.*",), iter([*odd, *odd])) == tuple(sorted(odd))


def test_select_tables_is_fast_on_hostile_patterns() -> None:
    assert select_tables(["public." + "*a" * 30 + "b"], [TableId("public", "a" * 63)]) == ()


@given(st.lists(st.text(max_size=8), max_size=5), st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_select_tables_raises_nothing(patterns: list[str], names: list[tuple[str, str]]) -> None:
    available = [TableId(*name) for name in names]
    assert set(select_tables(patterns, available)) <= set(available)


# ------------------------------------------------------------------------------------------ import


def test_importing_settings_pulls_in_no_heavy_library() -> None:
    heavy = ["pydantic", "pyarrow", "duckdb", "psycopg", "sqlglot", "apsw", "deltalake", "numpy", "asyncio"]
    code = f"import sys, headrace.config; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scaling(tmp_path: Path) -> None:
    scale = load(
        tmp_path,
        SOURCE
        + """
[scale]
freshness = "1m"
policy = "schedule"
min_workers = 1
max_workers = 6
max_worker_hours_per_day = 40
worker_memory = "512MiB"
price = 0.05
listen = ":9187"
[scale.schedule]
"mon-fri 08-18" = 4
"sun-mon 17-19" = 6
"daily 0-1" = 2
""",
    ).scale
    hours = dict(enumerate(scale.schedule))
    assert (hours[8], hours[7], hours[4 * 24 + 16], hours[5 * 24 + 9]) == (4, 1, 4, 1)
    assert (hours[17], hours[18], hours[19], hours[6 * 24 + 18], hours[6 * 24]) == (6, 6, 1, 6, 2)
    assert (scale.cap, scale.max_worker_hours_per_day, scale.worker_memory) == (6, 40.0, 512 << 20)
    assert (scale.price, scale.listen) == (0.05, ("127.0.0.1", 9187))
    assert load(tmp_path, SOURCE).scale.cap == len(os.sched_getaffinity(0))


def test_a_container_has_the_cores_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    quota = tmp_path / "cpu.max"
    assert cores(quota) == 64
    for text, count in (
        ("max 100000\n", 64),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9900000 100000\n", 64),
    ):
        quota.write_text(text)
        assert cores(quota) == count


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (
            'policy = "cpu"',
            'policy: "cpu" is not supported; it must be "slo_band" or "backlog" or "static" or ',
        ),
        ("min_workers = 3\nmax_workers = 2", "min_workers: 3 is more than max_workers, which is 2"),
        ("max_workers = 5000", "max_workers: 5000 is out of range; allowed are 0 to 1024"),
        ("price = -1", "price: must be 0 or more"),
        (
            'max_worker_hours_per_day = "8h"',
            "max_worker_hours_per_day: must be a number (hours), not a string",
        ),
        ('policy = "schedule"', 'schedule: missing; add it, such as { "mon-fri 08-18" = 4 }'),
        ('schedule = { "mon 8-9" = 1 }', 'schedule: is for policy = "schedule" only'),
        (
            'policy = "schedule"\nschedule = { "monday 8-9" = 1 }',
            'schedule: "monday 8-9" is no hours of the week; write them (UTC) like "mon-fri 08-18"',
        ),
        ('policy = "schedule"\nschedule = { "mon 9-9" = 1 }', '"mon 9-9" is no hours of the week'),
        ('threshold = "30s"', 'threshold: is for policy = "backlog" only'),
        ('listen = "here"', 'listen: "here" is no address to listen on; write host and port'),
        ('listen = "localhost:99999"', "listen: this value is no address to listen on"),
    ],
)
def test_scaling_that_cannot_be(tmp_path: Path, text: str, mistake: str) -> None:
    assert mistake in refusal(tmp_path, SOURCE + f"[scale]\n{text}")
