"""A plan as a person reads it: parameters, FLOPs, memory of a rank by moment and part, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, TextIO

from ssl_eo.config import Config
from ssl_eo.train.plan import Memory, Plan

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["print_plan"]

_SMALL = 1e9  # bytes, below which nobody needs advice

_TITLES = {
    "weights": "weights and buffers",
    "teacher": "teacher",
    "moments": "AdamW's moments",
    "gradients": "gradients",
    "activations": "activations",
    "batch": "batch",
    "gathered": "gathered from other ranks",
    "host": "beside it, on the host",
}


def print_plan(plan: Plan, config: Config, stream: TextIO) -> None:
    """Print the tables of `plan`, made from `config`."""
    from rich.console import Console

    console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    passes = f"{plan.n_micro_batches} x {plan.n_samples}" if plan.n_micro_batches > 1 else f"{plan.n_samples}"
    console.print(
        f"{config.objective.name}, {plan.strategy} on {plan.n_ranks} {_plural(plan.n_ranks, 'rank')} ({plan.device}),"
        f" {config.train.precision}; a step of {plan.global_batch_size} samples, {passes} on a rank"
    )
    console.print(_table("parameters", ["part", "number"], _parameter_rows(plan)))
    title = "FLOP of matrix products, convolutions and attention; a multiply-add is 2"
    steps = config.train.total_steps
    columns = ["", "a sample", f"a step of {plan.global_batch_size}", f"all {steps:,} steps"]
    console.print(_table(title, columns, _flop_rows(plan, steps)))
    console.print(_table("memory of a rank, MB", ["", *plan.memory], _memory_rows(plan)))
    console.print(_verdict(plan, config))


def _parameter_rows(plan: Plan) -> list[list[str]]:
    sums = {"of them trained": plan.n_trained, "the encoder that is published": plan.n_published}
    return [[name, f"{n:,}"] for name, n in (plan.parameters | sums).items()]


def _flop_rows(plan: Plan, n_steps: int) -> list[list[str]]:
    passes = {"forward": plan.forward_flop, "forward and backward": plan.step_flop}
    n = plan.global_batch_size
    return [[name, *(_flop(k * flop) for k in (1, n, n * n_steps))] for name, flop in passes.items()]


def _memory_rows(plan: Plan) -> list[list[str]]:
    moments = plan.memory.values()
    names = [f.name for f in fields(Memory) if any(getattr(memory, f.name) for memory in moments)]
    rows = [[_TITLES[name], *(_mb(getattr(memory, name)) for memory in moments)] for name in names if name != "host"]
    rows.append(["together", *(_mb(memory.total) for memory in moments)])
    return rows + [[_TITLES["host"], *(_mb(memory.host) for memory in moments)]] * ("host" in names)


def _verdict(plan: Plan, config: Config) -> str:
    """The worst moment, its largest part, and the first key that would make that smaller."""
    worst = plan.memory[plan.worst]
    parts = {f.name: getattr(worst, f.name) for f in fields(Memory) if f.name != "host"}
    largest = max(parts, key=parts.__getitem__)
    text = (
        f"At most {_mb(worst.total)} MB a rank ({plan.worst}), {100 * parts[largest] / worst.total:.0f} % of it"
        f" {_TITLES[largest]}"
    )
    written = f"A checkpoint takes {_mb(plan.checkpoint)} MB on disk."
    if worst.total < _SMALL:
        return f"{text}.\n{written}"
    return f"{text}. Less with {_advice(largest, plan, config)}.\n{written}"


def _advice(largest: str, plan: Plan, config: Config) -> str:
    if largest == "activations":
        if plan.device == "cuda" and config.train.precision == "float32":
            return "train.precision: bfloat16"
        if config.parallel.activation_checkpointing != "full":
            return "parallel.activation_checkpointing: full"
        return "more ranks, or train.accumulate where the loss does not mix samples"
    if largest == "batch":
        return "more ranks, or train.accumulate where the loss does not mix samples"
    if largest == "gathered":
        return "parallel.n_prefetched: 1, or on fewer ranks without FSDP"
    if plan.strategy in ("single", "ddp"):
        return "parallel.strategy: fsdp on more ranks" if plan.n_ranks == 1 else "parallel.strategy: fsdp"
    return "more ranks, or parallel.cpu_offload: true"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _flop(n: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if n >= size:
            return f"{n / size:,.2f} {prefix}FLOP"
    return f"{n / 1e6:,.2f} MFLOP"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f}"


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"
