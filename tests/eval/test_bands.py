"""Subsets of bands: which they are, in which order, and where there is none."""

from __future__ import annotations

import pytest

from ssl_eo.eval.bands import BAND_SUBSETS, bands_of
from ssl_eo.sensors import load_sensor

SENTINEL2 = load_sensor("sentinel2_l2a")
BANDS = SENTINEL2.band_names
COLOUR = SENTINEL2.true_color


def test_true_colour_is_red_green_blue_and_the_rest_keeps_its_order() -> None:
    assert bands_of("all", BANDS, COLOUR, "t", 0) == list(BANDS)
    assert bands_of("rgb", BANDS, COLOUR, "t", 0) == ["B04", "B03", "B02"]
    assert bands_of("no-rgb", BANDS, COLOUR, "t", 0) == [b for b in BANDS if b not in ("B02", "B03", "B04")]


def test_the_random_half_is_of_the_task_and_the_seed() -> None:
    half = bands_of("random", BANDS, COLOUR, "t", 0)
    assert half is not None
    assert len(half) == len(BANDS) // 2
    assert half == [band for band in BANDS if band in half]
    assert half == bands_of("random", BANDS, COLOUR, "t", 0)
    others = [bands_of("random", BANDS, COLOUR, task, seed) for task, seed in (("t", 1), ("u", 0))]
    assert half not in others


@pytest.mark.parametrize(
    ("subset", "bands", "colour"),
    [
        ("rgb", ("VV", "VH"), None),  # radar
        ("no-rgb", ("VV", "VH"), None),
        ("rgb", ("B02", "B03"), COLOUR),  # a band of the three is not shown
        ("no-rgb", ("B02", "B03", "B04"), COLOUR),  # nothing is left
        ("random", ("height",), None),
    ],
)
def test_a_tile_may_have_no_such_subset(subset: str, bands: tuple[str, ...], colour: tuple[str, ...] | None) -> None:
    assert subset in BAND_SUBSETS
    assert bands_of(subset, bands, colour, "t", 0) is None  # type: ignore[arg-type]
