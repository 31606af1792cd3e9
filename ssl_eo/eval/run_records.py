"""What a run directory says of a run, in the words of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.eval.record_checks import is_of_training
from ssl_eo.eval.records import Record
from ssl_eo.eval.summary import newest, read_task_records
from ssl_eo.jsonl import read_jsonl

__all__ = ["Run", "is_number", "is_run"]

_SHAPE = {"embed_dim": "wide", "depth": "blocks", "n_heads": "heads"}  # what a config may change of a size


def is_run(folder: Path) -> bool:
    """Whether a training wrote to it."""
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


@dataclass(frozen=True)
class Run:
    """What a run directory says, with one record a step: where a resumed run repeated a step, the later counts."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    metrics: list[Record]
    probed: list[Record]  # of tasks
    health: list[Record]  # of training sources
    put_off: list[Record]
    env: Mapping[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        import yaml

        text = _text(run_dir / "config.yaml")
        try:
            config = yaml.safe_load(text)
            env = json.loads(_text(run_dir / "env.json") or "{}")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{run_dir}: config.yaml or env.json cannot be read: {error}") from None
        metrics = [r for r in read_jsonl(run_dir / "metrics.jsonl", _is_of_metrics) if "step" in r]
        told = read_jsonl(run_dir / "eval.jsonl", is_of_training)
        return cls(
            name=run_dir.resolve().name,
            config=config if isinstance(config, dict) else {},
            config_text=text,
            metrics=newest(metrics, ("step",)),
            probed=read_task_records(run_dir / "eval.jsonl"),
            health=newest([r for r in told if "source" in r], ("step", "kind", "source", "tap")),
            put_off=newest([r for r in told if r["kind"] == "skipped"], ("step", "what")),
            env=env if isinstance(env, dict) else {},
        )

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key, None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def subtitle(self) -> str:
        size, patch = self.setting("model.size"), self.setting("model.patch_size")
        sources = [s.get("name") for s in self.setting("data.sources") or [] if isinstance(s, Mapping)]
        model = f"ViT-{size}/{patch}" if size and patch else None
        changed = [f"{v} {what}" for key, what in _SHAPE.items() if (v := self.setting(f"model.{key}")) is not None]
        model = f"{model} with {', '.join(changed)}" if model and changed else model
        return " · ".join(str(p) for p in (self.setting("objective.name"), model, *sources) if p)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and is a number."""
        rows = [(r["step"], r[key]) for r in self.metrics if is_number(r.get(key))]
        return [s for s, _ in rows], [v for _, v in rows]

    def of_task(self, task: str, kind: str, **wanted: str) -> list[Record]:
        """Records of one task and kind whose fields have the `wanted` values, by step."""
        rows = [r for r in self.probed if r["task"] == task and r["kind"] == kind]
        return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _is_of_metrics(record: Mapping[str, Any]) -> bool:
    return is_number(record.get("step", 0))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
