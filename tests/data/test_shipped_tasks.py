"""The tasks of datasets_meta/benchmarks: each opens on files of its format, and agrees with what is known of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")

from archives.tiffs import write_raster
from write_geobench import LAYOUTS, write_dataset

from ssl_eo.config import build
from ssl_eo.data.sources._geobench_card import DatasetCard, card_of
from ssl_eo.eval.hook import EvalConfig, EvalHook
from ssl_eo.eval.offline import Evaluation, Model, evaluate
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.models.patch_embed.channel_attention import ChannelAttentionConfig
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.resources import resource_dir

BENCHMARKS = resource_dir("datasets_meta") / "benchmarks"
GEOBENCH = sorted(path.stem for path in (BENCHMARKS / "geobench").glob("*.yaml"))
OF_OTHER_TILES = {"m-so2sat-s1": "m-so2sat", "m-NeonTree-neon": "m-NeonTree"}  # of datasets that have a task already
METRICS = {"accuracy": "accuracy", "f1_micro": "f1_micro", "miou": "miou_present"}  # as cards call them, as we do
N_TRAIN, N_VAL, N_TEST = 6, 2, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def geobench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("geobench")
    for dataset in LAYOUTS:
        write_dataset(root, dataset, N_TRAIN, N_VAL, N_TEST)
    return root


@pytest.fixture
def _in_place(geobench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEO_BENCH_DIR", str(geobench))


def card_of_task(name: str) -> DatasetCard:
    return card_of(OF_OTHER_TILES.get(name, name))


def test_every_dataset_of_geobench_has_a_task() -> None:
    assert set(GEOBENCH) == {*LAYOUTS, *OF_OTHER_TILES}


@pytest.mark.usefixtures("_in_place")
@pytest.mark.parametrize("name", GEOBENCH)
def test_tasks_of_geobench_agree_with_its_card(name: str) -> None:
    card, cfg = card_of_task(name), build(TaskConfig, f"geobench/{name}", "")
    task = Task(cfg)
    assert (cfg.name, cfg.kind, cfg.headline) == (name, card.kind, METRICS[card.metric])
    assert task.class_names == card.classes
    assert [card.classes[i] for i in cfg.no_data] == list(card.no_data_classes)
    assert cfg.ignore is None
    assert task.val is not None
    assert [len(split) for split in (task.train, task.val, task.test)] == [N_TRAIN, N_VAL, N_TEST]
    assert not any(split.is_held for split in (task.train, task.val, task.test))  # all samples, whatever their number
    (tile,) = (t for name, t in card.tiles["corrected"].items() if name == task.shown.tile)
    assert task.bands == tile.bands


@pytest.mark.parametrize("name", GEOBENCH)
def test_files_of_geobench_tasks_say_sizes_and_defects(name: str) -> None:
    card = card_of_task(name)
    text = (BENCHMARKS / "geobench" / f"{name}.yaml").read_text()
    prose = " ".join(re.findall(r"^# (.*)$", text, re.MULTILINE))
    for split, n in card.split_sizes.items():
        assert f"{n:,} {split}" in prose
    flags = " ".join(build_flags(name))
    assert (card.leak is not None) == ("leak:" in flags)
    noise = card.label_noise_ratio
    assert (noise is None) == ("labels are wrong" not in flags)
    if noise is not None:
        assert f"about {100 * noise:g} % of the test labels are wrong" in flags
    assert (card.slip is not None) == ("bands are corrected" in flags)


def build_flags(name: str) -> list[str]:
    import yaml

    return yaml.safe_load((BENCHMARKS / "geobench" / f"{name}.yaml").read_text()).get("flags", [])  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_in_place")
def test_while_training_a_task_of_all_samples_is_held_to_the_usual_number(tmp_path: Path) -> None:
    cfg = build(EvalConfig, {"every_n_steps": 1, "tasks": ["geobench/m-eurosat"]}, "eval")
    (task,) = EvalHook(cfg, tmp_path, CPU).tasks
    assert (task.cfg.max_train, task.cfg.max_val, task.cfg.max_test) == (2000, 1000, 1000)
    assert task.watched.name == "val"
    assert [split.is_held for split in (task.train, task.watched)] == [True, True]
    assert len(task.train) == N_TRAIN


def test_a_wrong_name_of_a_task_in_a_folder_is_corrected() -> None:
    with pytest.raises(ValueError, match=r"has no 'geobench/m-eurosatt'; did you mean 'geobench/m-eurosat'\?"):
        build(TaskConfig, "geobench/m-eurosatt", "")


@pytest.mark.usefixtures("_in_place")
def test_all_tasks_of_geobench_are_evaluated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    any_bands = ChannelAttentionConfig(attn_dim=32, n_heads=2)
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=32, channel_attention=any_bands), None)
    encoder.init_weights()
    tasks = [build(TaskConfig, f"geobench/{name}", "") for name in GEOBENCH]
    plan = Evaluation(tasks, probes=["knn", "ridge"], n_resamples=10, controls=False, batch_size=2)
    results = evaluate(Model("toy", encoder, step=1), plan, tmp_path)
    assert not [r for r in results if r["kind"] != "result"]
    assert {r["task"] for r in results} == set(GEOBENCH)
    for r in results:
        assert r["n_train"] == N_TRAIN
        assert (r["n_val"], r["n_test"]) == (N_VAL, N_TEST)
        assert 0 <= r["scores"][r["metric"]] <= 1
        assert r["size_px"] % 32 == 0  # 120, 332 and 500 pixels are no multiples of a patch
    sizes = {r["task"]: r["size_px"] for r in results}
    assert (sizes["m-bigearthnet"], sizes["m-forestnet"], sizes["m-nz-cattle"]) == (128, 352, 512)
    assert sizes["m-eurosat"] == 64
    knn = {r["task"] for r in results if r["probe"] == "knn"}
    assert knn == {name for name in GEOBENCH if card_of_task(name).kind != "segmentation"}


@pytest.mark.parametrize(
    ("name", "sizes", "n_classes", "headline"),
    [
        ("eurosat_rgb_geo", (4969, 598, 1433), 10, "accuracy"),
        ("bigearthnet_v2_s2", (79, 8, 9), 19, "map_micro"),
        ("bigearthnet_v2_s2_pixels", (79, 8, 9), 19, "miou_present"),
        ("enmap_landcover", (7, 3, 4), 7, "miou_present"),
    ],
)
def test_tasks_on_real_files(
    name: str, sizes: tuple[int, ...], n_classes: int, headline: str, real_samples: Callable[[str], Path]
) -> None:
    cfg = build(TaskConfig, name, "")
    real_samples(Path(cfg.train.options.root).parts[-2 if name != "eurosat_rgb_geo" else -1])
    task = Task(cfg)
    assert task.val is not None
    splits = task.train, task.val, task.test
    assert tuple(len(split._source) for split in splits) == sizes
    assert (task.n_classes, cfg.headline) == (n_classes, headline)
    prose = (BENCHMARKS / f"{name}.yaml").read_text()
    for n in sizes:
        assert f"{n:,}" in prose or str(n) in prose or {3: "three", 4: "four", 7: "seven"}[n] in prose
    batch = next(task.test.stream(4, CPU) if not task.test.is_held else task.test.batches(torch.arange(4), 4, CPU))
    assert batch.inputs.pixels.isfinite().all()


def test_tiles_of_enmap_keep_their_columns_apart(real_samples: Callable[[str], Path]) -> None:
    import h5py

    with h5py.File(real_samples("enmap_potsdam") / "enmap_potsdam_32px.h5") as file:
        west = dict(zip(file["tile"].asstr()[:], file["bounds"][:, 0], strict=True))
    cfg = build(TaskConfig, "enmap_landcover", "")
    assert cfg.val is not None
    train, val, test = ([west[name] for name in source.options.split] for source in (cfg.train, cfg.val, cfg.test))
    assert len({*train, *val, *test}) == 5
    assert max(train) < min(val) == max(val) < min(test) == max(test)  # a column of validation tiles lies between
    names = [name for source in (cfg.train, cfg.val, cfg.test) for name in source.options.split]
    assert sorted(names) == sorted(west)


def test_test_tiles_of_enmap_are_one_place(real_samples: Callable[[str], Path]) -> None:
    real_samples("enmap_potsdam")
    task = Task(build(TaskConfig, "enmap_landcover", ""))
    assert task.val is not None
    groups = [{g for b in split.stream(4, CPU) for g in b.groups} for split in (task.train, task.val, task.test)]
    assert groups == [{"64", "96", "128"}, {"160"}, {"192"}]


def test_the_task_of_thirteen_bands_reads_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rasterio")
    monkeypatch.setenv("SSL_EO_SAMPLES", str(tmp_path))
    rng = np.random.default_rng(0)
    for n in range(30):
        label = ("Forest", "River")[n % 2]
        pixels = rng.integers(300, 4000, (13, 64, 64)).astype(np.uint16)
        corner = 600_000.0, 3_000_000.0 + 111_200.0 * n  # a degree further north each
        write_raster(tmp_path / "eurosat_ms" / label / f"{label}_{n}.tif", pixels, corner=corner)
    task = Task(build(TaskConfig, "eurosat_ms", ""))
    assert task.val is not None
    assert len(task.train) + len(task.val) + len(task.test) == 30
    assert (task.bands[7:9], task.bands[-1]) == (("B08", "B09"), "B8A")
    assert task.n_classes == 10
    (batch, *_) = task.train.stream(2, CPU)
    assert batch.inputs.pixels.shape == (2, 13, 64, 64)


def test_the_task_of_resisc45_reads_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("SSL_EO_SAMPLES", str(tmp_path))
    rng = np.random.default_rng(0)
    for label in ("airplane", "wetland"):
        (tmp_path / "resisc45" / label).mkdir(parents=True)
        for n in range(1, 31):
            pixels = rng.integers(0, 255, (256, 256, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "resisc45" / label / f"{label}_{n:03d}.jpg")
    task = Task(build(TaskConfig, "resisc45", ""))
    assert task.val is not None
    keys = [{key for batch in s.stream(8, CPU) for key in batch.keys} for s in (task.train, task.val, task.test)]
    assert [len(k) for k in keys] == [len(s) for s in (task.train, task.val, task.test)]
    assert len(set().union(*keys)) == 60
    assert task.class_names == ("airplane", "wetland")
