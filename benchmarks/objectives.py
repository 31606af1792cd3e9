"""What steps of objectives cost beside the plain way of computing the same. One table, with targets.

    python benchmarks/objectives.py [--only SECTION] [--device cuda] [--batch-size N] [--turns N]

masked     a step of MAE ViT-B/16 that never embeds hidden patches, beside embedding all, dropping, an explicit softmax
multimae   a step of MultiMAE with its seven decoders run as one, beside a loop over them, and the decoders alone
alibi      CROMA's attention biases in closed form, beside a table that is gathered for each sample

`--size small` is a toy that shows in a minute that everything works; its figures say nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import _table
import torch
from _alibi import measure_alibi
from _masked import measure_masked
from _multimae import measure_decoders
from _objective_steps import Setting

SECTIONS: dict[str, Callable[[Setting, int], list[_table.Row]]] = {
    "masked": measure_masked,
    "multimae": measure_decoders,
    "alibi": lambda setting, n_turns: measure_alibi(setting.device, n_turns, setting.batch_size, toy=setting.toy),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=2, help="samples of a step")
    parser.add_argument("--turns", type=int, default=5, help="steps of each kind that are measured, after a first one")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="small: a toy")
    arguments = parser.parse_args()
    setting = Setting(device=arguments.device, batch_size=arguments.batch_size, toy=arguments.size == "small")
    rows = []
    for name in [arguments.only] if arguments.only else SECTIONS:
        rows += SECTIONS[name](setting, arguments.turns)
    print(_table.text(rows))
    threads = f"{torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if setting.device == "cuda" else threads
    size = ", --size small: a toy" if setting.toy else ""
    print(f"\n{_table.machine()}, {device}, float32, batch of {setting.batch_size}{size}")


if __name__ == "__main__":
    main()
