"""The docs do what they say: code runs, commands parse, configs build, links, keys, targets and tables are right.

The word after the fence says what a block is, and a third word names the file it is written to before code runs:

- `python` is executed, all blocks of a page in one namespace, in a folder that holds a run (`runs/demo`), its exported
  encoder (`encoder`), packed shards (`packed`) and a checkout (`path/to/ssl_eo`); with a file name it is only written
- `bash`: each command goes through the parser of the program that it names (`doc_commands`), and its config is built
- `yaml config` (whole, or some sections of one), `yaml sensor`, `yaml task`, `yaml study` are built
- `text` is anything else
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from doc_commands import check_command, commands_of, known_options, make_targets, our_commands
from doc_tables import PAGES, ROOT, keys_of, sections, write_tables

from ssl_eo.adapt.study import StudyConfig, leave_out
from ssl_eo.cli import _parsed, main
from ssl_eo.cli_eval import _listed
from ssl_eo.cli_eval_tasks import known_tasks
from ssl_eo.components import available
from ssl_eo.config import Config, build, find_config, load, read_overrides, read_yaml
from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval.tasks import TaskConfig
from ssl_eo.resources import find_resource
from ssl_eo.sensors import Sensor

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
def test_a_decoder_of_a_users_own_makes_maps() -> None:
    """By the study and the command of the page; its Python code runs with the model that is beside it."""
    rasterio = pytest.importorskip("rasterio")
    page = ROOT / "docs" / "adaptation.md"
    command = next(w for b in _blocks(page) if b.kind == "bash" for w in commands_of(b.text) if "--decoder" in w)
    short = ("trainings.default.n_steps=4", "trainings.default.lrs=[0.001]", "n_resamples=0", "device=cpu")
    assert main(["study", "own_decoder.yaml", "--out", "studies/own", *short]) == 0
    with rasterio.open(command[2], "w", driver="GTiff", count=12, height=40, width=50, dtype="uint16") as file:
        file.write(np.random.default_rng(0).integers(1, 5000, (12, 40, 50)).astype("uint16"))
    assert main(command[1:]) == 0
    with rasterio.open(command[-1]) as file:
        assert file.shape == (40, 50)
    (code,) = (b.text for b in _blocks(page) if b.kind == "python" and "load_model(" in b.text)
    namespace: dict[str, Any] = {}
    exec(re.sub('"studies/.*"', '"studies/own/models/cover-mine-frozen-linear-default-0"', code), namespace)
    assert namespace["logits"].shape == (2, len(namespace["saved"].classes), 120, 120)


def test_folders_of_studies_and_ensembles_stay_out_of_git() -> None:
    """Those that commands of the pages write, in a checkout."""
    commands = [words for block in BLOCKS if block.kind == "bash" for words in commands_of(block.text)]
    written = {
        w[w.index("--out") + 1] for w in commands if w[:2] in (["ssl-eo", "study"], ["ssl-eo", "export-ensemble"])
    }
    assert written
    assert {f"{path.partition('/')[0]}/" for path in written} <= set((ROOT / ".gitignore").read_text().splitlines())


@pytest.mark.usefixtures("_in_workspace")
@_of("bash")
def test_commands_parse(block: Block) -> None:
    for words in commands_of(block.text):
        ours = check_command(words)
        if ours is not None:
            _check_ours(ours)


def _check_ours(words: list[str]) -> None:
    """What a command of `ssl-eo` names is there: configs, tasks, sources."""
    arguments: argparse.Namespace = _parsed(words)
    if words[0] in ("train", "config"):
        load(arguments.config, arguments.overrides)
    if words[0] == "study":
        path, some = find_config(arguments.config), arguments.overrides
        build(StudyConfig, leave_out(read_yaml(path, some), read_overrides(some), read_yaml(path)), "")
    if words[0] == "eval":
        for task in known_tasks(_listed(arguments.tasks)):
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
    text = _prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) == text.count("](")
    assert not re.search(r"^ *\[[^]]+\]:|<a ", text, re.MULTILINE), "a link of another form, which is not looked at"
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}; headings: {sorted(_anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_make_targets_exist(page: Path) -> None:
    assert set(re.findall(r"`make ([\w-]+)`", _prose(page))) <= make_targets()


def _in_backticks(page: Path) -> list[str]:
    """Words as code in a page's text, and in tables; each may be broken over two lines."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", _prose(page))]


