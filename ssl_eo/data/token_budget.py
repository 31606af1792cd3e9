"""How many patches of each modality of a sample are seen, of one budget: Dirichlet shares, exact counts.

Shares are drawn where a sample's view is planned. Counts and patches follow for a whole batch at once, as a function of
the shares, the seed of the step and a sample's slot in the global batch.

B samples, T modalities of a sample, N patches of each, K visible patches of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.data.types import VisibleBatch
from ssl_eo.seeding import uniforms

__all__ = ["TokenBudgetConfig", "apportion", "choose_visible", "draw_shares"]

_LEAST_SHARE = 1e-6  # of a modality that was drawn to have none: it is seen where the others have no patch left


@dataclass
class TokenBudgetConfig:
    """One number of visible patches a sample, split over its modalities (MultiMAE, arXiv 2204.01678, section 3.2)."""

    n_visible: int = 98  # patches of a sample that are seen, of all its modalities together
    # Concentration of the Dirichlet distribution that splits them, one number or one for each modality, in their order:
    # large numbers give even shares, small ones leave a sample few modalities.
    alpha: float | list[float] = 1.0
    uniform_subsets: bool = False  # first draw which modalities share the budget: any subset, all equally likely

    def __post_init__(self) -> None:
        if self.n_visible < 1:
            raise ValueError(f"n_visible must be at least 1, got {self.n_visible}")
        alphas = self.alpha if isinstance(self.alpha, list) else [self.alpha]
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def alphas(self, n_modalities: int) -> NDArray[np.float64]:
        """`[T]`."""
        return np.broadcast_to(np.asarray(self.alpha, np.float64), n_modalities)


def draw_shares(cfg: TokenBudgetConfig, present: Sequence[bool], rng: np.random.Generator) -> NDArray[np.float64]:
    """The share of each modality in what is seen of one sample, `[T]`; 0 for those that are not `present [T]`."""
    has = np.asarray(present, bool)
    alphas = cfg.alphas(len(has))
    chosen = has
    if cfg.uniform_subsets:
        bits = int(rng.integers(1, 1 << int(has.sum())))
        chosen = has.copy()
        chosen[has] = [bool(bits >> i & 1) for i in range(int(has.sum()))]
    # Shares are gamma variates, of which only the ratios count. A small shape may underflow to 0.
    gamma = np.where(chosen, rng.standard_gamma(alphas), 0.0)
    gamma /= max(gamma.sum(), np.finfo(np.float64).tiny)
    return np.where(has, np.maximum(gamma, _LEAST_SHARE), 0.0)


def apportion(shares: NDArray[np.float64], n_patches: int, n_visible: int) -> NDArray[np.int64]:
    """Counts `[B, T]` in proportion to `shares [B, T]`, no more than `n_patches` each, `n_visible` of every sample.

    Seats of a parliament by the method of Webster: patch j of a modality has the claim share / (j + 1/2), and the
    largest claims are met. Shares are thereby rounded, and what a full modality leaves goes to the others.
    """
    patch = np.arange(n_patches) + 0.5
    with np.errstate(divide="ignore"):
        price = patch / shares[:, :, None]  # [B, T, N]
    order = price.reshape(len(shares), -1).argsort(axis=1, kind="stable")[:, :n_visible]  # [B, K]
    counts = np.stack([np.bincount(row // n_patches, minlength=shares.shape[1]) for row in order])
    assert not counts[shares == 0].any(), "a sample has fewer patches than are to be seen"
    return counts


def choose_visible(
    names: Sequence[str], shares: NDArray[np.float64], n_patches: int, n_visible: int, slots: Sequence[int], seed: int
) -> VisibleBatch:
    """Which patches of the modalities `names` the samples at `slots` show, by their `shares [B, T]`.

    Of each modality as many random ones as its share says, addressed by `seed`, which is that of the step, and slot.
    """
    (n_samples, n_modalities), slot = shares.shape, np.asarray(slots)
    counts = apportion(shares, n_patches, n_visible)  # [B, T]
    noise = uniforms(seed, slot, n_modalities * n_patches).reshape(n_samples, n_modalities, n_patches)
    rank = noise.argsort(axis=2).argsort(axis=2)
    visible = rank < counts[:, :, None]  # [B, T, N]
    sample, modality, patch = visible.nonzero()  # [B*K] each, sample by sample, ascending
    by_modality = modality.argsort(kind="stable")
    order = np.empty_like(by_modality)
    order[by_modality] = np.arange(len(order))
    row = sample * n_patches + patch
    return VisibleBatch(
        mask=torch.from_numpy(~visible.reshape(n_samples, -1)),
        ids_keep=torch.from_numpy((modality * n_patches + patch).reshape(n_samples, n_visible)),
        rows={name: torch.from_numpy(row[modality == i]) for i, name in enumerate(names)},
        order=torch.from_numpy(order),
    )
