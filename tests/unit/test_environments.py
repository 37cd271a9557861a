"""`headrace.NAME.toml` over `headrace.toml`: what is merged, where a mistake stands, whose state it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.cli import main
from headrace.config import ENVIRONMENT, load_project
from headrace.errors import ConfigError, UserError
from headrace.reading import find_logs

BASE = """\
[source.shop]
url = "${env:NO_SUCH_URL}"
tables = ["public.*"]
heartbeat = "5s"

[destination]
path = "warehouse.duckdb"
"""
DEV = """\
[source.shop]
url = "postgresql://dev@localhost/shop"
slot = "headrace_shop_dev"

[destination]
path = "dev.duckdb"

[scale]
freshness = "1m"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    (tmp_path / "headrace.toml").write_text(BASE)
    (tmp_path / "headrace.dev.toml").write_text(DEV)
    return tmp_path


def test_tables_are_merged_key_by_key_and_all_else_is_replaced(folder: Path) -> None:
    project = load_project(folder, env="dev")
    (source,) = project.sources
    assert source.url.reveal() == "postgresql://dev@localhost/shop"
    assert (source.slot, source.heartbeat, source.tables) == ("headrace_shop_dev", 5.0, ("public.*",))
    assert project.destination.path == folder / "dev.duckdb"
    assert project.scale.freshness == 60
    (folder / "headrace.dev.toml").write_text(
        DEV + '[source.more]\nurl = "postgresql://dev@localhost/more"\n'
    )
    assert [source.name for source in load_project(folder, env="dev").sources] == ["shop", "more"]


def test_an_environment_has_a_state_of_its_own(folder: Path) -> None:
    dev, plain = load_project(folder, env="dev"), load_project(folder, secrets=False)
    assert plain.state == folder / ".headrace"
    assert dev.state == folder / ".headrace" / "env" / "dev"
    assert dev.staging.path == dev.state / "staging"
    assert dev.log_path("shop") == dev.state / "log" / "shop.db"
    assert dev.models == plain.models


@pytest.mark.parametrize(
    ("base", "dev", "lines"),
    [
        (
            "[scale]\nfreshness = 1\n",
            "\n[log]\nkeeep = 1\n",
            ["headrace.dev.toml:12: [log] keeep"],
        ),
        ("", "\n[scael]\n", ["headrace.dev.toml:11: [scael]"]),
        ("", "[scale", ["headrace.dev.toml:10: not valid TOML"]),
        ("[log]\nkeep = 1\n", '\n[log]\nkeep = "x"\n', ["headrace.dev.toml:12: [log] keep"]),
        ("[log]\nkeep = 1\n", '\n[log]\nhold_max = "1GiB"\n', ["headrace.toml:9: [log] keep"]),
        ("", "\n[[log]]\n", ["headrace.dev.toml:11: [log]: must be a table"]),
    ],
)
def test_a_mistake_names_the_file_it_stands_in(folder: Path, base: str, dev: str, lines: list[str]) -> None:
    (folder / "headrace.toml").write_text(BASE + base)
    (folder / "headrace.dev.toml").write_text(DEV + dev)
    with pytest.raises(ConfigError) as caught:
        load_project(folder, env="dev")
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True)), found


def test_an_environment_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no headrace\.prod\.toml in ") as caught:
        load_project(folder, env="prod")
    assert caught.value.remedy == "Environments here: dev."
    for name in ("../x", "Dev", "a.b", "x" * 41):
        with pytest.raises(ConfigError, match="environment's name"):
            load_project(folder, env=name)


def test_the_command_line_and_the_environment_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["models", "ls", "--project", str(folder)]
    for arguments in (["--env", "prod", *where], [*where, "--env=prod"], [*where, "--env", "prod"]):
        assert main(arguments) == 2
        assert "no headrace.prod.toml" in capsys.readouterr().err
    assert ENVIRONMENT not in os.environ
    for arguments in ([*where, "--env"], [*where, "--env="], ["--env", "--", *where]):
        assert main(arguments) == 2
        assert "--env needs a name." in capsys.readouterr().err
    assert main([*where, "--env", "dev"]) == main(where) == 0
    monkeypatch.setenv(ENVIRONMENT, "prod")
    assert main(where) == 2
    assert main([*where, "--env", "dev"]) == 0
    assert os.environ[ENVIRONMENT] == "prod"


def test_logs_are_those_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (".headrace", ".headrace/env/dev"):
        (folder / state / "log").mkdir(parents=True)
    (folder / ".headrace" / "log" / "shop.db").touch()
    assert find_logs(folder) == [folder / ".headrace" / "log" / "shop.db"]
    monkeypatch.setenv(ENVIRONMENT, "dev")
    with pytest.raises(UserError, match="no log"):
        find_logs(folder)
