"""The UNet: any size, gradients, its number of weights, learning by heart."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ssl_eo.eval.decoders.unet import UNet

WIDTHS = (8, 12, 16)


def _pixels(n: int, height: int, width: int, n_channels: int = 4) -> torch.Tensor:
    return torch.randn(n, n_channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("size", [(16, 16), (13, 22), (7, 5)])
def test_any_size_and_a_gradient_for_every_parameter(size: tuple[int, int], norm: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 3, WIDTHS, norm)  # type: ignore[arg-type]
    for n in (1, 2):
        logits = model(_pixels(n, *size))
        assert logits.shape == (n, 3, *size)
        model.zero_grad()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any()) for p in model.parameters())


def test_a_pixel_at_inference() -> None:
    assert UNet(4, 3, WIDTHS).eval()(_pixels(1, 1, 1)).shape == (1, 3, 1, 1)


def test_images_do_not_see_each_other_at_inference() -> None:
    model, pixels = UNet(4, 3, WIDTHS), _pixels(3, 12, 20)
    model(pixels)  # moves running statistics
    together = model.eval()(pixels)
    torch.testing.assert_close(model(pixels[1:2])[0], together[1], rtol=1e-4, atol=1e-5)


def test_size_of_the_default() -> None:
    """Two convolutions a level down, two up on what is beneath and beside it, a linear layer; norms for biases."""
    with torch.device("meta"):
        model = UNet(6, 2)
    widths = (6, 64, 128, 256, 512)
    expected = sum(9 * (a * b + b * b) + 4 * b for a, b in pairwise(widths))
    expected += sum(9 * ((a + b) * a + a * a) + 4 * a for a, b in pairwise(widths[1:]))
    assert sum(p.numel() for p in model.parameters()) == expected + 2 * 64 + 2


def test_details_pass_the_skips() -> None:
    """A single pixel of another class is found, which no coarser level can place."""
    pixels = _pixels(1, 16, 16)
    labels = (pixels[:, 0] > 0.5).long() + (pixels[:, 1] > 0.5).long()
    torch.manual_seed(0)
    model = UNet(4, 3, (16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    assert float((model.eval()(pixels).argmax(1) == labels).float().mean()) > 0.98


def test_wrong_sizes() -> None:
    for arguments in ((0, 2, WIDTHS), (3, 0, WIDTHS), (3, 2, ()), (3, 2, (8, 0))):
        with pytest.raises(ValueError, match="a UNet needs a channel, an output and a level"):
            UNet(*arguments)  # type: ignore[arg-type]
