"""What results depend on: the code that can move a score, sources wherever they lie, samples as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from toy import tasks

import ssl_eo
from ssl_eo.components import FREE
from ssl_eo.data.opening import SourceConfig
from ssl_eo.data.sources import geobench
from ssl_eo.eval import provenance
from ssl_eo.eval.features import FeatureSet
from ssl_eo.eval.provenance import code_digest, content_of, scoring_files, source_facts, task_facts

SOURCES = {
    "eval/offline.py": "from ssl_eo.eval import probing\nfrom ssl_eo.eval.claims import Claim\n",
    "eval/probing.py": "from ssl_eo.eval.probes import find_probe\n",
    "eval/probes/__init__.py": "def find_probe(name):\n    return resolve('ssl_eo.eval.probes', name)\n",
    "eval/probes/ridge.py": "import ssl_eo.seeding\n",
    "seeding.py": "def seed():\n    from ssl_eo.components import resolve\n",
    "components.py": "",
}
OTHERS = ("eval/claims.py", "eval/table.py", "eval/style.css.j2", "train/trainer.py", "cli.py")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package of the same layout."""
    for name, text in {
        "__init__.py": "",
        **SOURCES,
        **dict.fromkeys(OTHERS, "from ssl_eo.eval import offline"),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


def _digest() -> str:
    code_digest.cache_clear()
    return code_digest()


@pytest.mark.parametrize("name", SOURCES)
def test_code_that_scores_can_depend_on_is_known_by_its_content(package: Path, name: str) -> None:
    before = _digest()
    assert _digest() == before
    with (package / name).open("a") as file:
        file.write("# another\n")
    assert _digest() != before


def test_a_probe_that_is_added_or_renamed_is_other_code(package: Path) -> None:
    found = [_digest()]
    (package / "eval/probes/mine.py").write_text("")
    found.append(_digest())
    (package / "eval/probes/mine.py").rename(package / "eval/probes/yours.py")
    found.append(_digest())
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", OTHERS)
def test_code_that_no_score_comes_from_is_not(package: Path, name: str) -> None:
    before = _digest()
    (package / name).write_text("another")
    assert _digest() == before


def test_the_files_of_this_package_that_scores_depend_on() -> None:
    root = Path(ssl_eo.__file__).parent
    found = {path.relative_to(root).as_posix() for path in scoring_files()}
    assert found > {
        *(f"eval/probes/{name}.py" for name in ("base", "knn", "ridge", "logistic", "linear", "_likelihood")),
        *(
            f"eval/{name}.py"
            for name in ("offline", "probing", "features", "dense", "controls", "metrics", "bootstrap")
        ),
        *("components.py", "distributed.py", "seeding.py", "sensors.py", "data/render.py", "data/stacking.py"),
        *(
            "models/vit.py",
            "models/patch_embed/dynamic.py",
            "data/sources/geobench.py",
            "data/sources/_geobench_units.py",
        ),
    }
    of_others = {path.relative_to(root).as_posix() for path in root.rglob("*.py")} - found
    assert of_others > {
        *(f"eval/{name}.py" for name in ("hook", "watching", "health", "claims", "records", "report", "comparison")),
        *("data/pack.py", "data/loader.py", "data/multicrop.py", "models/heads.py", "models/decoders.py", "config.py"),
    }
    assert not [name for name in found if name.startswith(("train/", "objectives/", "losses/", "weights/", "cli"))]


def test_what_is_left_out_would_be_found_otherwise() -> None:
    """So that a name which changes is seen."""
    imported = {name for path in scoring_files() for name in provenance._imports(path)}
    assert imported >= provenance._TELLS_NOTHING
    assert all(provenance._path_of(name) for name in provenance._TELLS_NOTHING)


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


def _samples(*rows: int) -> FeatureSet:
    keys, groups, digests = ([column[i] for i in rows] for column in ("abc", "xxy", ("01", "02", "03")))
    return FeatureSet({}, torch.tensor(rows), keys, groups, digests)


SAMPLES = _samples(0, 1, 2)


@pytest.mark.parametrize(
    "changed",
    [
        replace(SAMPLES, labels=torch.tensor([0, 1, 1])),
        replace(SAMPLES, digests=["01", "02", "04"]),
        replace(SAMPLES, keys=["a", "b", "d"]),
        _samples(0, 1),
        _samples(1, 0, 2),
    ],
    ids=["a label", "pixels", "a key", "fewer", "another order"],
)
def test_other_samples_have_another_content(changed: FeatureSet) -> None:
    assert content_of(SAMPLES) == content_of(_samples(0, 1, 2))
    assert content_of(changed) != content_of(SAMPLES)
