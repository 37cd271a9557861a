"""`headrace verify`."""

from __future__ import annotations

import json as json_lib
import sys
from pathlib import Path

from headrace.config import load_project


def verify(*, project: Path = Path(), json: bool = False) -> None:
    """Compare source, log, staging and destination, beside a running pipeline or without one.

    Exit code 0 when all agree, 1 when something differs.

    Parameters
    ----------
    project
        The project's folder.
    json
        Print one object: `verified`, and `findings` with `what`, `ok`, `detail`, `rows`, `keys`.
    """
    from headrace.verify import verify as compare

    report = compare(load_project(project))
    if json:
        print(json_lib.dumps(report.to_dict()))
    else:
        for finding in report.findings:
            print(f"{'✔' if finding.ok else '✘'} {finding.what}: {finding.detail}")
            if finding.keys:
                print(f"    differing keys: {', '.join(finding.keys)}")
        print("verified" if report.verified else "NOT verified")
    sys.exit(0 if report.verified else 1)
