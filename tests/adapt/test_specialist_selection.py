"""The specialists that a task needs are found: by ridge regression, and by a gate that learns beside a decoder."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from sklearn.linear_model import Ridge
from tiny_specialists import images, pyramid, sensor_input
from torch import Tensor, nn

from ssl_eo.adapt.ensemble import Ensemble, prune
from ssl_eo.adapt.selection import TopKGate, select_greedily
from ssl_eo.eval.probes import ridge
from ssl_eo.eval.probes.base import Labelled
from ssl_eo.sensors import load_sensor

NAMES = ("a", "b", "c", "d", "e", "f")
PLANTED = ("b", "e")


def planted(n: int, seed: int, kind: str = "classification") -> dict[str, Labelled]:
    """Features of six specialists, two of which know the class between them, each one half of it."""
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(n, 5, generator=generator) for name in NAMES}
    value = features["b"][:, 0] + features["e"][:, 3]
    if kind == "regression":
        return {name: Labelled(x, value, "regression", 1) for name, x in features.items()}
    labels = (value > 0).long()
    if kind == "multilabel":
        return {
            name: Labelled(x, torch.stack([labels, 1 - labels], 1), "multilabel", 2) for name, x in features.items()
        }
    if kind == "segmentation":
        fractions = torch.stack([value.sigmoid(), 1 - value.sigmoid()], 1)
        return {name: Labelled(x, fractions, "segmentation", 2) for name, x in features.items()}
    return {name: Labelled(x, labels, "classification", 2) for name, x in features.items()}


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation", "regression"])
def test_greedy_search_finds_the_planted_pair(kind: str) -> None:
    found = select_greedily(planted(200, 0, kind), planted(100, 1, kind), 2)
    assert set(found.names) == set(PLANTED)
    assert found.scores[1] > found.scores[0]
    assert set(found.alone) == set(NAMES)
    assert max(found.alone, key=lambda name: found.alone[name]) == found.names[0]
    assert found.alone[found.names[0]] == found.scores[0]


def test_each_step_is_the_best_by_an_independent_ridge() -> None:
    train, val = planted(120, 2, "regression"), planted(80, 3, "regression")
    cfg = ridge.Config(lambdas=[0.05])

    def error(names: tuple[str, ...]) -> float:
        """Mean squared error by scikit-learn, on features that are standardised as the probe's are."""
        x = torch.cat([train[name].features for name in names], 1).double()
        z = torch.cat([val[name].features for name in names], 1).double()
        mean, std = x.mean(0), x.std(0, correction=0)
        model = Ridge(alpha=0.05 * len(x)).fit(((x - mean) / std).numpy(), train["a"].targets.double().numpy())
        predicted = torch.from_numpy(model.predict(((z - mean) / std).numpy()))
        return float((predicted - val["a"].targets).square().mean())

    found = select_greedily(train, val, 3, cfg)
    for n, score in enumerate(found.scores, 1):
        before = found.names[: n - 1]
        best = min((error((*before, name)), name) for name in NAMES if name not in before)
        assert found.names[n - 1] == best[1]
        assert score == pytest.approx(-best[0], rel=1e-6)
    best_pair = min(combinations(NAMES, 2), key=error)
    assert set(best_pair) == set(found.names[:2])


def test_of_equal_specialists_the_first_by_name_is_taken() -> None:
    train, val = planted(60, 0), planted(40, 1)
    twins = [{"z": parts["b"], "y": parts["b"], "x": parts["a"]} for parts in (train, val)]
    assert select_greedily(twins[0], twins[1], 1).names == ("y",)


def test_samples_that_differ_are_refused() -> None:
    train, val = planted(60, 0), planted(40, 1)
    with pytest.raises(ValueError, match="k must be from 1 to 6"):
        select_greedily(train, val, 7)
    with pytest.raises(ValueError, match="train: the targets of b are not those of a"):
        select_greedily({**train, "b": planted(60, 5)["b"]}, val, 1)
    with pytest.raises(ValueError, match=r"train has the specialists .*: give the same"):
        select_greedily(train, {name: val[name] for name in NAMES[:3]}, 1)


