"""The options of `ssl-eo report`, and the table of them in the docs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ssl_eo import cli_report

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"


def test_the_table_of_the_docs_has_every_option() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    cli_report.add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    section = DOCS.read_text().split("\n## Comparisons\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    assert {option for row in rows for option in re.findall(r"--[a-z][a-z-]*", row)} == known
