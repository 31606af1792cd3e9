"""Which specialists of an ensemble a task needs: found by ridge regression on features, or learned beside the decoder.

E specialists, k of them selected, N samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssl_eo.eval.decoders import TapMaps
from ssl_eo.eval.probes import ridge
from ssl_eo.eval.probes.base import Labelled, indicators, selection_score
from ssl_eo.seeding import torch_generator

__all__ = ["GATE_LR_RATIO", "GatedDecoder", "Selection", "TopKGate", "select_greedily"]

GATE_LR_RATIO = 0.3  # lr of a gate's scores over that of the decoder behind it, which has to keep up with them


@dataclass(frozen=True)
class Selection:
    """What a greedy search has chosen, in this order, and how good the first 1, 2, ... of them are together."""

    names: tuple[str, ...]
    scores: tuple[float, ...]  # on the validation samples, higher is better (`selection_score`)
    alone: Mapping[str, float]  # that of each specialist by itself


def select_greedily(
    train: Mapping[str, Labelled], val: Mapping[str, Labelled], k: int, cfg: ridge.Config | None = None
) -> Selection:
    """The `k` specialists that ridge regression on their pooled features, side by side, predicts the targets best from.

    `train` and `val` hold the features `[N, D]` of each specialist, by name, for the same samples. One specialist after
    the other is added, always the one with which the score on `val` is best; of equal ones the one with the smaller
    squared error, then the one whose name comes first. Each fit is solved exactly, with the penalty that its own
    cross-validation chooses. Raises `ValueError` for a `k` that is not from 1 to E, and for samples that differ.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be from 1 to {len(train)}, the number of specialists, got {k}")
    _check_same("train", train)
    _check_same("val", val)
    if set(train) != set(val):
        raise ValueError(f"train has the specialists {', '.join(train)}, val {', '.join(val)}: give the same")
    chosen: list[str] = []
    scores: list[float] = []
    alone: dict[str, float] = {}
    while len(chosen) < k:
        found = {}
        for name in sorted(set(train) - set(chosen)):
            columns = [*chosen, name]
            found[name] = _score(_beside(train, columns), _beside(val, columns), cfg)
        best = max(found, key=lambda name: found[name])
        alone = alone or {name: score for name, (score, _) in found.items()}
        chosen.append(best)
        scores.append(found[best][0])
    return Selection(tuple(chosen), tuple(scores), alone)


def _score(train: Labelled, val: Labelled, cfg: ridge.Config | None) -> tuple[float, float]:
    """How well ridge regression on `train` does on `val`: the score, and minus the squared error, which is finer."""
    predicted = ridge.predict(train, val, val.features, cfg).scores  # [V, K]
    targets = indicators(val)
    if val.kind in ("classification", "multilabel"):
        targets = targets * 2.0 - 1.0
    return selection_score(predicted, val), -float((predicted - targets.to(predicted)).square().mean())


def _beside(parts: Mapping[str, Labelled], names: list[str]) -> Labelled:
    return replace(parts[names[0]], features=torch.cat([parts[name].features for name in names], 1))


def _check_same(split: str, parts: Mapping[str, Labelled]) -> None:
    """All specialists have seen the same samples, as far as labels tell."""
    (first_name, first), *others = parts.items()
    for name, other in others:
        same_kind = (other.kind, other.n_classes) == (first.kind, first.n_classes)
        if not same_kind or not torch.equal(other.targets, first.targets):
            raise ValueError(f"{split}: the targets of {name} are not those of {first_name}: give the same samples")


class TopKGate(nn.Module):
    """`forward() -> [E]`: 1 for the k specialists with the highest scores, 0 for the others, learned as they are used.

    What multiplies features by it is trained as if each entry were a sigmoid of the score above the k-th (straight-
    through, arXiv 1308.3432), so that scores of specialists that are not selected move too. While training, Gumbel
    noise on the scores lets each of them be selected at times: weights behind one that never is would learn nothing,
    and say nothing of it, which is also why scores should not learn faster than they do. Noise is addressed by the seed
    and the number of calls; in eval mode there is none, and equal scores are in an order that the seed draws.
    """

    order: Tensor

    def __init__(self, n_specialists: int, k: int, seed: int = 0, noise: float = 1.0) -> None:
        super().__init__()
        if not 1 <= k <= n_specialists:
            raise ValueError(f"k must be from 1 to {n_specialists}, the number of specialists, got {k}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.k, self.seed, self.noise = k, seed, noise
        self.scores = nn.Parameter(torch.zeros(n_specialists))
        self._n_calls = 0  # a number of the host: one on the device would be waited for in every step
        self.register_buffer("order", torch.randperm(n_specialists, generator=torch_generator(seed, "gate order")))

    def forward(self) -> Tensor:
        """The gates `[E]`, with a gradient for each score."""
        scores: Tensor = self.scores
        if self.training and self.noise:
            generator = torch_generator(self.seed, "gate", self._n_calls)
            uniform = torch.rand(len(scores), generator=generator).clamp_(1e-9, 1 - 1e-7)
            scores = scores - self.noise * torch.log(-torch.log(uniform)).to(scores)
            self._n_calls += 1
        ranked = self._ranked(scores.detach())
        hard = torch.zeros_like(scores).index_fill(0, ranked[: self.k], 1.0)
        edge = scores.detach()[ranked[self.k - 1 : self.k + 1]].mean()  # between the last selected and the next
        soft = torch.sigmoid(scores - edge)
        return hard + (soft - soft.detach())

    def selected(self) -> tuple[int, ...]:
        """The specialists that are selected without noise, in the order of the ensemble. It waits for the device."""
        return tuple(sorted(self._ranked(self.scores.detach())[: self.k].tolist()))

    def _ranked(self, scores: Tensor) -> Tensor:
        """`[E]` positions from the highest score to the lowest, equal ones as `order` has them."""
        return self.order[scores[self.order].argsort(descending=True, stable=True)]


class GatedDecoder(nn.Module):
    """`decoder` of the features of all specialists, of which it is shown those that `gate` selects, and zeros else.

    `owners` say which specialist each channel of each level is of (`Ensemble.owners`). Gates stand in front of the
    decoder and not in the ensemble, so that features of frozen encoders can be computed once and serve the search.
    """

    def __init__(self, gate: TopKGate, decoder: nn.Module, owners: Sequence[Tensor]) -> None:
        super().__init__()
        self.gate, self.decoder = gate, decoder
        for level, owner in enumerate(owners):
            self.register_buffer(f"owner_{level}", owner, persistent=False)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """What `decoder` gives."""
        gates = self.gate()  # [E]
        maps = []
        for level, x in enumerate(taps.maps):
            shown = gates[self.get_buffer(f"owner_{level}")]  # [D]
            maps.append(x * shown[:, None, None].to(x.dtype))
        logits: Tensor = self.decoder(TapMaps(maps, taps.cls), size)
        return logits
