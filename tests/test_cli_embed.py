"""The command `ssl-eo embed`: from a raster and a bundle to features of patches, on made and on real scenes."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray

from ssl_eo.cli import main
from ssl_eo.hub import SensorInput, load_bundle, write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor

rasterio = pytest.importorskip("rasterio")

PLACE = rasterio.transform.from_origin(600_000.0, 5_000_000.0, 10.0, 10.0)
BANDS = ("B04", "B03", "B02")
PATCH, WIDTH = 4, 16


def known(sensor: str, bands: Sequence[str]) -> SensorInput:
    n = len(bands)
    mean = tuple(900.0 + 100 * i for i in range(n))
    return SensorInput(load_sensor(sensor), tuple(bands), mean, (500.0,) * n, 10.0)


def bundle(
    folder: Path, inputs: dict[str, SensorInput], seed: int = 0, n_channels: int | None = None, **changes: Any
) -> Path:
    torch.manual_seed(seed)
    sizes = {"embed_dim": WIDTH, "depth": 1, "n_heads": 2, "patch_size": PATCH, "patch_embed": "dynamic"}
    encoder = Encoder(EncoderConfig(**{**sizes, **changes}), n_channels)
    encoder.init_weights()
    write_bundle(folder, encoder, inputs, {"step": 0})
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("bundles") / "tiny", {"sentinel2_l2a": known("sentinel2_l2a", BANDS)})


def values_of(height: int, width: int, dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(0).integers(1, 3000, (3, height, width)).astype(dtype)


def write(path: Path, values: NDArray[Any], names: Sequence[str] | None = BANDS, **options: Any) -> Path:
    place = {"crs": "EPSG:32632", "transform": PLACE, **options}
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **shape, **place) as file:
            file.write(values)
            if names is not None:
                file.descriptions = tuple(names)
    return path


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        pixels: NDArray[Any] = file.read()
    return pixels


def embed(scene: Path, model: Path | str, out: Path, *options: str) -> int:
    return main(["embed", str(scene), "--model", str(model), "--out", str(out), *options])


@torch.no_grad()
def of_windows(model: Path, values: NDArray[Any], size: int, sensor: str | None = None) -> NDArray[Any]:
    """Features `[D, h, w]` of windows side by side, each given to the encoder by itself."""
    encoder = load_bundle(model)
    found = np.empty((WIDTH, values.shape[1] // PATCH, values.shape[2] // PATCH), np.float32)
    n = size // PATCH
    for row in range(0, found.shape[1], n):
        for column in range(0, found.shape[2], n):
            top, left = row * PATCH, column * PATCH
            images = torch.from_numpy(values[:, top : top + size, left : left + size].astype(np.float32))
            tokens = encoder.forward_features(images[None], sensor)
            found[:, row : row + n, column : column + n] = tokens.patches[0].T.unflatten(1, (n, n))
    return found


def test_features_of_a_scene(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the encoder, on the grid of patches; bands are found by name; no-data has no features."""
    values = values_of(32, 48)
    values[:, 8:16, 4:12] = 0  # the sensor's no-data
    scene = write(tmp_path / "scene.tif", values[::-1], BANDS[::-1])
    out = tmp_path / "features" / "out.tif"
    assert embed(scene, tiny, out, "--window", "16", "--overlap", "0") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == (
        f"wrote {out}: 16 features of 8 x 12 patches of 4 pixels (sensor sentinel2_l2a; windows of 16 pixels)\n"
    )
    expected = of_windows(tiny, values, 16)
    expected[:, 2:4, 1:3] = np.nan
    np.testing.assert_allclose(read(out), expected, atol=1e-5)
    with rasterio.open(out) as file:
        assert (file.crs.to_epsg(), file.dtypes[0]) == (32632, "float32")
        assert file.transform == rasterio.transform.from_origin(600_000.0, 5_000_000.0, 40.0, 40.0)
        tags = file.tags()
        assert (tags["model"], tags["sensor"], tags["bands"]) == ("tiny", "sentinel2_l2a", "B04 B03 B02")
        assert len(tags["weights"]) == 24
    assert not list(out.parent.glob("*.panels"))


