"""Decoders of images against their formulas, and which features they see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_eo.eval.decoders import TapMaps, TapShape, build_decoder

D, N, SIZE = 8, 3, (1, 1)
SHAPE = TapShape((4, D), (16, 16), has_cls=True)


def _taps() -> TapMaps:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(N, width, 2, 5, generator=g) for width in SHAPE.widths]
    return TapMaps(maps, torch.randn(N, D, generator=g))


def _built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_decoder(name, options, SHAPE, 2)


def _state(decoder: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in decoder.state_dict().items()}


def _pooled(pool: str, taps: str) -> np.ndarray:
    """`[N, width]`, written out."""
    given = _taps()
    assert given.cls is not None
    maps = given.maps if taps == "all" else given.maps[-1:]
    means = [m.double().numpy().reshape(N, m.shape[1], -1).mean(-1) for m in maps]
    cls = [given.cls.double().numpy()]
    return np.concatenate({"mean": means, "cls": cls, "cls_mean": cls + means}[pool], 1)


POOLS = [("mean", "last"), ("cls", "last"), ("cls_mean", "last"), ("mean", "all"), ("cls_mean", "all")]


@pytest.mark.parametrize(("pool", "taps"), POOLS)
def test_identity_is_linear_in_what_is_pooled(pool: str, taps: str) -> None:
    decoder = _built("identity", pool=pool, taps=taps)
    state = _state(decoder)
    wanted = _pooled(pool, taps) @ state["out.weight"].T + state["out.bias"]
    np.testing.assert_allclose(decoder(_taps(), SIZE).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pool", "taps"), POOLS)
def test_mlp_has_one_hidden_layer(pool: str, taps: str) -> None:
    decoder = _built("mlp", pool=pool, taps=taps, hidden_dim=5)
    state = _state(decoder)
    hidden = _pooled(pool, taps) @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    hidden = nn.functional.gelu(torch.from_numpy(hidden)).numpy()
    wanted = hidden @ state["mlp.3.weight"].T + state["mlp.3.bias"]
    np.testing.assert_allclose(decoder(_taps(), SIZE).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_defaults() -> None:
    """identity sees the last tap, mlp all of them."""
    seen = {}
    for name in ("identity", "mlp"):
        taps = _taps()
        for m in taps.maps:
            m.requires_grad_()
        _built(name)(taps, SIZE).sum().backward()
        seen[name] = [m.grad is not None for m in taps.maps]
    assert seen == {"identity": [False, True], "mlp": [True, True]}


@pytest.mark.parametrize("n_queries", [1, 3])
def test_attentive_pool_is_the_formula(n_queries: int) -> None:
    decoder = _built("attentive_pool", n_queries=n_queries, n_heads=2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    state, d = _state(decoder), D // 2
    wanted = np.empty((N, 2))
    for i, features in enumerate(_taps().maps[-1].double().numpy()):
        patches = features.reshape(D, -1).T  # [10, D]
        patches = (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.var(1, keepdims=True) + 1e-5)
        patches = patches * state["norm.weight"] + state["norm.bias"]
        kv = patches @ state["attention.kv.weight"].T + state["attention.kv.bias"]
        found = []
        for query in state["queries"][0] @ state["attention.q.weight"].T + state["attention.q.bias"]:
            heads = []
            for head in (slice(0, d), slice(d, D)):
                weights = np.exp(kv[:, :D][:, head] @ query[head] / np.sqrt(d))
                heads.append(weights / weights.sum() @ kv[:, D:][:, head])
            found.append(np.concatenate(heads) @ state["attention.proj.weight"].T + state["attention.proj.bias"])
        wanted[i] = np.concatenate(found) @ state["out.weight"].T + state["out.bias"]
    np.testing.assert_allclose(decoder(_taps(), SIZE).detach().numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["identity", "mlp", "attentive_pool"])
def test_neither_the_order_of_patches_nor_the_size_of_labels_matters(name: str) -> None:
    decoder, taps = _built(name), _taps()
    turned = TapMaps([m.flip(2, 3) for m in taps.maps], taps.cls)
    torch.testing.assert_close(decoder(turned, (64, 32)), decoder(taps, SIZE))


def test_cls_that_is_not_there() -> None:
    without = TapShape((D,), (16,))
    for pool in ("cls", "cls_mean"):
        with pytest.raises(ValueError, match=f"pool: {pool}, but the encoder has no CLS token; pool: mean needs none"):
            build_decoder("identity", {"pool": pool}, without, 2)
    with pytest.raises(ValueError, match="pool: cls with taps: all, but the CLS token is that of the last tap"):
        _built("mlp", pool="cls")
    with pytest.raises(ValueError, match="said to have a CLS token, but gave none"):
        _built("identity", pool="cls")(TapMaps(_taps().maps), SIZE)
