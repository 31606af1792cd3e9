"""The masked autoencoder, which waits at one step for a signal or dies at another; an objective of a user's own."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_eo.data.types import Batch
from ssl_eo.distributed import rank
from ssl_eo.objectives import mae
from ssl_eo.objectives.base import Losses

_SIGNAL_COMES_WITHIN_S = 120


@dataclass
class Config(mae.Config):
    """Each happens once a rank: a file `mark`.`rank` is left, and where it is found nothing happens any more."""

    waits_at: int | None = None  # the step at which every rank waits for a signal
    dies_at: int | None = None  # the step at which rank 1 is killed
    mark: str = ""


class Objective(mae.Objective):
    cfg: Config

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        mark = Path(f"{self.cfg.mark}.{rank()}")
        if batch.step == self.cfg.waits_at and not mark.exists():
            _wait_for_signal(mark)
        if batch.step == self.cfg.dies_at and rank() == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch, now)


def _wait_for_signal(mark: Path) -> None:
    """Leave `mark` once a signal would be noticed, and wait until one has come to a handler."""
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    ours.settimeout(_SIGNAL_COMES_WITHIN_S)
    before = signal.set_wakeup_fd(pythons.fileno())
    try:
        mark.touch()
        ours.recv(1)
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        pythons.close()
