"""The samples on which health is measured: the same everywhere and always, as the published encoder takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import scenes, tasks
from toy.watched import training_on

from ssl_eo.components import resolve
from ssl_eo.config import load
from ssl_eo.data.opening import open_sources
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.eval.features import Encode
from ssl_eo.eval.watching import Training, WatchedSource, watched_sources
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.objectives import croma
from ssl_eo.sensors import load_sensor

CPU = torch.device("cpu")
DEBUG = Path(__file__).parents[2] / "configs" / "debug"
RECIPES = sorted(path.stem for path in DEBUG.glob("*.yaml"))


def _pixels_seen(training: Training, n_samples: int, batch_size: int = 4) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def encode(inputs: EncoderInput) -> list[Tokens]:
        seen.append(inputs.pixels)
        return [Tokens(inputs.pixels.flatten(2).mT, 0, (8, 8))]

    (source,) = watched_sources(training, n_samples, batch_size, CPU)
    source.measure(encode, ["last"], "mean")
    return torch.cat(seen)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they hold the same samples, in any order."""
    return {row.numpy().tobytes() for row in a} == {row.numpy().tobytes() for row in b}


def test_tiles_are_shown_whole_and_as_they_are() -> None:
    training = training_on(scenes.Config(n=5))
    (source,) = watched_sources(training, 5, 4, CPU)
    assert sorted(source._order) == [0, 1, 2, 3, 4]
    stored = [torch.from_numpy(training.sources[0].read(i).tiles["rgb"].array) for i in source._order]
    torch.testing.assert_close(_pixels_seen(training, 5), (torch.stack(stored).float() - 100.0) / 40.0)


def test_the_draw_is_that_of_the_seed_whatever_the_batches() -> None:
    config = scenes.Config(n=60)
    first = _pixels_seen(training_on(config), 10)
    assert len(first) == 10
    assert torch.equal(_pixels_seen(training_on(config), 10, batch_size=3), first)
    assert not _same(_pixels_seen(training_on(config, seed=1), 10), first)


def test_an_unreadable_sample_moves_no_other(caplog: pytest.LogCaptureFixture) -> None:
    training = training_on(scenes.Config(n=60))
    (source,) = watched_sources(training, 10, 4, CPU)
    third = source._order[2]
    before = _pixels_seen(training, 10)
    after = _pixels_seen(training_on(scenes.Config(n=60, broken=[third])), 10)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != 2 for i in range(10)]
    assert f"health of toy.scenes: sample {third} is left out: sample {third} is broken" in caplog.text


def test_what_stays_unreadable_is_left_out_of_the_measures() -> None:
    encoder = tasks.encoder()
    encode: Encode = lambda inputs: encoder([inputs])  # noqa: E731
    counts = []
    for broken in ([], [0, 3]):
        (source,) = watched_sources(training_on(scenes.Config(n=6, broken=broken)), 6, 2, CPU)
        counts.append(source.measure(encode, ["last"], "mean")["last"]["n_samples"])
    assert counts == [6, 4]


def test_a_source_that_cannot_be_read_is_an_error() -> None:
    (source,) = watched_sources(training_on(scenes.Config(n=6, broken=list(range(6)))), 6, 2, CPU)
    with pytest.raises(
        ValueError, match=r"the health of toy.scenes cannot be measured: sample \d: sample \d is broken"
    ):
        source.measure(lambda inputs: [], ["last"], "mean")


def test_what_no_encoder_takes_is_an_error() -> None:
    def check(channels: Any) -> None:
        raise ValueError("never")

    (source,) = watched_sources(replace(training_on(scenes.Config()), check=check), 6, 2, CPU)
    with pytest.raises(ValueError, match="its published encoder can embed nothing of what the objective shows"):
        source.measure(lambda inputs: [], ["last"], "mean")


def test_sources_of_one_name_are_told_apart() -> None:
    configs = [scenes.Config(n=3), scenes.Config(n=60, seed=2)]
    found = watched_sources(training_on(*configs), 10, 4, CPU)
    assert [(source.name, source._n) for source in found] == [("toy.scenes", 3), ("toy.scenes@1", 10)]


