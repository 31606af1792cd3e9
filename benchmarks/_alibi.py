"""What 2-D ALiBi costs in a step of CROMA: biases from the places of visible patches, or taken from those of all.

Research code computes the biases between all patches of a view once, repeats them for every sample of a batch and
gathers those between visible patches, three times a step: in each encoder, and across. Here they are computed from
where the visible patches are.

B samples, A heads, N patches of a view, Q and L visible ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from _memory import in_fresh_process
from _stepping import STATUS, resident_mb
from _table import Row
from _timing import best_processor_seconds, median_wall_seconds
from torch import Tensor

from ssl_eo.models import cross_encoder, vit
from ssl_eo.models.alibi import alibi_bias
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import EncoderInput
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.croma import PAIRS

__all__ = ["measure_alibi"]

GRID, N_KEPT, N_HEADS = (15, 15), 56, 16  # views of 120 pixels, patches of 8, three quarters of them hidden
BANDS = {"sentinel2_l2a": None, "sentinel1_grd": "vv_vh"}

Bias = Callable[..., Tensor]


def measure_alibi(device: str, n_turns: int, batch_size: int, n_biased: int = 64, toy: bool = False) -> list[Row]:
    """The biases of a step of `n_biased` samples by themselves, and a forward and backward pass of `batch_size`.

    `toy` is a small model that shows in seconds that everything works.
    """
    forms = {"materialised": materialised_bias, "closed form": alibi_bias}
    where = torch.device(device)
    ids = [_visible(n_biased, seed, where) for seed in range(2)]
    apart = max(
        float((a - b).abs().max()) for a, b in zip(*(_biases(f, ids, where) for f in forms.values()), strict=True)
    )
    calls = {name: partial(_biases, form, ids, where) for name, form in forms.items()}
    seconds = _seconds(calls, n_turns, device)
    what = f"biases of a step, batch of {n_biased}"
    slow = seconds["materialised"]
    rows = [
        *(Row("alibi", f"{what}, {name}", 1e3 * s, "ms", s / slow) for name, s in seconds.items()),
        *_memory(device, what, n_biased),
        Row("alibi", f"{what}, largest difference", apart, "", most=0.0),
    ]
    model, inputs = _model(toy, where), _inputs(batch_size, where)
    seconds = _seconds({name: partial(_pass, form, model, inputs) for name, form in forms.items()}, n_turns, device)
    slow = seconds["materialised"]
    what = f"encoders forward and backward, batch of {batch_size}"
    return [*rows, *(Row("alibi", f"{what}, {name}", s, "s", s / slow) for name, s in seconds.items())]


def _seconds(calls: dict[str, Callable[[], object]], n_turns: int, device: str) -> dict[str, float]:
    """Of a CPU processor time on one thread, which other work on the machine does not reach."""
    if device == "cpu":
        return best_processor_seconds(calls, n_turns)
    return median_wall_seconds(calls, n_turns, device)


def materialised_bias(
    grid: tuple[int, int],
    n_heads: int,
    device: torch.device,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    n_prefix: int = 0,
) -> Tensor:
    """As `alibi_bias`, by repeating the biases between all patches over the batch: `[B, A, Q, L]`."""
    assert query_ids is not None
    assert n_prefix == 0
    keys = query_ids if key_ids is None else key_ids
    (b, q), length, n = query_ids.shape, keys.shape[1], grid[0] * grid[1]
    table = alibi_bias(grid, n_heads, device).repeat(b, 1, 1, 1)  # [B, A, N, N]
    flat = table.flatten(2).transpose(1, 2)  # [B, N*N, A]
    index = (query_ids[:, :, None] * n + keys[:, None]).flatten(1)  # [B, Q*L]
    picked = flat.gather(1, index[..., None].expand(-1, -1, n_heads))  # [B, Q*L, A]
    return picked.transpose(1, 2).reshape(b, n_heads, q, length).contiguous()


def _biases(form: Bias, ids: list[Tensor], device: torch.device) -> list[Tensor]:
    """Of both encoders, and across."""
    optical, radar = ids
    across = form(GRID, N_HEADS, device, radar, optical)
    return [form(GRID, N_HEADS, device, optical), form(GRID, N_HEADS, device, radar), across]


def _memory(device: str, what: str, n_samples: int) -> list[Row]:
    if device == "cpu" and not STATUS.exists():
        return [Row("alibi", f"{what}: memory needs the /proc of Linux", None, "MB")]
    slow, fast = (in_fresh_process(peak_mb, device, n_samples, is_slow) for is_slow in (True, False))
    return [
        Row("alibi", f"{what}, memory, materialised", slow, "MB", 1.0),
        Row("alibi", f"{what}, memory, closed form", fast, "MB", fast / slow),
    ]


def peak_mb(device: str, n_samples: int, is_materialised: bool) -> float:
    """The most that the biases of a step take, MB."""
    where = torch.device(device)
    form = materialised_bias if is_materialised else alibi_bias
    _biases(form, [_visible(1, seed, where) for seed in range(2)], where)  # what is cached comes into being
    ids = [_visible(n_samples, seed, where) for seed in range(2)]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _biases(form, ids, where)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before_mb = resident_mb("VmRSS")
    _biases(form, ids, where)
    return resident_mb("VmHWM") - before_mb


def _visible(n_samples: int, seed: int, device: torch.device) -> Tensor:
    noise = torch.rand(n_samples, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, :N_KEPT].to(device)


def _model(toy: bool, device: torch.device) -> OpticalRadar:
    """CROMA base."""
    cfg = PAIRS["croma_base"].config
    if toy:
        cfg = replace(cfg, embed_dim=64, depth=2)
    half = cfg.n_blocks // 2
    model = OpticalRadar.of_sizes(cfg, replace(cfg, depth=half), (12, 2), half)
    for part in model.children():
        part.init_weights()  # type: ignore[operator]
    return model.to(device)


def _inputs(batch_size: int, device: torch.device) -> list[EncoderInput]:
    inputs = []
    for seed, (name, bands) in enumerate(BANDS.items()):
        sensor = load_sensor(name)
        channels = sensor.channel_meta(sensor.resolve_bands(bands)).to(device)
        pixels = torch.randn(batch_size, channels.n_channels, 120, 120, device=device)
        inputs.append(EncoderInput(pixels, channels, ids_keep=_visible(batch_size, seed, device)))
    return inputs


def _pass(form: Bias, model: OpticalRadar, inputs: list[EncoderInput]) -> None:
    with _biases_by(form):
        joint = model(*inputs)[2]
        joint.x.square().mean().backward()
    model.zero_grad()


@contextlib.contextmanager
def _biases_by(form: Bias) -> Iterator[None]:
    """The models take their biases from `form`."""
    try:
        vit.alibi_bias = cross_encoder.alibi_bias = form  # type: ignore[assignment]
        yield
    finally:
        vit.alibi_bias = cross_encoder.alibi_bias = alibi_bias
