"""The command ``dali-lmdb doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from dali_lmdb.cli import Command, print_result
from dali_lmdb.doctor import Finding, examine
from dali_lmdb.errors import one_line

__all__ = ["doctor_command"]


@click.command("doctor", cls=Command)
@click.argument("store", metavar="[STORE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor_command(store: str | None, *, as_json: bool) -> None:
    """Check this machine, and STORE on it, for what makes training slow or fail.

    Prints a line for each check, and what to do about a warning. The exit code is 1 if there is a warning,
    otherwise 0.
    """
    findings = examine(store)
    clean = all(finding.state != "warning" for finding in findings)
    if as_json:
        print_result(json.dumps({"clean": clean, "findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.name) for finding in findings)
        print_result("\n".join(_line(finding, width) for finding in findings))
    sys.exit(0 if clean else 1)


def _line(finding: Finding, width: int) -> str:
    remedy = "" if finding.remedy is None else f"; {finding.remedy}"
    return one_line(f"{finding.state:<7}  {finding.name:<{width}}  {finding.text}{remedy}")
