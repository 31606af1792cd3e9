"""GeoBench: all twelve layouts come back as written, hostile files do nothing, wrong units and bands are found."""

from __future__ import annotations

import json
import math
import os
import pickle
import pickletools
import shutil
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from write_geobench import LAYOUTS, Written, edit_json, pickle_of, set_description, write_dataset

from ssl_eo.cli import main
from ssl_eo.data.pack import pack
from ssl_eo.data.sources._geobench_card import card_of, folded
from ssl_eo.data.sources._geobench_pickle import Call, Global, array_of, interpret
from ssl_eo.data.sources.geobench import Config, Source
from ssl_eo.data.sources.shards import Config as PackedConfig
from ssl_eo.data.sources.shards import Source as PackedSource
from ssl_eo.data.stacking import check_sample
from ssl_eo.sensors import load_sensor

TWELVE = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"
RGB_KEYS = ("Red", "Green", "Blue")
SPLITS = {"train": "train", "val": "valid", "test": "test"}
# By dataset and tile: how many of the arrays that the writer lists come first, and the true bands in the next ones.
TRUE_BANDS: dict[str, dict[str, tuple[int, str]]] = {
    "m-bigearthnet": {"sentinel2_l2a": (0, TWELVE)},
    "m-brick-kiln": {
        "sentinel2_l2a": (0, "B01 B02 B03 B04 B05 B07 B8A B08 B11 B12"),
        "sentinel2_tci": (10, "B04 B03 B02"),
    },
    "m-eurosat": {"sentinel2_l1c": (0, "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A")},
    "m-forestnet": {"forestnet_landsat8": (0, "B04 B03 B02 B05 B06 B07")},
    "m-pv4ger": {"rgb": (0, "R G B")},
    "m-so2sat": {
        "so2sat_sentinel1": (
            0,
            "VH_real VH_imaginary VV_real VV_imaginary VH_lee VV_lee"
            " VH_covariance_real_lee VV_covariance_imaginary_lee",
        ),
        "sentinel2_l1c": (8, "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"),
    },
    "m-pv4ger-seg": {"rgb": (0, "R G B")},
    "m-chesapeake": {"naip": (0, "R G B N")},
    "m-cashew-plant": {"sentinel2_l2a": (0, TWELVE)},
    "m-SA-crop-type": {"sa_crop_sentinel2": (0, TWELVE)},
    "m-nz-cattle": {"rgb": (0, "R G B")},
    "m-NeonTree": {"neon_rgb": (0, "R G B"), "neon_canopy_height": (3, "height")},  # and neon: see below
}
GSD_M = {"forestnet_landsat8": 15.0, "rgb": 0.1, "naip": 1.0, "neon_rgb": 0.1, "neon_canopy_height": 1.0, "neon": 1.0}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """`archive(dataset)`: one dataset, written once; not to be changed."""
    made: dict[str, Written] = {}

    def write(dataset: str) -> Written:
        if dataset not in made:
            made[dataset] = write_dataset(tmp_path_factory.mktemp("geobench"), dataset)
        return made[dataset]

    return write


@pytest.fixture
def copied(archive: Callable[[str], Written], tmp_path: Path) -> Callable[[str], Written]:
    """The same, of a copy that a test may spoil."""

    def copy(dataset: str) -> Written:
        w = archive(dataset)
        root = shutil.copytree(w.root, tmp_path / "copy")
        return Written(root, root / w.folder.relative_to(w.root), w.arrays, w.labels, w.dates, w.splits)

    return copy


def open_dataset(written: Written, dataset: str, **options: Any) -> Source:
    return Source(Config(str(written.root), dataset, **options))


def first_file(written: Written) -> Path:
    return written.folder / f"{written.splits['train'][0]}.hdf5"


def stacked(arrays: dict[str, Any], keys: list[str]) -> Any:
    """`[C, H, W]` of arrays of one band, or of one of many."""
    return np.concatenate([np.atleast_3d(arrays[key]).transpose(2, 0, 1) for key in keys])


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", LAYOUTS)
def test_every_layout_comes_back_exactly(dataset: str, split: str, archive: Callable[[str], Written]) -> None:
    written, layout = archive(dataset), LAYOUTS[dataset]
    source = open_dataset(written, dataset, split=split)
    names = written.splits[SPLITS[split]]
    assert [source.locate(i) for i in range(len(source))] == [(n, f"{n}.hdf5") for n in names]
    assert len(source.label_names) == len(set(source.label_names)) == layout.n_classes
    for i, name in enumerate(names):
        sample = source.read(i)
        check_sample(sample, source.schema)
        assert sample.key == name
        assert {n: tile.bands for n, tile in sample.tiles.items() if n != "neon"} == {
            n: tuple(bands.split()) for n, (_, bands) in TRUE_BANDS[dataset].items()
        }
        for tile_name, (start, bands) in TRUE_BANDS[dataset].items():
            keys = [array.key for array in layout.arrays][start : start + len(bands.split())]
            tile = sample.tiles[tile_name]
            np.testing.assert_array_equal(tile.array, stacked(written.arrays[name], keys))
            assert tile.date == written.dates[name]
            assert tile.gsd_m == GSD_M.get(tile_name, 10.0)
        np.testing.assert_array_equal(sample.label, written.labels[name])
        assert isinstance(sample.label, int if layout.kind == "classification" else np.ndarray)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_statistics_follow_their_arrays(dataset: str, archive: Callable[[str], Written]) -> None:
    written = archive(dataset)
    schema = open_dataset(written, dataset, split="val").schema  # of the training split, whichever is read
    train = [written.arrays[name] for name in written.splits["train"]]
    for name, (start, bands) in TRUE_BANDS[dataset].items():
        keys = [array.key for array in LAYOUTS[dataset].arrays][start : start + len(bands.split())]
        for i, key in enumerate(keys):
            values = np.stack([arrays[key] for arrays in train]).astype(np.float64)
            assert schema[name].mean[i] == pytest.approx(values.mean(), abs=1e-6)
            assert schema[name].std[i] == pytest.approx(values.std(), rel=1e-6)


def test_a_spectrum_is_a_tile_of_its_own(archive: Callable[[str], Written], caplog: pytest.LogCaptureFixture) -> None:
    written = archive("m-NeonTree")
    source = open_dataset(written, "m-NeonTree")
    assert "nobody recorded which bands neon holds" in caplog.text
    schema = source.schema["neon"]
    sample = source.read(0)
    values = written.arrays[sample.key]["Neon"]  # [H, W, C]
    assert values.shape == (40, 40, 369)
    np.testing.assert_array_equal(sample.tiles["neon"].array, values.transpose(2, 0, 1))
    assert {name: tile.array.shape[1:] for name, tile in sample.tiles.items()} == {
        "neon_rgb": (400, 400),
        "neon_canopy_height": (40, 40),
        "neon": (40, 40),
    }
    assert sample.label.shape == (400, 400)
    wavelengths = schema.sensor.channel_meta(schema.bands).wavelength_um
    assert (wavelengths.diff() > 0).all()
    assert schema.mean == (schema.mean[0],) * 369  # one array, one entry in the statistics


