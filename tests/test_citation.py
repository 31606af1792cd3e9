"""The files that others read about the package say what it says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import ssl_eo
from ssl_eo.cli import main

ROOT = Path(__file__).parent.parent


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ssl_eo {ssl_eo.__version__}\n"
    assert {project["version"], str(cited["version"])} == {ssl_eo.__version__}
    assert cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors", "type"} <= cited.keys()  # what the format requires, and type


def test_the_citation_is_one_that_readers_of_the_format_take() -> None:
    """Citation File Format 1.2.0: the keys that are used, of the types that it gives them."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    texts = {"cff-version", "message", "type", "title", "abstract", "license"}
    assert cited.keys() == texts | {"authors", "version", "keywords"}
    assert all(isinstance(cited[key], str) and cited[key].strip() for key in texts)
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert isinstance(cited["version"], (str, int, float))
    assert all(isinstance(author["name"], str) and author.keys() == {"name"} for author in cited["authors"])  # entities
    assert len(set(cited["keywords"])) == len(cited["keywords"]) > 0


def test_no_page_names_an_address() -> None:
    """Nobody stands behind one."""
    for name in ("CITATION.cff", "SECURITY.md"):
        assert not re.search(r"[\w.]+@[\w.]+|https?://", (ROOT / name).read_text())
