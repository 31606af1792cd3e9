"""The probes against scikit-learn, brute force, a plain loop of training and the definitions."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ssl_eo.components import available, resolve
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes import Labelled, is_at_optimum, knn, linear, logistic, ridge
from ssl_eo.eval.probes.base import hold_out, selection_score
from ssl_eo.eval.probes.ridge import RidgePath
from ssl_eo.seeding import torch_generator

PACKAGE = "ssl_eo.eval.probes"
PROBES = [resolve(PACKAGE, name) for name in available(PACKAGE)]
CASES = [(probe, kind) for probe in PROBES for kind in probe.KINDS]


def _name(value: object) -> str:
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else str(value)


def _problem(n: int, d: int, n_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features with unequal scales, offsets and correlations, and labels that depend on them."""
    mix = torch.randn(d, d, generator=torch_generator("mix", d), dtype=torch.float64)
    g = torch_generator(seed, "problem", n, d)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
    labels = (x[:, :n_classes] + 2.0 * torch.randn(n, n_classes, generator=g)).argmax(1)
    return x * torch.logspace(-2, 2, d, dtype=torch.float64) + 7.0, labels


def _labelled(n: int, d: int, kind: Kind, n_classes: int = 3, seed: int = 0) -> Labelled:
    x, labels = _problem(n, d, n_classes, seed)
    if kind == "classification":
        return Labelled(x, labels, kind, n_classes)
    one_hot = functional.one_hot(labels, n_classes).double()
    if kind == "multilabel":
        others = torch.rand(n, n_classes, generator=torch_generator(seed, "others")) < 0.3
        return Labelled(x, torch.maximum(one_hot, others.double()), kind, n_classes)
    if kind == "segmentation":
        return Labelled(x, (one_hot + 0.2) / (1 + 0.2 * n_classes), kind, n_classes)
    return Labelled(x, labels * 10.0 + 100.0, kind, 1)


def _pm1(labels: Tensor, n_classes: int) -> Tensor:
    return functional.one_hot(labels, n_classes).double() * 2 - 1


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


# What all of them promise


@pytest.mark.parametrize(("probe", "kind"), CASES, ids=_name)
@pytest.mark.parametrize("with_val", [True, False])
def test_predicts_and_repeats_itself(probe: ModuleType, kind: Kind, with_val: bool) -> None:
    train, val = _labelled(60, 8, kind), _labelled(30, 8, kind, seed=1) if with_val else None
    test = _labelled(25, 8, kind, seed=2)
    before = torch.random.get_rng_state()
    first, second = probe.predict(train, val, test.features), probe.predict(train, val, test.features)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.scores.shape == (25, train.n_classes)
    assert torch.equal(first.scores, second.scores)
    assert first.chosen == second.chosen
    if first.probabilities is not None:
        assert bool(((first.probabilities >= 0) & (first.probabilities <= 1)).all())
        if kind != "multilabel":
            torch.testing.assert_close(first.probabilities.sum(1).double(), torch.ones(25).double())
    useless = selection_score(torch.zeros_like(first.scores) + train.targets.double().mean(), test)
    if kind in ("segmentation", "regression"):
        useless = min(useless, selection_score(first.scores.flip(0), test))
    assert selection_score(first.scores, test) > useless


