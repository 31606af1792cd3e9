"""What a step of self-distillation costs. One table, with the targets that this repository sets itself.

    python benchmarks/dinov2.py [--only SECTION] [--device cuda] [--bfloat16] [--batch-size N] [--turns N]

forms      a training step with channel attention in its factorised form, beside the direct form of the same function
memory     the most that such a step takes, beyond what stays between steps and with it; with all activations of the
           blocks kept, and with `parallel.activation_checkpointing: full`
channels   a step on the 202 channels of EnMAP beside the 13 of Sentinel-2
masks      block masks of a batch, beside the loop over cells of research code

The step is that of Panopticon's recipe: a ViT-B/14, student and teacher, two global views of 224 pixels and 13 channels
and four local ones of 98 pixels and 4 channels, and a head of 65,536 prototypes. It goes from the forward pass through
backward, clipping and AdamW to the moving averages. Two cores need half an hour for all sections and 10 GB of memory.
`--size small` is a toy that shows in a minute that everything works; its figures say nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import _table
import torch
from _masking import measure_masks
from _stepping import measure_channels, measure_forms, measure_peak
from _training import Setting

SECTIONS: dict[str, Callable[[Setting, int], list[_table.Row]]] = {
    "forms": measure_forms,
    "memory": lambda setting, _: measure_peak(setting),
    "channels": measure_channels,
    "masks": lambda _, n_turns: measure_masks(n_turns),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, as train.precision has it")
    parser.add_argument("--batch-size", type=int, help="samples of a step; by default 2 on a CPU, 32 on a GPU")
    parser.add_argument("--turns", type=int, default=5, help="steps of each kind that are measured, after a first one")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="small: a toy")
    arguments = parser.parse_args()
    setting = Setting(
        device=arguments.device,
        batch_size=arguments.batch_size or (32 if arguments.device == "cuda" else 2),
        bfloat16=arguments.bfloat16,
        toy=arguments.size == "small",
    )
    rows = []
    for name in [arguments.only] if arguments.only else SECTIONS:
        rows += SECTIONS[name](setting, arguments.turns)
    print(_table.text(rows))
    print(f"\n{_conditions(setting)}")


def _conditions(setting: Setting) -> str:
    threads = f"{torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if setting.device == "cuda" else threads
    precision = "bfloat16" if setting.bfloat16 else "float32"
    size = ", --size small: a toy" if setting.toy else ""
    return f"{_table.machine()}, {device}, {precision}, batch of {setting.batch_size}{size}"


if __name__ == "__main__":
    main()
