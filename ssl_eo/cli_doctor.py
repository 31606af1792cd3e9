"""The command `ssl-eo doctor`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import json
import sys

from ssl_eo.cluster import EXIT_DONE, EXIT_FAILURE

__all__ = ["add_doctor"]


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo doctor` takes."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="configs to be run, by file or name; folders of data")
    parser.add_argument(
        "--limit-s", type=float, default=120.0, help="seconds that two processes have to meet; 0: do not start them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ssl_eo.doctor import examine, is_well, print_findings

    if not 0 <= arguments.limit_s < float("inf"):
        raise ValueError(f"--limit-s must be seconds, or 0 to leave it out, got {arguments.limit_s}")
    findings = examine(arguments.paths, arguments.limit_s)
    if arguments.json:
        print(json.dumps({"ok": is_well(findings), "findings": [asdict(found) for found in findings]}, indent=1))
    else:
        print_findings(findings, sys.stdout)
    return EXIT_DONE if is_well(findings) else EXIT_FAILURE
