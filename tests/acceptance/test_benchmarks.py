"""The benchmarks: that they are told of, take turns, check what they measured, and run."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_benchmark_and_case_stands_in_the_documentation(module):
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in module("bench").NAMES:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        told = row.split("|")[2].replace("`", "").split(",")
        assert tuple(case.strip() for case in told) == module(name).CASES
        assert f"\n**{name}** " in text


def test_turns_are_taken_and_each_round_is_told_of_as_one(module):
    order: list[str] = []

    def contestant(name: str):
        return lambda: order.append(name) or {name: float(len(order))}

    runs = module("rig").by_turns(3, {name: contestant(name) for name in ("ours", "rival")})
    assert order == ["ours", "rival", "rival", "ours", "ours", "rival"]
    assert runs == [{"ours": 1.0, "rival": 2.0}, {"ours": 4.0, "rival": 3.0}, {"ours": 5.0, "rival": 6.0}]


def test_latencies_are_read_from_pgbench_after_the_ramp(module, tmp_path):
    log = tmp_path / "window.1"
    log.write_text(
        "0 1 900 0 1700000000 999999 12\n1 1 1500 0 1700000001 500000 30\n0 2 700 0 1700000002 1 0\n"
    )
    assert list(module("latency")._latencies(log, 1700000001.5)) == [1500.0, 700.0]


def test_without_the_jars_it_says_what_to_install(module, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_DEBEZIUM_JARS", str(tmp_path))
    with pytest.raises(module("rig").Unavailable, match="no debezium-embedded"):
        module("debezium")._jars()


def test_an_unknown_case_is_refused_with_those_there_are():
    done = subprocess.run(
        [sys.executable, BENCH / "bench.py", "catchup", "--case", "other"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "small_tx, big_tx, long_open_tx" in done.stderr


def test_the_same_backlog_is_caught_up_by_both_in_every_run(module):
    rival, runs, extra = module("catchup").measure("long_open_tx", 5_000, 2)
    assert rival == "pg_recvlogical -f /dev/null"
    assert extra["rows"] == 5_000
    assert [set(run) for run in runs] == [{"ours", "rival"}] * 2
    assert all(value > 0 for run in runs for value in run.values())


def test_mixed_changes_arrive_as_they_are_in_the_source(module):
    _, runs, extra = module("end_to_end")._measure("mixed", 5_000, 1)
    assert runs[0]["ours"] > 0
    assert extra["peak_rss_mb"] > 10


def test_a_rebuild_and_its_rivals_make_the_same_table(module, tmp_path):
    rebuild = module("rebuild")
    bench = rebuild._Bench(tmp_path, 20_000, 2_000)
    for case, rivals in zip(rebuild.CASES, ({"rival", "every_change"}, {"rival"}), strict=True):
        _, runs, extra = bench.case(case, 1)
        assert set(runs[0]) == {"ours", "peak_rss_mb", "cpu_seconds"} | rivals
        assert all(value > 0 for value in runs[0].values())
        assert extra == {"changes": 20_000, "keys": 2_000}


def test_a_model_makes_the_rows_that_plain_casts_make(module, monkeypatch):
    models = module("models")
    monkeypatch.setattr(models, "SLICE", 5_000)
    ((_, runs, extra),) = models.run(quick=True)["cases"].values()
    assert extra["rows"] == 5_000
    assert all(value > 0 for run in runs for value in run.values())


def test_the_log_is_measured_beside_a_bare_file(module):
    log = module("log")
    measured = log.run(quick=True)["cases"]
    assert tuple(measured) == log.CASES
    for _, runs, extra in measured.values():
        assert extra["rows"] == 200_000
        assert all(value > 0 for run in runs for value in run.values())
    assert {"ours", "rival", "with_encoding"} == set(measured["sqlite_append"][1][0])
    assert {"ours", "rival", "verify_mb_per_s"} == set(measured["sqlite_read"][1][0])


@pytest.mark.parametrize("engine", ["duckdb", "postgres"])
def test_changes_to_a_large_table_are_measured_beside_those_to_a_small_one(module, engine):
    merge, rig = module("merge"), module("rig")
    with rig.open_rig() as made:
        for where in ("recent", "scattered"):
            rival, runs, extra = merge.measure(made, f"{engine}_{where}", 20_000, 2_000, 100, 2)
            assert rival == "the same to 2,000 rows"
            assert len(runs) == 2
            assert all(value > 0 for run in runs for value in run.values())
            assert (extra["rows"], extra["changes"]) == (20_000, 100)
