"""Batches on the device. On a GPU the next one is copied while the step before it computes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ssl_eo.data.types import Batch, map_tensors, move_to

__all__ = ["DeviceBatches"]


class DeviceBatches:
    """Hands out the batches of an iterator in order, each on `device`.

    Call `take`, queue the work on the batch, then call `prefetch`: it starts the copy of the next batch on a stream of
    its own, beside that work. Copies overlap only if the batches are in page-locked memory (`data.pin_memory`). On a
    CPU `prefetch` does nothing. `waited_s` counts the seconds spent waiting for the iterator.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: Batch | None = None
        self.waited_s = 0.0

    def take(self) -> Batch:
        """The next batch; raises `StopIteration` after the last."""
        if self._stream is None:
            return self._copy()
        if self._ahead is None:
            self.prefetch()
        batch, self._ahead = self._ahead, None
        if batch is None:
            raise StopIteration
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)

        def used_by_current(x: Tensor) -> Tensor:
            x.record_stream(current)  # else its memory could be handed out again while `current` still reads it
            return x

        taken: Batch = map_tensors(used_by_current, batch)
        return taken

    def prefetch(self) -> None:
        """Start to copy the batch that `take` will return next, if there is one."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            try:
                self._ahead = self._copy()
            except StopIteration:
                self._ahead = None

    def _copy(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - start
        return move_to(batch, self._device, non_blocking=True)
