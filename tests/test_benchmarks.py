"""The speed measurements run to their end and print every row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> tuple[list[str], list[list[str]], str]:
    """Header and rows of the printed table, as words, and the line below it."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines[0].split(), [line.split() for line in lines[1:-2]], lines[-1]


def table(*arguments: str) -> list[list[str]]:
    header, rows, conditions = run("benchmarks/data.py", "--quick", *arguments)
    assert header[:5] == ["section", "row", "value", "unit", "ratio"]
    assert "torch" in conditions
    assert "HDF5" in conditions
    return rows


def test_one_section() -> None:
    rows = table("--only", "rendering")
    assert [row[0] for row in rows] == ["rendering"] * 4
    assert [row[-1] in ("yes", "NO") for row in rows if ">=" in row] == [True]


def test_a_step_of_self_distillation() -> None:
    """The forms agree. How fast a toy is, on a machine that does other things too, says nothing."""
    header, rows, conditions = run("benchmarks/dinov2.py", "--size", "small", "--turns", "1", "--only", "forms")
    assert header == ["section", "row", "value", "unit", "ratio", "target", "met"]
    assert [row[0] for row in rows] == ["forms"] * 4
    assert [row[-1] for row in rows if "ppm" in row] == ["yes", "yes"]
    assert "a toy" in conditions


@pytest.mark.slow
def test_every_section_of_self_distillation() -> None:
    _, rows, _ = run("benchmarks/dinov2.py", "--size", "small", "--turns", "1")
    sections = [row[0] for row in rows]
    assert {name: sections.count(name) for name in sections} == {"forms": 4, "memory": 8, "channels": 4, "masks": 4}


@pytest.mark.slow
def test_every_section_of_objectives() -> None:
    _, rows, _ = run("benchmarks/objectives.py", "--size", "small", "--turns", "1")
    sections = [row[0] for row in rows]
    assert {name: sections.count(name) for name in sections} == {"masked": 6, "multimae": 5, "alibi": 7}


@pytest.mark.slow
def test_strategies_side_by_side() -> None:
    header, rows, conditions = run("benchmarks/scaling.py", "--size", "small", "--turns", "1", "--only", "strategies")
    assert header[:3] == ["model", "processes", "strategy"]
    assert [(row[1], row[2]) for row in rows] == [("1", "single"), ("2", "apart"), ("2", "ddp"), ("2", "fsdp")]
    state_mb = {row[2]: float(row[-2]) for row in rows if row[2] != "apart"}
    assert state_mb["ddp"] == state_mb["single"]
    assert 0.5 <= state_mb["fsdp"] / state_mb["single"] < 0.52  # rows that do not divide are filled up
    assert "a toy" in conditions


@pytest.mark.slow
def test_what_measuring_costs() -> None:
    header, rows, conditions = run("benchmarks/eval_cost.py", "--size", "small")
    assert header == ["section", "row", "value", "unit", "ratio", "target", "met"]
    assert [row[0] for row in rows] == [*["cost"] * 5, *["share"] * 4]
    assert [row[1] for row in rows if row[-1] in ("yes", "NO")] == ["health", "probes"]
    assert "a toy" in conditions


def test_probes_beside_those_of_scikit_learn() -> None:
    header, rows, conditions = run("benchmarks/probes.py", "--size", "small")
    assert header == ["section", "row", "value", "unit", "ratio", "target", "met"]
    assert {row[0] for row in rows} == {"logistic", "ridge", "knn"}
    assert all(row[-1] == "yes" for row in rows if "points" in row)
    assert "a toy" in conditions


@pytest.mark.slow
def test_what_a_save_costs() -> None:
    header, rows, _ = run("benchmarks/scaling.py", "--size", "small", "--turns", "1", "--only", "saving")
    assert header == ["section", "row", "value", "unit", "ratio", "target", "met"]
    assert [row[0] for row in rows] == ["saving"] * 10
    assert len([row for row in rows if "<=" in row]) == 2


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again() -> None:
    command = [sys.executable, "benchmarks/kills.py", "--times", "1", "--strategy", "fsdp", "--asynchronous"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert ["killed after step" in line for line in lines] == [False, True, False, False]
    assert "tensors have the undisturbed run's bits" in lines[-1]


@pytest.mark.slow
def test_comparison_of_objectives() -> None:
    few = ("--seconds", "1", "--places", "96", "--only", "mae")
    command = [sys.executable, "benchmarks/comparison.py", *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    _, _, row = [line.split(" | ") for line in done.stdout.splitlines()]
    assert row[0] == "| `mae`"
    assert len(row) == 7


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
