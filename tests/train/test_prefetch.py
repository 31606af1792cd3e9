"""Batches arrive in order, on the device, each once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from ssl_eo.data.types import Batch, MaskBatch
from ssl_eo.train.prefetch import DeviceBatches

N_BATCHES = 5
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _batches(device: torch.device) -> Iterator[Batch]:
    for step in range(N_BATCHES):
        time.sleep(0.01)
        mask = torch.full((4, 1 << 16), bool(step % 2))
        ids = torch.full((4, 1 << 16), step)
        if device.type == "cuda":
            mask, ids = mask.pin_memory(), ids.pin_memory()
        yield Batch(step, 0, ["a", "b"], {}, {}, {"image": MaskBatch(mask, ids, ids)})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_each_batch_comes_once_and_whole(device: str) -> None:
    batches = DeviceBatches(_batches(torch.device(device)), torch.device(device))
    sums = []
    for step in range(N_BATCHES):
        batch = batches.take()
        ids = batch.masks["image"].ids_keep
        assert batch.step == step
        assert ids.device.type == device
        work = torch.ones(512, 512, device=device)
        for _ in range(20):
            work = work @ work / 512
        sums.append(ids.float().mean() * work[0, 0])  # read late, after the next copy has begun
        del batch, ids
        batches.prefetch()
    assert torch.stack(sums).tolist() == pytest.approx(list(range(N_BATCHES)))
    assert batches.waited_s >= 0.01 * N_BATCHES
    with pytest.raises(StopIteration):
        batches.take()
