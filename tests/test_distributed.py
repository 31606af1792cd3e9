"""Gather with gradient, agreement and mean over ranks, with real gloo processes."""

from collections.abc import Callable
from typing import Any

import torch

from ssl_eo.distributed import AgreedFlag, all_agree, broadcast_object, gather, mean_over_ranks, rank, world_size

OnRanks = Callable[..., list[Any]]


def _contrast(anchors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (anchors @ others.T / 0.5).logsumexp(1).mean()


def _gathered_gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = x.chunk(world_size())[rank()].clone().requires_grad_()
    loss = _contrast(mine, gather(mine))
    loss.backward()
    assert mine.grad is not None
    return mean_over_ranks(loss.detach()), mine.grad / world_size()


def test_gathered_loss_and_gradient_equal_one_process(on_ranks: OnRanks) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = x.clone().requires_grad_()
    loss = _contrast(whole, gather(whole))
    loss.backward()
    results = on_ranks(2, _gathered_gradient, x)
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in results]), whole.grad, rtol=1e-12, atol=1e-15)


def _agree() -> tuple[bool, bool, list[bool], int]:
    mixed = bool(all_agree(torch.tensor(rank() == 0)))
    same = bool(all_agree(torch.tensor(True)))
    flag, polls = AgreedFlag(), []
    for call in range(4):
        if call == 1 and rank() == 1:
            flag.raised = True
        polls.append(flag.poll())
    flag.settle()
    flag.settle()  # nothing is left to wait for
    polls.append(flag.poll())  # and nothing has been asked
    return mixed, same, polls, broadcast_object(rank() + 5)


def test_ranks_agree(on_ranks: OnRanks) -> None:
    for mixed, same, polls, word in on_ranks(2, _agree):
        assert not mixed
        assert same
        # Raised at the second call, seen by all at the third.
        assert polls == [False, False, True, True, False]
        assert word == 5


def test_one_process_needs_no_group() -> None:
    flag = AgreedFlag()
    assert not flag.poll()
    flag.raised = True
    assert flag.poll()
    x = torch.ones(2, 3)
    assert gather(x) is x
    assert mean_over_ranks(x) is x
    assert broadcast_object("word") == "word"
