"""The command `ssl-eo doctor`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ssl_eo.cluster import EXIT_DONE, EXIT_FAILURE

if TYPE_CHECKING:
    from ssl_eo.doctor import Finding

__all__ = ["add_doctor"]


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo doctor` takes."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="configs to be run, by file or name; folders of data")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=120.0,
        help="seconds that two processes have to meet, and one to import packages; 0: none",
    )
    models = "instead, compare outputs of these published architectures, or of all, with known ones; see docs/models.md"
    parser.add_argument("--models", nargs="*", metavar="NAME", default=None, help=models)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ssl_eo.doctor import examine, examine_models, is_well, print_findings

    if not 0 <= arguments.limit_s < float("inf"):
        raise ValueError(f"--limit-s must be seconds, or 0 to leave it out, got {arguments.limit_s}")
    if arguments.models is None:
        findings = examine(arguments.paths, arguments.limit_s)
    elif arguments.paths:
        raise ValueError(f"--models looks at no paths, got {arguments.paths[0]}: leave it out, or --models")
    else:
        findings = []
        for found in examine_models(arguments.models):
            findings.append(found)
            if not arguments.json:
                print(_line(found), flush=True)
    if arguments.json:
        print(json.dumps({"ok": is_well(findings), "findings": [asdict(found) for found in findings]}, indent=1))
    elif arguments.models is None:
        try:
            print_findings(findings, sys.stdout)
        except ModuleNotFoundError as error:  # of tables; that it is missing is among the findings
            if error.name is None or error.name.partition(".")[0] != "rich":
                raise
            print(*map(_line, findings), sep="\n")
    return EXIT_DONE if is_well(findings) else EXIT_FAILURE


def _line(found: Finding) -> str:
    return "; ".join(filter(None, (f"{found.topic}: {found.status}, {found.found}", found.advice)))
