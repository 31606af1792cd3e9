"""Projector and predictor: layers, biases, normalisation over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.models.heads import GlobalBatchNorm, MLPHead

N, D, HIDDEN, OUT = 8, 6, 10, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(n_layers: int = 3, batch_norm: bool = True, norm_output: bool = False) -> MLPHead:
    """A head all of whose tensors are drawn."""
    head = MLPHead(D, HIDDEN, OUT, n_layers, batch_norm, norm_output).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.normal_(generator=generator)
    return head


@pytest.mark.parametrize("affine", [True, False])
def test_one_process_normalises_as_torch_does(affine: bool) -> None:
    ours, theirs = GlobalBatchNorm(D, affine).double(), nn.BatchNorm1d(D, affine=affine).double()
    if affine:
        with torch.no_grad():
            for name, value in (("weight", drawn(D).double()), ("bias", drawn(D, seed=1).double())):
                getattr(ours, name).copy_(value)
                getattr(theirs, name).copy_(value)
    x, weights = 100.0 + drawn(N, D).double(), drawn(N, D, seed=2).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, value in zip((ours, theirs), inputs, strict=True):
        (module(value) * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-11)


def test_views_are_normalised_apart() -> None:
    head, x = built(norm_output=True), drawn(2, N, D).double()
    x[1] = 5.0 * x[1] + 3.0
    torch.testing.assert_close(head(x), torch.stack([head(view) for view in x]))
    together = torch.unflatten(head(x.flatten(0, 1)), 0, (2, N))
    assert (together - head(x)).abs().max() > 0.1


def _step_of_rank() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output and gradients of this rank's part of a batch whose halves lie far apart."""
    head, x = built(norm_output=True), drawn(2, N, D).double()
    x[:, : N // 2] += 4.0
    mine = x.chunk(world_size(), 1)[rank()].clone().requires_grad_()
    out = head(mine)
    target = drawn(2, N, OUT, seed=1).double().chunk(world_size(), 1)[rank()]
    (out - target).square().mean().backward()
    assert mine.grad is not None
    grads = {name: mean_over_ranks(p.grad) for name, p in head.named_parameters()}
    return out.detach(), grads, mine.grad / world_size()


def test_two_ranks_are_one_process_in_value_and_gradient(on_ranks: Callable[..., list[Any]]) -> None:
    out, grads, grad = _step_of_rank()
    ranks = on_ranks(2, _step_of_rank)
    torch.testing.assert_close(torch.cat([found for found, _, _ in ranks], 1), out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([found for _, _, found in ranks], 1), grad, rtol=1e-10, atol=1e-13)
    for _, found, _ in ranks:
        for name, expected in grads.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-13)


def test_forward_leaves_no_trace() -> None:
    head = built(norm_output=True)
    assert not list(head.buffers())
    before = {name: value.clone() for name, value in head.state_dict().items()}
    x = drawn(N, D).double()
    first = head.train()(x)
    assert torch.equal(head.eval()(x), first)  # no mode either: the teacher's is normalised as the student's
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize(("batch_norm", "norm_output"), [(True, True), (True, False), (False, False)])
def test_layers(n_layers: int, batch_norm: bool, norm_output: bool) -> None:
    head = MLPHead(D, HIDDEN, OUT, n_layers, batch_norm, norm_output)
    expected: list[type[nn.Module]] = [nn.Linear]
    for _ in range(n_layers - 1):
        expected += [GlobalBatchNorm, nn.ReLU, nn.Linear] if batch_norm else [nn.ReLU, nn.Linear]
    expected += [GlobalBatchNorm] * norm_output
    assert [type(layer) for layer in head.mlp] == expected
    linear = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [HIDDEN] * (n_layers - 1) + [OUT]
    assert all((layer.bias is None) == batch_norm for layer in linear)
    if norm_output:
        assert head.mlp[-1].weight is None


def test_init_fills_everything_and_keeps_the_scale() -> None:
    with torch.device("meta"):
        head = MLPHead(256, 512, 128, 3, batch_norm=True)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    head.init_weights()
    assert all(value.isfinite().all() for value in head.state_dict().values())
    assert 0.3 < head(drawn(64, 256)).std().item() < 1.5


def test_statistics_are_exact_under_autocast() -> None:
    """In bfloat16 the variance of values near 100 would be lost."""
    norm = GlobalBatchNorm(D, affine=False)
    x = (100.0 + drawn(64, D)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), norm(x.float()), rtol=2**-8, atol=1e-6)