def _measured_on_toys(n_samples: int, broken: list[int]) -> dict[str, Any]:
    encoder = tasks.encoder()
    (source,) = watched_sources(training_on(scenes.Config(n=30, broken=broken)), n_samples, 4, CPU)
    passes = 0

    def encode(inputs: EncoderInput) -> list[Tokens]:
        nonlocal passes
        passes += 1
        return encoder.intermediates(inputs, [0, 1])

    return {**source.measure(encode, ["depth_0.50", "last"], "mean"), "passes": passes}


@pytest.mark.parametrize(("n_samples", "broken"), [(12, []), (11, []), (30, [4, 9])])
def test_two_ranks_measure_what_one_measures(
    on_ranks: Callable[..., list[Any]], n_samples: int, broken: list[int]
) -> None:
    expected = _measured_on_toys(n_samples, broken)
    first, second = on_ranks(2, _measured_on_toys, n_samples, broken)
    assert first == second
    assert first["passes"] == math.ceil(math.ceil(n_samples / 2) / 4)
    assert expected["last"]["n_samples"] == n_samples - len(broken)
    for tap in ("depth_0.50", "last"):
        assert first[tap] == pytest.approx(expected[tap], rel=1e-4)


def test_what_is_not_finite_is_counted() -> None:
    def encode(inputs: EncoderInput) -> list[Tokens]:
        x = inputs.pixels.flatten(2).mT.clone()
        x[0, 0, 0] = torch.nan  # of one sample in a batch of three
        return [Tokens(x, 0, (8, 8))]

    (source,) = watched_sources(training_on(scenes.Config()), 9, 3, CPU)
    assert source.measure(encode, ["last"], "mean") == {"last": {"n_samples": 9, "n_features": 3, "n_not_finite": 3}}


def _of_recipe(name: str) -> tuple[list[WatchedSource], Any]:
    config = load(str(DEBUG / f"{name}.yaml"), [])
    sources = open_sources(config.data)
    schemas = [source.schema for source in sources]
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    views = method.views(config.objective.options, config.model, schemas)
    torch.manual_seed(0)
    objective = method(config.objective.options, config.model, schemas)
    objective.init_weights()
    names = [source.name for source in config.data.sources]
    training = Training(names, sources, views, objective.published_encoder().check, config.run.seed)
    return watched_sources(training, 6, 4, CPU), objective.eval()


@pytest.mark.parametrize("name", RECIPES)
def test_every_objective_is_measured_on_every_source(name: str) -> None:
    watched, objective = _of_recipe(name)
    encode = partial(objective.encode, layers=[0, len(objective.published_encoder().blocks) - 1])
    for source in watched:
        found = source.measure(encode, ["first", "last"], "mean")
        assert source.measure(encode, ["first", "last"], "mean") == found
        for tap in ("first", "last"):
            assert found[tap]["n_samples"] == 6
            assert found[tap]["effective_rank"] > 1.0
            assert ("cls_patch_cosine" in found[tap]) == (name != "croma")
    assert [source.name for source in watched] == {
        "dofa": ["synthetic", "synthetic@1"],
        "panopticon": ["synthetic", "synthetic@1"],
    }.get(name, ["synthetic"])


class _Resolutions:
    """Sentinel-2 in tiles of two resolutions beside Sentinel-1, as SSL4EO-S12 has them."""

    chunk_size, label_names = 1, ()

    def __init__(self) -> None:
        self.schema = {
            "sentinel2_l2a@10m": _tile_schema("sentinel2_l2a", ("B02", "B03", "B04"), 32, 10.0),
            "sentinel2_l2a@20m": _tile_schema("sentinel2_l2a", ("B05", "B11"), 16, 20.0),
            "sentinel1_grd": _tile_schema("sentinel1_grd", ("VV", "VH"), 32, 10.0),
        }

    def __len__(self) -> int:
        return 9

    def fingerprint(self) -> str:
        return ""

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        tiles = {
            name: Tile(rng.normal(5, 2, (len(s.bands), *(s.shape or ()))).astype(np.float32), s.bands, s.gsd_m)
            for name, s in self.schema.items()
        }
        return Sample(f"place {index}", tiles)


