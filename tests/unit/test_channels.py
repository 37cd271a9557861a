"""`[alerts]` in headrace.toml and what a model's header says of alerts: read strictly, no secret quoted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.channels import AlertsConfig, AlertSettings, Channel
from headrace.config import load_project
from headrace.errors import ConfigError, ModelError
from headrace.mart import Mart
from headrace.secret import Secret
from headrace.transform.mart import read_file
from headrace.transform.python.text import read_python
from headrace.transform.sql import read_model

SOURCE = '[source.shop]\nurl = "postgresql://localhost/shop"\n'


def alerts(folder: Path, text: str) -> AlertsConfig:
    (folder / "headrace.toml").write_text(SOURCE + text)
    return load_project(folder).alerts


def test_channels_are_read_with_their_secrets_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", "https://hooks.example/hunter2")
    read = alerts(
        tmp_path,
        '[alerts]\ngroup_wait = "1m"\ndisk_low = "1GiB"\n'
        '[alerts.ops]\nurl = "${env:HOOK}"\nsecret = "sixteen letters !"\n'
        '[alerts.mail]\nurl = "smtps://me:hunter2@mail.example"\nfrom = "h@x.org"\n'
        'to = ["a@x.org", "b@x.org"]\n'
        'severity = "critical"\nmodels = ["sal*"]\nowners = "finance"\n'
        '[alerts.chat]\nurl = "slack://hunter2/x"\n',
    )
    assert (read.group_wait, read.group_interval, read.disk_low) == (60.0, 300.0, 1 << 30)
    assert read.channels == (
        Channel("ops", Secret("https://hooks.example/hunter2"), Secret("sixteen letters !")),
        Channel(
            "mail", Secret("smtps://me:hunter2@mail.example"), None, "h@x.org", ("a@x.org", "b@x.org"),
            "critical", ("sal*",), ("finance",),
        ),
        Channel("chat", Secret("slack://hunter2/x")),
    )  # fmt: skip
    assert [channel.type for channel in read.channels] == ["webhook", "smtp", "apprise"]
    assert "hunter2" not in repr(read)
    assert alerts(tmp_path, "") == AlertsConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[alerts]\ngroup_wiat = "1m"\n', '[alerts] group_wiat: unknown key; did you mean "group_wait"?'),
        ('[alerts]\nrepeat_interval = "1s"\n', "out of range"),
        ("[alerts.ops]\n", '[alerts.ops] url: missing; such as [alerts.ops] with url = "${env:ALERT_URL}"'),
        ('[alerts.ops]\nurl = "hunter2"\n', "[alerts.ops] url: must be an address that begins with a scheme"),
        ('[alerts.ops]\nurl = "https://"\n', "[alerts.ops] url: "),
        ('[alerts.ops]\nurl = "https://x:hunter2/y"\n', "has no host, or no port"),
        ('[alerts.ops]\nurl = "${env:HUNTER2_NOT_SET}"\n', "is not set"),
        ('[alerts.ops]\nurl = "https://x"\nsecret = "hunter2"\n', "at least 16 characters"),
        ('[alerts.ops]\nurl = "slack://x"\nsecret = "hunter2hunter2hunter2"\n', "signs a webhook"),
        ('[alerts.ops]\nurl = "smtp://x"\n', "[alerts.ops]: mail needs from and to"),
        ('[alerts.ops]\nurl = "smtp://x"\nfrom = "me"\nto = []\n', "must be an address of mail"),
        ('[alerts.ops]\nurl = "https://x"\nto = "a@b.c"\n', "for smtp:// and smtps:// only"),
        ('[alerts.ops]\nurl = "https://x"\nseverity = "bad"\n', '"bad" is not supported'),
        ('[alerts.ops]\nurl = "https://x"\nmodels = []\n', "must be an array of names"),
        ('[alerts.Ops]\nurl = "https://x"\n', "a channel's name is 1 to 40"),
        ("alerts = 1\n", "must be a table"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "headrace.toml").write_text(text + SOURCE if text.startswith("alerts") else SOURCE + text)
    with pytest.raises(ConfigError) as caught:
        load_project(tmp_path)
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_project_without_its_secrets_still_knows_its_channels(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text(
        SOURCE + '[alerts.ops]\nurl = "${env:NOT_SET_AT_ALL}"\nto = "a@b.c"\nsecret = "${env:NEITHER}"\n'
    )
    (channel,) = load_project(tmp_path, secrets=False).alerts.channels
    assert channel.name == "ops"


HEADER = 'freshness = "5m"\nseverity = "critical"\nowner = "finance"\nroute = ["ops", "mail"]'
SAID = AlertSettings(300.0, "critical", "finance", ("ops", "mail"))


def test_a_model_says_of_its_alerts_in_sql_and_in_python(tmp_path: Path) -> None:
    sql, python = tmp_path / "a.sql", tmp_path / "b.py"
    sql.write_text(f"/* headrace\n{HEADER}\n*/\nSELECT id FROM raw.shop.orders")
    assert read_model(sql).alerts == SAID
    python.write_text(
        "import headrace\nfrom dataclasses import dataclass\n@dataclass\nclass Out:\n    id: int\n"
        f'@headrace.model(reads="raw.shop.orders", {HEADER.replace(chr(10), ", ")})\n'
        "def make(row: headrace.Row) -> Out: ...\n"
    )
    assert read_python(python).alerts == SAID


def test_a_mart_says_whose_it_is_too_and_has_no_freshness_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.sql"
    head, _, others = HEADER.partition("\n")
    path.write_text(f"/* headrace\n{others}\n*/\nSELECT count(*) AS n FROM orders")
    mart = read_file(path, "duckdb")
    assert isinstance(mart, Mart)
    assert mart.alerts == replace(SAID, freshness=None)
    path.write_text(f"/* headrace\n{head}\n*/\nSELECT count(*) AS n FROM orders")
    with pytest.raises(ModelError, match="freshness"):
        read_file(path, "duckdb")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('freshness = "soon"', 'a.sql: freshness "soon" is not a duration'),
        ('severity = "bad"', "a.sql: severity must be one of info, warning, error, critical"),
        ("owner = 1", "a.sql: owner must be a name"),
        ("route = [1]", "a.sql: route must name channels"),
    ],
)
def test_what_a_header_says_wrongly_of_alerts_is_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "a.sql"
    path.write_text(f"/* headrace\n{header}\n*/\nSELECT id FROM raw.shop.orders")
    with pytest.raises(ModelError) as caught:
        read_model(path)
    assert message in str(caught.value)
