"""Every decoder on every architecture that others released: shapes, and a gradient for every weight.

Widths, patches and embeddings are the released ones; of blocks there are the four that decoders are given. Tensors have
no values, so this takes no memory. What a decoder knows of an encoder is its `TapShape`: encoders are held to theirs,
and decoders are run on each that there is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ssl_eo.adapt.backbone import EncoderBackbone
from ssl_eo.adapt.model import TaskModel
from ssl_eo.components import available
from ssl_eo.eval.decoders import TapMaps, TapShape, build_decoder, kinds_of
from ssl_eo.models.patch_embed.base import PatchEmbed
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import load_sensor
from ssl_eo.train.tracing import without_values
from ssl_eo.weights import croma
from ssl_eo.weights.base import find_released

N_OUTPUTS, N_TAPS, GRID = 3, 4, 4
DECODERS = [name for name in available("ssl_eo.eval.decoders") if name != "unet"]  # which is of pixels


def _names() -> list[str]:
    with pytest.raises(ValueError, match="known: ") as error:
        find_released("none")
    return str(error.value).split("known: ")[1].rstrip(")").split(", ")


def _released(name: str) -> tuple[EncoderConfig, int | None]:
    """What it is, of four blocks."""
    if name in croma.PAIRS:
        optical = croma.PAIRS[name].build().optical
        return replace(optical.cfg, depth=N_TAPS), optical.n_channels
    released = find_released(name)
    return replace(released.config, depth=N_TAPS), released.n_channels


RELEASED = {name: _released(name) for name in _names()}


def _shape(cfg: EncoderConfig) -> TapShape:
    return TapShape((cfg.width,) * N_TAPS, (cfg.patch_size,) * N_TAPS, cfg.cls_token)


SHAPES = sorted({_shape(cfg) for cfg, _ in RELEASED.values()}, key=str)


def test_every_family_is_here() -> None:
    assert {name.split("_")[0] for name in RELEASED} >= {"dinov2", "dofa", "croma", "mae", "panopticon", "prithvi"}
    assert len(RELEASED) > len(SHAPES) > 5
    assert len(DECODERS) == 8


@pytest.mark.parametrize("name", RELEASED)
def test_encoders_give_what_their_shape_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, n_channels = RELEASED[name]
    sensor = load_sensor("sentinel2_l2a")
    channels = sensor.channel_meta(sensor.band_names[: n_channels or 4])
    if n_channels is not None:  # of any sensor: a convolution does not ask which
        channels = channels.select([0] * n_channels)
    side = GRID * cfg.patch_size
    inputs = EncoderInput(torch.zeros(2, channels.n_channels, side, side), channels, gsd_m=10.0)
    if cfg.time_encoding or cfg.location_encoding:
        inputs = replace(inputs, dates=torch.full((2, 1, 2), 2020.0), location=torch.full((2, 2), 47.0))
    with torch.device("meta"):  # weights are not drawn, which looks at values
        backbone = EncoderBackbone(Encoder(cfg, n_channels))
    monkeypatch.setattr(PatchEmbed, "check", lambda *_: None)  # which looks at them too
    with without_values():
        taps = backbone.to_empty(device="cpu")(inputs)
        _check_taps(taps, _shape(cfg))
        total = torch.stack([x.sum() for x in taps.maps]).sum()
        (total if taps.cls is None else total + taps.cls.sum()).backward()
        for key, p in backbone.named_parameters():
            assert key == "encoder.mask_token" or (p.grad is not None and p.grad.shape == p.shape), key
    assert backbone.shape == _shape(cfg)


def _check_taps(taps: TapMaps, shape: TapShape) -> None:
    assert [tuple(x.shape) for x in taps.maps] == [(2, width, GRID, GRID) for width in shape.widths]
    assert (taps.cls is not None) == shape.has_cls
    assert taps.cls is None or tuple(taps.cls.shape) == (2, shape.widths[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.widths[0]}-{s.strides_px[0]}-{s.has_cls}")
def test_decoders_take_the_taps_of_every_encoder(shape: TapShape) -> None:
    side = GRID * shape.strides_px[0]
    with torch.device("meta"):
        maps = [torch.zeros(2, width, GRID, GRID, requires_grad=True) for width in shape.widths]
        taps = TapMaps(maps, torch.zeros(2, shape.widths[-1]) if shape.has_cls else None)
        for name in DECODERS:
            decoder = build_decoder(name, {}, shape, N_OUTPUTS)
            logits: Tensor = TaskModel(_Taps(shape), decoder).decode(taps, (side, side), (side, side))
            is_map = kinds_of(name) == ("segmentation",)
            assert tuple(logits.shape) == ((2, N_OUTPUTS, side, side) if is_map else (2, N_OUTPUTS)), name
            for x in maps:
                x.grad = None
            logits.sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in decoder.parameters()), name
            assert maps[-1].grad is not None, name


class _Taps(EncoderBackbone):
    """A backbone of a shape alone."""

    def __init__(self, shape: TapShape) -> None:
        nn.Module.__init__(self)
        self.shape = shape
