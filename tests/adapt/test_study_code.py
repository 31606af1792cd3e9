"""Keys of a study's cells follow the code that trains and scores them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_study import bundle, study

from ssl_eo.adapt import study_code
from ssl_eo.adapt.study_run import _Runner
from ssl_eo.eval.provenance import scoring_files

PACKAGE = study_code._PACKAGE
SCORES = (
    *("adapt/training.py", "adapt/losses.py", "adapt/selection.py", "eval/decoders/linear.py", "models/convnext.py"),
    "train/optim.py",
)
OTHERS = (
    *("adapt/study_code.py", "adapt/study_page.py", "adapt/study_records.py", "adapt/study_tables.py"),
    *("adapt/saved_page.py", "adapt/tiling.py", "cli_adapt.py", "train/trainer.py"),
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package of the same layout; what evaluations depend on stays as it is."""
    for name in (*SCORES, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(study_code, "_PACKAGE", tmp_path)
    monkeypatch.setattr(study_code, "code_digest", lambda: "as it is")
    study_code.study_code.cache_clear()
    yield tmp_path
    study_code.study_code.cache_clear()


def _code() -> str:
    study_code.study_code.cache_clear()
    return study_code.study_code()


def test_a_change_of_what_scores_come_from_is_other_code(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [_code()]
    for name in SCORES:
        (package / name).write_text("# another\n")
        seen.append(_code())
    (package / "eval/decoders/linear.py").rename(package / "eval/decoders/mine.py")
    seen.append(_code())
    monkeypatch.setattr(study_code, "code_digest", lambda: "another")
    seen.append(_code())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", OTHERS)
def test_code_that_no_score_comes_from_is_not(package: Path, name: str) -> None:
    before = _code()
    (package / name).write_text("# another\n")
    assert _code() == before


def test_a_key_of_a_cell_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = study(bundle(tmp_path / "tiny"))
    (cell,) = cfg.cells()
    runner = _Runner(cfg, tmp_path)
    before = runner.key_of(cell)
    assert runner.key_of(cell) == before
    monkeypatch.setattr("ssl_eo.adapt.study_run.study_code", lambda: "another")
    assert runner.key_of(cell) != before


def test_a_key_of_a_cell_follows_the_samples_and_what_the_encoder_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = study(bundle(tmp_path / "tiny"))
    (cell,) = cfg.cells()
    keys = [_Runner(cfg, tmp_path).key_of(cell)]
    page = json.loads((tmp_path / "tiny/encoder.json").read_text())
    page["inputs"]["sentinel1_grd"]["clip_std"] = 2.0
    (tmp_path / "tiny/encoder.json").write_text(json.dumps(page))
    keys.append(_Runner(cfg, tmp_path).key_of(cell))
    monkeypatch.setattr("ssl_eo.data.sources.synthetic.Source.fingerprint", lambda self: "other samples")
    keys.append(_Runner(cfg, tmp_path).key_of(cell))
    assert keys[-1] == _Runner(cfg, tmp_path).key_of(cell)
    assert len(set(keys)) == 3


def test_all_that_training_imports_is_part_of_it() -> None:
    """Whatever is left out is imported by nothing that makes, trains, chooses or scores a model."""
    measured = {path.relative_to(PACKAGE).as_posix() for path in scoring_files()}
    found, left = set(), ["adapt/workbench.py", "adapt/training.py", "adapt/cost.py"]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("ssl_eo.adapt.", "ssl_eo.eval.dec", "ssl_eo.models.")
            ):
                path = str(node.module).removeprefix("ssl_eo.").replace(".", "/")
                left.append(f"{path}.py" if (PACKAGE / f"{path}.py").is_file() else f"{path}/__init__.py")
    assert len(found) > 15
    assert found <= set(study_code.study_files()) | measured
