"""Average precision of rankings whose entries count more than once or not at all.

L rankings of T entries each, P positives of all rankings together, M samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rankings"]


@dataclass(frozen=True, eq=False)
class Rankings:
    """L rankings by falling score; their positives in order, ranking after ranking.

    Entries of one score end at the last of them: no order among them would be right.
    """

    samples: Tensor  # [L, T], which sample an entry belongs to
    ranking: Tensor  # [P], which ranking a positive is in
    sample: Tensor  # [P], which sample it belongs to
    end: Tensor  # [P], where the entries of its score end, in all L * T
    n_through: Tensor  # [P], positives of this and earlier rankings up to there
    n_before: Tensor  # [P], positives of earlier rankings

    @classmethod
    def of(cls, scores: Tensor, targets: Tensor, samples: Tensor) -> Rankings:
        """All `[L, T]`, in any order; targets are 0 or 1."""
        scores, order = scores.sort(dim=1, descending=True)
        samples, is_positive = samples.gather(1, order), targets.gather(1, order).bool()
        n_entries = scores.shape[1]
        is_end = torch.ones_like(is_positive)
        is_end[:, :-1] = scores[:, 1:] != scores[:, :-1]
        ends = torch.where(is_end, torch.arange(n_entries), n_entries)
        ends = ends.flip(1).cummin(1).values.flip(1)  # [L, T], the nearest end at or behind each entry
        ranking, place = is_positive.nonzero(as_tuple=True)
        end = ranking * n_entries + ends[ranking, place]
        n_positives = is_positive.sum(1)  # [L]
        return cls(
            samples=samples,
            ranking=ranking,
            sample=samples[ranking, place],
            end=end,
            n_through=is_positive.flatten().cumsum(0)[end],
            n_before=(n_positives.cumsum(0) - n_positives)[ranking],
        )

    def average_precision(self, weights: Tensor) -> Tensor:
        """`[L]`, for `weights [M]` float64: how often the entries of each sample count.

        The mean over the positives of the precision among all entries that score as high or higher, which is the sum of
        precision times gain in recall over the distinct scores. nan for a ranking in which no positive counts.
        """
        n_entries = weights[self.samples].cumsum(1).flatten()[self.end]  # [P]
        gained = weights[self.sample]  # [P]
        found = torch.nn.functional.pad(gained.cumsum(0), (1, 0))  # [P + 1]
        n_hits = found[self.n_through] - found[self.n_before]
        # Where no entry counts yet, neither does the positive itself, and 0 hits of 0 may be any precision.
        precision = n_hits / n_entries.clamp_min(torch.finfo(torch.float64).tiny)
        nothing = weights.new_zeros(len(self.samples))
        total = nothing.index_add(0, self.ranking, gained)
        return nothing.index_add(0, self.ranking, gained * precision) / total
