"""The shape of the package: who imports whom, how long files are, what `ssl_eo.hub` needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssl_eo"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")

# Layer of a module: the longest prefix that matches. A module may import its own and lower layers.
LAYER_0 = (
    "cluster",
    "components",
    "distributed",
    "files",
    "installation",
    "json_page",
    "jsonl",
    "progress",
    "resources",
    "schedules",
    "seeding",
    "sensors",
    "tensor_files",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LAYER_0, LAYER_0),
    "losses": ("losses", "distributed"),
    "models": ("models", "sensors", "distributed", "components"),
    "data": ("data", "sensors", "seeding", "components", "resources", "files", "jsonl"),
    "objectives": (
        "objectives",
        "models",
        "losses",
        "data.types",
        "data.plans",
        "data.multicrop",
        "data.joint_views",
        "data.token_budget",
        "data.masked_views",
        "data.series",
        "data.spread_masking",
        "data.masking",
        "data.stacking",
        *LAYER_0,
    ),
    "baking": ("bundle_inputs", "models"),
    "opening": ("bundles", "models", "train.export", "train.sealing", "weights", *LAYER_0),
    "bundle_inputs": ("models", "sensors"),
    "bundles": ("bundle_inputs", "models", "sensors"),
    "hub": ("hub", "bundles", "tensor_files", "json_page", "models", "sensors", "components", "files"),
    "weights": ("weights", "hub", "bundles", "tensor_files", "models", "sensors", "components", "files", "resources"),
    "eval": ("eval", "models", "data", "hub", *LAYER_0),
    "adapt": (
        "adapt",
        "eval",
        "models",
        "data",
        "hub",
        "bundles",
        "weights",
        "train.optim",
        "opening",
        "train.tracing",
        *LAYER_0,
    ),
    "two_ranks": LAYER_0,
    "doctor": ("config", "data.opening", "two_ranks", "weights", *LAYER_0),
    "config": ("data.opening", "eval.hook", "models.vit", "objectives.base", "train", *LAYER_0),
    **{f"train.{name}": ("objectives.base", *LAYER_0) for name in ("metrics", "optim", "sharding")},
    "train.checkpoint": ("train.metadata_reader", "train.sealing", *LAYER_0),
    "train.metadata_reader": (),
    "train.sealing": LAYER_0,
    "train.parallel": (
        "objectives.base",
        "models.packed_attention",
        "train.activation_checkpointing",
        "train.sharding",
        *LAYER_0,
    ),
    "train.watch": LAYER_0,
    "train.activation_checkpointing": ("models.layers",),
    "train.initial": ("hub", "objectives.base", "train.checkpoint", "train.sealing", "weights._reading", *LAYER_0),
    "train": ("baking", "config", "data", "eval", "hub", "models", "objectives.base", "train", *LAYER_0),
}
ANYTHING = (
    "api",
    "cli",
    "cli_adapt",
    "cli_data",
    "cli_doctor",
    "cli_embed",
    "cli_eval",
    "cli_eval_tasks",
    "cli_report",
    "cli_scenes",
    "cli_stopping",
    "__main__",
)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ssl_eo"):
            module = node.module.removeprefix("ssl_eo").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                is_module = (PACKAGE / inner.replace(".", "/")).with_suffix(".py").exists()
                found.add(inner if is_module else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("ssl_eo.") for a in node.names if a.name.startswith("ssl_eo.")}
    return found


def _rule(name: str) -> tuple[str, ...]:
    matching = [prefix for prefix in ALLOWED if name == prefix or name.startswith(prefix + ".")]
    assert matching, f"{name} is in no layer: add it to the table of docs/architecture.md section 3 and here"
    return ALLOWED[max(matching, key=len)]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_follow_the_layers(path: Path) -> None:
    name = _name(path)
    if name in ANYTHING:
        return
    allowed = _rule(name)
    for imported in _imports(path) - {""}:
        assert any(imported == a or imported.startswith(a + ".") for a in allowed), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_no_sensor_is_named_in_the_engine() -> None:
    names = [p.stem for p in (ROOT / "datasets_meta" / "sensors").glob("*.yaml") if p.stem not in ("rgb", "dem")]
    pattern = re.compile(rf"[\"']({'|'.join(names)})[\"']")
    for path in MODULES:
        if not _name(path).startswith(("data.sources", "weights")):
            tree = ast.parse(path.read_text())
            docstrings = {id(n.body[0].value) for n in ast.walk(tree) if _has_docstring(n)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    assert not pattern.fullmatch(repr(node.value)), f"{path}:{node.lineno} names {node.value}"


def _has_docstring(node: ast.AST) -> bool:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return isinstance(node, documented) and bool(node.body) and isinstance(node.body[0], ast.Expr)


def test_hub_needs_torch_alone() -> None:
    """Every module that it and the entries of torch.hub bring in is ours, torch's or the standard library's."""
    probe = (
        "import sys, torch; before = set(sys.modules); import ssl_eo.weights._entries;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    assert set(out) - set(sys.stdlib_module_names) == {"ssl_eo"}