def test_only_the_chosen_tiles_are_read(archive: Callable[[str], Written], caplog: pytest.LogCaptureFixture) -> None:
    source = open_dataset(archive("m-NeonTree"), "m-NeonTree", tiles=["neon_rgb"])
    assert list(source.schema) == list(source.read(0).tiles) == ["neon_rgb"]
    assert source.read(0).label.shape == (400, 400)
    assert caplog.text == ""
    with pytest.raises(ValueError, match=r"tiles: m-NeonTree has no tile 'neon_rbg'; did you mean 'neon_rgb'"):
        open_dataset(archive("m-NeonTree"), "m-NeonTree", tiles=["neon_rbg"])


@pytest.mark.parametrize("order", ["sorted", "reversed"])
def test_the_order_of_arrays_in_a_file_says_nothing(order: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-so2sat")
    name = written.splits["train"][0]
    with h5py.File(first_file(written)) as file:
        text = file.attrs["pickle"]
    with h5py.File(first_file(written), "w", track_order=True) as file:
        for key in sorted(written.arrays[name], reverse=order == "reversed"):
            file.create_dataset(key, data=written.arrays[name][key])
        file.attrs["pickle"] = text
    sample = open_dataset(written, "m-so2sat").read(0)
    np.testing.assert_array_equal(sample.tiles["sentinel2_l1c"].array[0], written.arrays[name]["02 - Blue"])
    np.testing.assert_array_equal(sample.tiles["so2sat_sentinel1"].array[1], written.arrays[name]["02 - VH.Imaginary"])


@pytest.mark.parametrize(
    ("dataset", "name", "group"),
    [
        ("m-forestnet", "-4.43_102.9_2013_01_01", "-4.43_102.9"),
        ("m-cashew-plant", "sample_24", "0"),
        ("m-cashew-plant", "sample_25", "1"),
        ("m-SA-crop-type", "crops_train_labels_0031_4", "crops_train_labels_0031"),
        ("m-NeonTree", "2018_TEAK_3_image_crop_00_01", "2018_TEAK_3_image_crop"),
        ("m-NeonTree", "MLBS_061", "MLBS_061"),
        ("m-eurosat", "id_7", None),
    ],
)
def test_samples_of_one_place_share_a_group(dataset: str, name: str, group: str | None) -> None:
    assert card_of(dataset).group_of(name) == group


def test_groups_are_in_the_meta_of_samples(archive: Callable[[str], Written]) -> None:
    source = open_dataset(archive("m-cashew-plant"), "m-cashew-plant")
    assert [source.read(i).meta for i in range(4)] == [{"group": "0"}, {"group": "0"}, {"group": "1"}, {"group": "1"}]
    assert open_dataset(archive("m-eurosat"), "m-eurosat").read(0).meta == {}


# Sizes, classes and pixels as published; they stand in no file that is written here.
@pytest.mark.parametrize(
    ("dataset", "kind", "n_classes", "sizes", "no_data"),
    [
        ("m-bigearthnet", "multilabel", 43, (20000, 1000, 1000), ()),
        ("m-brick-kiln", "classification", 2, (15063, 999, 999), ()),
        ("m-eurosat", "classification", 10, (2000, 1000, 1000), ()),
        ("m-forestnet", "classification", 12, (6464, 989, 993), ()),
        ("m-pv4ger", "classification", 2, (11814, 999, 999), ()),
        ("m-so2sat", "classification", 17, (19992, 986, 986), ()),
        ("m-pv4ger-seg", "segmentation", 2, (3000, 403, 403), ()),
        ("m-chesapeake", "segmentation", 7, (3000, 1000, 1000), (6,)),
        ("m-cashew-plant", "segmentation", 7, (1350, 400, 50), (0,)),
        ("m-SA-crop-type", "segmentation", 10, (3000, 1000, 1000), (0,)),
        ("m-nz-cattle", "segmentation", 2, (524, 66, 65), ()),
        ("m-NeonTree", "segmentation", 2, (270, 94, 93), ()),
    ],
)
def test_the_card_has_the_published_facts(
    dataset: str, kind: str, n_classes: int, sizes: tuple[int, ...], no_data: tuple[int, ...]
) -> None:
    card = card_of(dataset)
    assert (card.name, card.kind, len(card.classes)) == (dataset, kind, n_classes)
    assert tuple(card.split_sizes[s] for s in ("train", "val", "test")) == sizes
    assert tuple(card.classes.index(name) for name in card.no_data_classes) == no_data
    assert card.folder == LAYOUTS[dataset].folder
    assert (card.leak is not None) == (dataset == "m-cashew-plant")


def test_classes_of_eurosat_are_in_the_order_of_labels() -> None:
    classes = card_of("m-eurosat").classes
    assert classes[1] == "Forest"
    assert list(classes) == sorted(classes)  # labels count folders, which were listed by name


def test_forestnet_is_seen_by_landsat_8() -> None:
    """Wavelengths in micrometres are those that GeoBench's files give for its Landsat 8, not those of Landsat 9."""
    sensor = load_sensor("forestnet_landsat8")
    published = {"B02": 0.482, "B03": 0.5614, "B04": 0.6546, "B05": 0.8647, "B06": 1.6089, "B07": 2.2007}
    found = {band.name: band.wavelength_um for band in sensor.bands}
    assert found == pytest.approx(published, abs=5e-5)


def test_aliases_are_of_one_dataset_each() -> None:
    names = [name for dataset in LAYOUTS for name in card_of(dataset).folder_names()]
    assert len(names) == len(set(names))
    assert folded("m_NEONtree") in card_of("m-NeonTree").folder_names()


# --- bands and units --------------------------------------------------------------------------------------------------


def test_published_names_are_given_with_a_warning(
    archive: Callable[[str], Written], caplog: pytest.LogCaptureFixture
) -> None:
    written = archive("m-eurosat")
    true = open_dataset(written, "m-eurosat")
    assert caplog.text == ""
    said = open_dataset(written, "m-eurosat", bands="as_published")
    assert "'09 - Water vapour' is B10 of sentinel2_l1c and not B09" in caplog.text
    assert "'10 - SWIR - Cirrus' is B11 of sentinel2_l1c and not B10" in caplog.text
    assert "take bands: corrected" in caplog.text
    assert said.schema["sentinel2_l1c"].bands == said.schema["sentinel2_l1c"].sensor.band_names
    one, other = (source.read(0).tiles["sentinel2_l1c"] for source in (true, said))
    np.testing.assert_array_equal(one.array, other.array)
    assert true.fingerprint() != said.fingerprint()
    i, j = true.schema["sentinel2_l1c"].bands.index("B10"), said.schema["sentinel2_l1c"].bands.index("B10")
    assert true.schema["sentinel2_l1c"].mean[i] < 30 < said.schema["sentinel2_l1c"].mean[j]


def test_the_picture_in_brick_kiln_is_no_reflectance(
    archive: Callable[[str], Written], caplog: pytest.LogCaptureFixture
) -> None:
    written = archive("m-brick-kiln")
    true = open_dataset(written, "m-brick-kiln")
    assert {name: str(unit) for name, unit in true.units.items()} == {
        "sentinel2_l2a": "digital_number",
        "sentinel2_tci": "byte",
    }
    said = open_dataset(written, "m-brick-kiln", bands="as_published")
    assert list(said.schema) == ["sentinel2_l1c"]
    assert len(said.schema["sentinel2_l1c"].bands) == 13
    assert "that is TCI_B" in caplog.text
    assert "'06 - Vegetation Red Edge' is B07 of sentinel2_l2a and not B06" in caplog.text
    assert "'12 - SWIR' is B02 of sentinel2_tci and not B12" in caplog.text


def _mend_eurosat(arrays: Any) -> None:
    cirrus, water = "10 - SWIR - Cirrus", "09 - Water vapour"
    arrays[cirrus], arrays[water] = arrays[water], arrays[cirrus]


def _mend_brick_kiln(arrays: Any) -> None:
    arrays["12 - SWIR"] = arrays["02 - Blue"]


def mend_samples(written: Written, mend: Callable[[Any], None], names: list[str] | None = None) -> None:
    """`mend` is done to the arrays of the samples `names`, or of all."""
    for name in written.arrays if names is None else names:
        with h5py.File(written.folder / f"{name}.hdf5", "r+") as file:
            arrays = {key: file[key][()] for key in file}
            mend(arrays)
            for key, values in arrays.items():
                file[key][...] = values


SLIPPED = pytest.mark.parametrize(
    ("dataset", "mend"), [("m-eurosat", _mend_eurosat), ("m-brick-kiln", _mend_brick_kiln)], ids=["eurosat", "brick"]
)


@SLIPPED
def test_mended_files_are_not_corrected(
    dataset: str,
    mend: Callable[[Any], None],
    copied: Callable[[str], Written],
    caplog: pytest.LogCaptureFixture,
) -> None:
    written = copied(dataset)
    edit_json(written.folder / "band_stats.json", mend)
    mend_samples(written, mend)
    with pytest.raises(ValueError, match=r"bands: .* these files have been mended.*take bands: as_published"):
        open_dataset(written, dataset)
    open_dataset(written, dataset, bands="as_published")
    assert caplog.text == ""


@SLIPPED
def test_samples_that_hold_other_bands_than_statistics_say_are_counted(
    dataset: str,
    mend: Callable[[Any], None],
    copied: Callable[[str], Written],
    caplog: pytest.LogCaptureFixture,
) -> None:
    written = copied(dataset)
    one, two, three, _ = written.splits["train"]
    mend_samples(written, mend, [two])
    source = open_dataset(written, dataset, check_units=False)  # a picture that is a band is in another unit, too
    slip = source.card.slip
    assert slip is not None
    assert (
        f"says that {slip.key!r} is {slip.holds}, 1 of 4 samples looked at say otherwise, the first is" in caplog.text
    )
    assert f"{two}.hdf5" in caplog.text
    mend_samples(written, mend, [one, three])
    for bands in ("corrected", "as_published"):
        with pytest.raises(ValueError, match=r"bands: .*, 3 of 4 samples looked at say otherwise.*unpack"):
            open_dataset(written, dataset, bands=bands)
    edit_json(written.folder / "band_stats.json", mend)
    caplog.clear()
    open_dataset(written, dataset, bands="as_published")
    assert f"is not {slip.holds}, 1 of 4 samples looked at say otherwise" in caplog.text


def scaled(written: Written, factor: float, dtype: str = "float32", pixels: bool = True, keys: str = "") -> None:
    """Statistics times `factor`, and the arrays too if `pixels`; of arrays whose name has `keys` in it."""

    def change(statistics: Any) -> None:
        for key, entry in statistics.items():
            if key != "label" and keys in key:
                statistics[key] = {name: value * factor for name, value in entry.items()}

    edit_json(written.folder / "band_stats.json", change)
    for path in written.folder.glob("*.hdf5") if pixels else ():
        with h5py.File(path, "r+") as file:
            for key in [k for k in file if not k.startswith("label") and keys in k]:
                values = file[key][()]
                del file[key]
                file[key] = (values * factor).astype(dtype)


@pytest.mark.parametrize(
    ("dataset", "factor", "found"),
    [
        ("m-bigearthnet", 1e-4, "reflectance"),
        ("m-chesapeake", 255.0, "byte"),
        ("m-pv4ger-seg", 1 / 255, "reflectance or unit_interval"),
        ("m-cashew-plant", 1e-4, "reflectance"),
    ],
)
def test_another_unit_is_refused(dataset: str, factor: float, found: str, copied: Callable[[str], Written]) -> None:
    written = copied(dataset)
    scaled(written, factor, pixels=False)
    with pytest.raises(ValueError, match=rf"band_stats\.json says .* which is {found}.*check_units: false"):
        open_dataset(written, dataset)
    unchecked = open_dataset(written, dataset, check_units=False)
    expected = {name: tile.units[0] for name, tile in card_of(dataset).tiles["corrected"].items()}
    assert unchecked.units == expected


def test_pixels_in_another_unit_than_statistics_are_refused(copied: Callable[[str], Written]) -> None:
    written = copied("m-bigearthnet")
    scaled(written, 1e-4)
    edit_json(written.folder / "band_stats.json", lambda statistics: _rescale(statistics, 1e4))
    with pytest.raises(
        ValueError, match=r"id_0000\.hdf5, sentinel2_l2a: its brightest pixel is 0\.\d+, of digital_num"
    ):
        open_dataset(written, "m-bigearthnet")
    assert open_dataset(written, "m-bigearthnet", check_units=False).read(0).tiles["sentinel2_l2a"].array.max() < 1


def test_all_samples_that_are_looked_at_must_be_in_one_unit(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, "m-eurosat", n_train=20)
    train = written.splits["train"]
    open_dataset(written, "m-eurosat")
    for n_odd, odd in enumerate((train[11], train[19]), start=1):  # of eight, every third or second
        mend_samples(written, lambda arrays: arrays.update({key: arrays[key] // 1000 for key in arrays}), [odd])
        with pytest.raises(ValueError, match=rf"{train[11]}\.hdf5, .* so it is in {n_odd} of 8 samples looked at: get"):
            open_dataset(written, "m-eurosat")
    open_dataset(written, "m-eurosat", check_units=False)


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [(lambda v: -v, True), (lambda v: v * 0, False), (lambda v: v * np.nan, False), (lambda v: v, False)],
    ids=["negative", "blank", "nan", "as it was"],
)
def test_of_a_sample_only_what_is_blank_may_be_dark(
    change: Any, is_refused: bool, copied: Callable[[str], Written]
) -> None:
    written = copied("m-bigearthnet")
    mend_samples(written, lambda arrays: arrays.update({k: change(v) for k, v in arrays.items()}), ["id_0001"])
    if not is_refused:
        open_dataset(written, "m-bigearthnet")
        return
    with pytest.raises(
        ValueError, match=r"id_0001\.hdf5, sentinel2_l2a: its brightest pixel is -[\d.]+, of digital_num"
    ):
        open_dataset(written, "m-bigearthnet")


def _rescale(statistics: Any, factor: float) -> None:
    for key, entry in statistics.items():
        statistics[key] = {name: value * factor for name, value in entry.items()}


def test_so2sat_may_be_in_either_unit_and_the_scale_says_which(copied: Callable[[str], Written]) -> None:
    written = copied("m-so2sat")
    source = open_dataset(written, "m-so2sat")
    assert source.units["sentinel2_l1c"] == "reflectance"
    assert source.schema["sentinel2_l1c"].sensor.scale == 1.0
    for path in written.folder.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for array in LAYOUTS["m-so2sat"].arrays[8:]:
                file[array.key][...] *= 10_000
    optical = {array.key for array in LAYOUTS["m-so2sat"].arrays[8:]}

    def change(statistics: Any) -> None:
        statistics.update({k: {n: v * 1e4 for n, v in statistics[k].items()} for k in optical})

    edit_json(written.folder / "band_stats.json", change)
    numbers = open_dataset(written, "m-so2sat")
    assert numbers.units["sentinel2_l1c"] == "digital_number"
    assert numbers.schema["sentinel2_l1c"].sensor.scale == 1e-4
    assert numbers.fingerprint() != source.fingerprint()


def test_backscatter_in_decibels_is_refused(copied: Callable[[str], Written]) -> None:
    written = copied("m-so2sat")
    of_decibels = {"mean": -17.0, "std": 3.0, "min": -40.0, "max": 2.0, "percentile_99": -8.0}
    edit_json(written.folder / "band_stats.json", lambda s: s["05 - VH.LEE Filtered"].update(of_decibels))
    with pytest.raises(ValueError, match=r"so2sat_sentinel1 bands .* means from -17.* expected linear_amplitude"):
        open_dataset(written, "m-so2sat")


def test_bytes_as_fractions_have_their_scale(archive: Callable[[str], Written]) -> None:
    source = open_dataset(archive("m-chesapeake"), "m-chesapeake")
    sensor = source.schema["naip"].sensor
    assert (sensor.scale, sensor.unit, sensor.dtype) == (255.0, "digital number", "float32")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("04 - Red"), r"has no statistics of 04 - Red"),
        (lambda s: s["04 - Red"].pop("std"), r"'04 - Red' holds .* expected numbers mean, std"),
        (lambda s: s["04 - Red"].update(mean=math.nan), r"'04 - Red' holds"),
        *(
            (lambda s, change=change: s["04 - Red"].update(change), r"'04 - Red' holds .* which no values have")
            for change in (
                {"std": 0.0},
                {"std": 1e-300},
                {"std": 1e14},
                {"std": 3000.0},  # above half of what lies between the least and the largest value
                {"mean": -1e14},
                {"mean": 5000.0},
                {"percentile_99": 5000.0},
                {"min": 5000.0, "max": 300.0},
            )
        ),
        *(
            (lambda s, mean=mean: s["04 - Red"].update(mean=mean), r"'04 - Red' holds .*expected numbers mean")
            for mean in (10**400, 1e300, True)
        ),
        (lambda s: s["04 - Red"].pop("min"), r"'04 - Red' holds .*expected numbers mean"),
    ],
)
def test_damaged_statistics_are_refused(change: Any, reason: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    edit_json(written.folder / "band_stats.json", change)
    with pytest.raises(ValueError, match=reason):
        open_dataset(written, "m-eurosat")


# --- folders, partitions, labels --------------------------------------------------------------------------------------


def test_root_may_be_any_of_three_folders_and_names_differ(copied: Callable[[str], Written]) -> None:
    written = copied("m-cashew-plant")
    folder = written.folder.rename(written.folder.with_name("M-Cashew-Plantation"))
    roots = [written.root, folder.parent, folder]
    names = ["m-cashew-plant", "M-CASHEW-PLANTATION", "smallholder_cashew"]
    prints = {Source(Config(str(root), name)).fingerprint() for root in roots for name in names}
    assert len(prints) == 1
    with pytest.raises(ValueError, match=r"root: .* holds a dataset by its name other than m-eurosat"):
        Source(Config(str(folder), "m-eurosat"))
    with pytest.raises(ValueError, match=r"root: there is no folder m-nz-cattle in .*found: 'M-Cashew-Plantation'"):
        Source(Config(str(written.root), "m-nz-cattle"))
    with pytest.raises(ValueError, match=r"dataset: GeoBench has no 'm-eurosatt'; did you mean 'm-eurosat'\?"):
        Source(Config(str(written.root), "m-eurosatt"))
    with pytest.raises(ValueError, match="root: no such folder"):
        Source(Config(str(written.root / "none"), "m-eurosat"))


def test_partitions_are_of_training_alone(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, "m-eurosat", n_train=20)
    sizes = {p: len(open_dataset(written, "m-eurosat", partition=p)) for p in ("0.05x", "0.50x", "1.00x", "default")}
    assert sizes == {"0.05x": 1, "0.50x": 10, "1.00x": 20, "default": 20}
    tests = {open_dataset(written, "m-eurosat", split="test", partition=p).fingerprint() for p in ("0.01x", "default")}
    assert len(tests) == 1
    (written.folder / "0.10x_train_partition.json").unlink()
    with pytest.raises(
        ValueError, match=r"partition: .*0\.10x_train_partition\.json is not there \(there are: 0\.01x_tr"
    ):
        open_dataset(written, "m-eurosat", partition="0.10x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p["train"].append("id_999"), r"names 5 samples, 1 have no file, such as id_999\.hdf5; unpack"),
        (lambda p: p["test"].append(p["train"][0]), r"lists 'id_0' in train and in test, so training would see"),
        (lambda p: p["train"].append(p["train"][0]), r"lists samples of train twice"),
        (lambda p: p["train"].append("../id_0"), r"lists '\.\./id_0', expected the name of a file"),
        (lambda p: p["train"].append("a/b"), r"lists 'a/b', expected the name of a file"),
        (lambda p: p["train"].append(".."), r"lists '\.\.', expected"),
        (lambda p: p["train"].append("a\x00b"), r"lists 'a\\x00b', expected"),
        (lambda p: p["train"].append(7), r"has no list 'train' of names"),
        (lambda p: p.pop("valid"), r"has no list 'valid' of names"),
        (lambda p: p["train"].clear(), r"split: .* lists no sample of split 'train'"),
    ],
)
def test_damaged_partitions_are_refused(change: Any, reason: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    edit_json(written.folder / "default_partition.json", change)
    with pytest.raises(ValueError, match=reason):
        open_dataset(written, "m-eurosat")


def test_opening_does_not_open_the_samples(tmp_path: Path) -> None:
    """Otherwise 20,000 files would be opened on a shared disk before the first is needed."""
    written = write_dataset(tmp_path, "m-eurosat", n_train=3)
    names = [f"copy_{n}" for n in range(2000)]
    for name in names:
        (written.folder / f"{name}.hdf5").write_bytes(b"")
    edit_json(written.folder / "default_partition.json", lambda p: p["train"].extend(names))
    source = open_dataset(written, "m-eurosat")
    assert len(source) == 2003
    assert source.read(0).label == 0
    with pytest.raises(ValueError, match=r"copy_0\.hdf5 cannot be used"):
        source.read(3)


@pytest.mark.parametrize("dataset", ["m-eurosat", "m-bigearthnet"])
def test_lists_of_labels_come_first(dataset: str, tmp_path: Path) -> None:
    written = write_dataset(tmp_path, dataset, label_list=True)
    for name in written.splits["train"]:
        set_description(written.folder / f"{name}.hdf5", "not looked at")
    source = open_dataset(written, dataset)
    for i, name in enumerate(written.splits["train"]):
        np.testing.assert_array_equal(source.read(i).label, written.labels[name])


@pytest.mark.parametrize(
    ("dataset", "change", "reason"),
    [
        ("m-eurosat", lambda m: m["2"].clear(), r"label_map\.json has no label for 1 of 4 samples, such as 'id_2'"),
        ("m-eurosat", lambda m: m["1"].append("id_2"), r"lists 'id_2' in classes 1 and 2"),
        ("m-eurosat", lambda m: m["1"].append(["id_2"]), r"has an entry '1', expected lists of sample names"),
        ("m-eurosat", lambda m: m["1"].append(None), r"has an entry '1', expected lists of sample names"),
        ("m-eurosat", lambda m: m.update({"10": ["id_2"]}), r"has an entry '10', expected lists .* '0' to '9'"),
        ("m-bigearthnet", lambda m: m.pop("id_0001"), r"label_stats\.json has no label for 1 of 4"),
        ("m-bigearthnet", lambda m: m["id_0001"].append(1), r"label_stats\.json: 'id_0001' holds"),
        ("m-bigearthnet", lambda m: m.update(id_0001=[2] * 43), r"label_stats\.json: 'id_0001' holds"),
    ],
)
def test_damaged_lists_of_labels_are_refused(dataset: str, change: Any, reason: str, tmp_path: Path) -> None:
    written = write_dataset(tmp_path, dataset, label_list=True)
    path = written.folder / ("label_map.json" if dataset == "m-eurosat" else "label_stats.json")
    edit_json(path, change)
    with pytest.raises(ValueError, match=reason):
        open_dataset(written, dataset)


@pytest.mark.parametrize(
    "label",
    [[0, 1] * 21 + [1], np.array([0, 1] * 21 + [1]), np.array([0, 1] * 21 + [1], np.float32), (0.0, 1.0) * 21 + (1.0,)],
    ids=["list", "int64", "float32", "tuple"],
)
def test_a_multi_hot_label_may_be_stored_in_many_ways(label: Any, copied: Callable[[str], Written]) -> None:
    written = copied("m-bigearthnet")
    set_description(first_file(written), pickle_of(label))
    found = open_dataset(written, "m-bigearthnet").read(0).label
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(label))