def _tile_schema(sensor: str, bands: tuple[str, ...], size: int, gsd_m: float) -> TileSchema:
    n = len(bands)
    return TileSchema(load_sensor(sensor), bands, "float32", (size, size), gsd_m, (5.0,) * n, (2.0,) * n)


@pytest.mark.parametrize(("published", "n_bands"), [("optical", 5), ("radar", 2)])
def test_a_convolution_sees_what_the_objective_shows_its_encoder(published: str, n_bands: int) -> None:
    """The optical view of CROMA is a joint one here, of which no tile alone could be embedded."""
    overrides = ["model.patch_embed=conv", "objective.output=linear", "objective.optical=sentinel2_l2a"]
    config = load(str(DEBUG / "croma.yaml"), [*overrides, f"objective.published={published}"])
    source = _Resolutions()
    views = croma.Objective.views(config.objective.options, config.model, [source.schema])
    objective = croma.Objective(config.objective.options, config.model, [source.schema])
    objective.init_weights()
    training = Training(["places"], [source], views, objective.published_encoder().check, 0)
    seen: list[torch.Size] = []

    def encode(inputs: EncoderInput) -> list[Tokens]:
        seen.append(inputs.pixels.shape)
        return objective.encode(inputs, [3 if published == "optical" else 1])

    (watched,) = watched_sources(training, 6, 6, CPU)
    assert watched.measure(encode, ["last"], "mean")["last"]["n_samples"] == 6
    assert seen == [(6, n_bands, 32, 32)]


@pytest.mark.parametrize("has_optional_bands", [True, False])
def test_a_band_without_data_is_missing_where_that_can_be_said(has_optional_bands: bool) -> None:
    class Gaps(scenes.Source):
        """Of the first sample the second band is all no-data."""

        def __init__(self, cfg: scenes.Config) -> None:
            super().__init__(cfg)
            schema = self.schema["rgb"]
            self.schema = {"rgb": replace(schema, sensor=replace(schema.sensor, no_data=(0.0,)))}

        def read(self, index: int) -> Sample:
            sample = super().read(index)
            tile = sample.tiles["rgb"]
            assert isinstance(tile.pixels, np.ndarray)
            pixels = np.maximum(tile.pixels, 1)
            if index == 0:
                pixels[1] = 0
            return replace(sample, tiles={"rgb": replace(tile, pixels=pixels)})

    config = scenes.Config(n=5)
    training = replace(training_on(config), sources=[Gaps(config)], has_optional_bands=has_optional_bands)
    seen: list[EncoderInput] = []

    def encode(inputs: EncoderInput) -> list[Tokens]:
        seen.append(inputs)
        return [Tokens(inputs.pixels.flatten(2).mT, 0, (8, 8))]

    (source,) = watched_sources(training, 5, 5, CPU)
    source.measure(encode, ["last"], "mean")
    (inputs,) = seen
    first = source._order.index(0)
    assert not inputs.pixels[first, 1].any()
    if has_optional_bands:
        valid = torch.ones(5, 3, dtype=torch.bool)
        valid[first, 1] = False
        assert inputs.channels.valid is not None
        assert torch.equal(inputs.channels.valid, valid)
    else:
        assert inputs.channels.valid is None


def test_of_tiles_that_differ_in_size_the_middle_is_shown() -> None:
    class Ragged(scenes.Source):
        def __init__(self, cfg: scenes.Config) -> None:
            super().__init__(cfg)
            self.schema = {"rgb": replace(self.schema["rgb"], shape=None)}

        def read(self, index: int) -> Sample:
            sample = super().read(index)
            tile = sample.tiles["rgb"]
            assert isinstance(tile.pixels, np.ndarray)
            pixels = np.pad(tile.pixels, ((0, 0), (3, 4), (1, 1)))
            return replace(sample, tiles={"rgb": replace(tile, pixels=pixels)})

    config = scenes.Config(n=5)
    ragged = replace(training_on(config), sources=[Ragged(config)])
    assert torch.equal(_pixels_seen(ragged, 5), _pixels_seen(training_on(config), 5))