def test_each_input_is_normalised_by_its_own_statistics(tmp_path: Path) -> None:
    """Of two sources of one sensor, and of a tile that is called otherwise than its sensor."""
    first = known("sentinel2_l2a", BANDS)
    inputs = {"sentinel2_l2a": first}
    for shift, name in ((500.0, "sentinel2_l2a@1"), (1000.0, "before")):
        inputs[name] = replace(first, mean=tuple(value + shift for value in first.mean))
    model, values = bundle(tmp_path / "several", inputs), values_of(16, 16)
    scene = write(tmp_path / "scene.tif", values)
    found = {}
    for name in inputs:
        assert embed(scene, model, tmp_path / f"{name}.tif", "--sensor", name) == 0
        found[name] = read(tmp_path / f"{name}.tif")
        np.testing.assert_allclose(found[name], of_windows(model, values, 16, name), atol=1e-5)
    assert np.abs(found["sentinel2_l2a"] - found["sentinel2_l2a@1"]).max() > 0.1


def test_bands_by_number_half_precision_and_batches(tiny: Path, tmp_path: Path) -> None:
    values = values_of(24, 24)
    named = write(tmp_path / "named.tif", values)
    nameless = write(tmp_path / "nameless.tif", values[[2, 0, 1]], None)
    assert embed(named, tiny, tmp_path / "a.tif", "--window", "16") == 0
    assert (
        embed(nameless, tiny, tmp_path / "b.tif", "--window", "16", "--bands", "2", "3", "1", "--batch-size", "1") == 0
    )
    a, b = read(tmp_path / "a.tif"), read(tmp_path / "b.tif")
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert embed(named, tiny, tmp_path / "half.tif", "--window", "16", "--dtype", "float16") == 0
    np.testing.assert_array_equal(read(tmp_path / "half.tif"), a.astype("float16").astype("float32"))