def learn(gate: TopKGate, seed: int) -> tuple[int, ...]:
    """What a linear decoder with the gate selects after a few steps."""
    torch.manual_seed(seed)
    parts = planted(400, seed)
    x = torch.stack([parts[name].features for name in NAMES], 1)  # [N, E, D]
    y = parts["a"].targets
    decoder = nn.Linear(x[0].numel(), 2)
    steps = torch.optim.Adam([{"params": decoder.parameters(), "lr": 0.1}, {"params": gate.parameters(), "lr": 0.03}])
    gate.train()
    for _ in range(100):
        loss = nn.functional.cross_entropy(decoder((x * gate()[:, None]).flatten(1)), y)
        steps.zero_grad()
        loss.backward()
        steps.step()
    return gate.eval().selected()


def test_a_gate_learns_the_planted_pair_from_whatever_it_began_with() -> None:
    pair = tuple(NAMES.index(name) for name in PLANTED)
    begun = set()
    for seed in range(6):
        gate = TopKGate(len(NAMES), 2, seed)
        begun.add(gate.eval().selected())
        assert learn(gate, seed) == pair
        assert gate().tolist() == [float(i in pair) for i in range(len(NAMES))]
    assert len(begun) > 1  # equal scores: not always the first
    assert begun != {pair}


def test_the_gate_is_hard_and_its_gradient_reaches_all() -> None:
    gate = TopKGate(5, 2)
    for _ in range(20):
        values = gate()
        assert sorted(values.tolist()) == [0.0, 0.0, 0.0, 1.0, 1.0]
    (values * torch.arange(1.0, 6.0)).sum().backward()
    assert gate.scores.grad is not None
    assert (gate.scores.grad > 0).all()
    everything = TopKGate(3, 3)
    everything().sum().backward()
    assert everything().tolist() == [1.0, 1.0, 1.0]


def test_one_step_along_the_gradient_changes_the_selection() -> None:
    """Straight through: a specialist that is not selected, and would lower the loss, comes in."""
    gate = TopKGate(4, 1, noise=0.0)
    (first,) = gate.selected()
    wanted = (first + 1) % 4
    use = torch.full((4,), 0.1).index_fill(0, torch.tensor(wanted), 1.0)
    gate.train()
    (-(gate() * use).sum()).backward()
    assert gate.scores.grad is not None
    with torch.no_grad():
        gate.scores -= gate.scores.grad
    assert gate.selected() == (wanted,)


def test_noise_gives_each_its_turn_and_follows_from_the_seed() -> None:
    def drawn(gate: TopKGate) -> list[list[float]]:
        return [gate().tolist() for _ in range(40)]

    def seen(values: list[list[float]]) -> Tensor:
        return torch.tensor(values).sum(0)

    first = drawn(TopKGate(4, 1, seed=3))
    assert first == drawn(TopKGate(4, 1, seed=3))
    assert first != drawn(TopKGate(4, 1, seed=4))
    assert (seen(first) > 0).all()
    quiet = TopKGate(4, 1, seed=3).eval()
    assert len({tuple(values) for values in drawn(quiet)}) == 1
    with pytest.raises(ValueError, match="noise must not be negative"):
        TopKGate(4, 1, noise=-1.0)


def test_features_of_an_ensemble_lead_to_the_specialist_that_saw_the_band() -> None:
    """Each specialist is shown one band, and the label is the sign of one of them."""
    sensor = load_sensor("sentinel2_l2a")
    bands = ("B02", "B04", "B08", "B11")
    specialists = [pyramid(band, 1, {"it": sensor_input(sensor, [band])}, i) for i, band in enumerate(bands)]
    channels = sensor.channel_meta(bands)
    ensemble = Ensemble(specialists, channels)
    inputs = images(channels, 80)
    offsets = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    inputs.pixels += 2.0 * offsets[:, :, None, None]
    labels = (offsets[:, 2] > 0).long()
    with torch.no_grad():
        features = ensemble.pooled(ensemble(inputs))
    assert {name: x.shape for name, x in features.items()} == dict.fromkeys(bands, (80, 60))
    halves = [
        {name: Labelled(x[part], labels[part], "classification", 2) for name, x in features.items()}
        for part in (slice(0, 50), slice(50, 80))
    ]
    found = select_greedily(halves[0], halves[1], 1)
    assert found.names == ("B08",)
    assert prune(ensemble, found.names).names == ("B08",)
