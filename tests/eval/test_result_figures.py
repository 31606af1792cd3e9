"""Charts can be read: labels of points stand clear of dots, shades have a scale where cells have no numbers."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_eo.eval.figures import FONT_SIZE
from ssl_eo.eval.result_figures import (
    _DOT,
    _LETTER,
    Point,
    _clear_offsets,
    _shared,
    draw_confusion,
    draw_points,
)

INSIDE = np.array([0.0, 0.0, 340.0, 170.0])


def overlaps(labels: list[str], places: np.ndarray) -> float:
    """Square points that labels share with dots, with each other, and with what is outside."""
    boxes = []
    for label, at, offset in zip(labels, places, _clear_offsets(labels, places, INSIDE), strict=True):
        size = np.array(_LETTER) * (FONT_SIZE - 1) * (len(label), 1)
        if label:
            boxes.append(offset.box(at, size))
    dots = [np.concatenate([at - _DOT / 2, at + _DOT / 2]) for at in places]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in [*dots, *boxes[:i]]]
    outside = sum(float(np.prod(box[2:] - box[:2])) - float(_shared(box, INSIDE)) for box in boxes)
    return sum(float(_shared(a, b)) for a, b in pairs) + outside


@given(st.lists(st.tuples(st.integers(5, 335), st.integers(5, 165)), min_size=1, max_size=8))
def test_labels_cover_nothing(places: list[tuple[int, int]]) -> None:
    labels = [f"{i}, {i + 1}" for i in range(len(places))]
    assert overlaps(labels, np.array(places, dtype=float)) == pytest.approx(0, abs=1e-6)


def test_a_label_moves_away_from_a_dot_that_lies_beside_it() -> None:
    """As protocols of a decoder do, whose costs differ by a little."""
    places = np.array([[60.0, 80.0], [72.0, 80.0], [60.0, 89.0], [72.0, 71.0]])
    labels = ["7, 8", "9, 10", "", ""]
    first, second, *_ = _clear_offsets(labels, places, INSIDE)
    assert first.x < 0 < second.x
    assert overlaps(labels, places) == 0


def test_a_label_without_room_nearby_is_led_to() -> None:
    places = np.array([[x, y] for x in range(20, 320, 12) for y in (72, 84, 96)], dtype=float)
    labels = [""] * len(places)
    labels[37] = "12"  # in the middle of all
    assert _clear_offsets(labels, places, INSIDE)[37].is_far
    assert overlaps(labels, places) == 0
    places = np.array([[20.0, 30.0], [200.0, 90.0]])
    assert not any(offset.is_far for offset in _clear_offsets(["1", "2"], places, INSIDE))


def test_points_are_labelled_and_those_without_a_label_are_not() -> None:
    svg = draw_points("t", [Point("1", 1.0, 40, 0), Point("", 1.01, 40, 0), Point("2, 3", 9.0, 41, 1)], [], "x", "x")
    texts = [e.text for e in ElementTree.fromstring(svg.replace("xlink:href", "href")).iter("text")]
    assert texts.count("2, 3") == 1
    assert None not in texts


@pytest.mark.parametrize(("k", "has_scale"), [(10, False), (11, True), (30, True)])
def test_shades_without_numbers_have_a_scale(k: int, has_scale: bool) -> None:
    svg = draw_confusion("t", np.eye(k) * 5, [f"class {i}" for i in range(k)], "x")
    assert ("100 %" in svg) == has_scale
