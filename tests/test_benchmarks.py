"""The speed measurements run to their end and print every row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def table(*arguments: str) -> list[list[str]]:
    """Rows of the printed table, as words."""
    command = [sys.executable, "benchmarks/data.py", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header, machine = lines[0], lines[-1]
    assert header.split() == ["section", "row", "value", "unit", "ratio", "KB", "stored", "target", "met"]
    assert "torch" in machine
    assert "HDF5" in machine
    return [line.split() for line in lines[1:-2]]


def test_one_section() -> None:
    rows = table("--only", "rendering")
    assert [row[0] for row in rows] == ["rendering"] * 4
    assert [row[-1] in ("yes", "NO") for row in rows if ">=" in row] == [True]


@pytest.mark.slow
def test_every_section() -> None:
    sections = [row[0] for row in table()]
    assert {name: sections.count(name) for name in sections} == {
        "reading": 13,
        "packing": 3,
        "scenes": 1,
        "archives": 10,
        "memory": 4,
        "rendering": 4,
        "waiting": 2,
    }
