"""From YAML to one typed, checked object: includes, then the file, then `key=value` overrides, then dataclasses.

Defaults live in the dataclass beside each component; YAML only overrides them. Every error names the full key, what was
found, what is allowed. `to_dict` gives back plain types that load to the same object, so a run keeps its own copy.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ssl_eo.components import FREE, free, one_line, resolve, suggest
from ssl_eo.data.opening import DataConfig
from ssl_eo.eval.hook import EvalConfig
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives.base import ObjectiveConfig
from ssl_eo.resources import find_resource, resource_dir
from ssl_eo.train.checkpoint import CheckpointConfig
from ssl_eo.train.initial import InitialWeights
from ssl_eo.train.metrics import LogConfig
from ssl_eo.train.optim import OptimConfig
from ssl_eo.train.parallel import ParallelConfig

__all__ = [
    "Config",
    "RunConfig",
    "TrainConfig",
    "bound_values",
    "build",
    "difference",
    "find_config",
    "load",
    "read_overrides",
    "read_yaml",
    "to_dict",
    "to_yaml",
]

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class RunConfig:
    """Where a run lives and the seed that all its randomness is addressed from."""

    out_dir: str = free("runs")  # the run directory is <out_dir>/<name>
    name: str = "run"  # the folder of this run in out_dir
    seed: int = 0  # of weights, order, crops, masks and dropout

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", "..") or "\0" in self.name:
            raise ValueError(f"name must be one folder name, got {self.name!r}")


_MOST_STEPS = 10**8 - 1  # eight digits name a checkpoint


@dataclass
class TrainConfig:
    """The loop. Steps only, no epochs; `global_batch_size` is the truth and the per-rank size is derived."""

    total_steps: int = 1000  # updates of the weights
    global_batch_size: int = 256  # samples per optimiser step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per step on each rank
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; parameters stay float32
    max_skipped_steps: int = free(20)  # non-finite steps in a row before the run stops
    n_threads: int | None = None  # CPU threads of torch; None leaves torch's choice
    time_limit_s: float | None = free(None)  # checkpoint and stop (exit 75) after this long

    def __post_init__(self) -> None:
        for key in ("total_steps", "global_batch_size", "accumulate", "max_skipped_steps", "n_threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.total_steps > _MOST_STEPS:
            raise ValueError(f"total_steps must be at most {_MOST_STEPS:,}, got {self.total_steps:,}")
        if self.time_limit_s is not None and self.time_limit_s < 0:
            raise ValueError(f"time_limit_s must not be negative, got {self.time_limit_s}")
        if self.global_batch_size % self.accumulate:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of accumulate {self.accumulate}"
            )


@dataclass
class Config:
    """The root of every pretraining config."""

    objective: ObjectiveConfig
    data: DataConfig
    run: RunConfig = field(default_factory=RunConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    init: list[InitialWeights] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=FREE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=FREE)
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE)

    def __post_init__(self) -> None:
        for key, plain in (("attention", "sdpa"), ("gather_dtype", "float32")):
            value = getattr(self.parallel, key)
            if value != plain and self.train.precision != "bfloat16":
                raise ValueError(
                    f"parallel.{key} {value} needs train.precision bfloat16, got {self.train.precision}; or take"
                    f" {plain}"
                )

    @property
    def run_dir(self) -> Path:
        return Path(self.run.out_dir) / self.run.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of a YAML file (a path, or a name below `configs/`) with `key=value` overrides applied."""
    return build(Config, read_yaml(find_config(str(path)), overrides), "")


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Plain types from a YAML file: `include:` files below it, `${...}` interpolations and overrides resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = _override(_merge_includes(path, ()), overrides)
        plain: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if unset := re.search(r"Environment variable '(\w+)' not found", reason):
            reason = f"needs the environment variable {unset[1]}, which is not set: export {unset[1]}=..."
        raise ValueError(f"{path}: {reason}") from None
    return plain


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Plain types from `key=value` alone; dots in a key make mappings."""
    from omegaconf import OmegaConf

    plain: dict[str, Any] = OmegaConf.to_container(_override(OmegaConf.create({}), overrides))
    return plain


def build(cls: type[T], raw: Any, where: str) -> T:
    """An instance of the dataclass `cls` from plain types; `where` is the key of `raw` for error messages.

    A class with a field `options` whose metadata names a `package` is a component: `name` picks the module, and the
    keys that are not fields of `cls` build the module's own `Config`. A class with an attribute `resource_folder` may
    also be given by the name of a shipped YAML file.
    """
    folder = getattr(cls, "resource_folder", None)
    if folder is not None and isinstance(raw, str):
        path = _with_key(where, find_resource, folder, raw)
        raw = {"name": path.stem, **read_yaml(path)}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where or 'config'}: expected a mapping of keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    raw = {str(k): v for k, v in raw.items()}
    values: dict[str, Any] = {}
    own = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    if package := _component_package(cls):
        own.pop("options")
        values["options"] = _build_options(package, raw, set(own), where)
        raw = {k: v for k, v in raw.items() if k in own}
    for key, value in raw.items():
        if key not in own:
            known = sorted(own)
            raise ValueError(f"{_join(where, key)}: unknown key{suggest(key, known)} (allowed: {', '.join(known)})")
        values[key] = _convert(hints[key], value, _join(where, key))
    for name, f in own.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{_join(where, name)}: missing; this key has no default")
    built: T = _with_key(where, cls, **values)
    return built


def to_dict(config: Any) -> Any:
    """Plain types that `build` turns into the same object."""
    if is_dataclass(config) and not isinstance(config, type):
        out: dict[str, Any] = {}
        flatten = _component_package(type(config)) is not None
        for f in fields(config):
            value = to_dict(getattr(config, f.name))
            if flatten and f.name == "options":
                out.update(value)
            else:
                out[f.name] = value
        return out
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    return config


def to_yaml(config: Config) -> str:
    """A YAML file that `load` turns into the same object."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what OmegaConf takes for a number and YAML 1.1 does not, such as the string 1e5."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.0-9][-+.0-9eE_]*$"), list("-+.0123456789"))
    text: str = yaml.dump(_uninterpolated(to_dict(config)), Dumper=Dumper, sort_keys=False)
    return text


