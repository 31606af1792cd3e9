"""Weights between losses of several tasks: learned uncertainties, or fixed ones.

M tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["UncertaintyWeights"]


class UncertaintyWeights(nn.Module):
    """A learned log variance s of each task: loss / exp(s) + s (Kendall et al. 2018, arXiv 1705.07115, simplified).

    s = bound * tanh(parameter / bound) stays within `bound` and always has a gradient. The parameter is no `weight`, so
    it does not decay, and it is saved with the student. The gradient of s is 0 on average where exp(s) is the mean
    loss of the samples that have the task, as far as the bound allows.
    """

    def __init__(self, n_tasks: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.log_variance = nn.Parameter(torch.empty(n_tasks))

    def forward(self, losses: Tensor, shares: Tensor) -> Tensor:
        """Balanced `losses [M]`; `shares [M]` of the samples have the task, and only these push its s."""
        s = self.clamped()
        return losses * torch.exp(-s) + s * shares

    def clamped(self) -> Tensor:
        """s of each task, `[M]`, float32 at least."""
        s = self.log_variance.to(torch.promote_types(self.log_variance.dtype, torch.float32))
        return self.bound * torch.tanh(s / self.bound)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.zeros_(self.log_variance)
