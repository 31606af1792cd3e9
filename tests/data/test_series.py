"""Which tiles are the dates of a view, in which order, and what is told of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_eo.data.masking import MaskConfig, draw
from ssl_eo.data.series import Acquisitions, SeriesConfig, acquisitions_at, choose_dates, series_of, stack_acquisitions
from ssl_eo.data.sources._landscape import build_series
from ssl_eo.data.sources.synthetic import Config, Source
from ssl_eo.data.types import PixelBatch, Sample, Tile
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor

BANDS = ("R", "G", "B")


def rng_of(*address: object) -> np.random.Generator:
    return numpy_generator("test", *map(str, address))


def sample_of(*dates: str | None, **meta: object) -> Sample:
    pixels = np.zeros((3, 8, 8), np.uint8)
    tiles = {f"rgb@{i}": Tile(pixels, BANDS, 10.0, date) for i, date in enumerate(dates)}
    return Sample("a", tiles, dict(meta))


@given(order=st.permutations(range(6)), n_dates=st.integers(2, 6), seed=st.integers(0, 50))
def test_dates_are_in_order_of_time(order: list[int], n_dates: int, seed: int) -> None:
    sample = sample_of(*(f"2020-0{month + 1}-11" for month in order))
    chosen = choose_dates(sample, list(sample.tiles), n_dates, rng_of(seed))
    assert len(set(chosen)) == n_dates
    dates = [sample.tiles[name].date or "" for name in chosen]
    assert all(a < b for a, b in pairwise(dates))


def test_every_choice_of_dates_is_drawn() -> None:
    sample = sample_of("2020-01-01", "2020-04-01", "2020-07-01")
    drawn = {tuple(choose_dates(sample, list(sample.tiles), 2, rng_of(i))) for i in range(60)}
    assert drawn == {("rgb@0", "rgb@1"), ("rgb@0", "rgb@2"), ("rgb@1", "rgb@2")}


def test_tiles_without_a_date_come_last_in_their_own_order() -> None:
    sample = sample_of(None, "2021-05-05", None)
    assert choose_dates(sample, list(sample.tiles), 3, rng_of()) == ["rgb@1", "rgb@0", "rgb@2"]


def test_too_few_dates_are_a_bad_sample() -> None:
    with pytest.raises(ValueError, match=r"n_dates is 3, .* rgb@0, rgb@1"):
        choose_dates(sample_of("2020-01-01", "2020-02-01"), ["rgb@0", "rgb@1"], 3, rng_of())


def test_acquisitions_are_years_days_and_degrees() -> None:
    sample = sample_of("2020-12-31T10:30:00Z", None, "2019-01-01", latitude=52.5, longitude=-13.25)
    found = acquisitions_at(sample, list(sample.tiles), SeriesConfig(3), rng_of())
    expected = [[2020, 366], [math.nan, math.nan], [2019, 1]]
    np.testing.assert_array_equal(found.dates, np.array(expected, np.float32))
    np.testing.assert_array_equal(found.location, np.array([52.5, -13.25], np.float32))
    assert found.dates.dtype == found.location.dtype == np.float32
    unknown = acquisitions_at(sample_of(None), ["rgb@0"], SeriesConfig(), rng_of())
    assert np.isnan(unknown.location).all()
    of_sample = acquisitions_at(sample_of(None, date="2018-02-01"), ["rgb@0"], SeriesConfig(), rng_of())
    assert of_sample.dates.tolist() == [[2018, 32]]


def test_a_date_that_is_none_is_a_bad_sample() -> None:
    with pytest.raises(ValueError, match="isoformat"):
        acquisitions_at(sample_of("yesterday"), ["rgb@0"], SeriesConfig(), rng_of())


def test_metadata_are_dropped_as_often_as_said() -> None:
    sample = sample_of("2020-06-01", "2020-07-01", latitude=1.0, longitude=2.0)
    cfg, n = SeriesConfig(2, drop_dates_prob=0.25, drop_location_prob=0.6), 2000
    found = [acquisitions_at(sample, list(sample.tiles), cfg, rng_of(i)) for i in range(n)]
    no_dates, no_location = (np.array([np.isnan(getattr(m, k)).all() for m in found]) for k in ("dates", "location"))
    assert no_dates.mean() == pytest.approx(0.25, abs=0.04)
    assert no_location.mean() == pytest.approx(0.6, abs=0.04)
    assert (no_dates & no_location).mean() == pytest.approx(0.15, abs=0.03)  # each by itself
    assert not any(np.isnan(m.dates).any() != np.isnan(m.dates).all() for m in found)


def test_acquisitions_become_tensors() -> None:
    one = Acquisitions(np.zeros((3, 2), np.float32), np.ones(2, np.float32))
    meta = stack_acquisitions([one, one], ["dates", "location"])
    assert {k: (tuple(v.shape), v.dtype) for k, v in meta.items()} == {
        "dates": ((2, 3, 2), torch.float32),
        "location": ((2, 2), torch.float32),
    }
    assert stack_acquisitions([one], ["location"]).keys() == {"location"}


def test_rows_of_dates_become_series_of_samples() -> None:
    rows = torch.arange(3 * 2 * 3 * 4 * 4.0).view(6, 3, 4, 4)  # T = 3 outermost, B = 2
    view = PixelBatch(rows, load_sensor("rgb").channel_meta(), torch.tensor([1.0, 2.0] * 3), rows > 7)
    found = series_of(view, 3)
    assert found.pixels.shape == (2, 3, 3, 4, 4)
    assert found.valid is not None
    for b in range(2):
        for t in range(3):
            assert torch.equal(found.pixels[b, :, t], rows[2 * t + b])
            assert torch.equal(found.valid[b, :, t], rows[2 * t + b] > 7)
    assert found.gsd_m.tolist() == [1.0, 2.0]
    per_row = replace(view, channels=view.channels.expand(6))
    assert series_of(per_row, 3).channels.kind.ndim == 1


def test_blocks_hide_the_same_ground_at_all_dates() -> None:
    mask = draw(MaskConfig("block", 0.5), rng_of(), (4, 4), n_steps=3).reshape(3, 16)
    assert mask.sum(1).tolist() == [8, 8, 8]
    assert (mask == mask[0]).all()
    random = draw(MaskConfig("random", 0.75), rng_of(), (4, 4), n_steps=3)
    assert random.sum() == 36
    assert not (random.reshape(3, 16) == random.reshape(3, 16)[0]).all()


@pytest.mark.parametrize(
    "wrong", [{"n_dates": 0}, {"drop_dates_prob": 1.5}, {"drop_location_prob": -0.1}], ids=lambda w: next(iter(w))
)
def test_wrong_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SeriesConfig(**wrong)  # type: ignore[arg-type]


def test_procedural_places_at_several_dates() -> None:
    source = Source(Config(n_samples=8, n_dates=4, extent_m=320.0))
    single = Source(Config(n_samples=8, extent_m=320.0))
    assert list(source.schema) == [f"sentinel2_l2a@{i}" for i in range(4)]
    spread = []
    for i in range(8):
        sample = source.read(i)
        assert np.array_equal(sample.tiles["sentinel2_l2a@0"].array, single.read(i).tiles["sentinel2_l2a"].array)
        days = [np.datetime64(tile.date) for tile in sample.tiles.values()]
        gaps = np.diff(days).astype(int)
        assert (gaps > 20).all()
        assert gaps.sum() < 366
        means = [tile.array.mean((1, 2)) for tile in sample.tiles.values()]
        spread.append(np.std(means, axis=0) / np.mean(means, axis=0))
        assert sample.meta == single.read(i).meta
    assert np.mean(spread) > 0.05  # seasons differ
    assert source.fingerprint() != single.fingerprint()
    again = Source(Config(n_samples=8, n_dates=4, extent_m=320.0)).read(3)
    assert all(np.array_equal(again.tiles[k].array, v.array) for k, v in source.read(3).tiles.items())


def test_what_a_place_is_made_of_does_not_change_with_the_date() -> None:
    """Also where some dates have snow, which draws numbers of its own."""
    n_frozen = 0
    for seed in range(60):
        later = [rng_of(seed, date) for date in (1, 2)]
        scenes = build_series(rng_of(seed), 160.0, later)
        for scene in scenes[1:]:
            assert np.array_equal(scene.surface, scenes[0].surface)
            assert np.array_equal(scene.backscatter_db, scenes[0].backscatter_db)
            assert np.array_equal(scene.drought, scenes[0].drought)
            assert np.array_equal(scene.elevation_m, scenes[0].elevation_m)
        frozen = {scene.climate.air_k < 273 for scene in scenes}
        n_frozen += len(frozen) == 2
    assert n_frozen > 3  # the case that is meant does occur