def _uninterpolated(value: Any) -> Any:
    """`value`, whose strings OmegaConf is to take as they stand: `${` with a backslash, those before it doubled."""
    if isinstance(value, dict):
        return {key: _uninterpolated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_uninterpolated(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def difference(saved: Config, current: Config) -> list[str]:
    """`key: saved -> current` for every key that must agree for a run to be resumed and does not."""
    before, after = dict(bound_values(saved)), dict(bound_values(current))
    pairs = {key: (before.get(key, "(absent)"), after.get(key, "(absent)")) for key in sorted(before.keys() | after)}
    return [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def find_config(name: str) -> Path:
    """The file `name`, or the shipped one of that name below `configs/`; `ValueError` with the names there are."""
    path = Path(name)
    if path.is_file():
        return path
    root = resource_dir("configs")
    shipped = root / (name if name.endswith(".yaml") else f"{name}.yaml")
    if shipped.is_file():
        return shipped
    known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    raise ValueError(f"no config file {name!r}{suggest(name, known)} (shipped: {', '.join(known)})")


def _override(target: Any, overrides: Sequence[str]) -> Any:
    """Write each `key=value` into the OmegaConf mapping `target`; values are YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ValueError(f"{override!r}: write key=value, for instance optim.lr=0.001")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except YAMLError as error:
            raise ValueError(f"{override!r}: the value is not YAML: {one_line(error)}") from None
        try:
            OmegaConf.update(target, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, IndexError, TypeError) as error:
            raise ValueError(
                f"{override!r}: {one_line(error)}; a key is written as optim.lr or data.sources[0].name"
            ) from None
    return target


def _merge_includes(path: Path, parents: tuple[Path, ...]) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    path = path.resolve()
    if path in parents:
        raise ValueError(f"include: {' -> '.join(p.name for p in (*parents, path))} is a circle")
    try:
        own = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(own, DictConfig):
        raise ValueError(f"{path}: a config file holds one mapping of keys")
    includes = own.pop("include", [])
    merged = OmegaConf.create({})
    for name in _names(path, includes):
        beside = path.parent / name
        merged = OmegaConf.merge(
            merged, _merge_includes(beside if beside.is_file() else find_config(name), (*parents, path))
        )
    return OmegaConf.merge(merged, own)


def _names(path: Path, includes: Any) -> list[str]:
    names = [includes] if isinstance(includes, str) else includes
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: include takes the name of a config file, or a list of them, got {includes!r}")
    return list(names)


def _component_package(cls: type) -> str | None:
    for f in fields(cls):
        if f.name == "options" and "package" in f.metadata:
            return str(f.metadata["package"])
    return None


def _build_options(package: str, raw: Mapping[str, Any], own: set[str], where: str) -> Any:
    name = raw.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{_join(where, 'name')}: missing; it names a module of {package}")
    module = _with_key(_join(where, "name"), resolve, package, name)
    return build(module.Config, {k: v for k, v in raw.items() if k not in own}, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            allowed = [str(a) for a in get_args(hint)]
            raise ValueError(
                f"{where}: got {value!r}, must be one of {', '.join(allowed)}{suggest(str(value), allowed)}"
            )
        return value
    if origin in (list, tuple):
        return _convert_sequence(origin, get_args(hint), value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(get_args(hint)[1], v, _join(where, str(k))) for k, v in value.items()}
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value!r}")
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [o for o in options if o is not type(None)]
    errors = []
    for option in rest:
        try:
            return _convert(option, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[-1]


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    if origin is list or args[-1] is Ellipsis:
        items = [_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    else:
        if len(value) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {list(value)!r}")
        items = [_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))]
    return origin(items)


def _with_key(where: str, call: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """`call(...)`, with `where` before the message of a `ValueError`."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def bound_values(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a config that a run is bound to: all fields but those marked as free."""
    if is_dataclass(value) and not isinstance(value, type):
        is_component = _component_package(type(value)) is not None
        for f in fields(value):
            if not f.metadata.get("free"):
                inside = is_component and f.name == "options"
                yield from bound_values(getattr(value, f.name), where if inside else _join(where, f.name))
    elif isinstance(value, list) and any(is_dataclass(item) for item in value):
        for i, item in enumerate(value):
            yield from bound_values(item, f"{where}[{i}]")
    else:
        yield where, to_dict(value)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
