"""Published weights of MAE: the whole file of pre-training, or the encoder alone, becomes an encoder of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_formula import uniform, weights
from torch import Tensor

from ssl_eo.models.position import sincos_grid
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.sensors import load_sensor
from ssl_eo.weights import mae
from ssl_eo.weights.base import export_released, find_released, import_released, read_released

TINY = "mae_tiny"
COUNTS = {"mae_vitb16": 85_798_656, "mae_vitl16": 303_301_632, "mae_vith14": 630_764_800}


@pytest.fixture(scope="module", autouse=True)
def _tiny_member_of_the_family() -> Iterator[None]:
    base = find_released("mae_vitb16")
    config = replace(base.config, embed_dim=16, depth=2, n_heads=2, image_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae, "MODELS", (*mae.MODELS, replace(base, name=TINY, config=config)))
        yield


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    released = find_released(TINY)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    own = weights({name: tuple(value.shape) for name, value in encoder.state_dict().items()})
    own["pos_embed"] = torch.cat((torch.zeros(1, 16), sincos_grid((4, 4), 16, torch.device("cpu"))))[None]
    return own


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name: str) -> None:
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[name]


def test_the_decoder_is_left_out_and_the_encoder_comes_back(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 16)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": {**tensors, **decoder}, "epoch": 799}, tmp_path / "mae.pth")
    encoder = read_released(tmp_path / "mae.pth", find_released(TINY))[0]
    assert all(torch.equal(value, tensors[name]) for name, value in encoder.state_dict().items())
    assert encoder.state_dict().keys() == tensors.keys()
    import_released(tmp_path / "mae.pth", TINY, tmp_path / "bundle")
    export_released(encoder, TINY, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == tensors.keys()


def test_its_positions_are_those_of_sincos(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """At the native size an encoder that computes positions gives the numbers of the stored table."""
    torch.save(tensors, tmp_path / "mae.pth")
    stored = read_released(tmp_path / "mae.pth", find_released(TINY))[0]
    computed = Encoder(replace(stored.cfg, position="sincos"), 3)
    computed.load_state_dict({name: value for name, value in tensors.items() if name != "pos_embed"})
    item = EncoderInput(uniform("pixels", (2, 3, 64, 64)), load_sensor("rgb").channel_meta())
    with torch.no_grad():
        first, second = stored([item])[0].x, computed.eval()([item])[0].x
    torch.testing.assert_close(first, second)
