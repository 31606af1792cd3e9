"""How much memory the steps of a real run take at most.

A program too, whose processes hold nothing else: `python measuring.py FILE CONFIG OUT_DIR [key=value ...]` writes the
bytes of each rank to `FILE.<rank>`. In a forked process what the parent had freed would not be seen to be taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch

from ssl_eo.config import load
from ssl_eo.distributed import AgreedFlag, init_world, rank, shutdown
from ssl_eo.train import run_dir
from ssl_eo.train.prefetch import DeviceBatches
from ssl_eo.train.trainer import Trainer
from ssl_eo.train.watch import Watch

N_STEPS = 2  # the moments of the optimiser come into being at the end of the first
_M_MMAP_THRESHOLD = -3  # of mallopt


def peak_bytes(config: str, out_dir: str, *overrides: str) -> int:
    """What the first steps, as the trainer takes them, add to what this process holds."""
    # The C library keeps freed blocks for later, more or fewer from run to run: told to give back at once all but
    # small ones, it leaves what lives.
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16) == 1
    _warm_up()
    before = _resident_bytes("VmRSS")
    settings = [f"run.out_dir={out_dir}", "data.n_workers=0", "log.report=false", *overrides]
    world, built = init_world(), load(config, settings)
    with (
        run_dir.claim(built.run_dir, built),
        contextlib.closing(Trainer(built, world, AgreedFlag(), Watch(world, 60.0))) as trainer,
    ):
        trainer.model.train()
        batches = DeviceBatches(iter(trainer.loader), world.device)
        for _ in range(N_STEPS):
            trainer._train_step(batches)
        return _resident_bytes("VmHWM") - before


def _warm_up() -> None:
    """Let torch load what it loads at a first step, whatever is trained."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(8, 8)).sum().backward()
    optimizer.step()


def _resident_bytes(what: str) -> int:
    """Resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    n_bytes = peak_bytes(*arguments)
    Path(f"{file}.{rank()}").write_text(str(n_bytes))
    shutdown()
