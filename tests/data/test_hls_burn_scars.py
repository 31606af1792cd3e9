"""HLS Burn Scars: pairs by name, PANGAEA's split, no-data, groups by tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rasterio")

from archives.tiffs import write_raster

from ssl_eo.config import build
from ssl_eo.data.sources.hls_burn_scars import Config, Source, val_rows
from ssl_eo.data.stacking import check_sample
from ssl_eo.eval.tasks import Task, TaskConfig

pytestmark = pytest.mark.usefixtures("own_cache")

SIDE = 512


def write_scene(folder: Path, tile: str, day: int) -> None:
    """Float32 of six bands with 9999 for nothing; a mask of int16 whose name sorts elsewhere."""
    rng = np.random.default_rng(day)
    image = rng.uniform(0.0, 0.4, (6, SIDE, SIDE)).astype(np.float32)
    image[:, :3] = 9999.0
    mask = np.zeros((1, SIDE, SIDE), np.int16)
    mask[:, :, day:] = 1
    mask[:, :3] = -1
    stem = f"subsetted_512x512_HLS.S30.{tile}.{day:07d}.v1.4"
    write_raster(folder / f"{stem}_merged.tif", image, pixel=30.0, no_data=9999.0, compress="deflate")
    write_raster(folder / f"{stem}.mask.tif", mask, pixel=30.0, compress="deflate")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hls")
    for day, tile in enumerate(("T10SDH", "T10SDH", "T11SKU", "T12TYN"), start=100):
        write_scene(root / "training", tile, day)
    write_scene(root / "validation", "T13TCE", 200)
    return root


def test_scenes_are_read_with_their_own_masks(archive: Path) -> None:
    found = {}
    for split, n in (("train", 3), ("val", 1), ("test", 1)):
        source = Source(Config(str(archive), split))  # type: ignore[arg-type]
        assert len(source) == n
        for i in range(n):
            sample = source.read(i)
            check_sample(sample, source.schema)
            (tile,) = sample.tiles.values()
            day = int(sample.key.split(".")[3])
            assert tile.array.shape == (6, SIDE, SIDE)
            assert tile.bands == ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
            assert sample.label[0, 0] == -1
            assert sample.label[5, day - 1] == 0
            assert sample.label[5, day] == 1
            found[day] = split, sample.meta["group"]
    assert found[200] == ("test", "T13TCE")
    assert {of for of, _ in found.values()} == {"train", "val", "test"}
    assert found[100][1] == found[101][1] == "T10SDH"


def test_the_split_is_that_of_scikit_learn() -> None:
    from sklearn.model_selection import train_test_split

    for n in (4, 29, 540):
        _, val = train_test_split(np.arange(n), test_size=0.1, random_state=23)
        assert val_rows(n).tolist() == sorted(val.tolist())
    assert len(val_rows(540)) == 54


def test_the_task_shows_no_data_as_the_mean(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLS_BURN_SCARS", str(archive))
    task = Task(build(TaskConfig, "hls_burn_scars", ""))
    assert task.class_names == ("not burned", "burn scar")
    import torch

    batch = next(task.test.stream(1, torch.device("cpu")))
    assert not batch.inputs.pixels[0, :, :3].any()
    assert batch.inputs.pixels[0, :, 3:].any()
    assert batch.labels.unique().tolist() == [-1, 0, 1]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder validation; it is to hold `training` and `validation`"):
        Source(Config(str(tmp_path), "test"))
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'all'"):
        Config(str(tmp_path), "all")  # type: ignore[arg-type]
