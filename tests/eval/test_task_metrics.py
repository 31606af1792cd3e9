"""Metrics against torchmetrics and scikit-learn, with and without weights, and where they are undefined."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tm
import torchmetrics.functional.classification as tmc
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import (
    HEADLINE,
    HIGHER_IS_BETTER,
    METRICS,
    Classified,
    MultiLabelled,
    Regressed,
    Segmented,
    best_of,
    has_intervals,
    image_confusions,
    is_ratio,
    metric_text,
    number_text,
    score_text,
)
from ssl_eo.seeding import torch_generator

K = 7  # class 5 is predicted and never true, class 6 is neither
FLOAT32 = 1e-6  # torchmetrics sums in float32

# References are called with a class absent on purpose; what they say about it is known.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _classified(seed: int, m: int = 300) -> Classified:
    g = torch_generator(seed, "classified")
    labels = torch.randint(5, (m,), generator=g)
    logits = torch.randn(m, K, generator=g, dtype=torch.float64)
    logits[torch.arange(m), labels] += 1.0
    logits[:, 6] = -20.0
    probabilities = logits.softmax(1)
    return Classified(probabilities.argmax(1), labels, K, probabilities)


def _multi_labelled(seed: int, m: int = 200) -> MultiLabelled:
    g = torch_generator(seed, "multilabel")
    targets = torch.rand(m, K, generator=g) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.1, 0.0, 0.0])
    # Rounded, so that many scores are equal, within a class and between classes.
    scores = ((torch.rand(m, K, generator=g) + 0.3 * targets) * 20).round() / 26
    positive = scores > 0.5
    positive[:, 6] = False
    return MultiLabelled(scores, positive, targets.long())


def _maps(seed: int, m: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch_generator(seed, "maps")
    targets = torch.randint(5, (m, 9, 11), generator=g)
    is_right = torch.rand(targets.shape, generator=g) < 0.6
    return torch.where(is_right, targets, torch.randint(6, targets.shape, generator=g)), targets


def _segmented(seed: int, m: int = 12) -> Segmented:
    return Segmented(image_confusions(*_maps(seed, m), K), no_data=(0, 6))


def _regressed(seed: int, m: int = 200) -> Regressed:
    g = torch_generator(seed, "regressed")
    targets = torch.randn(m, generator=g, dtype=torch.float64) * 3 + 50
    return Regressed(targets + torch.randn(m, generator=g, dtype=torch.float64), targets)


MAKERS = {
    "classification": _classified,
    "multilabel": _multi_labelled,
    "segmentation": _segmented,
    "regression": _regressed,
}


def _rows(outcome: Any, rows: torch.Tensor) -> Any:
    """The samples `rows` of an outcome, a row as often as it is named."""
    tensors = {f.name: getattr(outcome, f.name) for f in fields(outcome)}
    return replace(outcome, **{name: t[rows] for name, t in tensors.items() if isinstance(t, torch.Tensor)})


@pytest.mark.parametrize("seed", range(5))
def test_classified_equals_torchmetrics(seed: int) -> None:
    outcome = _classified(seed)
    predicted, labels = outcome.predicted, outcome.labels
    both = {"preds": predicted, "target": labels, "num_classes": K}
    expected = {
        "accuracy": tmc.multiclass_accuracy(**both, average="micro"),
        "macro_f1": tmc.multiclass_f1_score(**both, average="macro"),
        "weighted_f1": tmc.multiclass_f1_score(**both, average="weighted"),
        "kappa": tmc.multiclass_cohen_kappa(**both),
        "ece": tmc.multiclass_calibration_error(outcome.probabilities, labels, K, n_bins=15, norm="l1"),
    }
    scores = outcome.scores()
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(float(value), abs=FLOAT32), metric
    assert torch.equal(outcome.confusion, tmc.multiclass_confusion_matrix(**both))
    # torchmetrics counts the recall of a class that is predicted and never true as 0; without it we agree.
    seen = predicted < 5
    part = Classified(predicted[seen], labels[seen], K)
    macro = tmc.multiclass_accuracy(predicted[seen], labels[seen], K, average="macro")
    assert part.scores()["macro_accuracy"] == pytest.approx(float(macro), abs=FLOAT32)


@pytest.mark.parametrize("weighted", [False, True])
def test_classified_equals_scikit_learn(weighted: bool) -> None:
    outcome = _classified(9)
    y, p = outcome.labels.numpy(), outcome.predicted.numpy()
    w = torch.rand(len(outcome), generator=torch_generator(1)).double() if weighted else None
    s: dict[str, Any] = {"sample_weight": None if w is None else w.numpy()}
    expected = {
        "accuracy": sk.accuracy_score(y, p, **s),
        "macro_accuracy": sk.balanced_accuracy_score(y, p, **s),
        "macro_f1": sk.f1_score(y, p, average="macro", **s),
        "weighted_f1": sk.f1_score(y, p, average="weighted", **s),
        "kappa": sk.cohen_kappa_score(y, p, **s),
        "worst_class_recall": sk.recall_score(y, p, labels=range(5), average=None, **s).min(),
    }
    scores = outcome.scores(w)
    assert scores.keys() == expected.keys() | {"ece"}
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(value, abs=1e-12), metric


def test_table_of_classes_equals_scikit_learn_and_is_nan_where_it_is_undefined() -> None:
    outcome = _classified(3)
    y, p = outcome.labels.numpy(), outcome.predicted.numpy()
    nan = {"labels": range(K), "zero_division": np.nan}
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, p, **nan)
    iou = sk.jaccard_score(y, p, labels=range(6), average=None)
    table = outcome.per_class()
    assert table["support"].tolist() == support.tolist()
    for column, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("iou", [*iou, np.nan])):
        np.testing.assert_allclose(table[column].numpy(), expected, rtol=1e-12, err_msg=column)
    assert table["recall"].isnan().tolist() == [False] * 5 + [True, True]
    assert table["precision"].isnan().tolist() == [False] * 6 + [True]


def test_calibration_error_by_hand() -> None:
    # Bins are (edge, next edge]: 0.6 closes the ninth bin, 0.61 and 0.65 are in the tenth.
    top = torch.tensor([0.60, 0.61, 0.65, 1.0], dtype=torch.float64)
    probabilities = torch.stack([top, 1 - top], 1)
    outcome = Classified(torch.zeros(4).long(), torch.tensor([0, 0, 1, 0]), 2, probabilities)
    assert outcome.scores()["ece"] == pytest.approx((0.40 + abs(1 - 0.61 - 0.65) + 0.0) / 4)
    assert "ece" not in Classified(outcome.predicted, outcome.labels, 2).scores()


@pytest.mark.parametrize("seed", range(5))
def test_multi_labelled_equals_torchmetrics(seed: int) -> None:
    outcome = _multi_labelled(seed)
    ranked = (outcome.class_scores, outcome.targets, K)
    decided = (outcome.positive.long(), outcome.targets, K)
    expected = {
        "f1_micro": tmc.multilabel_f1_score(*decided, average="micro"),
        "f1_macro_all": tmc.multilabel_f1_score(*decided, average="macro"),
        "map_micro": tmc.multilabel_average_precision(*ranked, average="micro"),
        "map_macro_all": tmc.multilabel_average_precision(*ranked, average="macro"),
        "subset_accuracy": tmc.multilabel_exact_match(*decided),
    }
    scores = outcome.scores()
    assert scores.keys() == expected.keys() | {"f1_macro", "map_macro"}
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(float(value), abs=FLOAT32), metric
    each = tmc.multilabel_average_precision(*ranked, average=None)
    assert scores["map_macro"] == pytest.approx(float(each[:5].mean()), abs=FLOAT32)
    torch.testing.assert_close(outcome.per_class()["average_precision"][:5].float(), each[:5])
    assert outcome.per_class()["average_precision"][5:].isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_multi_labelled_equals_scikit_learn(weighted: bool) -> None:
    outcome = _multi_labelled(9)
    y, p, r = outcome.targets.numpy(), outcome.positive.numpy().astype(int), outcome.class_scores.numpy()
    w = torch.randint(4, (len(outcome),), generator=torch_generator(1)).double() if weighted else None
    s: dict[str, Any] = {"sample_weight": None if w is None else w.numpy()}
    expected = {
        "f1_micro": sk.f1_score(y, p, average="micro", **s),
        "f1_macro": sk.f1_score(y, p, average="macro", zero_division=np.nan, **s),
        "f1_macro_all": sk.f1_score(y, p, average="macro", zero_division=0.0, **s),
        "map_micro": sk.average_precision_score(y, r, average="micro", **s),
        "map_macro": np.mean([sk.average_precision_score(y[:, k], r[:, k], **s) for k in range(5)]),
        "map_macro_all": sk.average_precision_score(y, r, average="macro", **s),
        "subset_accuracy": sk.accuracy_score(y, p, **s),
    }
    scores = outcome.scores(w)
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(value, abs=1e-12), metric
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, p, zero_division=np.nan)
    table = outcome.per_class()
    for column, values in (("support", support), ("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(table[column].numpy(), values, rtol=1e-12, err_msg=column)


def test_equal_scores_are_ranked_together() -> None:
    # The same three entries in each order: two share a score, and their precision is that of all three.
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        scores, targets = torch.tensor([[2.0], [1.0], [1.0]])[order], torch.tensor([[0], [1], [0]])[order]
        outcome = MultiLabelled(scores, scores > 1.5, targets)
        assert outcome.scores()["map_macro"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_segmented_equals_references(weighted: bool) -> None:
    predicted, targets = _maps(2)
    outcome = Segmented(image_confusions(predicted, targets, K), no_data=(0, 6))
    w = torch.randint(4, (len(outcome),), generator=torch_generator(1)) if weighted else None
    repeated = torch.arange(12) if w is None else torch.arange(12).repeat_interleave(w)
    p, y = predicted[repeated].flatten(), targets[repeated].flatten()
    classes = tmc.multiclass_jaccard_index(p, y, K, average="none")
    is_valid = y != 0
    expected = {
        "accuracy": sk.accuracy_score(y, p),
        "macro_accuracy": sk.balanced_accuracy_score(y, p),
        "macro_f1": sk.f1_score(y, p, average="macro"),
        "miou_present": sk.jaccard_score(y, p, average="macro"),
        "miou_all": float(classes.double().sum()) / K,
        "miou_valid": sk.jaccard_score(y[is_valid], p[is_valid], labels=[1, 2, 3, 4, 5], average="macro"),
        "fwiou": sk.jaccard_score(y, p, average="weighted"),
    }
    scores = outcome.scores(w)
    assert scores.keys() == expected.keys()
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(value, abs=FLOAT32 if metric == "miou_all" else 1e-12), metric
    present = tmc.multiclass_jaccard_index(p, y, K, average="macro")
    assert scores["miou_present"] == pytest.approx(float(present), abs=FLOAT32)


def test_miou_valid_without_no_data_is_miou_present() -> None:
    scores = replace(_segmented(0), no_data=()).scores()
    assert scores["miou_valid"] == scores["miou_present"]


def test_image_confusions_equal_a_loop_and_leave_out_ignored_pixels() -> None:
    predicted, targets = _maps(4, 5)
    targets[:, 0], predicted[:, 0, :4] = 255, 99  # what is predicted at an ignored pixel does not matter
    expected = torch.zeros(5, K, K, dtype=torch.int64)
    for image, row, column in np.ndindex(*targets.shape):
        if targets[image, row, column] != 255:
            expected[image, targets[image, row, column], predicted[image, row, column]] += 1
    found = image_confusions(predicted.to(torch.uint8), targets.to(torch.uint8), K, ignore=255)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_regressed_equals_references(weighted: bool) -> None:
    outcome = _regressed(0)
    p, y = outcome.predicted, outcome.targets
    w = torch.rand(len(outcome), generator=torch_generator(1)).double() if weighted else None
    s: dict[str, Any] = {"sample_weight": None if w is None else w.numpy()}
    scores = outcome.scores(w)
    assert scores == pytest.approx(
        {
            "rmse": sk.root_mean_squared_error(y, p, **s),
            "mae": sk.mean_absolute_error(y, p, **s),
            "r2": sk.r2_score(y, p, **s),
        },
        abs=1e-12,
    )
    if not weighted:
        assert scores["rmse"] == pytest.approx(float(tm.mean_squared_error(p, y, squared=False)), abs=1e-12)
        assert scores["mae"] == pytest.approx(float(tm.mean_absolute_error(p, y)), abs=1e-12)
        assert scores["r2"] == pytest.approx(float(tm.r2_score(p, y)), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), counts=st.lists(st.integers(0, 3), min_size=1, max_size=12))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_weight_is_how_often_a_sample_counts(kind: str, seed: int, counts: list[int]) -> None:
    outcome = MAKERS[kind](seed, len(counts))
    weights = torch.tensor(counts)
    repeated = _rows(outcome, torch.arange(len(counts)).repeat_interleave(weights))
    assert len(repeated) == sum(counts)
    assert outcome.scores(weights.double()) == pytest.approx(repeated.scores(), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_weight_zero_leaves_out_and_weight_one_changes_nothing(kind: str) -> None:
    outcome = MAKERS[kind](0, 12)
    assert outcome.scores(torch.ones(12)) == outcome.scores()
    kept = torch.arange(12) % 3 > 0
    part = _rows(outcome, kept.nonzero()[:, 0])
    assert outcome.scores(kept.double()) == pytest.approx(part.scores(), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_nothing_that_counts_leaves_every_score_undefined(kind: str) -> None:
    outcome = MAKERS[kind](0, 12)
    for scores in (outcome.scores(torch.zeros(12)), _rows(outcome, torch.arange(0)).scores()):
        assert all(math.isnan(value) for value in scores.values()), scores


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_task_may_be_ranked_by_the_scores_of_its_kind_which_have_a_direction(kind: Kind) -> None:
    scores = MAKERS[kind](0, 12).scores()
    assert HEADLINE[kind] in scores
    assert scores.keys() == set(METRICS[kind])
    assert scores.keys() <= HIGHER_IS_BETTER.keys()
    assert {m for m in HIGHER_IS_BETTER if not HIGHER_IS_BETTER[m]} == {"rmse", "mae", "ece"}
    assert {m for m in HIGHER_IS_BETTER if not is_ratio(m)} == {"rmse", "mae", "r2"}
    assert {m for m in HIGHER_IS_BETTER if not has_intervals(m)} == {"ece", "worst_class_recall"}


def test_scores_are_written_in_their_unit() -> None:
    assert [score_text(m, 0.7184) for m in ("accuracy", "ece", "rmse")] == ["71.8 %", "71.8 %", "0.718"]
    assert [number_text(m, 0.1239, "+") for m in ("accuracy", "r2")] == ["+12.4", "+0.124"]
    assert [metric_text(m) for m in ("macro_f1", "miou_present", "ece", "mae", "r2")] == [
        "macro F1 %",
        "mIoU present %",
        "ECE %, less is better",
        "MAE, less is better",
        "R2",
    ]
    assert [best_of(m, [0.2, 0.4, 0.3], float) for m in ("accuracy", "ece", "rmse", "r2")] == [0.4, 0.2, 0.2, 0.4]


def test_undefined_scores() -> None:
    one_class = Classified(torch.zeros(4).long(), torch.zeros(4).long(), 3).scores()
    assert math.isnan(one_class["kappa"])
    assert one_class["accuracy"] == one_class["macro_f1"] == one_class["worst_class_recall"] == 1.0
    constant = Regressed(torch.arange(3.0), torch.full((3,), 0.1)).scores()
    assert math.isnan(constant["r2"])
    assert constant["rmse"] > 0
    # Two samples differ, but only one of them counts.
    assert math.isnan(Regressed(torch.arange(2.0), torch.tensor([1.0, 2.0])).scores(torch.tensor([3.0, 0.0]))["r2"])
    zeros = torch.zeros(4, 2)
    nothing = MultiLabelled(zeros, zeros > 0, zeros.long()).scores()
    assert {m for m, v in nothing.items() if math.isnan(v)} == {"f1_micro", "f1_macro", "map_micro", "map_macro"}
    assert nothing["f1_macro_all"] == nothing["map_macro_all"] == 0.0
    assert nothing["subset_accuracy"] == 1.0
    no_target = replace(_segmented(0), confusions=torch.zeros(2, K, K, dtype=torch.int64))
    assert all(math.isnan(v) for v in no_target.scores().values())


def test_other_dtypes_give_the_same() -> None:
    outcome = _classified(0)
    small = Classified(outcome.predicted.to(torch.uint8), outcome.labels.to(torch.int16), K, outcome.probabilities)
    assert small.scores() == outcome.scores()
    labelled = _multi_labelled(0)
    assert replace(labelled, targets=labelled.targets.bool()).scores() == labelled.scores()


def _refused(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.tensor([0, 1, 1]), torch.tensor([0, 1])
    _refused(r"predicted and labels must be \[M\] alike, got .*\[3\].*\[2\]", lambda: Classified(a, b, 2))
    _refused("labels must be classes from 0 to 1, found 0 to 2", lambda: Classified(b, b * 2, 2))
    _refused("predicted must be integers, got torch.float32", lambda: Classified(b.float(), b, 2))
    _refused(r"probabilities must be \[M, K\], \[2, 2\], got \[2, 3\]", lambda: Classified(b, b, 2, torch.ones(2, 3)))
    _refused("sum to 1 in every row", lambda: Classified(b, b, 2, torch.full((2, 2), float("nan"))))
    _refused("greatest probability", lambda: Classified(b, b, 2, torch.tensor([[0.9, 0.1], [0.9, 0.1]])))
    scores, targets = torch.ones(2, 3), torch.ones(2, 3).long()
    _refused(r"must be \[M, K\] alike", lambda: MultiLabelled(scores, scores[:1] > 0, targets))
    _refused("positive must be bool", lambda: MultiLabelled(scores, targets, targets))
    _refused("targets of several labels must be 0 or 1", lambda: MultiLabelled(scores, scores > 0, targets * 2))
    _refused("class_scores hold nan", lambda: MultiLabelled(scores * float("nan"), scores > 0, targets))
    _refused("1 of 2 values are not finite", lambda: Regressed(torch.tensor([1.0, float("nan")]), torch.ones(2)))
    _refused(r"confusions must be \[M, K, K\] int64", lambda: Segmented(torch.zeros(2, 3, 3)))
    _refused(r"no_data: classes must be from 0 to 6, found \[7\]", lambda: replace(_segmented(0), no_data=(7,)))
    maps = torch.full((1, 2, 2), 255)
    _refused("targets must be classes from 0 to 6, found 255 to 255", lambda: image_confusions(maps, maps, K))
    for weights in (torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")])):
        _refused(r"weights must be \[2\] and at least 0", lambda w=weights: Classified(b, b, 2).scores(w))
