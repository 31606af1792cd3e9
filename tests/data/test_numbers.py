"""Numbers as labels, from files to scores: a column of an HDF5 file, and one of a table beside rasters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

pytest.importorskip("rasterio")

from archives.tiffs import write_raster

from ssl_eo.cli import main
from ssl_eo.config import build
from ssl_eo.data.pack import pack
from ssl_eo.data.sources import geotiff, shards
from ssl_eo.eval.records import read_results
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig

pytestmark = pytest.mark.usefixtures("own_cache")

N_TRAIN, N_TEST = 40, 20


def places(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Pixels `[n, 4, 8, 8]`, and how high it is there: the redder the higher."""
    rng = np.random.default_rng(seed)
    heights = rng.uniform(0, 30, n)
    pixels = rng.integers(90, 110, (n, 4, 8, 8))
    pixels[:, 0] += np.rint(3 * heights).astype(np.int64)[:, None, None]
    return pixels.astype(np.uint8), heights


def write_hdf5(root: Path) -> dict[str, Any]:
    pixels, heights = places(N_TRAIN + N_TEST, 0)
    heights[7] = np.nan
    with h5py.File(root / "places.h5", "w") as file:
        file["pixels"], file["height"] = pixels, heights.astype(np.float32)
        file["split"] = np.array([b"train"] * N_TRAIN + [b"test"] * N_TEST)
    source = {"name": "hdf5", "root": str(root / "places.h5"), "sensor": "naip", "dataset": "pixels"}
    return {split: {**source, "label_dataset": "height", "split": split} for split in ("train", "test")}


def write_rasters(root: Path) -> dict[str, Any]:
    lines = ["key,height_m"]
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        for i, (pixels, height) in enumerate(zip(*places(n, n), strict=True)):
            write_raster(root / split / f"{split}{i}.tif", pixels)
            lines.append(f"{split}{i},{'inf' if (split, i) == ('train', 7) else height}")
    (root / "heights.csv").write_text("\n".join(lines))
    labels = {"label_csv": "heights.csv", "label_column": "height_m", "label_kind": "number"}
    source = {"name": "geotiff", "root": str(root), "window_px": 8, **labels}
    return {s: {**source, "tiles": [{"sensor": "naip", "pattern": f"{s}/{{key}}.tif"}]} for s in ("train", "test")}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    found = Encoder(EncoderConfig(embed_dim=32, depth=1, n_heads=2, patch_size=4, patch_embed="conv"), n_channels=4)
    found.init_weights()
    write_bundle(tmp_path / "encoder", found, {}, {"step": 3})
    return tmp_path / "encoder"


@pytest.mark.parametrize("write", [write_hdf5, write_rasters])
def test_numbers_of_files_are_predicted(
    write: Any, encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "heights.yaml"
    task.write_text(yaml.safe_dump({"kind": "regression", **write(tmp_path)}))
    names = {"--model": encoder, "--tasks": task, "--out": tmp_path / "out", "--resamples": 0}
    command = ["eval", "--no-controls", *(str(word) for pair in names.items() for word in pair)]
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0, capsys.readouterr()
    (result,) = read_results(tmp_path / "out")
    assert (result["kind"], result["probe"], result["metric"]) == ("result", "ridge", "rmse")
    assert result["scores"].keys() == {"rmse", "mae", "r2"}
    assert result["scores"]["r2"] > 0.9
    assert result["scores"]["rmse"] < 3.0
    assert (result["n_train"], result["n_test"]) == (N_TRAIN - 1, N_TEST)
    assert caplog.text.count("a sample of train is left out") == 1
    assert "heights: rmse of frozen features" in capsys.readouterr().out


# --- a table ----------------------------------------------------------------------------------------------------------


def open_table(root: Path, rows: list[str], **options: Any) -> geotiff.Source:
    for i in range(5):
        write_raster(root / f"p{i}.tif", places(1, i)[0][0])
    (root / "labels.csv").write_text("\n".join(["key,label", *rows]))
    raw = {"root": str(root), "tiles": [{"sensor": "naip"}], "label_csv": "labels.csv", **options}
    return geotiff.Source(build(geotiff.Config, raw, ""))


def test_what_is_no_number_is_a_bad_sample_and_counted(tmp_path: Path) -> None:
    source = open_table(tmp_path / "a", ["p0,-1.5", "p1,nan", "p2,high", "p3,2e3", "p4,7"], label_kind="number")
    assert (source.label_names, source.read(0).label, source.read(3).label) == ((), -1.5, 2000.0)
    for i in (1, 2):
        with pytest.raises(ValueError, match=rf"p{i} has no finite number in labels\.csv"):
            source.read(i)
    pack(source, tmp_path / "packed", max_bad_ratio=0.5)
    assert len((tmp_path / "packed" / "quarantine.jsonl").read_text().splitlines()) == 2
    assert shards.Source(shards.Config(str(tmp_path / "packed"))).read(1).label == 2000.0
    other = open_table(tmp_path / "b", ["p0,-1.5", "p1,nan", "p2,high", "p3,2e4", "p4,7"], label_kind="number")
    assert other.fingerprint() != source.fingerprint()


def test_integers_are_classes_or_numbers_as_it_is_said(tmp_path: Path) -> None:
    rows = ["p0,3", "p1,0", "p2,1", "p3,1", "p4,1"]
    labels = [open_table(tmp_path, rows, label_kind=kind).read(0).label for kind in ("class", "number")]
    assert labels == [3, 3.0]
    assert list(map(type, labels)) == [int, float]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["p0,1.5", "p1,2"], {}, r"label_csv: 1\.5, 2 are no classes; set label_kind: number where they are to be"),
        (["p0,low", "p1,nan"], {"label_kind": "number"}, r"label_csv: no place has a finite number, found 'low'"),
        (["p0,1", f"p1,{'9' * 5000}"], {}, r"label_csv: 9{40} is no number of a class, expected one below 2,147,"),
        (["x,1"], {"label_kind": "number"}, "label_csv: no place has a label; are its keys those of"),
        ([], {"label_csv": None, "label_kind": "number"}, r"label_kind: number needs label_csv, or \{label\} in"),
        (
            [],
            {"label_csv": None, "label_kind": "number", "label_pattern": "{key}"},
            "label_kind: number needs label_csv",
        ),
    ],
    ids=["fractions", "none", "huge", "other keys", "nowhere", "maps"],
)
def test_columns_that_mean_something_else_are_refused(
    rows: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_table(tmp_path, rows, **options)
