"""`headrace models` against a real pipeline: what it lists and shows is what stands."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from headrace.config import Project
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from projects import SALES, here, sales_project, sql


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("models") / "pg") as running:
        yield running


@pytest.fixture
def project(tmp_path: Path, server: PostgresServer) -> Project:
    return sales_project(tmp_path, server)


def test_models_are_listed_before_anything_ran_and_after(project: Project) -> None:
    (listed,) = here("models", "ls", "--json", cwd=project.root).objects()
    assert (listed["name"], listed["state"], listed["table"]) == ("sales", "new", "orders")
    Pipeline(project).run_once()
    sales, customers = here("models", "ls", "--json", cwd=project.root).objects()
    assert (sales["state"], sales["kind"], sales["open_records"]) == ("in_sync", "row model", 1)
    assert sales["applied_version"] == sales["version"]
    assert (customers["name"], customers["kind"]) == ("shop.customers", "mirror")
    assert customers["lag"] == sales["lag"] == 0
    (project.models / "broken.sql").write_text("SELECT * FROM raw.shop.orders")
    out = here("models", "ls", cwd=project.root).out
    assert "broken broken: broken.sql: a row model cannot use * (name the columns)." in out


def test_a_model_that_changed_lags_and_its_versions_are_told_apart(
    project: Project, server: PostgresServer
) -> None:
    Pipeline(project).run_once()
    first = here("models", "show", "sales", "--json", cwd=project.root).objects()[0]
    (project.models / "sales.sql").write_text(SALES.replace("upper", "lower"))
    out = here("models", "ls", cwd=project.root).out
    assert f"sales: its table was last moved by version {first['version'][:8]}" in out
    sql(server, "UPDATE orders SET status = 'packed' WHERE id = 1")
    Pipeline(project).run_once()
    (shown,) = here("models", "show", "sales", "--json", cwd=project.root).objects()
    assert [version["version"] for version in shown["versions"]] == [first["version"], shown["version"]]
    assert [version["changes"] for version in shown["versions"]] == [3, 1]
    assert shown["versions"][0]["through"] <= shown["versions"][1]["after"]


def test_a_model_is_shown_with_the_types_of_its_columns(project: Project) -> None:
    before = here("models", "show", "sales", cwd=project.root).out
    assert "Source shop has not run yet, so the types are not known." in before
    Pipeline(project).run_once()
    (shown,) = here("models", "show", "sales", "--json", cwd=project.root).objects()
    assert [(c["name"], c["type"], c["not_null"], c["reads"]) for c in shown["columns"]] == [
        ("order_id", "BIGINT", True, ["id"]),
        ("status", "VARCHAR", False, ["status"]),
        ("amount", "DECIMAL(12,2)", True, ["amount"]),
    ]
    assert shown["key"] == ["order_id"]
    assert shown["checks"][1:] == ["amount: NOT NULL", "amount: CHECK (amount >= 0)"]
    (project.models / "sales.sql").write_text(SALES.replace("upper(status)", "upper(state)"))
    with pytest.raises(Exception, match="suspended"):
        Pipeline(project).run_once()
    out = here("models", "show", "sales", cwd=project.root).out
    assert out.startswith("sales: suspended")
    assert 'Referenced column "state" not found' in out
    assert "headrace models ls" in here("models", "show", "shop.nowhere", cwd=project.root).err
    assert 'Did you mean "sales"' in here("models", "show", "slaes", cwd=project.root).err


def test_lineage_of_files_needs_neither_database_nor_secrets(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "${env:NO_SUCH_URL}"\n')
    (tmp_path / "models" / "sales.sql").write_text(SALES)
    (model,) = here("models", "lineage", "--json", cwd=tmp_path).objects()
    assert model["columns"][1]["expression"] == "upper(status)"
    assert model["columns"][1]["reads"] == ["status"]
    assert model["where"] == {"expression": "status <> 'draft'", "reads": ["status"]}
    assert "sales <- raw.shop.orders" in here("models", "lineage", "sales", cwd=tmp_path).out


def test_lineage_tells_of_mirrors_too(project: Project) -> None:
    Pipeline(project).run_once()
    sales, customers = here("models", "lineage", "--json", cwd=project.root).objects()
    assert sales["name"] == "sales"
    assert [(c["name"], c["type"], c["reads"]) for c in customers["columns"]] == [
        ("id", "INTEGER", ["id"]),
        ("name", "VARCHAR", ["name"]),
    ]


def test_what_is_recorded_where_the_pipeline_runs_is_held_to_where_it_does_not(
    project: Project, server: PostgresServer, tmp_path: Path
) -> None:
    Pipeline(project).run_once()
    done = here("ci", "--record", cwd=project.root)
    assert done.out == "Recorded: schemas/shop.toml, schemas/models.lock\n"
    elsewhere = tmp_path / "elsewhere"
    for name in ("models", "schemas", "headrace.toml"):
        path = project.root / name
        elsewhere.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, elsewhere / name)
    settings = elsewhere / "headrace.toml"
    settings.write_text(settings.read_text().replace(server.url, "${env:NO_SUCH_URL}"))
    assert here("ci", cwd=elsewhere).code == 0
    (elsewhere / "models" / "sales.sql").write_text(SALES.replace(" NOT NULL", ""))
    assert "column amount may be null now" in here("ci", cwd=elsewhere).out
    sql(server, "ALTER TABLE customers DROP COLUMN name", "INSERT INTO customers VALUES (2)")
    Pipeline(project).run_once()
    assert "breaks: table shop.customers: column name is gone" in here("ci", "--record", cwd=project.root).out
    recorded = tomllib.loads((project.root / "schemas" / "shop.toml").read_text())
    assert list(recorded["customers"]["columns"]) == ["id"]
    (project.models / "sales.sql").write_text(SALES.replace("upper(status)", "upper(state)"))
    before = (project.root / "schemas" / "models.lock").read_text()
    assert "state" in here("ci", "--record", cwd=project.root).err
    assert (project.root / "schemas" / "models.lock").read_text() == before


def test_dbt_reads_what_the_destination_has(project: Project, server: PostgresServer) -> None:
    sql(server, 'CREATE TABLE visits (id int PRIMARY KEY, "odd ""name"": é\t😀" text)')
    (project.models / "nested.sql").write_text(
        "SELECT id::INT AS id, {'a': {'b': name}} AS deep FROM raw.shop.customers"
    )
    Pipeline(project).run_once()
    document = yaml.safe_load(here("models", "export-dbt", cwd=project.root).out)
    assert document["version"] == 2
    tables = {(s["schema"], t["name"]): t for s in document["sources"] for t in s["tables"]}
    assert list(tables) == [("main", "nested"), ("main", "sales"), ("shop", "visits")]
    assert [source["name"] for source in document["sources"]] == ["headrace", "shop"]
    for (schema, name), table in tables.items():
        columns = "SELECT column_name, data_type FROM information_schema.columns WHERE column_name[1] <> '_'"
        where = f"{columns} AND table_schema = '{schema}' AND table_name = '{name}' ORDER BY ordinal_position"
        _, there = read_rows(project, where)
        assert [(c["name"], c["data_type"]) for c in table["columns"]] == [tuple(row) for row in there]
        assert "{{" not in str([column["description"] for column in table["columns"]])
    # As dbt asks for a source's freshness.
    config = tables["main", "sales"]["config"]
    _, rows = read_rows(
        project,
        f"SELECT epoch(current_timestamp - max({config['loaded_at_field']})) AS age FROM main.sales",
    )
    assert 0 < next(iter(rows))[0] < 60
    assert config["freshness"]["error_after"] == {"count": 60, "period": "minute"}