ELSEWHERE = {"--no-install-recommends", "--ntasks-per-node", "--signal"}  # of apt-get and Slurm


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_options_exist(page: Path) -> None:
    """An option in backticks is one of ours, of a script or of torchrun; behind a command it is that command's."""
    commands, known = our_commands(), known_options() | ELSEWHERE
    for text in _in_backticks(page):
        options = re.findall(r"(?<!\S)--[a-z][\w-]*", text)
        assert set(options) <= known, f"{page.name}: {text}"
        if text.startswith("ssl-eo "):
            words = text.split()[1:]
            named = [" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in commands]
            assert named or words[0].startswith("-"), f"{page.name}: {text}"
            assert set(options) <= commands[named[0] if named else ""], f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_extras_exist(page: Path) -> None:
    """`pip install -e '.[geo]'`, `ssl_eo[geo]`, extra `geo`, extras: `geo`, ..."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    text = " ".join(page.read_text(encoding="utf-8").split())
    named = [n.strip() for group in re.findall(r"(?:'\.|ssl_eo)\[([\w,-]+)\]", text) for n in group.split(",")]
    listed = re.findall(r"\bextras?:? \(?((?:`[a-z0-9]+`(?:, | and )?)+)", text)
    named += [name for group in listed for name in re.findall(r"`(\w+)`", group)]
    assert set(named) <= known
    if page.name == "README.md":
        assert known <= set(named), "README names every extra"


def test_variables_of_the_environment_are_read_somewhere() -> None:
    folders = ("ssl_eo", "configs", "datasets_meta", "launch", "tests", "benchmarks")
    files = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".sh", ".sbatch", ".yaml")
    ]
    known = set(re.findall(r"SSL_EO_[A-Z_]+", "".join(path.read_text(encoding="utf-8") for path in files)))
    for page in PAGES:
        assert set(re.findall(r"SSL_EO_[A-Z_]+", page.read_text(encoding="utf-8"))) <= known, page.name


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


def test_readme_names_what_there_is() -> None:
    row = {
        m[1]: m[2] for m in re.finditer(r"^\| (\w[\w ]*|) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    }
    assert set(available("ssl_eo.data.sources")) <= set(re.findall(r"`(\w+)`", row["sources"]))
    page = (ROOT / "README.md").read_text()
    assert set(available("ssl_eo.objectives")) <= set(re.findall(r"`(\w+)`", page))
    n_sensors = len(list((ROOT / "datasets_meta" / "sensors").glob("*.yaml")))
    assert row["sensors"].startswith(f"{n_sensors} files: ")


@pytest.mark.parametrize(
    "command",
    [
        *("ssl-eo train --confg demo", "ssl-eo tran --config demo", "ssl-eo data pakc", "ssl-eo doctor --limit"),
        *("python benchmarks/dinov2.py --tunrs 3", "python benchmarks/gone.py", "python tests/doc_tables.py --all"),
        *("python -m other train", "torchrun --nproc=2 -m other", "torchrun --no-such=2 -m ssl_eo train --config demo"),
        *("launch/torchrun.sh --confg demo", "sbatch --nodes=2 launch/gone.sbatch --config demo", "make tset"),
        *("pytest tests/gone.py", "pre-commit run", "rm file", "source other/activate"),
    ],
)
def test_commands_that_are_wrong_are_found(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit, OSError)) as found:
        check_command(command.split())
    assert getattr(found.value, "code", 2) == 2