@pytest.mark.parametrize("label", [3, np.int64(3), np.int32(3), np.array(3)], ids=["int", "int64", "int32", "array"])
def test_a_class_may_be_stored_in_many_ways(label: Any, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    set_description(first_file(written), pickle_of(label))
    found = open_dataset(written, "m-eurosat").read(0).label
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize(
    ("dataset", "label", "reason"),
    [
        ("m-eurosat", 10, "its label is 10, expected a class from 0 to 9"),
        ("m-eurosat", -1, "its label is -1"),
        ("m-eurosat", 2.0, "its label is float"),
        ("m-eurosat", True, "its label is bool"),
        ("m-eurosat", None, "its label is NoneType"),
        ("m-eurosat", np.array([3]), "its label is ndarray"),
        ("m-eurosat", 2**60, "its label is 1152921504606846976"),
        ("m-eurosat", 2**1000, "an integer of 126 bytes at byte .*, expected at most 8"),
        ("m-bigearthnet", [0] * 42, r"its label has shape \(42,\), expected 0 or 1 for each of 43"),
        ("m-bigearthnet", [0.5] * 43, "its label has shape"),
        ("m-bigearthnet", [math.nan] * 43, "its label has shape"),
        ("m-bigearthnet", [2**1100] * 43, "cannot be used"),
        ("m-bigearthnet", 7, "its label is int, expected a vector of 43"),
    ],
)
def test_a_label_that_is_none_is_one_bad_sample(
    dataset: str, label: Any, reason: str, copied: Callable[[str], Written]
) -> None:
    written = copied(dataset)
    set_description(first_file(written), pickle_of(label))
    source = open_dataset(written, dataset)
    with pytest.raises(ValueError, match=reason):
        source.read(0)
    assert source.read(1).key


# --- hostile samples --------------------------------------------------------------------------------------------------


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _deep(n: int) -> bytes:
    return b"\x80\x04" + b")" + b"\x85" * n + b"."


def _doubled(n: int) -> bytes:
    """Instructions for tuples of the one before twice: small to write, too large to walk through, print or hash."""
    return b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(n))


