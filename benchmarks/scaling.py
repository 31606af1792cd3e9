"""What several processes cost and save, and what a checkpoint costs. A table a section.

    python benchmarks/scaling.py [--only SECTION] [--models NAME ...] [--device cuda] [--bfloat16] [--turns N]

strategies   steps of the trainer on 1, 2 and 4 processes, under each strategy and by themselves: time, the share of
             communication, the most memory that a rank takes, and what weights, teacher, gradients and moments take
saving       the stall of a step that saves, with and without `checkpoint.asynchronous`, in steps

The models are ViT-S/16 on procedural scenes of 12 bands and 224 pixels: a masked autoencoder, and self-distillation
with four local crops. A process has one thread on a CPU (gloo), and one GPU there (nccl; powers of two up to all that
are at hand). Each has a batch of its own, so perfect scaling is the time of one process. What is measured is told on
stderr as it comes.

`--size small` is a toy that shows in a minute that everything works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import _table
import torch
from _objective_steps import Setting
from _saving import measure_saving
from _scaling import MODELS, batch_sizes, measure_strategies, text

SECTIONS = ("strategies", "saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--models", choices=MODELS, nargs="+", help="of strategies; by default all, of a toy the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, as train.precision has it")
    parser.add_argument("--batch-size", type=int, help="samples of a process; by default 8 on a CPU, 64 on a GPU")
    parser.add_argument("--turns", type=int, default=5, help="turns of each kind that are measured")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="small: a toy")
    arguments = parser.parse_args()
    default = 64 if arguments.device == "cuda" else 8
    setting = Setting(
        device=arguments.device,
        batch_size=arguments.batch_size or default,
        bfloat16=arguments.bfloat16,
        toy=arguments.size == "small",
    )
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only in (None, "strategies"):
            models = arguments.models or (MODELS[:1] if setting.toy else MODELS)
            results = measure_strategies(setting, arguments.turns, models, _counts(setting), Path(folder))
            tables.append(text(results))
        if arguments.only in (None, "saving"):
            tables.append(_table.text(measure_saving(setting, arguments.turns, Path(folder))))
    print("\n\n".join(tables))
    print(f"\n{_conditions(setting)}")


def _counts(setting: Setting) -> list[int]:
    """Numbers of processes."""
    if setting.device == "cpu":
        return [1, 2] if setting.toy else [1, 2, 4]
    return [2**i for i in range(torch.cuda.device_count().bit_length())]


def _conditions(setting: Setting) -> str:
    device = torch.cuda.get_device_name() if setting.device == "cuda" else "a thread a process"
    precision = "bfloat16" if setting.bfloat16 else "float32"
    size = ", --size small: a toy" if setting.toy else ""
    batches = " and ".join(f"{n} ({model})" for model, n in batch_sizes(setting).items())
    return f"{_table.machine()}, {device}, {precision}, batches of {batches} a process{size}"


if __name__ == "__main__":
    main()
