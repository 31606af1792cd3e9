"""What training a model takes: floating point operations and memory of a step, and energy where it is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.training import TrainingConfig, autocast
from ssl_eo.components import import_extra, suggest
from ssl_eo.models.vit import EncoderInput
from ssl_eo.train.tracing import Ledger

__all__ = ["Energy", "StepCost", "check_country", "energy_of", "samples_per_second", "step_cost"]

_N_PASSES = 3
_ENERGY = "study.country (energy and CO2)"


@dataclass(frozen=True)
class StepCost:
    """Of one sample forward, and of a whole training step; two operations a multiply-add."""

    forward_gflop: float
    step_gflop: float  # of a sample, forward and backward
    memory_gb: float  # weights, gradients, AdamW's moments, and what is alive in a step at its worst moment


@dataclass
class Energy:
    """What was used, once it is known; None where it is not measured."""

    kwh: float | None = None
    co2_kg: float | None = None


def step_cost(model: TaskModel, inputs: EncoderInput, size: tuple[int, int], cfg: TrainingConfig) -> StepCost:
    """The cost of training `model` on `inputs` as `cfg` has it, backbone included, whether or not features were kept.

    One step runs, of which nothing is left: no gradients, no statistics of norms. Attention is taken apart into its
    products, so memory is an upper bound where a fused kernel would do it.
    """
    was_training, n_samples = model.training, len(inputs.pixels)
    model.train()
    weights = list(model.parameters())
    statistics = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), Ledger() as ledger:
        ledger.leave_out([*weights, *model.buffers(), inputs.pixels])
        with ledger.phase("forward"), autocast(inputs.pixels.device, cfg):
            logits = model(inputs, size)
        with ledger.phase("backward"):
            logits.float().square().mean().backward()
    gradients = [p.grad for p in weights if p.grad is not None]
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), statistics, strict=True):
        buffer.copy_(before)
    model.train(was_training)
    state = _bytes(weights) + 2 * _bytes(gradients)  # AdamW keeps two moments; gradients are in the peak
    peak = max(alive.total for alive in ledger.peaks.values())
    flop = ledger.flop
    return StepCost(
        flop["forward"] / n_samples / 1e9,
        (flop["forward"] + flop["backward"]) / n_samples / 1e9,
        (state + peak) / 1e9,
    )


@torch.no_grad()
def samples_per_second(model: TaskModel, inputs: EncoderInput, size: tuple[int, int], cfg: TrainingConfig) -> float:
    """How many samples of `inputs`, which are in memory, become logits in a second: pixels, encoder and decoder.

    The fastest of some passes, as others are of what else the machine does.
    """
    device, times = inputs.pixels.device, []
    was_training = model.training
    model.eval()
    for _ in range(_N_PASSES + 1):  # the first one warms up
        start = time.perf_counter()
        with autocast(device, cfg):
            model(inputs, size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    model.train(was_training)
    return len(inputs.pixels) / min(times[1:])


def check_country(country: str | None) -> None:
    """Raise `ValueError` for a country that codecarbon does not know: it would take the mean of the world for it."""
    if country is None:
        return
    known = import_extra("energy", "codecarbon.input", _ENERGY).DataSource().get_global_energy_mix_data()
    if country not in known:
        raise ValueError(
            f"country: codecarbon knows none that is called {country!r}{suggest(country, list(known))}; give the three"
            " letters of ISO 3166, such as DEU"
        )


@contextmanager
def energy_of(country: str | None) -> Iterator[Energy]:
    """Measure what runs inside by codecarbon, at the carbon intensity of `country`; nothing where that is None.

    Where a machine does not tell its power, codecarbon estimates it from the kind of processor.
    """
    found = Energy()
    if country is None:
        yield found
        return
    codecarbon: Any = import_extra("energy", "codecarbon", _ENERGY)
    logging.getLogger("codecarbon").setLevel(logging.ERROR)  # which tells of itself before it reads log_level
    options = {"save_to_file": False, "log_level": "error", "allow_multiple_runs": True}
    tracker = codecarbon.OfflineEmissionsTracker(country_iso_code=country, **options)
    tracker.start()
    try:
        yield found
    finally:
        found.co2_kg = tracker.stop()
        found.kwh = tracker.final_emissions_data.energy_consumed


def _bytes(tensors: list[nn.Parameter] | list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