@pytest.mark.parametrize(("probe", "kind"), CASES, ids=_name)
def test_a_test_sample_is_predicted_alike_whatever_the_others_are(probe: ModuleType, kind: Kind) -> None:
    train, val = _labelled(60, 8, kind), _labelled(30, 8, kind, seed=1)
    test = _labelled(20, 8, kind, seed=2).features
    everything = probe.predict(train, val, test)
    alone = probe.predict(train, val, test[3:4])
    strange = probe.predict(train, val, torch.cat([test[:4], torch.full((9, 8), 1e6)]).flip(0))
    torch.testing.assert_close(alone.scores, everything.scores[3:4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(strange.scores.flip(0)[:4], everything.scores[:4], rtol=1e-6, atol=1e-6)
    assert alone.chosen == everything.chosen == strange.chosen


@pytest.mark.parametrize(("probe", "kind"), CASES, ids=_name)
def test_test_samples_may_come_in_parts(probe: ModuleType, kind: Kind) -> None:
    train, test = _labelled(60, 8, kind), _labelled(20, 8, kind, seed=2).features
    fitted, whole = probe.fit(train, None), probe.predict(train, None, test)
    parts = [fitted.predict(part) for part in test.split(7)]
    torch.testing.assert_close(torch.cat([part.scores for part in parts]), whole.scores)
    for part in parts:
        assert (part.chosen, part.threshold, fitted.n_features) == (whole.chosen, whole.threshold, 8)
        assert (part.probabilities is None) == (whole.probabilities is None)


@pytest.mark.parametrize("probe", [ridge, logistic, linear], ids=_name)
def test_scale_offset_and_constant_features_change_nothing(probe: ModuleType) -> None:
    train, val = _labelled(60, 8, "classification"), _labelled(30, 8, "classification", seed=1)
    test = _labelled(30, 8, "classification", seed=2).features

    def changed(features: Tensor) -> Tensor:
        return torch.cat([features * 1e3 - 5e4, torch.full((len(features), 2), 0.1)], 1)

    def with_changed(part: Labelled) -> Labelled:
        return Labelled(changed(part.features), part.targets, part.kind, part.n_classes)

    plain = probe.predict(train, val, test)
    same = probe.predict(with_changed(train), with_changed(val), changed(test))
    assert plain.chosen == pytest.approx(same.chosen)
    torch.testing.assert_close(same.scores, plain.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("probe", "kind"), CASES, ids=_name)
@pytest.mark.parametrize("case", ["constant", "duplicated", "wide", "half precision"])
def test_degenerate_features(probe: ModuleType, kind: Kind, case: str) -> None:
    def features(n: int, part: Labelled) -> Tensor:
        x = part.features / 100.0
        if case == "constant":
            return torch.ones(n, 4)
        if case == "duplicated":
            return torch.cat([x, x, x[:, :2]], 1)
        return x.half() if case == "half precision" else torch.cat([x, x.square(), x.sin(), x.cos()], 1).float()

    parts = [_labelled(n, 8, kind, seed=seed) for seed, n in enumerate((20, 15, 10))]
    train, val, test = (Labelled(features(len(p), p), p.targets, kind, p.n_classes) for p in parts)
    prediction = probe.predict(train, val, test.features)
    assert bool(prediction.scores.isfinite().all())
    if case == "constant":
        assert bool((prediction.scores == prediction.scores[:1]).all())


@pytest.mark.parametrize("probe", PROBES, ids=_name)
def test_a_class_without_training_samples_is_never_predicted(probe: ModuleType) -> None:
    train, test = _labelled(60, 8, "classification"), _labelled(30, 8, "classification", seed=2)
    wider = Labelled(train.features, train.targets + (train.targets > 0).long(), "classification", 5)  # 0, 2 and 3
    prediction = probe.predict(wider, None, test.features)
    assert prediction.scores.shape == (30, 5)
    assert set(prediction.classes().tolist()) <= {0, 2, 3}
    same = probe.predict(train, None, test.features)
    if probe is not linear:  # whose softmax counts the classes
        torch.testing.assert_close(prediction.scores[:, [0, 2, 3]], same.scores)


@pytest.mark.parametrize("probe", PROBES, ids=_name)
def test_refusals(probe: ModuleType) -> None:
    train, val = _labelled(20, 8, "classification"), _labelled(10, 8, "classification", seed=1)
    test = val.features
    for kind in ("segmentation", "regression"):
        if kind not in probe.KINDS:
            with pytest.raises(ValueError, match=f"does not take {kind}; it takes {', '.join(probe.KINDS)}"):
                probe.predict(_labelled(20, 8, kind), None, test)
    spoiled = test.clone()
    spoiled[3, 2] = float("nan")
    with pytest.raises(ValueError, match="test: 1 of 10 rows hold nan"):
        probe.predict(train, val, spoiled)
    with pytest.raises(ValueError, match="test has 7 features a sample, train has 8"):
        probe.predict(train, val, test[:, :7])
    with pytest.raises(ValueError, match="val has 4 classes"):
        probe.predict(train, Labelled(test, val.targets, "classification", 4), test)


@pytest.mark.parametrize(
    ("kind", "targets", "n_classes", "message"),
    [
        ("classification", torch.tensor([0, 3]), 3, "integers from 0 to 2, got torch.int64 from 0 to 3"),
        ("classification", torch.tensor([0.0, 1.0]), 3, "integers from 0 to 2"),
        ("classification", torch.tensor([0, 1, 2]), 3, "2 and 3 rows"),
        ("multilabel", torch.tensor([[0, 2], [1, 1]]), 2, "0 or 1"),
        ("multilabel", torch.tensor([0, 1]), 2, r"shape \[2, 2\]"),
        ("segmentation", torch.tensor([[0.5, 0.2], [1.0, 0.0]]), 2, "fractions with the sum 1"),
        ("segmentation", torch.tensor([[1.5, -0.5], [1.0, 0.0]]), 2, "fractions with the sum 1"),
        ("segmentation", torch.tensor([[0.0, 0.0], [1.0, 0.0]]), 2, "leave out what is not labelled"),
        ("regression", torch.tensor([0.0, float("nan")]), 1, "nan or infinity"),
        ("regression", torch.tensor([0.0, 1.0]), 2, "n_classes must be 1"),
    ],
)
def test_targets_that_do_not_fit_their_kind(kind: Kind, targets: Tensor, n_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labelled(torch.zeros(2, 3), targets, kind, n_classes)


def test_the_held_out_tenth_is_stratified() -> None:
    labels = torch.cat([torch.zeros(400), torch.ones(100), torch.full((30,), 2)]).long()
    train = Labelled(torch.arange(530.0)[:, None], labels, "classification", 3)
    rest, held = hold_out(train, seed=0)
    assert sorted(torch.cat([rest.features, held.features]).flatten().tolist()) == list(range(530))
    assert torch.bincount(held.targets).tolist() == [40, 10, 3]
    assert not torch.equal(hold_out(train, seed=1)[1].features, held.features)
    assert [len(part) for part in hold_out(train.rows(torch.arange(2)), seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="give val"):
        hold_out(train.rows(torch.arange(1)), seed=0)


def test_whole_places_are_held_out() -> None:
    place_of = torch.arange(400) // 4  # of four samples each
    labels = (place_of < 30).long()
    alone = Labelled(torch.arange(400.0)[:, None], labels, "classification", 2)
    train = replace(alone, groups=place_of * 7 + 3)  # any numbers
    rest, held = hold_out(train, seed=0)
    assert rest.groups is not None
    assert held.groups is not None
    assert not set(rest.groups.tolist()) & set(held.groups.tolist())
    assert len(held) == 40
    assert torch.bincount(held.targets).tolist() == [28, 12]  # a tenth of the places of each class
    assert set(held.groups.tolist()) == {7 * (int(x) // 4) + 3 for x in held.features.flatten()}
    each_its_own = replace(alone, groups=torch.arange(400))
    assert torch.equal(hold_out(each_its_own, 0)[1].features, hold_out(alone, 0)[1].features)
    with pytest.raises(ValueError, match="the 4 samples of train share one place, of which nothing can be held out"):
        hold_out(train.rows(torch.arange(4)), seed=0)
    with pytest.raises(ValueError, match="groups must be one number for each of 400 rows"):
        replace(alone, groups=torch.arange(3))


@pytest.mark.parametrize(("probe", "grid"), [(ridge, "lambdas"), (logistic, "lambdas"), (linear, "lrs")], ids=_name)
def test_a_choice_at_the_end_of_the_grid_is_told(probe: ModuleType, grid: str) -> None:
    train, val, test = (_labelled(n, 6, "classification", seed=n) for n in (80, 40, 30))

    def chosen(*values: float) -> dict[str, float]:
        found: dict[str, float] = probe.predict(train, val, test.features, probe.Config(**{grid: list(values)})).chosen
        return found

    first, *_, last = getattr(probe.Config(), grid)
    best = chosen(*getattr(probe.Config(), grid))["lr" if probe is linear else "lambda"]
    assert first != best != last
    assert chosen(best)["at_edge"] == 0  # there is no choice
    assert chosen(first, best)["at_edge"] == chosen(best, last)["at_edge"] == 1
    assert chosen(first, best, last)["at_edge"] == 0


def test_selection_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, average_precision_score, mean_squared_error

    for kind, reference in (
        ("classification", lambda s, t: accuracy_score(t, s.argmax(1))),
        ("multilabel", lambda s, t: average_precision_score(t.ravel(), s.ravel())),
        ("regression", lambda s, t: -mean_squared_error(t, s[:, 0])),
    ):
        val = _labelled(40, 8, kind)
        scores = torch.randn(40, val.n_classes, generator=torch_generator(5)).round(decimals=1)  # with ties
        assert selection_score(scores, val) == pytest.approx(reference(scores.numpy(), val.targets.numpy()))
        scores[0, 0] = float("nan")
        assert selection_score(scores, val) == -float("inf")
    fractions = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    patches = Labelled(torch.zeros(2, 1), fractions, "segmentation", 2)
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert selection_score(scores, patches) == pytest.approx((0.7 + 0.2) / 2)


# Ridge


@pytest.mark.parametrize(("n", "d"), [(80, 12), (30, 50), (24, 24)])
@pytest.mark.parametrize("value", ridge.Config().lambdas)
def test_ridge_equals_scikit_learn(n: int, d: int, value: float) -> None:
    from sklearn.linear_model import Ridge

    (x, labels), (test, _) = _problem(n, d, 4), _problem(17, d, 4, seed=1)
    y, penalty = _pm1(labels, 4), value * n
    path = RidgePath(x, y)
    mean, std = x.mean(0), x.std(0, correction=0)
    reference = Ridge(alpha=penalty, solver="svd").fit(((x - mean) / std).numpy(), y.numpy())
    np.testing.assert_allclose(path.weights(penalty).T.numpy(), reference.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(path.intercept.numpy(), reference.intercept_, rtol=0, atol=1e-6)
    expected = reference.predict(((test - mean) / std).numpy())
    np.testing.assert_allclose(path.predict(test, penalty).numpy(), expected, rtol=1e-6, atol=1e-6)
    train = Labelled(x, labels, "classification", 4)
    probed = ridge.predict(train, None, test, ridge.Config(lambdas=[value]))
    np.testing.assert_allclose(probed.scores.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ridge.KINDS)
def test_ridge_of_every_kind_equals_scikit_learn(kind: Kind) -> None:
    from sklearn.linear_model import Ridge

    train, test = _labelled(60, 8, kind), _labelled(20, 8, kind, seed=1).features
    found = ridge.predict(train, None, test)
    x, y = train.features, train.targets.double()
    if kind == "classification":
        y = _pm1(train.targets, 3)
    elif kind == "multilabel":
        y = 2 * y - 1
    mean, std = x.mean(0), x.std(0, correction=0)
    reference = Ridge(alpha=found.chosen["penalty"], solver="svd").fit(((x - mean) / std).numpy(), y.numpy())
    expected = reference.predict(((test - mean) / std).numpy()).reshape(20, -1)
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (15, 30), (20, 20)])
def test_gcv_equals_the_explicit_hat_matrix(n: int, d: int) -> None:
    x, labels = _problem(n, d, 3)
    y = _pm1(labels, 3)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    penalties = torch.tensor([1e-2, 1.0, 30.0, 1e4], dtype=torch.float64)
    expected = []
    for penalty in penalties:
        hat = torch.full((n, n), 1.0 / n, dtype=torch.float64)
        hat += z @ torch.linalg.inv(z.T @ z + penalty * torch.eye(d, dtype=torch.float64)) @ z.T
        left = torch.eye(n, dtype=torch.float64) - hat
        expected.append(n * (left @ y).square().sum() / left.trace().square())
    torch.testing.assert_close(RidgePath(x, y).gcv(penalties), torch.stack(expected), rtol=1e-7, atol=0)


def test_gcv_is_the_mean_leave_one_out_error_where_all_leverages_are_equal() -> None:
    # An orthogonal design of +-1 gives every sample the same leverage; there GCV and leave-one-out are the same thing.
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    design = torch.kron(torch.kron(one, one), one)[:, 1:6]  # 8 samples, 5 centred columns
    y = torch.randn(8, 2, generator=torch_generator(3), dtype=torch.float64)
    penalty = 2.5
    error = 0.0
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        # The intercept is a sixth, unpenalised column; the standardisation is that of the full design.
        x = torch.cat([torch.ones(8, 1, dtype=torch.float64), design], 1)
        gram = x[rest].T @ x[rest] + penalty * torch.diag(torch.tensor([0.0] + [1.0] * 5, dtype=torch.float64))
        weights = torch.linalg.solve(gram, x[rest].T @ y[rest])
        error += float((y[i] - x[i] @ weights).square().sum()) / 8
    gcv = RidgePath(design, y).gcv(torch.tensor([penalty], dtype=torch.float64))
    assert float(gcv) == pytest.approx(error, rel=1e-10)


def test_ridge_chooses_the_penalty_of_least_gcv_and_never_looks_at_val() -> None:
    train, test = _labelled(60, 8, "classification"), _labelled(30, 8, "classification", seed=2)
    found = ridge.predict(train, None, test.features)
    shuffled = Labelled(test.features, (test.targets + 1) % 3, "classification", 3)
    assert ridge.predict(train, shuffled, test.features).chosen == found.chosen
    path = RidgePath(train.features, _pm1(train.targets, 3))
    around = torch.tensor([found.chosen["penalty"] * f for f in (10**-0.5, 1.0, 10**0.5)], dtype=torch.float64)
    assert path.gcv(around).argmin() == 1


@pytest.mark.parametrize("probe", PROBES, ids=_name)
def test_separable_classes_are_learned_and_noise_is_not(probe: ModuleType) -> None:
    g = torch_generator("separable")
    labels, test_labels = torch.arange(300) % 5, torch.arange(200) % 5
    centres = 3.0 * torch.eye(5, 20)
    x, test = (centres[y] + torch.randn(len(y), 20, generator=g) for y in (labels, test_labels))
    found = probe.predict(Labelled(x, labels, "classification", 5), None, test)
    assert _accuracy(found.scores, test_labels) > 0.85
    noise, test_noise = torch.randn(300, 20, generator=g), torch.randn(200, 20, generator=g)
    found = probe.predict(Labelled(noise, labels, "classification", 5), None, test_noise)
    assert 0.1 < _accuracy(found.scores, test_labels) < 0.3


# kNN


@given(
    n=st.integers(1, 30), m=st.integers(1, 12), k=st.integers(1, 25), chunk=st.integers(1, 5), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_knn_equals_brute_force(n: int, m: int, k: int, chunk: int, seed: int) -> None:
    g = torch_generator(seed)
    train, test = torch.randn(n, 6, generator=g), torch.randn(m, 6, generator=g)
    labels = torch.randint(0, 4, (n,), generator=g)
    several = torch.randint(0, 2, (n, 4), generator=g)
    cfg = knn.Config(n_neighbors=k, chunk_size=chunk)
    single = knn.predict(Labelled(train, labels, "classification", 4), None, test, cfg)
    multiple = knn.predict(Labelled(train, several, "multilabel", 4), None, test, cfg)
    a, b = train.double().numpy(), test.double().numpy()
    for i in range(m):
        cosines = [float(b[i] @ a[j] / np.linalg.norm(b[i]) / np.linalg.norm(a[j])) for j in range(n)]
        nearest = sorted(range(n), key=lambda j: -cosines[j])[:k]
        weights = {j: float(np.exp(cosines[j] / 0.07)) for j in nearest}
        for c in range(4):
            votes = sum(w for j, w in weights.items() if labels[j] == c) / sum(weights.values())
            assert float(single.scores[i, c]) == pytest.approx(votes, abs=1e-9)
            votes = sum(w * int(several[j, c]) for j, w in weights.items()) / sum(weights.values())
            assert float(multiple.scores[i, c]) == pytest.approx(votes, abs=1e-9)
    assert torch.equal(multiple.positive(), multiple.scores > 0.5)
    assert single.chosen == {"n_neighbors": min(k, n)}


def test_knn_weights_the_nearer_neighbour() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # one very near, two far
    labelled = Labelled(train, torch.tensor([0, 1, 1]), "classification", 2)
    assert knn.predict(labelled, None, torch.tensor([[1.0, 0.05]])).classes().tolist() == [0]


def test_knn_looks_at_directions_however_small_features_are() -> None:
    train, test = _labelled(60, 8, "classification"), _labelled(30, 8, "classification", seed=1).features
    small = Labelled(train.features * 2.0**-100, train.targets, "classification", train.n_classes)
    expected = knn.predict(train, None, test).scores
    torch.testing.assert_close(knn.predict(small, None, test * 2.0**-100).scores, expected, rtol=0, atol=0)


def test_knn_takes_the_first_of_equal_neighbours() -> None:
    g = torch_generator("ties")
    base = torch.randn(3, 50, generator=g)
    repeated = base[torch.randint(0, 3, (200,), generator=g)]  # many samples at three places
    labels = torch.randint(0, 6, (200,), generator=g)
    queries = base + 0.01 * torch.randn(3, 50, generator=g)
    found = knn.predict(Labelled(repeated, labels, "classification", 6), None, queries, knn.Config(n_neighbors=7))
    for i in range(3):
        first = [j for j in range(200) if torch.equal(repeated[j], base[i])][:7]
        expected = torch.bincount(labels[first], minlength=6) / 7
        torch.testing.assert_close(found.scores[i], expected.double())


# Logistic regression


def _standardised(train: Tensor, *others: Tensor) -> list[np.ndarray]:
    mean, std = train.mean(0), train.std(0, correction=0)
    return [((x - mean) / std).numpy() for x in (train, *others)]


# Where there are more features than samples and next to no penalty, scikit-learn's own solvers differ by 1e-5.
@pytest.mark.parametrize(
    ("n", "d", "value"), [(150, 12, 1.0), (150, 12, 1e-2), (150, 12, 1e-4), (40, 60, 1.0), (40, 60, 1e-2)]
)
@pytest.mark.parametrize("kind", logistic.KINDS)
def test_logistic_equals_scikit_learn(n: int, d: int, kind: Kind, value: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, test = _labelled(n, d, kind, n_classes=4), _labelled(30, d, kind, n_classes=4, seed=1).features
    cfg = logistic.Config(lambdas=[value], tolerance=1e-14, max_steps=5000)
    found = logistic.predict(train, train, test, cfg)
    x, x_test = _standardised(train.features, test)
    reference = LogisticRegression(C=1 / (value * n), solver="newton-cg", tol=1e-12, max_iter=1000)
    columns = [train.targets] if kind == "classification" else train.targets.T
    expected = [reference.fit(x, y.numpy()).predict_proba(x_test) for y in columns]
    together = expected[0] if kind == "classification" else np.stack([p[:, 1] for p in expected], 1)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.numpy(), together, rtol=0, atol=1e-6)
    assert torch.equal(found.positive() if kind == "multilabel" else found.classes(), _decided(together, kind))


def _decided(probabilities: np.ndarray, kind: Kind) -> Tensor:
    return torch.from_numpy(probabilities > 0.5 if kind == "multilabel" else probabilities.argmax(1))


@pytest.mark.parametrize("kind", logistic.KINDS)
def test_the_defaults_are_near_the_optimum(kind: Kind) -> None:
    train, val = _labelled(400, 30, kind), _labelled(200, 30, kind, seed=1)
    test = _labelled(1000, 30, kind, seed=2)
    for value in logistic.Config().lambdas:
        quick = logistic.predict(train, val, test.features, logistic.Config(lambdas=[value]))
        exact_cfg = logistic.Config(lambdas=[value], tolerance=1e-13, max_steps=5000)
        exact = logistic.predict(train, val, test.features, exact_cfg)
        assert quick.probabilities is not None
        assert exact.probabilities is not None
        torch.testing.assert_close(quick.probabilities, exact.probabilities, rtol=0, atol=1e-3)
        quality, exact_quality = (selection_score(p.scores, test) for p in (quick, exact))
        assert quality == pytest.approx(exact_quality, abs=0.003)


@pytest.mark.parametrize("value", [1e-2, 1e-5])
def test_probabilities_are_those_of_the_optimum_where_samples_are_fewer_than_features(value: float) -> None:
    """As with few labels, where the loss is flat and a fit that ends early is sure of less than it could be."""
    from sklearn.linear_model import LogisticRegression

    train, test = _labelled(200, 256, "classification", 10), _labelled(100, 256, "classification", 10, seed=1)
    x, x_test = _standardised(train.features, test.features)
    fit = LogisticRegression(C=1 / (value * 200), tol=1e-10, max_iter=20_000).fit(x, train.targets.numpy())
    found = logistic.predict(train, train, test.features, logistic.Config(lambdas=[value]))
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.numpy(), fit.predict_proba(x_test), rtol=0, atol=2e-3)
    assert found.chosen["converged"] == 1.0


def test_the_accuracy_over_a_grid_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    train, val, test = (_labelled(n, 40, "classification", 5, seed) for seed, n in enumerate((600, 400, 2000)))
    x, x_val, x_test = _standardised(train.features, val.features, test.features)
    best, expected = -1.0, 0.0
    for value in logistic.Config().lambdas:
        fit = LogisticRegression(C=1 / (value * 600), max_iter=1000).fit(x, train.targets.numpy())
        if (found := fit.score(x_val, val.targets.numpy())) > best:
            best, expected = found, fit.score(x_test, test.targets.numpy())
    ours = logistic.predict(train, val, test.features)
    assert _accuracy(ours.scores, test.targets) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("kind", logistic.KINDS)
def test_the_path_ends_at_the_best_penalty_of_val(kind: Kind) -> None:
    train, val, test = (_labelled(n, 20, kind, 3, seed) for seed, n in enumerate((60, 200, 10)))
    cfg = logistic.Config(patience=0)
    alone = [logistic.predict(train, val, val.features, logistic.Config([value])) for value in cfg.lambdas]
    found = [selection_score(p.scores, val) for p in alone]
    best = found.index(max(found))
    assert 0 < best < len(found) - 1
    whole, stopped = (logistic.predict(train, val, test.features, c) for c in (cfg, logistic.Config(patience=2)))
    assert whole.chosen["lambda"] == cfg.lambdas[best] == stopped.chosen["lambda"]
    torch.testing.assert_close(stopped.scores, whole.scores)


def test_what_the_chosen_penalty_is_fitted_on() -> None:
    train, val, test = (_labelled(n, 10, "classification", 3, seed) for seed, n in enumerate((60, 40, 20)))
    exact = {"tolerance": 1e-12, "max_steps": 5000}
    one = logistic.predict(train, val, test.features, logistic.Config(**exact))
    alone = logistic.predict(train, None, test.features, logistic.Config(**exact))
    for found in (one, alone):
        assert found.chosen["penalty"] == 60 * found.chosen["lambda"]
    again = logistic.predict(train, val, test.features, logistic.Config([alone.chosen["lambda"]], **exact))
    torch.testing.assert_close(alone.scores, again.scores, rtol=1e-4, atol=1e-4)


def test_several_labels_of_which_one_is_never_and_one_is_always_there() -> None:
    train, test = _labelled(50, 6, "multilabel"), _labelled(9, 6, "multilabel", seed=1).features
    targets = torch.cat([train.targets, torch.zeros(50, 1), torch.ones(50, 1)], 1)
    found = logistic.predict(Labelled(train.features, targets, "multilabel", 5), None, test)
    assert bool((found.scores[:, 3] == -float("inf")).all())
    assert found.probabilities is not None
    assert found.probabilities[:, 3:].unique(dim=0).tolist() == [[0.0, 1.0]]
    only = logistic.predict(Labelled(train.features, targets[:, 3:], "multilabel", 2), None, test)
    assert only.positive().unique(dim=0).tolist() == [[False, True]]


@pytest.mark.parametrize("has_val", [True, False])
def test_whether_the_fit_came_to_its_optimum_is_told(has_val: bool, caplog: pytest.LogCaptureFixture) -> None:
    train = _labelled(60, 8, "classification")
    val = train if has_val else None
    for cfg, converged in ((logistic.Config(), 1.0), (logistic.Config(lambdas=[1e-4], max_steps=1), 0.0)):
        chosen = logistic.predict(train, val, train.features, cfg).chosen
        assert chosen["converged"] == converged
        assert is_at_optimum(chosen) == bool(converged)
    assert is_at_optimum(ridge.predict(train, val, train.features).chosen)
    assert not caplog.records  # whoever runs a probe knows of which task it is


@pytest.mark.parametrize(("scores", "value", "converged"), [((0.9, 0.5), 1e3, 1.0), ((0.5, 0.9), 1e-6, 0.0)])
def test_and_of_the_chosen_penalty_alone(
    scores: tuple[float, float], value: float, converged: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, found = _labelled(60, 8, "classification"), iter(scores)
    monkeypatch.setattr(logistic, "selection_score", lambda *_: next(found))
    cfg = logistic.Config(lambdas=[1e3, 1e-6], max_steps=4)  # enough for the strong one
    chosen = logistic.predict(train, train, train.features, cfg).chosen
    assert (chosen["lambda"], chosen["converged"]) == (value, converged)


# Linear heads


@pytest.mark.parametrize("kind", linear.KINDS)
def test_linear_equals_a_plain_loop(kind: Kind) -> None:
    """Autograd, torch's optimiser and scheduler, one learning rate at a time; the same batches."""
    train, test = _labelled(50, 6, kind), _labelled(10, 6, kind, seed=1).features
    cfg = linear.Config(lrs=[0.3, 0.01], n_epochs=4, batch_size=16, seed=3)
    x, y = train.features, train.targets.double()
    if kind == "classification":
        y = functional.one_hot(train.targets, 3).double()
    shift, scale = (y.mean(), y.std(correction=0)) if kind == "regression" else (0.0, 1.0)
    y = ((y - shift) / scale).reshape(len(x), -1)
    z, z_test = (torch.from_numpy(part) for part in _standardised(x, test))
    found = linear.predict(train, train, test, cfg)
    head = torch.nn.Linear(6, y.shape[1], dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimiser = torch.optim.SGD(head.parameters(), lr=found.chosen["lr"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4 * -(-len(x) // 16))
    for epoch in range(4):
        order = torch.randperm(len(x), generator=torch_generator(3, "linear", epoch))
        for batch in order.split(16):
            scores = head(z[batch])
            if kind == "multilabel":
                loss = functional.binary_cross_entropy_with_logits(scores, y[batch], reduction="sum")
            elif kind == "regression":
                loss = (scores - y[batch]).square().sum() / 2
            else:
                loss = functional.cross_entropy(scores, y[batch], reduction="sum")
            optimiser.zero_grad()
            (loss / len(batch)).backward()
            optimiser.step()
            schedule.step()
    expected = (head(z_test) * scale + shift).detach()
    torch.testing.assert_close(found.scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_learning_rates_are_trained_as_if_alone_and_the_best_is_taken() -> None:
    train, val, test = (_labelled(n, 10, "classification", 3, seed) for seed, n in enumerate((80, 60, 20)))
    lrs = [1e-6, 3e-2, 1e3]
    alone = [linear.predict(train, val, val.features, linear.Config(lrs=[lr])) for lr in lrs]
    found = [selection_score(p.scores, val) for p in alone]
    together = linear.predict(train, val, test.features, linear.Config(lrs=lrs))
    assert together.chosen["lr"] == lrs[found.index(max(found))]
    same = linear.predict(train, val, test.features, linear.Config(lrs=[together.chosen["lr"]]))
    torch.testing.assert_close(together.scores, same.scores, rtol=1e-4, atol=1e-5)


def test_heads_that_diverge_lose_and_are_an_error_where_no_other_is_left() -> None:
    train = _labelled(60, 8, "regression")
    raw = linear.Config(lrs=[1e-9, 1e2], standardise=False)
    assert linear.predict(train, train, train.features, raw).chosen["lr"] == 1e-9
    with pytest.raises(ValueError, match="training diverged at every one"):
        linear.predict(train, train, train.features, linear.Config(lrs=[1e2], standardise=False))


@pytest.mark.parametrize(
    ("probe", "options", "key"),
    [
        (knn, {"n_neighbors": 0}, "n_neighbors"),
        (knn, {"temperature": 0.0}, "temperature"),
        (ridge, {"lambdas": []}, "lambdas"),
        (ridge, {"lambdas": [-1.0]}, "lambdas"),
        (logistic, {"lambdas": [1e-3, 1.0]}, "lambdas"),
        (logistic, {"patience": -1}, "patience"),
        (logistic, {"tolerance": 1e-15}, "tolerance must be at least 1e-14"),
        (logistic, {"path_tolerance": 1e-6}, "path_tolerance must be at least 1e-05"),
        (linear, {"lrs": [0.0]}, "lrs"),
        (linear, {"n_epochs": 0}, "n_epochs"),
        (linear, {"momentum": 1.0}, "momentum"),
    ],
)
def test_options_that_make_no_sense(probe: ModuleType, options: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        probe.Config(**options)
