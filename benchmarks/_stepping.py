"""Time and memory of a training step: with both forms of channel attention, and on many channels."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _memory import in_fresh_process
from _table import Row
from _timing import median_wall_seconds
from _training import Setting, Training
from torch import Tensor

from ssl_eo.data.types import Batch

__all__ = ["measure_channels", "measure_forms", "measure_peak"]

SENTINEL2, ENMAP = "sentinel2_l1c", "enmap:spectral_earth"  # 13 and 202 channels
N_LOCAL_CHANNELS = 4
# On a CPU memory is what is resident. The C library keeps freed blocks for later, more or fewer from run to run: told
# to give back at once those of a megabyte and above, it leaves what lives.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
STATUS = Path("/proc/self/status")
LARGE = 4  # on a CPU, peaks are of batches this many times as large: a gradient of each weight takes its memory anyway
# Rounding to float32 shows from 0.1 to some ppm; a term that is wrong or missing makes thousands.
MOST_PPM = 50


def measure_forms(setting: Setting, n_turns: int) -> list[Row]:
    """Steps of a training that takes turns between the forms, and how far apart these are on the first batch."""
    training = Training(setting, [SENTINEL2])
    batch = training.batch(N_LOCAL_CHANNELS)
    apart = _relative_differences(training, batch)

    def direct() -> None:
        with training.direct_form():
            training.step(batch)

    calls = {"direct": direct, "factorised": partial(training.step, batch)}
    seconds = median_wall_seconds(calls, n_turns, setting.device)
    slow, fast = seconds["direct"], seconds["factorised"]
    most = None if setting.bfloat16 else MOST_PPM
    return [
        Row("forms", "steps, direct form", setting.batch_size / slow, "samples/s", 1.0),
        Row("forms", "steps, factorised form", setting.batch_size / fast, "samples/s", slow / fast, least_ratio=2),
        *(Row("forms", f"{what}, one form beside the other", 1e6 * r, "ppm", most=most) for what, r in apart.items()),
    ]


def measure_peak(setting: Setting) -> list[Row]:
    """The most memory that a step takes, each form in a process of its own, with all activations kept and without."""
    if setting.device == "cpu" and not STATUS.exists():
        return [Row("memory", "needs the /proc of Linux", None, "MB")]
    if setting.device == "cpu":
        setting = replace(setting, batch_size=LARGE * setting.batch_size)
    recomputed = replace(setting, activation_checkpointing="full")
    return [*_peaks(setting, "activations kept"), *_peaks(recomputed, "checkpointed")]


def _peaks(setting: Setting, what: str) -> list[Row]:
    (direct_all, direct), (factorised_all, factorised) = (
        in_fresh_process(peak_mb, setting, is_direct, environment=GIVE_BACK) for is_direct in (True, False)
    )
    what = f"batch of {setting.batch_size}, {what}"
    ratio, whole = factorised / direct, f"{what}, and weights and moments"
    return [
        Row("memory", f"{what}, direct form", direct, "MB", 1.0),
        Row("memory", f"{what}, factorised form", factorised, "MB", ratio, most_ratio=0.6),
        Row("memory", f"{whole}, direct form", direct_all, "MB", 1.0),
        Row("memory", f"{whole}, factorised form", factorised_all, "MB", factorised_all / direct_all),
    ]


def measure_channels(setting: Setting, n_turns: int) -> list[Row]:
    """Steps on all channels of Sentinel-2 and of EnMAP, in all views or in global ones alone."""
    training = Training(setting, [SENTINEL2, ENMAP])
    rows = []
    for n_local, where in ((None, "all views"), (N_LOCAL_CHANNELS, f"global views, {N_LOCAL_CHANNELS} in local ones")):
        few, many = (training.batch(n_local, source) for source in range(2))
        calls = {"few": partial(training.step, few), "many": partial(training.step, many)}
        seconds = median_wall_seconds(calls, n_turns, setting.device)
        ratio = seconds["many"] / seconds["few"]
        rows += [
            Row("channels", _title(few, where), seconds["few"], "s", 1.0),
            Row("channels", _title(many, where), seconds["many"], "s", ratio, most_ratio=1.3),
        ]
    return rows


def _title(batch: Batch, where: str) -> str:
    return f"a step, {batch.pixels['global'].pixels.shape[1]} channels in {where}"


def peak_mb(setting: Setting, is_direct: bool) -> tuple[float, float]:
    """The most that a step takes: with what stays between steps, and without; not what Python takes. In MB."""
    imports_mb = resident_mb("VmRSS")
    training = Training(setting, [SENTINEL2])
    batch = training.batch(N_LOCAL_CHANNELS)
    with training.direct_form() if is_direct else contextlib.nullcontext():
        training.step(batch)  # the moments of the optimiser come into being
        training.step(batch)
    if setting.device == "cuda":
        most = torch.cuda.max_memory_allocated() / 1e6
    else:
        most = resident_mb("VmHWM") - imports_mb
    return most, most - training.state_bytes() / 1e6


def resident_mb(what: str) -> float:
    """Resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _relative_differences(training: Training, batch: Batch) -> dict[str, float]:
    """Of the loss, and of the gradient of the embedding, between the forms."""
    loss, gradient = _loss_and_gradient(training, batch)
    with training.direct_form():
        direct_loss, direct_gradient = _loss_and_gradient(training, batch)
    return {
        "loss": float((loss - direct_loss).abs() / direct_loss.abs()),
        "gradient of the embedding": float((gradient - direct_gradient).norm() / direct_gradient.norm()),
    }


def _loss_and_gradient(training: Training, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of all parameters of the student's patch embedding, in float64."""
    loss = training.gradients(batch).total.detach()
    embed = training.objective.student["encoder"].patch_embed
    gradient = torch.cat([p.grad.flatten() for p in embed.parameters() if p.grad is not None])
    training.optimizer.zero_grad(set_to_none=True)
    return loss.double(), gradient.double()