def test_some_bands_of_the_sensor(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An encoder of any sensor looks at those that the file has; one that was built for its bands cannot."""
    values = values_of(16, 16)
    scene, out = write(tmp_path / "scene.tif", values[:2], BANDS[:2]), tmp_path / "out.tif"
    assert embed(scene, tiny, out) == 2
    lack = f"ssl-eo: {scene} has no band 'B02' (it holds B04, B03)"
    hint = "to look at those that are there, add --sensor-bands B04 B03"
    assert capsys.readouterr().err == f"{lack}; {hint}\n"
    assert embed(scene, tiny, out, "--sensor-bands", "B03", "B04") == 0
    images = torch.from_numpy(values[1::-1].astype(np.float32))[None]
    with torch.no_grad():
        tokens = load_bundle(tiny).forward_features(images, "sentinel2_l2a", bands=["B03", "B04"])
    np.testing.assert_allclose(read(out), tokens.patches[0].T.unflatten(1, (4, 4)), atol=1e-5)
    with rasterio.open(out) as file:
        assert file.tags()["bands"] == "B03 B04"
    capsys.readouterr()
    inputs = {"sentinel2_l2a": known("sentinel2_l2a", BANDS)}
    fixed = bundle(tmp_path / "fixed", inputs, n_channels=3, patch_embed="conv")
    assert embed(scene, fixed, tmp_path / "b.tif", "--sensor-bands", "B03", "B04") == 2
    assert (
        "--sensor-bands: bands of sentinel2_l2a: got B03, B04, this encoder (patch_embed: conv) takes B04, B03, B02"
        in (capsys.readouterr().err)
    )
    assert embed(scene, fixed, tmp_path / "b.tif") == 2
    assert capsys.readouterr().err == f"{lack}\n"


def test_bands_of_other_names_are_told_by_an_option(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = write(tmp_path / "scene.tif", values_of(16, 16), ("red", "green", "blue"))
    assert embed(scene, tiny, tmp_path / "out.tif") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: {scene} has no band 'B04' (it holds red, green, blue); say in bands (--bands)")
    assert embed(scene, tiny, tmp_path / "out.tif", "--bands", "red", "green", "blue") == 0


def test_a_scene_is_not_fetched(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("http://127.0.0.1:9/scene.tif", "/vsicurl/http://127.0.0.1:9/scene.tif", "gone.tif"):
        assert main(["embed", name, "--model", str(tiny), "--out", str(tmp_path / "out.tif")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "there is no such file (a scene is read from a disk; fetch it before)" in line


def test_a_table_of_patches(tiny: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    values = values_of(16, 24)
    values[:, :4, :4] = 0
    scene = write(tmp_path / "scene.tif", values)
    assert embed(scene, tiny, tmp_path / "o.parquet", "--window", "8") == 0
    assert embed(scene, tiny, tmp_path / "o.tif", "--window", "8") == 0
    table, raster = parquet.read_table(tmp_path / "o.parquet"), read(tmp_path / "o.tif")
    rows, columns = table["row"].to_numpy(), table["column"].to_numpy()
    assert len(table) == 4 * 6 - 1
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), raster[:, rows, columns].T)
    np.testing.assert_array_equal(table["x"], 600_000 + 40 * (columns + 0.5))
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (metadata["sensor"], json.loads(metadata["shape"])) == ("sentinel2_l2a", [4, 6])
    assert rasterio.crs.CRS.from_wkt(metadata["crs"]).to_epsg() == 32632


@pytest.mark.parametrize(
    ("changes", "side", "window"),
    [
        ({}, 41, 44),  # no more than the scene needs
        ({}, 260, 224),
        ({"patch_size": 48}, 500, 240),  # a multiple of the patch
        ({"position": "learned", "image_size": 32}, 60, 32),  # what its table is made for
        ({"position": "learned", "image_size": 32}, 20, 20),
    ],
)
def test_the_window_that_nobody_chose(
    changes: dict[str, Any], side: int, window: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bundle(tmp_path / "model", {"sentinel2_l2a": known("sentinel2_l2a", BANDS)}, **changes)
    scene = write(tmp_path / "scene.tif", values_of(side, 12))
    assert embed(scene, model, tmp_path / "out.tif") == 0
    assert f"windows of {window} pixels" in capsys.readouterr().out


def test_a_model_of_several_sensors_is_told_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"sentinel2_l2a": known("sentinel2_l2a", BANDS), "sentinel2_l1c": known("sentinel2_l1c", BANDS[::-1])}
    model = bundle(tmp_path / "both", inputs)
    values = values_of(16, 16)
    scene = write(tmp_path / "scene.tif", values)
    out = tmp_path / "out.tif"
    assert embed(scene, model, out) == 2
    assert capsys.readouterr().err == (
        "ssl-eo: --sensor: both knows several; say which the scene is of: sentinel2_l2a, sentinel2_l1c\n"
    )
    assert embed(scene, model, out, "--sensor", "sentinel2_l1b") == 2
    assert (
        "both does not know 'sentinel2_l1b'; did you mean 'sentinel2_l1c'? (it knows sentinel2_l2a, "
        in capsys.readouterr().err
    )
    assert embed(scene, model, out, "--sensor", "sentinel2_l1c") == 0
    np.testing.assert_allclose(read(out), of_windows(model, values[::-1], 16, "sentinel2_l1c"), atol=1e-5)


def test_models_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, out = write(tmp_path / "scene.tif", values_of(16, 16)), tmp_path / "out.tif"
    for model, message in (
        (bundle(tmp_path / "stateless", {}), "stateless: it has statistics for no sensor"),
        ("prithvi_eo_v2_tiny_tl", "of released weights, give the file: prithvi_eo_v2_tiny_tl=FILE"),
        ("gone/bundle", "no such path"),
    ):
        assert embed(scene, model, out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "stateless"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bands", "1", "2"], "--bands: the model takes 3, B04, B03, B02; got 2"),
        (["--bands", "1", "2", "9"], "has no band 9"),
        (["--bands", "1", "2", "1"], "(--bands): band 1 of scene.tif is named more than once"),
        (["--sensor-bands", "B04", "B99"], "--sensor-bands: "),
        (
            ["--sensor-bands", "B04", "B08"],
            "--sensor-bands: bands of sentinel2_l2a: this encoder has no statistics of B08",
        ),
        (["--window", "7"], "--window must be a multiple of the patch, 4 pixels, got 7"),
        (["--window", "0"], "--window must be at least 1, got 0"),
        (["--overlap", "1"], "--overlap must be"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--out", "features.npy"], "written to a .tif or a .parquet"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "scene.tif", values_of(16, 16))
    out = [] if "--out" in options else ["--out", "out.tif"]
    command = ["embed", "scene.tif", "--model", str(tiny), *out, *options]
    try:
        status = main(command)
    except SystemExit as stop:  # of argparse
        status = stop.code  # type: ignore[assignment]
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_what_is_there_stays(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, out = write(tmp_path / "scene.tif", values_of(16, 16)), tmp_path / "out.tif"
    out.write_text("mine")
    assert embed(scene, tiny, out) == 2
    assert "exists already; give another path, or overwrite it (--overwrite)" in capsys.readouterr().err
    assert out.read_text() == "mine"
    notes = tmp_path / "out.tif.panels" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    assert embed(scene, tiny, out, "--overwrite") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out.tif.panels holds 'notes.txt', which no run of this command has made" in line
    assert notes.read_text() == "precious"
    notes.unlink()
    assert embed(scene, tiny, out, "--overwrite") == 0
    assert read(out).shape == (16, 4, 4)


def test_warnings_are_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = write(tmp_path / "nowhere.tif", values_of(16, 16), crs=None, transform=None)
    assert embed(nowhere, tiny, tmp_path / "a.tif") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: warning: {nowhere} has no coordinate reference system")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "a.tif") as file:
            assert file.crs is None
            assert file.transform[:6] == (4.0, 0.0, 0.0, 0.0, 4.0, 0.0)  # in pixels of the scene
    homeless = write(tmp_path / "homeless.tif", values_of(16, 16), transform=None)
    assert embed(homeless, tiny, tmp_path / "h.tif") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: warning: {homeless} does not say where in its coordinate reference system its pix")
    reflectance = write(tmp_path / "reflectance.tif", values_of(16, 16, "float32") / 10_000)
    assert embed(reflectance, tiny, tmp_path / "b.tif") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: warning: {reflectance} holds float32, and sentinel2_l2a is stored as uint16")
    empty = write(tmp_path / "empty.tif", np.zeros((3, 16, 16), "uint16"))
    assert embed(empty, tiny, tmp_path / "c.tif") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: warning: {empty}: nothing of it was measured")


def embed_and_die(scene: Path, model: Path, out: Path) -> None:
    """Killed as soon as the first panel is kept."""
    from ssl_eo.adapt import scene_maps

    save = scene_maps._Panels.save

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    scene_maps._Panels.save = save_and_die  # type: ignore[method-assign]
    embed(scene, model, out, "--window", "8", "--overlap", "0", "--batch-size", "64")


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = write(tmp_path / "scene.tif", values_of(8, 4200))  # three panels of 2048 pixels
    out, options = tmp_path / "out.tif", ("--overlap", "0", "--batch-size", "64")
    assert embed(scene, tiny, tmp_path / "whole.tif", "--window", "8", *options) == 0
    process = mp.get_context("fork").Process(target=embed_and_die, args=(scene, tiny, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    (kept,) = (tmp_path / "out.tif.panels").glob("*.npy")
    capsys.readouterr()

    other = bundle(tmp_path / "other", {"sentinel2_l2a": known("sentinel2_l2a", BANDS)}, seed=1)
    for model, window, what in ((tiny, "4", "tiling"), (other, "8", "model")):
        assert embed(scene, model, out, "--window", window, *options) == 2
        assert f"holds panels of a run with another {what}" in capsys.readouterr().err

    panel = np.load(kept)
    panel[0, 0, 0] = 7.0  # so that what was kept can be told from what is made anew
    np.save(kept, panel)
    assert embed(scene, tiny, out, "--window", "8", *options) == 0
    found, expected = read(out), read(tmp_path / "whole.tif")
    assert found[0, 0, 0] == 7.0
    expected[0, 0, 0] = 7.0
    np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.glob("*.panels"))


def test_a_run_that_is_asked_to_stop_says_what_is_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssl_eo.adapt import scene_maps

    scene, out = write(tmp_path / "scene.tif", values_of(8, 4200)), tmp_path / "out.tif"
    options = ("--window", "8", "--overlap", "0", "--batch-size", "64")
    save = scene_maps._Panels.save

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(scene_maps._Panels, "save", save_and_stop)
        assert embed(scene, tiny, out, *options) == 75
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "ssl-eo: stopped on request; the same command goes on"
    assert any(line.endswith(f"1 of 3 panels are kept in {out}.panels; the same command goes on") for line in told)
    assert embed(scene, tiny, out, *options) == 0


def test_a_real_scene_of_sentinel2(
    real_samples: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """512 x 512 pixels of 13 bands, Level-1C, of which the model takes four."""
    path = real_samples("s1_s2_pairs/sen1floods11/S2/Spain_7370579_S2Hand.tif")
    bands = ("B04", "B03", "B02", "B08")
    model = bundle(tmp_path / "model", {"sentinel2_l1c": known("sentinel2_l1c", bands)}, patch_size=16)
    numbers = [str(load_sensor("sentinel2_l1c").band_names.index(band) + 1) for band in bands]
    out = tmp_path / "out.tif"
    assert embed(path, model, out, "--bands", *numbers, "--dtype", "float16") == 0
    assert (
        "16 features of 32 x 32 patches of 16 pixels (sensor sentinel2_l1c; windows of 224" in capsys.readouterr().out
    )
    with rasterio.open(path) as scene, rasterio.open(out) as file:
        assert file.crs == scene.crs
        np.testing.assert_allclose(file.bounds, scene.bounds, rtol=1e-9)
        measured = (scene.read([int(n) for n in numbers]) != 0).any(0).reshape(32, 16, 32, 16).any((1, 3))
        features = file.read()
    np.testing.assert_array_equal(np.isfinite(features).all(0), measured)
    assert measured.any()
    assert features[:, measured].std(1).min() > 0.01


def test_a_real_patch_by_the_names_of_its_bands(real_samples: Callable[[str], Path], tmp_path: Path) -> None:
    """A GeoTIFF that says nothing of its bands, and has as many as the sensor: they are its, in its order."""
    path = real_samples("eurosat_ms/AnnualCrop/AnnualCrop_1.tif")
    model = bundle(tmp_path / "model", {"sentinel2_l1c": known("sentinel2_l1c", BANDS)}, patch_size=8)
    assert embed(path, model, tmp_path / "a.tif") == 0
    order = load_sensor("sentinel2_l1c").band_names
    assert embed(path, model, tmp_path / "b.tif", "--bands", *(str(order.index(band) + 1) for band in BANDS)) == 0
    features = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(features, read(tmp_path / "b.tif"))
    assert features.shape == (16, 8, 8)
    assert np.isfinite(features).all()
