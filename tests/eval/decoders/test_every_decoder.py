"""What all decoders promise: shapes, gradients, logits, images that do not see each other, options that are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.components import available
from ssl_eo.eval.decoders import TapMaps, TapShape, build_decoder, find_decoder, kinds_of

PACKAGE = "ssl_eo.eval.decoders"
N_OUTPUTS, SIZE = 3, (37, 29)
SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "fcn": {"channels": 16, "n_convs": 2},
    "segformer": {"channels": 16},
    "upernet": {"channels": 16},
    "muster": {"channels": 16, "n_heads": 1, "window": 3, "mlp_ratio": 2.0},
    "identity": {},
    "mlp": {"hidden_dim": 16},
    "attentive_pool": {"n_heads": 2, "n_queries": 2},
}
OF_PIXELS = [name for name in SMALL if kinds_of(name) == ("segmentation",)]
OF_IMAGES = [name for name in SMALL if name not in OF_PIXELS]
WITH_NORM = OF_PIXELS

# What an encoder gives, and the grid of its first tap.
SHAPES: dict[str, tuple[TapShape, tuple[int, int]]] = {
    "one tap": (TapShape((16,), (8,)), (4, 4)),
    "two taps, odd": (TapShape((16, 16), (8, 8)), (5, 3)),
    "four taps": (TapShape((16,) * 4, (8,) * 4, has_cls=True), (4, 6)),
    "taps of several widths": (TapShape((8, 16, 16, 24), (8,) * 4), (4, 4)),
    "pyramid": (TapShape((8, 16, 32, 64), (4, 8, 16, 32)), (16, 24)),
    "odd pyramid that does not double": (TapShape((16, 24, 24), (8, 16, 16)), (7, 5)),
}


def taps_of(shape: TapShape, grid: tuple[int, int], n: int, seed: int = 0) -> TapMaps:
    g = torch.Generator().manual_seed(seed)
    finest = shape.strides_px[0]
    maps = []
    for width, stride in zip(shape.widths, shape.strides_px, strict=True):
        cells = (-(-side * finest // stride) for side in grid)
        maps.append(torch.randn(n, width, *cells, generator=g, requires_grad=True))
    return TapMaps(maps, torch.randn(n, shape.widths[-1], generator=g) if shape.has_cls else None)


def built(name: str, shape: TapShape, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_decoder(name, {**SMALL[name], **options}, shape, N_OUTPUTS)


def still(name: str) -> dict[str, Any]:
    """Options without anything random, and without statistics of the batch."""
    norm = {"norm": "layer"} if name in WITH_NORM else {}
    return {"dropout_prob": 0.0, **norm, **({"drop_path_prob": 0.0} if name == "muster" else {})}


def test_all_decoders_are_tested() -> None:
    assert sorted([*SMALL, "unet"]) == available(PACKAGE)  # the UNet has a file of its own


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name: str, case: str) -> None:
    """Every parameter has a gradient, from one image as from several, by the norm of the defaults."""
    shape, grid = SHAPES[case]
    decoder = built(name, shape, **({"drop_path_prob": 0.0} if name == "muster" else {}))
    for n in (1, 3):
        taps = taps_of(shape, grid, n)
        logits = decoder(taps, SIZE)
        assert logits.shape == ((n, N_OUTPUTS, *SIZE) if name in OF_PIXELS else (n, N_OUTPUTS))
        decoder.zero_grad()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        for key, parameter in decoder.named_parameters():
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key
            assert bool(parameter.grad.any()), key
        gradient = taps.maps[-1].grad
        assert gradient is not None
        assert bool(gradient.any())


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("name", WITH_NORM)
def test_all_norms(name: str, norm: str) -> None:
    """At inference an image is judged by itself, after training as before it."""
    shape, grid = SHAPES["four taps"]
    decoder, taps = built(name, shape, norm=norm), taps_of(shape, grid, 3)
    decoder(taps, SIZE)  # moves running statistics
    decoder.eval()
    together = decoder(taps, SIZE)
    for i in range(3):
        alone = decoder(TapMaps([m[i : i + 1] for m in taps.maps]), SIZE)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    trained = built(name, shape, norm=norm)
    assert not torch.equal(trained(taps, SIZE), trained(taps, SIZE))  # dropout


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_do_not_see_each_other(name: str) -> None:
    shape, grid = SHAPES["four taps"]
    decoder, taps = built(name, shape), taps_of(shape, grid, 3)
    together = decoder(taps, SIZE)
    alone = decoder(TapMaps([m[1:2] for m in taps.maps]), SIZE)
    torch.testing.assert_close(alone[0], together[1])


@pytest.mark.parametrize("name", SMALL)
def test_dropout_is_of_training_alone(name: str) -> None:
    shape, grid = SHAPES["two taps, odd"]
    taps = taps_of(shape, grid, 2)
    decoder = built(name, shape, **still(name) | {"dropout_prob": 0.5})
    assert not torch.equal(decoder(taps, SIZE), decoder(taps, SIZE))
    decoder.eval()
    judged = decoder(taps, SIZE)
    assert torch.equal(judged, decoder(taps, SIZE))
    without = built(name, shape, **still(name))
    without.load_state_dict(decoder.state_dict())
    assert torch.equal(without(taps, SIZE), judged)  # in training mode: nothing else differs


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_logits(name: str) -> None:
    """Negative ones too, and linear in the last layer: no softmax, no rectifier."""
    shape, grid = SHAPES["four taps"]
    decoder, taps = built(name, shape).eval(), taps_of(shape, grid, 2)
    logits = decoder(taps, SIZE)
    assert bool((logits < 0).any())
    last = [m for m in decoder.modules() if any(True for _ in m.parameters(recurse=False))][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(-3.0)
    torch.testing.assert_close(decoder(taps, SIZE), -3.0 * logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name: str) -> None:
    """What autocast makes of it is what float32 gives, up to its rounding."""
    shape, grid = SHAPES["four taps"]
    decoder, taps = built(name, shape, **still(name)), taps_of(shape, grid, 2)
    wanted = decoder(taps, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(taps, SIZE)
    found.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in decoder.parameters())
    assert float((found.float() - wanted).detach().norm() / wanted.detach().norm()) < 0.05


# Learning


def _tile() -> tuple[TapShape, TapMaps, Tensor]:
    """Three fields of a tile of 64 x 64 pixels, and noisy features of its 8 x 8 patches that tell them apart."""
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, :, 32:] = 1
    labels[:, 24:, 32:] = 2
    fields = F.adaptive_avg_pool2d(F.one_hot(labels, 3).movedim(-1, 1).float(), 8)  # [1, 3, 8, 8]
    shape, g = TapShape((16,) * 4, (8,) * 4), torch.Generator().manual_seed(0)
    maps = []
    for _ in shape.widths:
        seen = torch.einsum("dk,bkhw->bdhw", torch.randn(16, 3, generator=g), fields)
        maps.append(seen + 0.2 * torch.randn(1, 16, 8, 8, generator=g))
    return shape, TapMaps(maps), labels


def _miou(logits: Tensor, labels: Tensor) -> float:
    predicted = logits.argmax(1)
    both = [((predicted == k) & (labels == k)).sum() / ((predicted == k) | (labels == k)).sum() for k in range(3)]
    return float(torch.stack(both).mean())


@pytest.mark.parametrize("name", OF_PIXELS)
def test_overfits_a_tile(name: str) -> None:
    shape, taps, labels = _tile()
    decoder = built(name, shape)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(decoder(taps, (64, 64)), labels).backward()
        optimizer.step()
    assert _miou(decoder.eval()(taps, (64, 64)), labels) > 0.95


@pytest.mark.parametrize("name", OF_IMAGES)
def test_overfits_images(name: str) -> None:
    shape, grid = SHAPES["four taps"]
    taps, labels = taps_of(shape, grid, 12), torch.arange(12) % N_OUTPUTS
    decoder = built(name, shape)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(decoder(taps, SIZE), labels).backward()
        optimizer.step()
    assert torch.equal(decoder.eval()(taps, SIZE).argmax(1), labels)


# Options


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("upernet", {"chanels": 8}, r"decoder upernet has no option 'chanels'; did you mean 'channels'\?"),
        ("upernet", {"norm": "bach"}, r"norm must be one of batch, group, layer, got 'bach'; did you mean 'batch'\?"),
        ("upernet", {"neck": "halve"}, r"neck must be one of .*; did you mean 'halved'\?"),
        ("upernet", {"pools": []}, "pools must be a list of whole numbers, each from 1 to 65,536, got"),
        ("upernet", {"pools": [2, 0]}, "pools must be a list of whole numbers"),
        ("upernet", {"pools": 3}, "pools must be a list of whole numbers"),
        ("segformer", {"taps": "lst"}, r"taps must be one of all, last, .*; did you mean 'last'\?"),
        ("segformer", {"channels": 0}, "channels must be a whole number from 1 to 65,536, got 0"),
        ("segformer", {"channels": "512"}, "channels must be a whole number from 1 to 65,536, got '512'"),
        ("linear", {"dropout_prob": 1.0}, r"dropout_prob must be in \[0, 1\), got 1.0"),
        ("linear", {"dropout_prob": "a"}, r"dropout_prob must be in \[0, 1\), got 'a'"),
        ("fcn", {"upsampling": "shufle"}, r"upsampling must be one of .*; did you mean 'shuffle'\?"),
        ("fcn", {"n_convs": 0}, "n_convs must be"),
        ("muster", {"mlp_ratio": 0}, "mlp_ratio must be positive"),
        ("muster", {"mlp_ratio": "4"}, "mlp_ratio must be positive"),
        ("muster", {"mlp_ratio": math.inf}, "mlp_ratio must be positive and finite, got inf"),
        ("muster", {"window": True}, "window must be a whole number from 1 to 65,536, got True"),
        ("upernet", {"pools": [True]}, "pools must be a list of whole numbers"),
        ("linear", {"dropout_prob": True}, r"dropout_prob must be in \[0, 1\), got True"),
        ("unet", {"widths": ["a"]}, r"widths must be a list of whole numbers, each from 1 to 65,536, got \['a'\]"),
        ("unet", {"widths": []}, "widths must be a list of whole numbers"),
        ("unet", {"norm": 3}, "norm must be one of batch, group, layer, got 3"),
        ("muster", {"n_heads": 3}, "n_heads 3 must divide the width of the finest level, 4"),
        ("muster", {"drop_path_prob": -0.1}, "drop_path_prob must be in"),
        ("identity", {"pool": "clss"}, r"pool must be one of .*; did you mean 'cls'\?"),
        ("mlp", {"hidden_dim": 0}, "hidden_dim must be"),
        ("mlp", {"taps": "al"}, r"taps must be one of last, all, .*; did you mean 'all'\?"),
        ("attentive_pool", {"n_heads": 3}, "n_heads 3 must divide the width of the last tap, 16"),
        ("attentive_pool", {"n_queries": 0}, "n_queries must be"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_decoder(name, options, SHAPES["one tap"][0], N_OUTPUTS)


def test_wrong_decoders() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'upernet'\?"):
        find_decoder("uppernet")


def test_kinds() -> None:
    assert sorted(OF_PIXELS) == ["fcn", "linear", "muster", "segformer", "upernet"]
    assert {kinds_of(name) for name in OF_IMAGES} == {("classification", "multilabel", "regression")}


@pytest.mark.parametrize("name", ["segformer", "upernet", "muster"])
def test_more_taps_than_levels(name: str) -> None:
    with pytest.raises(ValueError, match="made of as many taps at most, got 5"):
        build_decoder(name, SMALL[name], TapShape((16,) * 5, (8,) * 5), N_OUTPUTS)


def test_wrong_taps() -> None:
    with pytest.raises(ValueError, match="one stride for each width"):
        TapShape((16, 16), (8,))
    with pytest.raises(ValueError, match="finest first"):
        TapShape((16, 16), (16, 8))


# Sizes of the published defaults, of four taps of a ViT-B and two classes; d = 768, c = 512

_D, _C = 768, 512
_NECK = 12 * _D * _D + 2 * _D + 2 * _D  # three transposed convolutions, the norm, two biases
_FULL_CLASSIFIER = 2 * _C + 2


def _conv(a: int, b: int, kernel: int) -> int:
    return kernel * kernel * a * b + 2 * b  # with its norm


def _muster() -> int:
    d = _D
    widths = [d // 4, d // 2, d, 2 * d]
    neck = 4 * d * d + 2 * d + 4 * d * (d // 4) + d // 4 + 4 * d * (d // 2) + d // 2 + d * 2 * d + 2 * d
    total = neck
    for w, heads in zip(widths, (4, 8, 16, 32), strict=True):
        feed_forward = 2 * w + 8 * w * w + 5 * w
        attention = 4 * w * w + 4 * w + heads * 23 * 23
        total += feed_forward + 2 * (3 * 2 * w + attention + feed_forward)
        total += 4 * w * w + (2 * w if w == d // 4 else 4 * w)  # fused: a bias on the finest level, else a norm
    wide = d // 2
    return total + 2 * wide + 8 * wide * wide + 5 * wide + _conv(wide, 256, 1) + 2 * 256 + 2


PUBLISHED = {
    "linear": 2 * _D + 2 * _D + 2,
    "fcn": _conv(_D, _C, 3) + 3 * _conv(_C, _C, 3) + _conv(_D + _C, _C, 3) + _FULL_CLASSIFIER,
    "segformer": _NECK + 4 * _conv(_D, _C, 1) + _conv(4 * _C, _C, 1) + _FULL_CLASSIFIER,
    "upernet": _NECK
    + 4 * (_conv(_D, _C, 1) + _C)  # pools, whose norm leaves a bias
    + _conv(_D + 4 * _C, _C, 3)
    + 3 * (_conv(_D, _C, 1) + _conv(_C, _C, 3))
    + _conv(4 * _C, _C, 3)
    + _FULL_CLASSIFIER,
    "muster": _muster(),
    "identity": 2 * _D + 2,
    "mlp": 4 * _D * _D + _D + 2 * _D + 2,
    "attentive_pool": _D + 2 * _D + 4 * _D * _D + 4 * _D + 2 * _D + 2,
}


@pytest.mark.parametrize("name", SMALL)
def test_sizes_of_the_published_defaults(name: str) -> None:
    with torch.device("meta"):
        decoder = build_decoder(name, {}, TapShape((_D,) * 4, (16,) * 4), 2)
    assert sum(p.numel() for p in decoder.parameters()) == PUBLISHED[name]
    if name in ("segformer", "upernet"):
        assert round(sum(p.numel() for p in decoder.neck.parameters()) / 1e6, 1) == 7.1
