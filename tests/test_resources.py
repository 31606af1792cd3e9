"""The shipped YAML files are found by their names; `tests/test_package.py` has those of an installed package."""

from __future__ import annotations

import pytest

from ssl_eo.resources import find_resource


def test_a_wrong_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"datasets_meta/sensors has no 'sentinel2_l2b'; did you mean 'sentinel2_l2a'"):
        find_resource("datasets_meta/sensors", "sentinel2_l2b")
