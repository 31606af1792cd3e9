"""Which fields of which dataclass the package reads: types followed from annotations, without running anything.

Followed are parameters, `self` and what `__init__` and others put on it, local names, loops over lists, fields and
properties, constructors and functions with an annotated result. What a class reads of itself in `__post_init__` does
not count: that a value was checked does not mean that it does something.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Types = tuple[Any, ...]  # what an expression may be; empty where unknown


def fields_read(package: types.ModuleType) -> set[tuple[type, str]]:
    """(dataclass, field) of every read in the modules of `package`."""
    root = Path(inspect.getfile(package)).parent
    modules = []
    for path in sorted(root.rglob("*.py")):
        name = ".".join((package.__name__, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        if not name.endswith("__main__"):
            modules.append((ast.parse(path.read_text()), vars(importlib.import_module(name))))
    reader = _Reader()
    for _ in range(2):  # what is on `self` may be assigned in a module that is read later
        for tree, names in modules:
            reader.block(tree.body, names, {}, None)
    return reader.read


class _Reader:
    def __init__(self) -> None:
        self.read: set[tuple[type, str]] = set()
        self._on_self: dict[tuple[type, str], Types] = {}

    def block(self, body: list[ast.stmt], names: Mapping[str, Any], env: dict[str, Types], owner: type | None) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                self.block(statement.body, names, env, names.get(statement.name))
            elif isinstance(statement, ast.FunctionDef):
                self._function(statement, names, env, owner)
            else:
                self._walk(statement, names, env, owner)

    def _function(
        self, function: ast.FunctionDef, names: Mapping[str, Any], env: Mapping[str, Types], owner: type | None
    ) -> None:
        arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        inner = {**env, **{a.arg: self._annotation(a.annotation, names) for a in arguments}}
        if owner is not None and arguments and arguments[0].annotation is None:
            inner[arguments[0].arg] = (owner,)
        before = set(self.read)
        self.block(function.body, names, inner, None)
        if function.name == "__post_init__":
            self.read = before | {(cls, name) for cls, name in self.read if owner is None or cls not in owner.__mro__}

    def _walk(self, node: ast.AST, names: Mapping[str, Any], env: dict[str, Types], owner: type | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.block([node], names, env, owner)
            return
        if isinstance(node, (ast.For, ast.comprehension)):
            self._bind(node.target, self._items(self._infer(node.iter, names, env)), env)
        for child in sorted(ast.iter_child_nodes(node), key=lambda c: not isinstance(c, ast.comprehension)):
            self._walk(child, names, env, owner)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            self._infer(node, names, env)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for left, right in pairs:
                    self._bind(left, self._infer(right, names, env), env)
        elif isinstance(node, ast.AnnAssign):
            self._bind(node.target, self._annotation(node.annotation, names), env)
        elif isinstance(node, (ast.NamedExpr, ast.withitem)):
            is_name = isinstance(node, ast.NamedExpr)
            target, value = (node.target, node.value) if is_name else (node.optional_vars, node.context_expr)
            if target is not None:
                self._bind(target, self._infer(value, names, env), env)

    def _bind(self, target: ast.expr, found: Types, env: dict[str, Types]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = found
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            for cls in env.get(target.value.id, ()):
                self._on_self[cls, target.attr] = found or self._on_self.get((cls, target.attr), ())

    def _infer(self, node: ast.expr, names: Mapping[str, Any], env: Mapping[str, Types]) -> Types:
        if isinstance(node, ast.Name):
            return env.get(node.id, ())
        if isinstance(node, ast.Attribute):
            return tuple(t for cls in self._infer(node.value, names, env) for t in self._attribute(cls, node.attr))
        if isinstance(node, ast.Subscript):
            return self._items(self._infer(node.value, names, env))
        if isinstance(node, ast.BoolOp):
            return tuple(t for value in node.values for t in self._infer(value, names, env))
        if isinstance(node, ast.IfExp):
            return (*self._infer(node.body, names, env), *self._infer(node.orelse, names, env))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            made = names.get(node.func.id)
            return (made,) if isinstance(made, type) else _alternatives(_hints(made).get("return"))
        return ()

    def _attribute(self, cls: Any, name: str) -> Types:
        if not isinstance(cls, type):
            return ()
        if name in declared_fields(cls):
            self.read.add((declared_fields(cls)[name], name))
        if name in (hints := _hints(cls)):
            return _alternatives(hints[name])
        for base in cls.__mro__:
            if isinstance(found := vars(base).get(name), property):
                return _alternatives(_hints(found.fget).get("return"))
            if (base, name) in self._on_self:
                return self._on_self[base, name]
        return ()

    def _annotation(self, node: ast.expr | None, names: Mapping[str, Any]) -> Types:
        try:
            return () if node is None else _alternatives(eval(ast.unparse(node), dict(names)))
        except (NameError, TypeError, AttributeError):  # a name that only type checkers import
            return ()

    def _items(self, found: Types) -> Types:
        return tuple(t for hint in found for arg in typing.get_args(hint)[-1:] for t in _alternatives(arg))


def _alternatives(hint: Any) -> Types:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(t for arg in typing.get_args(hint) for t in _alternatives(arg))
    return () if hint is None or hint is type(None) else (hint,)


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError, AttributeError):
        return {}


def declared_fields(cls: type) -> dict[str, type]:
    """The fields of a dataclass, each with the class of its hierarchy that declares it; none of another class."""
    if not dataclasses.is_dataclass(cls):
        return {}
    names = [f.name for f in dataclasses.fields(cls)]
    return {n: next(c for c in cls.__mro__ if n in vars(c).get("__annotations__", {})) for n in names}


def config_classes(roots: list[type]) -> Iterator[type]:
    """Every dataclass reachable from the fields of `roots`."""
    queue: list[Any] = list(roots)
    seen: set[type] = set()
    while queue:
        cls = queue.pop()
        if cls in seen:
            continue
        seen.add(cls)
        yield cls
        for hint in typing.get_type_hints(cls).values():
            queue += [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
