"""The docs do what they say: code runs, commands parse, configs build, links, keys, targets and tables are right.

The word after the fence says what a block is, and a third word names the file it is written to before code runs:

- `python` is executed, all blocks of a page in one namespace, in a folder that holds a run (`runs/demo`), its exported
  encoder (`encoder`), packed shards (`packed`) and a checkout (`path/to/ssl_eo`); with a file name it is only written
- `bash`: each command is one that is known here; those of `ssl-eo` go through its parser, and their configs are built
- `yaml config` (whole, or some sections of one), `yaml sensor`, `yaml task`, `yaml study` are built
- `text` is anything else
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_tables import PAGES, ROOT, keys_of, sections, write_tables

from ssl_eo.adapt.study import StudyConfig
from ssl_eo.cli import _parsed, main
from ssl_eo.cli_eval import _known_tasks, _listed
from ssl_eo.config import Config, build, find_config, load, read_overrides, read_yaml
from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval.tasks import TaskConfig
from ssl_eo.resources import find_resource
from ssl_eo.sensors import Sensor

COMMANDS = ("export", "pre-commit", "pytest", "python")  # beside ours, make and launchers
LAUNCHERS = {"launch/torchrun.sh", "launch/slurm.sbatch", "launch/submitit_launch.py"}
MINIMAL = {"objective": {"name": "mae"}, "data": {"sources": [{"name": "synthetic"}]}}
SHORT = (
    *("train.total_steps=2", "train.global_batch_size=8", "optim.warmup_steps=1", "data.n_workers=0"),
    *("eval.every_n_steps=0", "checkpoint.every_n_steps=2", "log.every_n_steps=1", "log.report=false"),
)
SECTIONS = [f.name for f in dataclasses.fields(Config)]


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    name: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            assert "```" not in line, f"{page.name}:{number}: a fence must start its line"
        elif start is None:
            start, words = number, line[3:].split()
        else:
            language = words[0] if words else ""
            n_kind = 2 if language == "yaml" else 1
            name = words[n_kind] if len(words) > n_kind else None
            yield Block(page, start + 1, " ".join(words[:n_kind]), name, "\n".join(lines[start : number - 1]) + "\n")
            start = None
    assert start is None, f"{page.name}:{start}: this fence is not closed"


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _of(*kinds: str) -> Any:
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in kinds], ids=str)


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", "samples")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has done what the pages say."""
    folder = tmp_path_factory.mktemp("docs")
    assert main(["train", "--config", "debug/mae", f"run.out_dir={folder}/runs", "run.name=demo", *SHORT]) == 0
    assert main(["export", "--checkpoint", f"{folder}/runs/demo", "--out", f"{folder}/encoder"]) == 0
    source = ("--source", "synthetic", "n_samples=8")
    assert main(["data", "pack", *source, "--out", f"{folder}/packed", "--workers", "0"]) == 0
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "ssl_eo").symlink_to(ROOT)
    for block in BLOCKS:
        if block.name is not None:
            path = folder / block.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture
def _in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(str(workspace))


def test_every_block_says_what_it_is() -> None:
    kinds = {"python", "bash", "yaml config", "yaml sensor", "yaml task", "yaml study", "text"}
    for block in BLOCKS:
        assert block.kind in kinds, f"{block}: the fence says {block.kind!r}, must be one of {sorted(kinds)}"


@pytest.mark.usefixtures("_in_workspace")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.kind == "python" for b in _blocks(p))], ids=lambda p: p.stem
)
def test_python_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in _blocks(page):
        if block.kind == "python" and block.name is None:
            padding = "\n" * (block.line - 1)  # so that a traceback shows the line of the page
            exec(compile(padding + block.text, str(page), "exec"), namespace)


