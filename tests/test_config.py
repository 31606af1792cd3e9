"""YAML to typed config: includes, overrides, errors that name key and remedy, and no dead field."""

from __future__ import annotations

import importlib
import json
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from config_reads import config_classes, declared_fields, fields_read
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ssl_eo
from ssl_eo import components
from ssl_eo.config import Config, build, difference, load, read_yaml, to_dict, to_yaml
from ssl_eo.data.order import check_lanes

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(p for folder in ("debug", "pretrain") for p in (ROOT / "configs" / folder).glob("*.yaml"))
SHIPPED.append(ROOT / "configs" / "demo.yaml")

MINIMAL = {"objective": {"name": "mae"}, "data": {"sources": [{"name": "synthetic"}]}}


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_EO_SAMPLES", "SSL_EO_DATA", "SSL_EO_WEIGHTS"):
        monkeypatch.setenv(name, name.lower())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_round_trips(path: Path) -> None:
    config = load(path)
    again = build(Config, yaml.safe_load(yaml.safe_dump(to_dict(config))), "")
    assert again == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.n_wokers=3", r"data\.n_wokers: unknown key; did you mean 'n_workers'\?"),
        ("optim.lr=fast", r"optim\.lr: expected float, got 'fast'"),
        ("optim.lr=-1", r"optim: lr must be positive"),
        ("train.total_steps=1.5", r"train\.total_steps: expected int, got 1\.5"),
        ("train.precision=bfloat61", r"train\.precision: got 'bfloat61'.*did you mean 'bfloat16'\?"),
        ("objective.name=mea", r"objective\.name: there is no component 'mea'.*did you mean 'mae'\?"),
        ("objective.name=base", r"objective\.name: ssl_eo\.objectives\.base has no dataclass Config"),
        ("objective.name=../mae", r"objective\.name: '\.\./mae' is not the name of a module"),
        ("optim.lr=.nan", r"optim\.lr: expected a finite number, got nan"),
        ("run.name=..", r"run: name must be one folder name, got '\.\.'"),
        ("data.sources[a].n=3", r"'data\.sources\[a\]\.n=3': .*; a key is written as"),
        ("model.depth=0", r"model: depth must be at least 1, or null for that of the size, got 0"),
        ("objective.name=nowhere.mine", r"objective\.name: there is no module 'nowhere\.mine'.*PYTHONPATH"),
        ("objective.mask.mask_ratoi=0.5", r"objective\.mask\.mask_ratoi: unknown key"),
        ("data.sources[0].sensrs=[naip]", r"data\.sources\[0\]\.sensrs: unknown key; did you mean 'sensors'\?"),
        ("data.sources=[]", r"data: sources is empty"),
        ("optim.betas=[0.9]", r"optim\.betas: expected 2 values"),
        ("modle.size=tiny", r"modle: unknown key; did you mean 'model'\?"),
        ("eval.tasks=[eurosat_gep]", r"eval\.tasks\[0\]: datasets_meta/benchmarks has no 'eurosat_gep'"),
        ("run.name=a/b", r"run: name must be one folder name"),
        (
            "optim.lr_multipliers={'^encoder\\.': fast}",
            r"optim\.lr_multipliers\.\^encoder\\\.: expected float, got 'fast'",
        ),
        ("optim.lr_multipliers=0.2", r"optim\.lr_multipliers: expected a mapping, got 0\.2"),
        ("optim.freeze_steps.last_layer=1.5", r"optim\.freeze_steps\.last_layer: expected int, got 1\.5"),
        ("optim.lr_multipliers={'a[': 1}", r"optim: lr_multipliers: 'a\[' is not a regular expression"),
        ("init=[{path: w, renam: {a: b}}]", r"init\[0\]\.renam: unknown key; did you mean 'rename'\?"),
        ("init=[{path: w, rename: {a: 1}}]", r"init\[0\]\.rename\.a: expected str, got 1"),
        ("init=[{include: [a]}]", r"init\[0\]\.path: missing"),
    ],
)
def test_a_wrong_key_is_one_clear_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError, match=message) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_steps=100000000", "total_steps must be at most 99,999,999"),
        ("parallel.timeout_s=1e300", "timeout_s must be above 0 and up to"),
        ("parallel.bucket_cap_mb=9999999999", "bucket_cap_mb must be from 1 to"),
        ("parallel.attention=varlen", "parallel.attention varlen needs train.precision bfloat16"),
        (
            "parallel={strategy: fsdp, gather_dtype: bfloat16}",
            "parallel.gather_dtype bfloat16 needs train.precision bfloat16",
        ),
        ("parallel={strategy: fsdp, n_prefetched: 0}", "n_prefetched must be at least 1"),
    ],
)
def test_values_that_would_fail_in_a_step_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("debug/mae", [override])


def test_recipes_fit_the_ranks_that_their_heads_name() -> None:
    named = {}
    for path in SHIPPED:
        found = re.search(r"\b(\d+) (?:ranks|GPUs)\b", path.read_text().replace("\n# ", " "))
        if found is not None:
            named[path.stem] = int(found[1])
            config = load(path)
            check_lanes(config.train.global_batch_size, config.data.n_lanes, int(found[1]))
    assert len(named) > 5, named


