"""The output head that is generated from wavelengths, against its formula one value at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssl_eo.models.generated_output import GeneratedOutput
from ssl_eo.models.patch_embed import DynamicConfig

DIM, N_VALUES, N_CHANNELS, WIDTH = 6, 4, 3, 8
SMALL = DynamicConfig(generator_dim=WIDTH, n_weight_tokens=5, n_heads=2, ffn_dim=16)


@pytest.fixture
def head() -> GeneratedOutput:
    """Every parameter random and of a size that matters."""
    head = GeneratedOutput(DIM, N_VALUES, SMALL).double()
    head.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return head


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randn(N_CHANNELS, WIDTH, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_a_channel_s_code_writes_the_weights_of_this_channel_s_pixels(head: GeneratedOutput) -> None:
    """Value e of channel c is that of row (c, e) of what is generated. Values of a patch have their channel last."""
    x, codes = _inputs()
    generator = head.weight_generator
    sequence = torch.cat((generator.weight_tokens, codes, generator.bias_token))
    out = generator.transformer_encoder(sequence)
    found = head(x, codes)
    assert found.shape == (2, 5, N_VALUES * N_CHANNELS)
    for c in range(N_CHANNELS):
        numbers = generator.fc_weight.weight @ (out[5 + c] + codes[c]) + generator.fc_weight.bias
        for e in range(N_VALUES):
            row = numbers[e * DIM : (e + 1) * DIM] * 0.01
            torch.testing.assert_close(found[:, :, e * N_CHANNELS + c], x @ row)


@torch.no_grad()
def test_the_order_of_channels_does_not_matter(head: GeneratedOutput) -> None:
    x, codes = _inputs()
    order = [2, 0, 1]
    before = head(x, codes).unflatten(-1, (N_VALUES, N_CHANNELS))
    after = head(x, codes[order]).unflatten(-1, (N_VALUES, N_CHANNELS))
    torch.testing.assert_close(after, before[..., order])


def test_every_parameter_is_trained_and_there_is_no_bias(head: GeneratedOutput) -> None:
    x, codes = _inputs()
    head(x, codes).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    assert not any("fc_bias" in name for name, _ in head.named_parameters())
    assert not head(torch.zeros_like(x), codes).any()
