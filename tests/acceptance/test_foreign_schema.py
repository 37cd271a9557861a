"""A schema that nobody here wrote, pgbench's own, goes through with no edits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from headrace.testing.postgres import PostgresServer


def headrace(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_pgbench_is_mirrored_with_init_check_run_and_verify_and_no_edits(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "pg", 18) as server:
        pgbench = [server.bin / "pgbench", server.url]
        subprocess.run([*pgbench, "-i", "-q", "-s", "1"], check=True, capture_output=True)
        project = str(tmp_path / "project")
        headrace("init", server.url, project)
        assert '"!public.pgbench_history"' in (tmp_path / "project" / "headrace.toml").read_text()
        headrace("check", "--project", project)
        headrace("run", "--once", "--project", project)
        subprocess.run([*pgbench, "-T", "2", "-c", "2", "-n"], check=True, capture_output=True)
        headrace("run", "--once", "--project", project)
        report = json.loads(headrace("verify", "--json", "--project", project))
        assert report["verified"]
        rows = {f["what"]: f["rows"] for f in report["findings"] if f["what"].startswith("source table")}
        assert rows == {
            "source table public.pgbench_accounts = staging": 100_000,
            "source table public.pgbench_branches = staging": 1,
            "source table public.pgbench_tellers = staging": 10,
        }
