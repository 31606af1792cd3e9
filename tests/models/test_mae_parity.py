"""Encoder and decoder together reproduce numbers of the original masked autoencoder."""

import pytest
import torch
from torch import nn

from ssl_eo.models.decoders import DecoderConfig, LinearOutput, MaskedDecoder
from ssl_eo.models.patch_embed import cut_patches
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import Band, ChannelMeta, Sensor

RGB = tuple(Band(n, "optical", 10.0, wavelength_um=w) for n, w in (("r", 0.665), ("g", 0.56), ("b", 0.49)))


def rgb_channels() -> ChannelMeta:
    return Sensor("rgb", "rgb", RGB, "uint8", "dn", "test").channel_meta()


def reference_name(module: str, name: str) -> str:
    """The name that the reference implementation gives to our parameter."""
    if module == "encoder":
        return name
    if module == "output":
        return name.replace("proj.", "decoder_pred.")
    for ours, theirs in (("embed.", "decoder_embed."), ("blocks.", "decoder_blocks."), ("norm.", "decoder_norm.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@torch.no_grad()
def fill_by_formula(module: nn.Module, prefix: str) -> None:
    """v_j = 0.05 sin(0.37 j + h), h a hash of the name; plus 1 for weights of norms."""
    for name, parameter in module.named_parameters():
        name = reference_name(prefix, name)
        h = sum(name.encode("ascii")) % 97
        j = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.05 * torch.sin(0.37 * j + h)
        if parameter.ndim == 1 and name.endswith("weight"):
            values += 1.0
        parameter.copy_(values.view(parameter.shape))


def test_fingerprint_of_the_original():
    cfg = EncoderConfig(embed_dim=48, depth=2, n_heads=4, patch_size=8, patch_embed="conv")
    encoder = Encoder(cfg, n_channels=3)
    decoder = MaskedDecoder(DecoderConfig(embed_dim=32, depth=1, n_heads=4), encoder_dim=48)
    output = LinearOutput(32, 3, 64)
    for module, prefix in ((encoder, "encoder"), (decoder, "decoder"), (output, "output")):
        fill_by_formula(module, prefix)

    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    image = torch.stack([torch.sin(0.1 * k * y + 0.1) + torch.cos(0.07 * k * x - 0.1) for k in (1, 2, 3)])[None]
    noise = torch.tensor([[(7 * i) % 16 for i in range(16)]])
    order = noise.argsort(1)
    ids_keep, ids_masked = order[:, :4].sort().values, order[:, 4:].sort().values
    assert ids_keep.tolist() == [[0, 5, 7, 14]]
    channels = rgb_channels()
    with torch.no_grad():
        (tokens,) = encoder([EncoderInput(image, channels, ids_keep=ids_keep)])
        pred = output(decoder(tokens, ids_keep, ids_masked, all_patches=True), channels)
        hidden = output(decoder(tokens, ids_keep, ids_masked), channels)

    assert pred.mean().item() == pytest.approx(0.000126, abs=1e-6)
    assert pred.std().item() == pytest.approx(0.688638, abs=1e-6)
    torch.testing.assert_close(pred[0, 0, :3], torch.tensor([0.01065, -0.69648, -1.06362]), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, pred.take_along_dim(ids_masked[..., None], 1))

    target = cut_patches(image, 8)[0].transpose(2, 3).flatten(2)  # row, column, channel last
    target = target.take_along_dim(ids_masked[..., None], 1)
    normed = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert ((hidden - normed) ** 2).mean().item() == pytest.approx(1.459358, abs=1e-6)
    assert ((hidden - target) ** 2).mean().item() == pytest.approx(1.633334, abs=1e-6)
