"""What a run tells: meters on the device, `metrics.jsonl`, a progress line, optional wandb and tensorboard."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import torch
from torch import Tensor

from ssl_eo.components import import_extra
from ssl_eo.distributed import mean_over_ranks
from ssl_eo.jsonl import JsonLines

__all__ = ["LogConfig", "Meters", "ProgressLine", "Sink", "TensorBoard", "Wandb", "open_sinks"]


@dataclass
class LogConfig:
    """How often and where to log. Between two log steps nothing is read from the device."""

    every_n_steps: int = 10  # one record: a line of metrics.jsonl
    wandb: Literal["off", "offline", "online"] = "off"  # offline: `wandb sync` sends it later
    wandb_project: str = "ssl_eo"  # the run has the name of run.name there
    tensorboard: bool = False  # write scalars to the folder tensorboard of the run
    pictures_every_n_steps: int = 0  # 0: once, at the end
    keys: bool = False  # the sample keys of every step and rank go to keys.jsonl
    report: bool = True  # write report.html when the run ends

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {self.every_n_steps}")


class Meters:
    """Running sums of device scalars; `read` is the one place where the host waits for the device.

    A skipped step adds nothing but is counted; the flags of the steps since the last read come back in order.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._flags: list[Tensor] = []

    def add(self, values: Mapping[str, Tensor], finite: Tensor) -> None:
        """Add one step's scalars; `finite` is 0-d, 1 for a step that was taken."""
        self._flags.append(finite)
        for name, value in values.items():
            clean = torch.where(finite > 0, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + clean if name in self._sums else clean

    def read(self) -> tuple[dict[str, float | None], list[bool]]:
        """Means over the taken steps since the last read, averaged over ranks, and the flag of every step.

        The means are None where every step was skipped.
        """
        flags = torch.stack(self._flags).float()
        n_taken = flags.sum()
        means = torch.stack([v / n_taken.clamp(min=1) for v in self._sums.values()])
        row = torch.cat([mean_over_ranks(means), flags]).cpu().tolist()
        names, taken = list(self._sums), [flag > 0 for flag in row[len(self._sums) :]]
        self._sums, self._flags = {}, []
        return {name: mean if any(taken) else None for name, mean in zip(names, row, strict=False)}, taken


class Sink(Protocol):
    """Somewhere that a log record goes."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class ProgressLine:
    """A live line on a terminal, plain lines elsewhere: step, loss, samples/s, data wait, time left."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total = total_steps
        # Paths and keys are shown as they are: rich would take [/data] for the end of a style.
        self._console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._live = Progress(*columns, console=self._console, transient=False)
            self._task = self._live.add_task("starting", total=total_steps)
            self._live.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if "loss" not in record:  # what was measured before training
            return
        left = timedelta(seconds=round(record["eta_s"]))
        loss = "skipped" if record["loss"] is None else f"loss {record['loss']:.4f}"
        text = (
            f"{loss}  {record['samples_per_s']:.0f} samples/s"
            f"  data wait {100 * record['data_wait_ratio']:.0f} %  {left} left"
        )
        if self._live is not None:
            self._live.update(self._task, completed=record["step"], description=text)
        else:
            self._console.print(f"step {record['step']}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """What is going on besides steps, on a live line only."""
        if self._live is not None:
            self._live.update(self._task, description=text)

    def note(self, text: str) -> None:
        """A line above the progress line."""
        (self._live.console if self._live is not None else self._console).print(text)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class Wandb:
    """Weights and Biases; offline unless asked, and offline too when the network does not answer.

    A run that is resumed goes on with its record there, whose id is kept in `run_dir/wandb/id`.
    """

    def __init__(self, cfg: LogConfig, run_dir: Path, config: dict[str, Any], start_step: int) -> None:
        wandb = import_extra("wandb", "wandb", "log.wandb")
        id_path = run_dir / "wandb" / "id"
        if start_step == 0 or not id_path.exists():
            id_path.parent.mkdir(exist_ok=True)
            id_path.write_text(secrets.token_hex(4), encoding="utf-8")
        options = {
            "project": cfg.wandb_project,
            "name": run_dir.name,
            "id": id_path.read_text(encoding="utf-8"),
            "dir": str(run_dir),
            "config": config,
        }
        settings = wandb.Settings(init_timeout=30)
        try:
            resume = "allow" if cfg.wandb == "online" else None  # offline there is nothing to look up
            self._run = wandb.init(mode=cfg.wandb, resume=resume, settings=settings, **options)
        except wandb.errors.CommError as error:
            print(f"wandb does not answer ({error}); logging offline, `wandb sync` sends it later", file=sys.stderr)  # noqa: T201
            self._run = wandb.init(mode="offline", **options)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Scalars in `run_dir/tensorboard`; those of steps that a resumed run does again are hidden."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        import_extra("tensorboard", "tensorboard", "log.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        first = start_step + 1 if start_step else 0  # a run that starts anew also measures step 0
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def open_sinks(cfg: LogConfig, run_dir: Path, config: dict[str, Any], start_step: int) -> list[Sink]:
    """The sinks of `cfg` beside the progress line, of a run that has finished `start_step` steps. Rank 0 only."""
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
    if cfg.wandb != "off":
        sinks.append(Wandb(cfg, run_dir, config, start_step))
    if cfg.tensorboard:
        sinks.append(TensorBoard(run_dir, start_step))
    return sinks


class Stopwatch:
    """Seconds of training since the last `lap`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Leave the last `seconds` out: they went to something else than training."""
        self._start += seconds

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self._start
        self._start = now
        return seconds