def _array(shape: bytes, order: bytes = b"\x89") -> bytes:
    """A description whose label is an array of one byte, of the shape that instructions make."""

    def text(value: str) -> bytes:
        return b"\x8c%c%s" % (len(value), value.encode())

    dtype = text("numpy") + text("dtype") + b"\x93" + text("f8") + b"\x85R"
    begun = text("numpy.core.multiarray") + text("_reconstruct") + b"\x93)R"
    return b"\x80\x04}" + text("label") + begun + b"(K\x01" + shape + dtype + order + b"C\x01at" + b"bs."


def _sizes(first: bytes, n: int) -> bytes:
    """A tuple of n sizes: `first`, and it again and again."""
    return b"(" + first + b"q\x01" + b"h\x01" * (n - 1) + b"t"


_MANY = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"  # 2^63 - 1
_LONG = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"  # an integer of 255 bytes

HOSTILE = {
    "many sizes": (lambda t: _array(_sizes(_MANY, 40_000)), "has 40000 dimensions, which no label has"),
    "no size": (lambda t: _array(_sizes(b"K\x00", 40_000)), "has 40000 dimensions, which no label has"),
    "large size": (lambda t: _array(_sizes(_MANY, 2)), "has 1 bytes of float64, which are not those of its shape"),
    "column order": (lambda t: _array(_sizes(_MANY, 2), b"\x88"), "has 2 dimensions in column order"),
    "integer": (lambda t: _array(_sizes(_LONG, 2)), "has an integer of 255 bytes at byte .*, expected at most 8"),
    "one hash": (lambda t: b"\x80\x04}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Ns.", "below 2"),
    "unprintable name": (
        lambda t: pickle.dumps(Runs(types.SimpleNamespace), 4).replace(
            b"\x8c\x05types\x94\x8c\x0fSimpleNamespace",
            2 * (b"X\x90\x01\x00\x00" + "\U000e0001".encode() * 100 + b"\x94"),
        ),
        "which no sample is described with",
    ),
    "builtins.eval": (lambda t: pickle.dumps({"label": Runs(eval, f"open({str(t)!r}, 'w')")}, 4), "names 'builtins'"),
    "os.system": (
        lambda t: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c%c%s\x85R." % (len(f"touch {t}"), f"touch {t}".encode()),
        "names 'posix'.'system'",
    ),
    "deep": (lambda t: _deep(90_000), "nested more than 64 deep"),
    "long": (lambda t: _deep(200_000), "has more than 100,000 instructions"),
    "key": (lambda t: b"\x80\x04}" + _doubled(60) + b"K\x01s.", "keys that are no text or number"),
    "global": (lambda t: b"\x80\x04cposix\nsystem\n.", "the instruction GLOBAL at byte 2"),
    "inst": (lambda t: b"\x80\x04(iposix\nsystem\n.", "the instruction INST"),
    "extension": (lambda t: b"\x80\x04\x82\x01.", "the instruction EXT1"),
    "persistent": (lambda t: b"\x80\x04K\x01Q.", "the instruction BINPERSID"),
    "cycle": (lambda t: b"\x80\x04]\x94h\x00a.", "holds itself"),
    "string": (lambda t: b"\x80\x04X\xff\xff\xff\xff.", "a string of 4,294,967,295 bytes"),
    "bytes": (lambda t: b"\x80\x04B\x00\x00\x10\x00" + b"a" * (1 << 20) + b".", "a string of 1,048,576 bytes"),
    "frame": (lambda t: b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.", "is cut off: a frame"),
    "nothing": (lambda t: b"\x80\x04.", "with 0 values"),
    "underflow": (lambda t: b"\x80\x04(K\x01\x86.", "takes more values than it has put down"),
    "memo": (lambda t: b"\x80\x04h\x07.", "asks for value 7"),
    "protocol": (lambda t: b"\x80\x09N.", "has protocol 9"),
    "end": (lambda t: b"\x80\x04N.N.", "ends at byte 4 of 6"),
    "list": (lambda t: b"\x80\x04]N.", "with 2 values"),
    "no label": (lambda t: pickle.dumps({}, 4), "has no entry 'label'"),
    "no table": (lambda t: pickle.dumps([1], 4), "has no entry 'label'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_does_nothing(name: str, copied: Callable[[str], Written], tmp_path: Path) -> None:
    written, trace = copied("m-eurosat"), tmp_path / "trace"
    make, reason = HOSTILE[name]
    set_description(first_file(written), make(trace))
    source = open_dataset(written, "m-eurosat")
    with pytest.raises(ValueError, match=reason) as refusal:
        source.read(0)
    assert str(first_file(written)) in str(refusal.value)
    assert len(str(refusal.value)) < 1500
    assert not trace.exists()
    assert source.read(1).label == 1


def test_hostile_pickles_are_what_they_say(tmp_path: Path) -> None:
    """The two that would run something do so where they are unpickled, so the test above is of something."""
    for name in ("builtins.eval", "os.system"):
        trace = tmp_path / name
        pickle.loads(HOSTILE[name][0](trace))
        assert trace.exists()


def test_a_value_that_is_small_to_write_and_large_to_walk_is_read() -> None:
    steps = interpret(b"\x80\x04(" + _doubled(50) + b"t.")
    assert len(steps) == 51
    assert all(pair[0] is pair[1] is before for before, pair in pairwise(steps))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "b'\\x80' + b'a'",
        "b'\\x80\\x04N.' ",
        "b'\\x80" + "(" * 100_000,
        "b'\\x80\\x04N.",
        "b'\\x80\\xZZ'",
        "b'N.'",
        "",
        "b'\\x80" + "a" * (4 << 20) + "'",
    ],
    ids=["call", "sum", "space", "nested", "open", "escape", "no pickle", "empty", "huge"],
)
def test_an_attribute_that_is_no_bytes_literal_is_refused(text: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    set_description(first_file(written), text)
    with pytest.raises(ValueError, match="its attribute 'pickle'"):
        open_dataset(written, "m-eurosat").read(0)


@pytest.mark.parametrize("value", [7, np.zeros(3), np.bytes_(b"\x80\x04N.")], ids=["number", "array", "bytes"])
def test_an_attribute_of_another_type_is_refused(value: Any, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    with h5py.File(first_file(written), "r+") as file:
        file.attrs["pickle"] = value
    with pytest.raises(ValueError, match=r"its attribute 'pickle' is .*, expected text of at most"):
        open_dataset(written, "m-eurosat").read(0)


def test_an_attribute_of_many_texts_is_refused_before_it_is_read(
    copied: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file they may all be one of a megabyte."""
    written = copied("m-eurosat")
    read, source = h5py.AttributeManager.__getitem__, open_dataset(written, "m-eurosat")
    names: list[str] = []
    monkeypatch.setattr(h5py.AttributeManager, "__getitem__", lambda self, name: names.append(name) or read(self, name))
    source.read(0)
    assert names == ["pickle"]  # so the rest of the test is of something
    for value in (np.array(["a"] * 50, object), np.zeros(1000)):
        with h5py.File(first_file(written), "r+") as file:
            del file.attrs["pickle"]
            dtype = h5py.string_dtype() if value.dtype == object else None
            file.attrs.create("pickle", value, dtype=dtype)
        names.clear()
        with pytest.raises(ValueError, match=r"its attribute 'pickle' is of dtype .* shape \(\d+,\), expected text"):
            source.read(0)
        assert names == []


@pytest.mark.parametrize("dataset", [name for name, layout in LAYOUTS.items() if layout.kind == "segmentation"])
def test_segmentation_never_looks_at_the_attribute(dataset: str, copied: Callable[[str], Written]) -> None:
    written = copied(dataset)
    name = written.splits["train"][0]
    with h5py.File(first_file(written), "r+") as file:
        del file.attrs["pickle"]
    np.testing.assert_array_equal(open_dataset(written, dataset).read(0).label, written.labels[name])


BAND = "04 - Red"
OTHER = np.zeros((64, 64), np.int16)


def _replace(make: Callable[[Any, Path], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[BAND]
            make(file, path)

    return spoil


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _elsewhere(path: Path) -> str:
    other = path.with_name("secret.h5")
    with h5py.File(other, "w") as file:
        file["values"] = OTHER
    return str(other)


def _external_file(file: Any, path: Path) -> None:
    raw = path.with_name("secret.raw")
    raw.write_bytes(OTHER.tobytes())
    file.create_dataset(BAND, (64, 64), "int16", external=[(str(raw), 0, OTHER.nbytes)])


def _external_link(file: Any, path: Path) -> None:
    file[BAND] = h5py.ExternalLink(_elsewhere(path), "values")


def _virtual(file: Any, path: Path) -> None:
    layout = h5py.VirtualLayout((64, 64), "int16")
    layout[:] = h5py.VirtualSource(_elsewhere(path), "values", (64, 64))
    file.create_virtual_dataset(BAND, layout)


def _soft_link(file: Any, path: Path) -> None:
    file[BAND] = h5py.SoftLink("/02 - Blue")


def _group(file: Any, path: Path) -> None:
    file.create_group(BAND)


def _huge(file: Any, path: Path) -> None:
    file.create_dataset(BAND, (1 << 20, 1 << 20), "int16")


def _unwritten(file: Any, path: Path) -> None:
    file.create_dataset(BAND, (64, 64), "int16")


def _chunked(file: Any, path: Path) -> None:
    file.create_dataset(BAND, data=OTHER, chunks=(8, 8), compression="gzip")


def _many(file: Any, path: Path) -> None:
    for n in range(300):
        file.create_group(f"group {n}")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "cannot be used"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be used"),
    "no hdf5": (lambda p: p.write_bytes(b"GIF89a" * 100), "cannot be used"),
    "swollen": (lambda p: p.open("r+b").truncate(1 << 30) and None, "it has 1,073,741,824 bytes, expected at most"),
    "no band": (_replace(lambda file, path: None), "it has no array '04 - Red', with or without a date"),
    "external link": (_replace(_external_link), "is a link to somewhere else, which is not followed"),
    "soft link": (_replace(_soft_link), "is a link to somewhere else"),
    "external file": (_replace(_external_file), "is not stored as one piece in this file"),
    "virtual": (_replace(_virtual), "is not stored as one piece in this file"),
    "chunked": (_replace(_chunked), "is not stored as one piece in this file"),
    "group": (_replace(_group), "is no array of numbers"),
    "text": (_replace(lambda f, p: f.create_dataset(BAND, data=[b"abc"])), "is no array of numbers"),
    "huge": (_replace(_huge), r"has shape \(1048576, 1048576\) and dtype int16, expected \(64, 64\)"),
    "flat": (_replace(lambda f, p: f.create_dataset(BAND, data=OTHER.ravel())), r"has shape \(4096,\)"),
    "unwritten": (_replace(_unwritten), "has 0 bytes in the file, expected 8,192"),
    "dtype": (_replace(lambda f, p: f.create_dataset(BAND, data=OTHER * 1.0)), "has .* dtype float64, expected"),
    "two dates": (
        _replace(lambda f, p: [f.create_dataset(f"{BAND}_2016-0{m}-01", data=OTHER) for m in (1, 2)]),
        "it has 2 arrays '04 - Red'",
    ),
    "odd date": (
        _replace(lambda f, p: f.create_dataset(f"{BAND}_2016-01-01", data=OTHER)),
        "its bands are of different dates: 2016-01-01, None",
    ),
    "many": (_replace(_many), "it holds 312 arrays, expected at most 256"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_bad_sample(name: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    spoil, reason = DAMAGE[name]
    spoil(first_file(written))
    source = open_dataset(written, "m-eurosat")
    with pytest.raises(ValueError, match=reason) as refusal:
        source.read(0)
    assert str(first_file(written)) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert source.read(1).label == 1


@pytest.mark.timeout(30)  # without a look at what it is, the pipe is waited for
def test_a_pipe_is_no_sample_and_no_list(copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    source = open_dataset(written, "m-eurosat")
    for path in (first_file(written), written.folder / "band_stats.json"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"id_0\.hdf5 cannot be used: .*it is no regular file"):
        source.read(0)
    assert source.fingerprint()
    with pytest.raises(ValueError, match=r"band_stats\.json cannot be read \(it is no regular file\), expected"):
        open_dataset(written, "m-eurosat")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((320, 320), 2, np.uint8), "holds classes 2 to 2, expected 0 to 1"),
        (np.full((320, 320), -1, np.int16), "holds classes -1 to -1"),
        (np.zeros((320, 320), np.float32), "has dtype float32, expected integers"),
        (np.zeros((32, 32), np.uint8), r"has shape \(32, 32\)"),
    ],
)
def test_a_map_that_is_none_is_one_bad_sample(values: Any, reason: str, copied: Callable[[str], Written]) -> None:
    written = copied("m-pv4ger-seg")
    with h5py.File(first_file(written), "r+") as file:
        del file["label"]
        file["label"] = values
    with pytest.raises(ValueError, match=reason):
        open_dataset(written, "m-pv4ger-seg").read(0)


def test_a_folder_without_any_good_sample_is_refused(copied: Callable[[str], Written]) -> None:
    written = copied("m-eurosat")
    for path in written.folder.glob("*.hdf5"):
        _truncate(path)
    with pytest.raises(
        ValueError, match=r"root: none of the samples looked at can be used: .*id_0\.hdf5 cannot be used"
    ):
        open_dataset(written, "m-eurosat")


# --- the interpreter against pickle itself ----------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(-99, 99), inner)
    ),
    max_leaves=30,
)


@settings(max_examples=300, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([4, 5]))
@example(value=["\ud800", ("a",) * 5, {}, [], ()], protocol=4)
def test_plain_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert repr(interpret(data)) == repr(pickle.loads(data))  # repr: NaN is not NaN


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["bool", "int8", "uint8", "int16", "int32", "int64", "uint64", "float32", "float64", ">i4"]),
    values=st.lists(st.integers(0, 1), max_size=50),
)
def test_arrays_are_those_of_pickle(dtype: str, values: list[int]) -> None:
    array = np.array(values, dtype)
    found = array_of(interpret(pickle.dumps(array, 4)))
    assert found is not None
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_objects_are_told_and_not_made() -> None:
    found = interpret(pickle.dumps({"crs": np.dtype("i8"), "bands": (1, 2)}, 4))
    assert isinstance(found["crs"], Call)
    assert found["crs"].target == Global("numpy", "dtype")
    assert found["bands"] == (1, 2)
    assert array_of(found["crs"]) is None


def check_outcome(data: bytes) -> None:
    """Any other exception fails the test."""
    reason = ""
    try:
        value = interpret(data)
        array_of(value["label"] if isinstance(value, dict) and "label" in value else value)
    except ValueError as error:
        reason = str(error)
    assert len(reason) < 1500
    assert "\n" not in reason


_CODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.sampled_from(_CODES) | st.binary(max_size=6) | PLAIN.map(lambda v: pickle.dumps(v, 4)[2:-1])),
)
def test_any_bytes_give_a_value_or_a_value_error(parts: list[bytes]) -> None:
    data = b"\x80\x04" + b"".join(parts) + b"."
    check_outcome(data)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), keep=st.integers(0, 2000))
def test_a_changed_pickle_gives_a_value_or_a_value_error(at: int, byte: int, keep: int) -> None:
    content = {"label": np.arange(43) % 2, "a": {"b": [None, 1.5, ("x", b"y")], "c": np.int64(10)}, "order": ["a"] * 9}
    data = bytearray(pickle.dumps(content, 4))
    data[at % len(data)] = byte
    for changed in (bytes(data), bytes(data[: keep % len(data)])):
        check_outcome(changed)


# --- packing, workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["m-bigearthnet", "m-so2sat", "m-cashew-plant", "m-NeonTree"])
def test_packed_samples_are_the_same(dataset: str, archive: Callable[[str], Written], tmp_path: Path) -> None:
    source = open_dataset(archive(dataset), dataset)
    pack(source, tmp_path / "packed", samples_per_shard=3)
    packed = PackedSource(PackedConfig(str(tmp_path / "packed")))
    assert packed.schema == source.schema
    assert packed.label_names == source.label_names
    assert len(packed) == len(source)
    for i in range(len(source)):
        one, other = source.read(i), packed.read(i)
        assert (one.key, one.meta) == (other.key, other.meta)
        np.testing.assert_array_equal(one.label, other.label)
        assert one.tiles.keys() == other.tiles.keys()
        for name, tile in one.tiles.items():
            np.testing.assert_array_equal(tile.array, other.tiles[name].array)
            assert (tile.bands, tile.gsd_m, tile.date) == (
                other.tiles[name].bands,
                other.tiles[name].gsd_m,
                other.tiles[name].date,
            )


def test_the_command_packs_a_dataset(
    archive: Callable[[str], Written], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = archive("m-eurosat")
    command = ["data", "pack", "--source", "geobench", "--root", str(written.root), "dataset=m-eurosat", "split=train"]
    assert main([*command, "--out", str(tmp_path / "packed"), "--split", "train"]) == 0
    assert "4 samples in 1 shards" in capsys.readouterr().out
    packed = PackedSource(PackedConfig(str(tmp_path / "packed"), split="train"))
    assert [packed.read(i).label for i in range(4)] == [written.labels[name] for name in written.splits["train"]]
    options = json.loads((tmp_path / "packed" / "train" / "manifest.json").read_text())["source"]["options"]
    assert (options["dataset"], options["bands"], options["partition"]) == ("m-eurosat", "corrected", "default")


def _one_brighter(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["02 - Blue"][5, 5] += 1


def _another_label(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(rb"label\x94K\x00") == 1
    path.write_bytes(data.replace(rb"label\x94K\x00", rb"label\x94K\x03"))


@pytest.mark.parametrize("change", [_one_brighter, _another_label], ids=["pixel", "label"])
def test_another_file_of_the_same_size_is_another_content(
    change: Callable[[Path], None], copied: Callable[[str], Written]
) -> None:
    written = copied("m-eurosat")
    before, path = open_dataset(written, "m-eurosat").fingerprint(), first_file(written)
    size = path.stat().st_size
    change(path)
    assert path.stat().st_size == size
    assert open_dataset(written, "m-eurosat").read(0).label == (3 if change is _another_label else 0)
    assert open_dataset(written, "m-eurosat").fingerprint() != before


def test_a_source_travels_to_workers(archive: Callable[[str], Written]) -> None:
    source = open_dataset(archive("m-bigearthnet"), "m-bigearthnet")
    other = pickle.loads(pickle.dumps(source))
    assert other.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(other.read(1).label, source.read(1).label)


def test_a_tile_list_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="tiles is an empty list"):
        Config("root", "m-eurosat", tiles=[])


# --- the real file ----------------------------------------------------------------------------------------------------


def test_the_real_sample_is_a_forest(
    real_samples: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = real_samples("geobench_format/classification_v1.0/m-eurosat")
    with pytest.raises(ValueError, match=r"names 20 samples, 19 have no file, such as id_3642\.hdf5"):
        Source(Config(str(real), "m-eurosat", partition="0.01x"))
    folder = tmp_path / "m-eurosat"
    folder.mkdir()
    for name in ("id_1905.hdf5", "band_stats.json"):
        shutil.copy(real / name, folder)
    lists = {"train": ["id_1905"], "valid": [], "test": []}
    (folder / "default_partition.json").write_text(json.dumps(lists))
    source = Source(Config(str(tmp_path), "m-eurosat"))
    assert caplog.text == ""
    sample = source.read(0)
    assert (sample.label, source.label_names[sample.label]) == (1, "Forest")
    tile = sample.tiles["sentinel2_l1c"]
    means = dict(zip(tile.bands, tile.array.astype(np.float64).mean((1, 2)), strict=True))
    assert (means["B08"] - means["B04"]) / (means["B08"] + means["B04"]) == pytest.approx(0.70, abs=0.01)
    assert means["B10"] < 10 < means["B12"] < means["B11"] < means["B8A"]  # no cirrus, wood in short-wave infrared
    assert means["B8A"] == pytest.approx(means["B08"], rel=0.15)
    published = Source(Config(str(tmp_path), "m-eurosat", bands="as_published"))
    assert "the mean of '09 - Water vapour' in band_stats.json is 12.33" in caplog.text
    assert published.read(0).label == 1
    description = pickle.dumps(published)
    assert pickle.loads(description).fingerprint() == published.fingerprint()
