"""What results depend on: the code that can move a score, sources wherever they lie, samples as they are."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from toy import tasks

from ssl_eo.components import FREE
from ssl_eo.data.opening import SourceConfig
from ssl_eo.data.sources import geobench
from ssl_eo.eval import provenance
from ssl_eo.eval.features import FeatureSet
from ssl_eo.eval.provenance import SHOWN_ONLY, code_digest, content_of, source_facts, task_facts

EVAL = Path(provenance.__file__).parent
FILES = ("eval/probes/ridge.py", "models/vit.py", "data/render.py", "seeding.py", "sensors.py")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package of the same layout."""
    for name in (*FILES, "eval/table.py", "train/trainer.py", "eval/style.css.j2"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


def _digest() -> str:
    code_digest.cache_clear()
    return code_digest()


@pytest.mark.parametrize("name", FILES)
def test_code_that_can_move_a_score_is_known_by_its_content(package: Path, name: str) -> None:
    before = _digest()
    assert _digest() == before
    (package / name).write_text("# another\n")
    changed = _digest()
    assert changed != before
    (package / name).rename((package / name).with_name("renamed.py"))
    assert _digest() not in (before, changed)


@pytest.mark.parametrize("name", ["eval/table.py", "train/trainer.py", "eval/style.css.j2"])
def test_code_that_shows_results_is_not(package: Path, name: str) -> None:
    before = _digest()
    (package / name).write_text("another")
    assert _digest() == before


def test_nothing_that_measures_needs_what_shows() -> None:
    shown_only = {f"ssl_eo.eval.{name}" for name in SHOWN_ONLY}
    assert {path.stem for path in EVAL.glob("*.py")} > set(SHOWN_ONLY)
    for path in EVAL.rglob("*.py"):
        if path.stem not in SHOWN_ONLY:
            imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
            modules = {name for n in imports for name in (n.module, *(f"{n.module}.{a.name}" for a in n.names))}
            assert not modules & shown_only, path.name


def test_a_source_is_known_by_its_samples_and_not_by_its_folder() -> None:
    def facts(root: str, **options: object) -> dict[str, object]:
        return source_facts(SourceConfig("geobench", geobench.Config(root, "m-eurosat", **options)))  # type: ignore[arg-type]

    here = facts("/data/geobench")
    assert here == facts("elsewhere")
    assert here["name"] == "geobench"
    assert here["options"] == {
        "dataset": "m-eurosat",
        "split": "train",
        "partition": "default",
        "bands": "corrected",
        "tiles": None,
        "check_units": True,
    }
    assert facts("/data", bands="as_published") != here


@dataclass
class _Config:
    statistics: str
    array: str
    others: list[dict[str, str]]
    root: str = field(default="", metadata=FREE)


def test_files_of_this_machine_are_known_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "stats.json").touch()
    path = str(tmp_path / "stats.json")
    found = source_facts(SourceConfig("mine", _Config(path, "/group/array", [{"statistics": path}], path)))
    assert found == {
        "name": "mine",
        "options": {"statistics": "stats.json", "array": "/group/array", "others": [{"statistics": "stats.json"}]},
    }


def test_a_task_is_known_by_all_its_keys() -> None:
    task = tasks.task()
    facts = task_facts(task)
    assert json.dumps(facts)
    assert facts["sources"].keys() == {"train", "test"}
    assert facts != task_facts(replace(task, seed=1))
    assert facts != task_facts(replace(task, val=tasks.source(seed=2)))
    assert facts == task_facts(tasks.task())


SAMPLES = FeatureSet({}, torch.tensor([0, 1, 2]), ["a", "b", "c"], ["x", "x", "y"], ["01", "02", "03"])


@pytest.mark.parametrize(
    "changed",
    [
        replace(SAMPLES, labels=torch.tensor([0, 1, 1])),
        replace(SAMPLES, digests=["01", "02", "04"]),
        replace(SAMPLES, keys=["a", "b", "d"]),
        SAMPLES.rows([0, 1]),
        SAMPLES.rows([1, 0, 2]),
    ],
    ids=["a label", "pixels", "a key", "fewer", "another order"],
)
def test_other_samples_have_another_content(changed: FeatureSet) -> None:
    assert content_of(SAMPLES) == content_of(SAMPLES.rows([0, 1, 2]))
    assert content_of(changed) != content_of(SAMPLES)
