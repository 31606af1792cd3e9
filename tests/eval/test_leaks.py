"""What a careful reader would find in a task: a leak, another unit, a swapped band. Each is said in one clear line."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import tasks

from ssl_eo.data.opening import SourceConfig
from ssl_eo.data.sources.geobench import Config
from ssl_eo.eval.leaks import count_alike, count_leaked, count_shared_groups, digest_of_pixels
from ssl_eo.eval.offline import Evaluation, Model, evaluate
from ssl_eo.eval.tasks import TaskConfig

sys.path.append(str(Path(__file__).parents[1] / "data"))

from write_geobench import edit_json, write_dataset


@dataclass
class Samples:
    keys: list[str]
    digests: list[str]


def _samples(*pairs: str) -> Samples:
    """Of `key=digest`."""
    keys, _, digests = zip(*(pair.partition("=") for pair in pairs), strict=True)
    return Samples(list(keys), list(digests))


TRAIN, VAL = _samples("a=1", "b=2", "c=3"), _samples("d=4", "e=5")


def test_splits_that_are_apart_leak_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert count_leaked("t", {"train": TRAIN, "val": VAL, "test": _samples("f=6", "g=7")}) == 0
    assert count_leaked("t", {"train": _samples("a=1", "b=1"), "test": _samples("f=6", "g=6")}) == 0  # within one
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": TRAIN, "test": _samples("b=9", "f=6", "c=8")}, "2 of 3 samples of test are in train too, the first"),
        (
            {"train": TRAIN, "val": VAL, "test": _samples("e=9")},
            "1 of 1 samples of test are in val too, the first",
        ),
        (
            {"train": TRAIN, "val": VAL, "test": _samples("a=9")},
            "1 of 1 samples of test are in train too",
        ),
        ({"train": TRAIN, "val": _samples("a=9"), "test": VAL}, "1 of 1 samples of val are in train too"),
    ],
)
def test_a_key_in_two_splits_is_refused(splits: dict[str, Samples], message: str) -> None:
    with pytest.raises(ValueError, match=f"task t: {message}"):
        count_leaked("t", splits)
    with pytest.raises(ValueError, match="a flag that begins with 'shared keys'"):
        count_leaked("t", splits, ["leak: known"])
    count_leaked("t", splits, ["shared keys: both count from 1"])


def test_equal_pixels_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": TRAIN, "val": _samples("d=3", "e=6"), "test": _samples("f=1", "g=6", "h=3", "i=1")}
    assert count_leaked("t", splits) == 3
    for said, of, first in (("1 of 2", "val", "train"), ("3 of 4", "test", "train"), ("2 of 4", "test", "val")):
        assert f"task t: {said} samples of {of} have the pixels of a sample of {first}, the first is" in caplog.text
    assert len(caplog.records) == 3
    caplog.clear()
    assert count_leaked("t", splits, ["leak: three scenes twice"]) == 3
    assert caplog.text == ""


def test_copies_of_train_and_of_val_are_counted_apart() -> None:
    train, val, test = _samples("a=1", "b=2"), _samples("c=3", "d=1"), _samples("e=3", "f=1", "g=9")
    assert count_leaked("t", {"train": train, "val": val, "test": test}) == 1
    assert count_alike(test, val) == 2


@pytest.mark.parametrize("blank", [0, 7, np.nan, np.inf])
def test_blank_tiles_are_copies_of_nothing(blank: float, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    dtype = np.float32 if not np.isfinite(blank) else np.uint16
    picture, flat = rng.integers(9, size=(2, 4, 4)).astype(dtype), np.full((2, 4, 4), blank, dtype)
    flat[1] = 3  # bands may differ: within each of them there is nothing to see
    digests = [digest_of_pixels(tile) for tile in (picture, flat)]
    assert len(set(digests)) == 2
    other = flat.copy()
    other[1] = 4
    assert digest_of_pixels(other) != digests[1]  # of other content all the same
    train, test = Samples(["a", "b"], digests), Samples(["c", "d", "e"], [*digests, digests[1]])
    assert count_leaked("t", {"train": train, "test": test}) == 1
    (said,) = caplog.records
    assert "1 of 3 samples of test have the pixels of a sample of train, the first is c" in said.getMessage()
    nearly = flat.copy()
    nearly[0, 3, 3] = 5
    assert count_alike(Samples(["c"], [digest_of_pixels(nearly)]), Samples(["a"], [digest_of_pixels(nearly)])) == 1


@dataclass
class Places:
    groups: list[str]


def test_places_in_several_splits_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": Places(["a", "a", "b"]), "val": Places(["c"]), "test": Places(["b", "d", "c", "b"])}
    assert [count_shared_groups("t", splits) for _ in range(3)] == [2, 2, 2]
    (record,) = caplog.records
    assert "task t: 2 of 3 places of test, with 3 of its 4 samples, are in an earlier split too, the first is b;" in (
        record.getMessage()
    )
    assert "'shared places'" in record.getMessage()
    caplog.clear()
    assert count_shared_groups("t", splits, ["shared places: dates of one field"]) == 2
    assert count_shared_groups("t", splits, ["leak: chips overlap"]) == 2
    assert count_shared_groups("t", {"train": splits["train"], "test": Places(["d", "d"])}) == 0
    assert count_shared_groups("t", {"train": Places(["a", "b"]), "test": Places(["a"])}, ["shared keys: x"]) == 0
    assert caplog.text == ""


def _evaluate(task: TaskConfig, out: Path) -> list[dict[str, Any]]:
    plan = Evaluation([task], probes=["ridge"], n_resamples=0)
    return evaluate(Model("toy", tasks.encoder(), step=1), plan, out)


def test_a_planted_leak_is_caught(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied = tasks.task(test=tasks.source(seed=1, n=40, n_copied=5))
    assert {r["n_leaked"] for r in _evaluate(copied, tmp_path / "copied")} == {5}
    assert "5 of 40 samples of test have the pixels of a sample of train" in caplog.text
    same = tasks.task(test=tasks.source(seed=0, n=40))
    found = _evaluate(same, tmp_path / "same")
    assert {r["kind"] for r in found} == {"error"}
    assert all("ValueError: task toy: 40 of 40 samples of test are in train too" in r["error"] for r in found)
    clean = _evaluate(tasks.task(), tmp_path / "clean")
    assert {(r["kind"], r["n_leaked"]) for r in clean} == {("result", 0)}


def _geobench(root: Path, **options: Any) -> TaskConfig:
    train, test = (
        SourceConfig("geobench", Config(str(root), "m-eurosat", split=split, **options)) for split in ("train", "test")
    )
    return TaskConfig("m-eurosat", train, test)


def _make_reflectance(statistics: dict[str, dict[str, float]]) -> None:
    for band, measures in statistics.items():
        if band != "label":
            measures.update({name: value / 10_000 for name, value in measures.items()})


def _swap_vapour_and_cirrus(statistics: dict[str, dict[str, float]]) -> None:
    vapour, cirrus = "09 - Water vapour", "10 - SWIR - Cirrus"
    statistics[vapour], statistics[cirrus] = statistics[cirrus], statistics[vapour]


def test_another_unit_is_caught(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "data", "m-eurosat", n_train=12, n_test=6)
    edit_json(written.folder / "band_stats.json", _make_reflectance)
    found = _evaluate(_geobench(written.root), tmp_path / "out")
    assert {r["kind"] for r in found} == {"error"}
    (message,) = {r["error"] for r in found}
    assert "reflectance" in message
    assert "digital_number" in message


def test_a_swapped_band_is_caught(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = write_dataset(tmp_path / "data", "m-eurosat", n_train=12, n_test=6)
    with caplog.at_level(logging.WARNING):
        _evaluate(_geobench(written.root, bands="as_published"), tmp_path / "slipped")
    assert "bands: corrected" in caplog.text
    assert "B09" in caplog.text
    edit_json(written.folder / "band_stats.json", _swap_vapour_and_cirrus)
    found = _evaluate(_geobench(written.root), tmp_path / "mended")
    assert {r["kind"] for r in found} == {"error"}
    assert all("bands: as_published" in r["error"] for r in found)
