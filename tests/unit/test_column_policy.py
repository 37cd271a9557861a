"""The policy of a source's columns and rows: what it makes of a batch, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.config import Secret, SourceConfig, load_project, source_config
from headrace.errors import ConfigError, UserError
from headrace.payload import BEFORE, UNCHANGED
from headrace.sources.postgres.columns import HASHED, Policy

URL = "postgresql://app@db/shop"
SALT = "it's a salt of 20 ch"
USERS = TableId("public", "users")
SHAPE = TableSchema(
    USERS,
    (Column("id", "bigint"), Column("email", "text"), Column("ssn", "text"), Column("n", "int")),
    ("id",),
)


def policy(**values: object) -> Policy:
    return Policy(source_config("shop", Secret(URL), hash_salt=Secret(SALT), **values))


def digest(text: str) -> str:
    return hashlib.sha256((SALT + text).encode()).hexdigest()


def test_excluded_columns_go_and_hashed_ones_are_hashed_wherever_they_stand() -> None:
    before = [[("id", "1"), ("email", "old é"), ("ssn", "s1"), ("n", None)], None, [("email", None)]]
    batch = pa.RecordBatch.from_pydict(
        {
            "_op": pa.array(["u", "c", "u"]),
            "id": pa.array(["1", "2", "3"]),
            "email": pa.array(["new é", None, ""]),
            "ssn": pa.array(["s1", "s2", None]),
            "_unchanged": pa.array([["ssn"], None, ["email", "ssn"]], UNCHANGED),
            "_before": pa.array(before, BEFORE),
        }
    )
    rules = policy(exclude=("public.*.ssn",), hash=("public.users.email",))
    for rows in (batch, pa.RecordBatch.from_struct_array(batch.to_struct_array())):
        made = rules.apply(USERS, rows.slice(0, 3))
        assert made.schema.names == ["_op", "id", "email", "_unchanged", "_before"]
        assert made.column("id").to_pylist() == ["1", "2", "3"]
        assert made.column("email").to_pylist() == [digest("new é"), None, digest("")]
        assert made.column("_unchanged").to_pylist() == [None, None, ["email"]]
        assert made.column("_before").to_pylist() == [
            [("id", "1"), ("email", digest("old é")), ("n", None)],
            None,
            [("email", None)],
        ]
        assert (made.column("_before").type, made.column("_unchanged").type) == (BEFORE, UNCHANGED)
        part = rules.apply(USERS, rows.slice(1, 2))
        assert part.to_pylist() == made.slice(1, 2).to_pylist()
    assert rules.apply(TableId("public", "other"), batch.select(["_op", "email"])).to_pydict() == {
        "_op": ["u", "c", "u"],
        "email": ["new é", None, ""],
    }


def test_shapes_say_what_is_hashed_and_with_the_same_salt_or_another() -> None:
    made = policy(exclude=("*.*.ssn",), hash=("public.users.i?",)).shape(SHAPE)
    assert [(c.name, c.type) for c in made.columns] == [("id", "text"), ("email", "text"), ("n", "int")]
    base = made.columns[0].base
    assert base.startswith(HASHED)
    assert SALT not in base
    again = Policy(source_config("shop", Secret(URL), hash=("*.*.id",), hash_salt=Secret(SALT)))
    other = Policy(source_config("shop", Secret(URL), hash=("*.*.id",), hash_salt=Secret(SALT + "2")))
    assert again.shape(SHAPE).columns[0].base == base != other.shape(SHAPE).columns[0].base
    assert policy().shape(SHAPE) == SHAPE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exclude": ("public.users.id",)}, "leaves out id, which is of the key of public.users"),
        ({"exclude": ("*.*.ssn",), "hash": ("public.users.*",)}, "ssn is both excluded and hashed"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(values: dict[str, object], message: str) -> None:
    assert any(message in mistake for mistake in policy(**values).mistakes([SHAPE]))
    with pytest.raises(UserError, match=message):
        policy(**values).shape(SHAPE)


def test_exact_names_that_are_none_are_mistakes_and_patterns_are_not() -> None:
    rules = policy(
        exclude=("public.users.snn", "public.*.nothing", "public.user.n"),
        hash=("later_*.users.email",),
        where=(("public.userz", "true"), ("sales.*", "true"), ("public.users", "n > '1'")),
    )
    assert list(rules.mistakes([SHAPE])) == [
        'exclude: there is no column public.users.snn; did you mean "public.users.ssn"?',
        'exclude: there is no table of public.user.n among those captured; did you mean "public.users.n"?',
        'where: there is no table public.userz among those captured; did you mean "public.users"?',
    ]
    assert list(policy(exclude=("*.*.*",)).mistakes([SHAPE]))
    keyless = TableSchema(USERS, SHAPE.columns, ())
    assert list(policy(exclude=("*.*.*",)).mistakes([keyless])) == [
        "exclude leaves no column of public.users"
    ]


def test_the_last_condition_that_fits_a_table_holds() -> None:
    rules = policy(where=(("public.*", "a"), ("public.users", "b"), ("sales.*", "c")))
    assert [rules.where(t) for t in (USERS, TableId("public", "x"), TableId("o", "x"))] == ["b", "a", ""]


# -- headrace.toml -------------------------------------------------------------------------------------


def read(folder: Path, text: str) -> SourceConfig:
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{URL}"\n{text}')
    return load_project(folder).sources[0]


def test_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HASH_SALT", SALT)
    config = read(
        tmp_path,
        'exclude = ["public.users.ssn", "public.*.password"]\nhash = ["public.users.email"]\n'
        'hash_salt = "${env:HEADRACE_HASH_SALT}"\n[source.shop.where]\n'
        '"public.orders" = "created_at >= \'2024-01-01\'"\n',
    )
    assert config.exclude == ("public.users.ssn", "public.*.password")
    assert config.hash == ("public.users.email",)
    assert config.hash_salt == Secret(SALT)
    assert config.where == (("public.orders", "created_at >= '2024-01-01'"),)
    assert SALT not in repr(config)


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        'exclude = ["users.ssn", 1]\nhash = ["public.users.email"]\nexlude = []\n'
        '[source.shop.where]\n"orders" = "true"\n"public.a" = 5\n"!public.b" = " "\n'
    )
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).splitlines() == [
        "headrace.toml:1: [source.shop] hash_salt: missing; hash needs it: hash_salt = "
        '"${env:HEADRACE_HASH_SALT}"',
        'headrace.toml:3: [source.shop] exclude: "users.ssn" is not a pattern schema.table.column, such as '
        '"public.users.email"',
        "headrace.toml:3: [source.shop] exclude: a pattern must be a string, not an integer",
        'headrace.toml:5: [source.shop] exlude: unknown key; did you mean "exclude"?',
        'headrace.toml:7: [source.shop.where] orders: "orders" is not a pattern schema.table, such as '
        '"public.orders" or "!public.tmp_*"',
        "headrace.toml:8: [source.shop.where] public.a: must be a string with a condition in SQL, not an "
        "integer",
        "headrace.toml:9: [source.shop.where] !public.b: a pattern of where includes; it cannot begin with !",
        "headrace.toml:9: [source.shop.where] !public.b: must be a condition in SQL, such as "
        "\"created_at >= '2024-01-01'\"",
    ]
    with pytest.raises(ConfigError, match="at least 16 characters") as caught:
        read(tmp_path, 'hash_salt = "guessable"')
    assert "guessable" not in str(caught.value)
