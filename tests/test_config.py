"""YAML to typed config: includes, overrides, errors that name key and remedy, and no dead field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ssl_eo
from ssl_eo import components
from ssl_eo.config import Config, build, difference, fingerprint, load, read_yaml, to_dict

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(p for folder in ("debug", "pretrain") for p in (ROOT / "configs" / folder).glob("*.yaml"))
SHIPPED.append(ROOT / "configs" / "demo.yaml")

MINIMAL = {"objective": {"name": "mae"}, "data": {"sources": [{"name": "synthetic"}]}}


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", "samples")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_round_trips(path: Path) -> None:
    config = load(path)
    again = build(Config, yaml.safe_load(yaml.safe_dump(to_dict(config))), "")
    assert again == config
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.n_wokers=3", r"data\.n_wokers: unknown key; did you mean 'n_workers'\?"),
        ("optim.lr=fast", r"optim\.lr: expected float, got 'fast'"),
        ("optim.lr=-1", r"optim: lr must be positive"),
        ("train.total_steps=1.5", r"train\.total_steps: expected int, got 1\.5"),
        ("train.precision=bfloat61", r"train\.precision: got 'bfloat61'.*did you mean 'bfloat16'\?"),
        ("objective.name=mea", r"objective\.name: there is no component 'mea'.*did you mean 'mae'\?"),
        ("objective.name=nowhere.mine", r"objective\.name: there is no module 'nowhere\.mine'.*PYTHONPATH"),
        ("objective.mask.mask_ratoi=0.5", r"objective\.mask\.mask_ratoi: unknown key"),
        ("data.sources[0].sensrs=[naip]", r"data\.sources\[0\]\.sensrs: unknown key; did you mean 'sensors'\?"),
        ("data.sources=[]", r"data: sources is empty"),
        ("optim.betas=[0.9]", r"optim\.betas: expected 2 values"),
        ("modle.size=tiny", r"modle: unknown key; did you mean 'model'\?"),
        ("eval.tasks=[eurosat_gep]", r"eval\.tasks\[0\]: datasets_meta/benchmarks has no 'eurosat_gep'"),
        ("run.name=a/b", r"run: name must be one folder name"),
    ],
)
def test_a_wrong_key_is_one_clear_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError, match=message) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)


def test_includes_come_first_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("model: {size: tiny, patch_size: 8}\noptim: {betas: [0.1, 0.2]}\n")
    (tmp_path / "run.yaml").write_text(f"include: model.yaml\nmodel: {{patch_size: 4}}\n{yaml.safe_dump(MINIMAL)}")
    config = load(tmp_path / "run.yaml", ["optim.betas=[0.3,0.4]", "train.total_steps=7"])
    assert (config.model.size, config.model.patch_size) == ("tiny", 4)
    assert config.optim.betas == (0.3, 0.4)
    assert config.train.total_steps == 7


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
    saved = to_dict(load(path))
    free = to_dict(load(path, ["data.n_workers=0", "log.every_n_steps=1", "run.out_dir=elsewhere"]))
    assert difference(saved, free) == []
    bound = to_dict(load(path, ["optim.lr=0.5", "data.sources[0].seed=3"]))
    assert [line.split(":")[0] for line in difference(saved, bound)] == ["data.sources[0].seed", "optim.lr"]
    assert fingerprint(build(Config, saved, "")) == fingerprint(build(Config, free, ""))
    assert fingerprint(build(Config, saved, "")) != fingerprint(build(Config, bound, ""))


def test_read_yaml_keeps_small_floats_floats(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-4\n")
    assert read_yaml(path, ["end=1e-6"]) == {"lr": 1e-4, "end": 1e-6}


def _config_classes() -> Iterator[type]:
    """Every dataclass reachable from the root, and the `Config` of every objective and source."""
    queue: list[Any] = [Config]
    for package in ("ssl_eo.objectives", "ssl_eo.data.sources"):
        queue += [components.resolve(package, name).Config for name in components.available(package)]
    seen: set[type] = set()
    while queue:
        cls = queue.pop()
        if cls in seen:
            continue
        seen.add(cls)
        yield cls
        for hint in typing.get_type_hints(cls).values():
            queue += [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]


def test_every_config_field_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in Path(inspect.getfile(ssl_eo)).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = [
        f"{cls.__module__}.{cls.__name__}.{f.name}"
        for cls in _config_classes()
        for f in dataclasses.fields(cls)
        if f.name not in read
    ]
    assert not unread, f"config fields that nothing reads: {unread}"