def test_includes_come_first_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("model: {size: tiny, patch_size: 8}\noptim: {betas: [0.1, 0.2]}\n")
    (tmp_path / "run.yaml").write_text(f"include: model.yaml\nmodel: {{patch_size: 4}}\n{yaml.safe_dump(MINIMAL)}")
    config = load(tmp_path / "run.yaml", ["optim.betas=[0.3,0.4]", "train.total_steps=7"])
    assert (config.model.size, config.model.patch_size) == ("tiny", 4)
    assert config.optim.betas == (0.3, 0.4)
    assert config.train.total_steps == 7


REGEXES = [r"^encoder\.blocks\.\d+", r"(?<=a)b=[^.]*$", "1e5", "on", "a: b", "'", "a{2}"]


def test_regexes_as_keys_come_through_files_and_the_command_line(tmp_path: Path) -> None:
    """Mappings are merged, the included file first; a key whose dots are its own is written inside braces."""
    (tmp_path / "base.yaml").write_text("optim: {lr_multipliers: {'^encoder\\.norm': 0.5, bias: 2}}\n")
    given = {**MINIMAL, "include": "base.yaml", "optim": {"lr_multipliers": dict.fromkeys(REGEXES, 0.25)}}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    overrides = [r"optim.lr_multipliers={'blocks\.3$':0.1}", "optim.lr_multipliers.bias=1"]
    config = load(tmp_path / "run.yaml", overrides)
    expected = {r"^encoder\.norm": 0.5, "bias": 1.0, **dict.fromkeys(REGEXES, 0.25), r"blocks\.3$": 0.1}
    assert list(config.optim.lr_multipliers.items()) == list(expected.items())
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    again = load(tmp_path / "saved.yaml")
    assert again == config
    assert list(again.optim.lr_multipliers) == list(expected)


def test_include_circle_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml -> b\.yaml -> a\.yaml is a circle"):
        load(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="no config file 'nowhere'"):
        load("nowhere")
    (tmp_path / "c.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"c\.yaml: cannot be read as YAML"):
        load(tmp_path / "c.yaml")


def test_missing_environment_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {out_dir: '${oc.env:SSL_EO_NOT_SET}'}\n")
    with pytest.raises(ValueError, match="SSL_EO_NOT_SET"):
        load(tmp_path / "c.yaml")


def test_difference_lists_only_keys_that_bind(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    saved = load(path)
    free = load(path, ["data.n_workers=0", "log.every_n_steps=1", "run.out_dir=elsewhere"])
    assert difference(saved, free) == []
    bound = load(path, ["optim.lr=0.5", "data.sources[0].seed=3"])
    assert [line.split(":")[0] for line in difference(saved, bound)] == ["data.sources[0].seed", "optim.lr"]


@given(name=st.text(min_size=1).filter(lambda s: Path(s).name == s and s not in ".." and s.isprintable()))
@example(name="1e5")
@example(name="on")
@example(name="0x1F")
@example(name="1_000.5")
@example(name="a${b{c")
@example(name="${oc.env:HOME}")
@example(name="\\${a}\\\\${b}\\")
@settings(max_examples=50, deadline=None)
def test_strings_that_look_like_something_else_stay_strings(name: str) -> None:
    config = build(Config, {**MINIMAL, "run": {"name": name}}, "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load(path) == config


@pytest.mark.parametrize(
    ("include", "found"), [("5", "5"), ("null", "None"), ("[[a]]", r"\[\['a'\]\]"), ("{a: 1}", r"\{'a': 1\}")]
)
def test_include_takes_names(tmp_path: Path, include: str, found: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"include: {include}\n")
    with pytest.raises(ValueError, match=rf"c\.yaml: include takes the name of a config file.*, got {found}"):
        load(path)


def test_read_yaml_keeps_small_floats_floats(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-4\n")
    assert read_yaml(path, ["end=1e-6"]) == {"lr": 1e-4, "end": 1e-6}


def test_every_config_field_is_read_somewhere() -> None:
    roots = [Config]
    for package in ("ssl_eo.objectives", "ssl_eo.data.sources"):
        roots += [components.resolve(package, name).Config for name in components.available(package)]
    declared = {(cls, name) for c in config_classes(roots) for name, cls in declared_fields(c).items()}
    assert len(declared) > 100
    unread = sorted(f"{cls.__module__}.{cls.__name__}.{name}" for cls, name in declared - fields_read(ssl_eo))
    assert not unread, f"config fields that nothing reads: {unread}"


DEAD_FIELDS = """\
from dataclasses import dataclass, field

@dataclass
class Inner:
    depth: int = 1  # read
    name: str = ""  # dead: only the field of another class is read

@dataclass
class Config:
    name: str = ""  # read
    seed: int = 0  # dead: only checked
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError("seed")

class User:
    def __init__(self, cfg: Config) -> None:
        self.cfg, self.n_parts = cfg, len(cfg.parts)

    def run(self) -> str:
        inner = self.cfg.inner
        return self.cfg.name * inner.depth
"""


def test_a_field_that_nothing_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadfields").mkdir()
    (tmp_path / "deadfields" / "__init__.py").touch()
    (tmp_path / "deadfields" / "parts.py").write_text(DEAD_FIELDS)
    monkeypatch.syspath_prepend(tmp_path)
    package, parts = (importlib.import_module(name) for name in ("deadfields", "deadfields.parts"))
    declared = {(cls, name) for c in config_classes([parts.Config]) for name, cls in declared_fields(c).items()}
    assert declared - fields_read(package) == {(parts.Inner, "name"), (parts.Config, "seed")}