@pytest.mark.usefixtures("_in_workspace")
@pytest.mark.parametrize("name", ["add-a-source", "add-an-objective"])
def test_a_component_of_a_users_own_trains(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    for block in _blocks(page):
        if block.kind == "python" and block.name is None:
            exec(compile(block.text, str(page), "exec"), {})
    (config,) = (b.name for b in _blocks(page) if b.kind == "yaml config")
    assert config is not None
    assert main(["train", "--config", config, *SHORT]) == 0
    assert Path("runs", load(config).run.name, "checkpoints", "step_00000002").is_dir()


@pytest.mark.usefixtures("_in_workspace")
@_of("bash")
def test_commands_parse(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]  # a variable of the environment
        if not words:
            continue
        if LAUNCHERS & set(words):
            words = ["ssl-eo", "train", *words[words.index("--config") :]]
        elif words[0] == "torchrun" or words[:2] == ["python", "-m"]:
            assert words[words.index("-m") + 1] == "ssl_eo", f"{block}: {line}"
            words = ["ssl-eo", *words[words.index("-m") + 2 :]]
        if words[0] == "ssl-eo":
            _check_command(words[1:])
        elif words[0] == "make":
            assert set(words[1:]) <= _targets(), f"{block}: {line}"
        else:
            assert Path(words[0]).name in COMMANDS, f"{block}: {line}"


def _check_command(words: list[str]) -> None:
    arguments: argparse.Namespace = _parsed(words)
    if words[0] in ("train", "config"):
        load(arguments.config, arguments.overrides)
    if words[0] == "study":
        build(StudyConfig, read_yaml(find_config(arguments.config), arguments.overrides), "")
    if words[0] == "eval":
        for task in _known_tasks(_listed(arguments.tasks)):
            find_resource("datasets_meta/benchmarks", task)
    if "source" in arguments:
        root = {} if arguments.root is None else {"root": arguments.root}
        options = {"name": arguments.source, **root, **read_overrides(arguments.options)}
        build(SourceConfig, options, "--source")


@pytest.mark.usefixtures("_in_workspace")
@_of("yaml config", "yaml sensor", "yaml task", "yaml study")
def test_yaml_builds(block: Block) -> None:
    if block.kind == "yaml config" and block.name is not None:
        load(block.name)
        return
    raw = yaml.safe_load(block.text)
    if block.kind == "yaml sensor":
        Sensor.from_dict({"name": "documented", **raw})
    elif block.kind == "yaml task":
        build(TaskConfig, {"name": "documented", **raw}, "")
    elif block.kind == "yaml study":
        build(StudyConfig, raw, "")
    else:
        whole = {**raw, **{section: {**least, **raw.get(section, {})} for section, least in MINIMAL.items()}}
        build(Config, whole, "")


def _prose(page: Path) -> str:
    """The page without its blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}; headings: {sorted(_anchors(file))}"


def _targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_make_targets_exist(page: Path) -> None:
    assert set(re.findall(r"`make ([\w-]+)`", _prose(page))) <= _targets()


def _known_keys() -> set[str]:
    names = [key.name for section in [*sections(), "objective"] for key in keys_of(section)]
    parts = [name.replace("[]", "").split(".") for name in names]
    return {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}


KNOWN_KEYS = _known_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_keys_exist(page: Path) -> None:
    """A name in backticks that starts with a section of the config is a key, a module of the package or a file."""
    for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[\w.\[\]]+)", _prose(page)):
        key = re.sub(r"\[\d*\]", "", name).removesuffix(".")  # all keys of a section end in `.*`
        module = ROOT / "ssl_eo" / key.replace(".", "/")
        is_module = module.is_dir() or module.with_suffix(".py").is_file()
        assert key in KNOWN_KEYS or is_module or key.endswith((".json", ".jsonl", ".yaml")), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_names_exist(page: Path) -> None:
    """A dotted name of the package in backticks can be imported."""
    for name in re.findall(r"`(ssl_eo(?:\.\w+)+)", _prose(page)):
        parent, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(parent), last), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_paths_exist(page: Path) -> None:
    """A path in backticks to a file of the repository names one that is there."""
    folders = ("benchmarks", "configs", "datasets_meta", "docs", "launch", "ssl_eo", "tests")
    for name in re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]+)`", _prose(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tables_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == write_tables(text), "run 'python tests/doc_tables.py' and look at the diff"


def test_every_key_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not re.findall(r"^\| `(\S+)` \|.* \|  \|$", _key_tables(text), re.MULTILINE), "these keys say nothing"
    assert not [section for section in sections() if f"<!-- keys of {section} -->" not in text]


def _key_tables(text: str) -> str:
    return "".join(re.findall(r"<!-- keys of .*? -->\n.*?<!-- end -->\n", text, re.DOTALL))


def test_the_tree_of_the_architecture_is_that_of_the_package() -> None:
    (tree,) = (b.text for b in _blocks(ROOT / "docs" / "architecture.md") if b.text.startswith("setup.py"))
    named = set(re.findall(r"\b\w+\.py\b", tree))
    folders = [
        ROOT,
        ROOT / "benchmarks",
        ROOT / "launch",
        *(p for p in (ROOT / "ssl_eo").rglob("*") if p.is_dir()),
        ROOT / "ssl_eo",
    ]
    files = {p.name for folder in folders for p in folder.glob("*.py")}
    assert not named - files
    assert not {name for name in files - named if not name.startswith("_")}


FIGURES = re.compile(r"<!-- figures of python (benchmarks/\w+\.py) -->\n```text\n(.*?)\n```", re.DOTALL)


@pytest.mark.parametrize(("script", "figures"), FIGURES.findall((ROOT / "docs" / "benchmarks.md").read_text()))
def test_figures_are_of_their_script(script: str, figures: str) -> None:
    """What its rows begin with is a section that this script prints."""
    source = (ROOT / script).read_text()
    source += "".join(
        (ROOT / f"benchmarks/{name}.py").read_text() for name in re.findall(r"^from (_[a-z]\w*) import", source, re.M)
    )
    found = {row.split()[0] for row in figures.splitlines()[1:]}
    assert {section for section in found if f'"{section}"' not in source} == set()
