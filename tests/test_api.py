"""`ssl_eo` from Python: what an import costs, what `load` opens, what `train` leaves and raises."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ssl_eo
from ssl_eo.cli import main
from ssl_eo.hub import BundleEncoder, BundlePair, load_bundle, write_bundle
from ssl_eo.tensor_files import write_tensors
from ssl_eo.weights import _entries
from ssl_eo.weights.base import find_released, released_state_dict

ROOT = Path(__file__).parent.parent
SHORT = (
    *("train.total_steps=2", "train.global_batch_size=8", "optim.warmup_steps=1", "data.n_workers=0"),
    *("eval.every_n_steps=0", "checkpoint.every_n_steps=1", "log.every_n_steps=1", "log.report=false"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ssl_eo.TrainedRun:
    return ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={tmp_path_factory.mktemp('runs')}")


def same(found: Any, expected: Any) -> None:
    """Two encoders with the same weights, of which the same is said."""
    assert found.facts == expected.facts
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
    assert not found.training


# --- the package ------------------------------------------------------------------------------------------------------


def test_an_import_brings_nothing_heavy_and_sensors_and_bundles_torch_alone() -> None:
    code = (
        "import sys, ssl_eo; assert not any(name.startswith(('torch', 'ssl_eo.')) for name in sys.modules)\n"
        "import torch; before = set(sys.modules); ssl_eo.load, ssl_eo.Sensor\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert set(found.split()) - set(sys.stdlib_module_names) == {"ssl_eo"}


def test_what_is_public() -> None:
    for name in ssl_eo.__all__:
        assert getattr(ssl_eo, name) is not None
    assert set(ssl_eo.__all__) <= set(dir(ssl_eo))
    assert ssl_eo.Sensor is importlib.import_module("ssl_eo.sensors").Sensor
    assert ssl_eo.load_sensor("naip").band_names == ("R", "G", "B", "N")
    with pytest.raises(AttributeError, match=r"module 'ssl_eo' has no attribute 'laod' \(public: Sensor, "):
        ssl_eo.laod  # type: ignore[attr-defined]  # noqa: B018
    assert (ROOT / "ssl_eo" / "py.typed").is_file()  # so that mypy looks at the types at all


def test_train_is_a_function_and_a_package_whatever_comes_first() -> None:
    code = (
        "import ssl_eo; train = ssl_eo.train; assert callable(train)\n"
        "import ssl_eo.train.optim as optim; from ssl_eo.train import sealing\n"
        "assert ssl_eo.train is train and train.optim is optim and train.sealing is sealing"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_run_its_checkpoint_and_their_bundles(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    """One encoder, whichever way it comes."""
    assert main(["export", "--checkpoint", str(run.folder), "--out", str(tmp_path / "bundle")]) == 0
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for file in (tmp_path / "bundle").iterdir():
            archive.write(file, file.name)
    expected = load_bundle(tmp_path / "bundle")
    assert expected.facts["step"] == 2
    ways: list[str | Path] = [run.folder, str(run.folder), run.folder / "checkpoints" / "step_00000002"]
    ways += [tmp_path / "bundle", str(tmp_path / "bundle.zip"), (tmp_path / "bundle.zip").as_uri()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"), raising=False)
        for way in ways:
            same(ssl_eo.load(way), expected)
    before = ssl_eo.load(run.folder / "checkpoints" / "step_00000001")
    assert before.facts["step"] == 1
    images = torch.randint(0, 3000, (2, len(ssl_eo.load_sensor("sentinel2_l2a").bands), 32, 32))
    with torch.no_grad():
        assert not torch.equal(before(images), expected(images))


def test_published_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cpu"):
        random = ssl_eo.load("dinov2_vits14", False)
    assert isinstance(random, BundleEncoder)
    path = tmp_path / "weights.safetensors"
    digest = write_tensors(path, released_state_dict(random.encoder, find_released("dinov2_vits14")))
    same(ssl_eo.load("dinov2_vits14", path, digest[:8]), _entries.released("dinov2_vits14", path))
    with pytest.raises(ValueError, match="another file, or damaged"):
        ssl_eo.load("dinov2_vits14", path, "0" * 8)


def test_two_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    pair = BundlePair.__new__(BundlePair)  # the real one has 200 million weights
    monkeypatch.setattr("ssl_eo.weights._named.released_pair", lambda *arguments: asked.append(arguments) or pair)
    assert ssl_eo.load("croma_base", "CROMA_base.pt") is pair
    assert asked == [("croma_base", "CROMA_base.pt", None)]


def test_an_encoder_of_a_recipe(tmp_path: Path) -> None:
    random = ssl_eo.load("mae_vitmicro4_eurosat", False)
    assert isinstance(random, BundleEncoder)
    write_bundle(tmp_path, random.encoder, random.inputs, random.facts)
    same(ssl_eo.load("mae_vitmicro4_eurosat", tmp_path), load_bundle(tmp_path))
    with pytest.raises(ValueError, match="not of the recipe mae_vitt8_eurosat: its "):
        ssl_eo.load("mae_vitt8_eurosat", tmp_path)
    with pytest.raises(ValueError, match="no encoder is called 'mae_vitt8_euro'; did you mean 'mae_vitt8_eurosat'"):
        ssl_eo.load("mae_vitt8_euro", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dofa_vitb16",), r"dofa_vitb16 give the file of its weights, ssl_eo.load\('dofa_vitb16', 'PATH'\), or"),
        (("croma_base",), "of the encoder croma_base give the file of its weights"),
        (("dofa_vitb61",), "dofa_vitb61: there is no such run, bundle or file; did you mean 'dofa_vitb16'"),
        (("mae_vitmicro4_eurosat",), "mae_vitmicro4_eurosat give a bundle, ssl_eo.load"),
        (("runs/gone",), "^runs/gone: there is no such run, bundle or file$"),
        (("dofa_vitb61", "a.pth"), "did you mean 'dofa_vitb16'"),
        (("dofa_vitb16", True), "pretrained is True: give the path or address"),
        (("dofa_vitb16", "gone.pth"), "gone.pth: no such file"),
        (("http://example.org/bundle.zip",), "begins with https://"),
        (("a" * 5000,), "^a{200}: File name too long"),
        (("dofa_vitb16", "a" * 5000), "^a{200}: File name too long"),
        ((None,), "^None: expected a path, an address or a name, got a NoneType"),
        ((b"/tmp",), "^b'/tmp': expected a path"),
        (("dofa_vitb16", "a.pth", 5), "sha256 must be the first 8 to 64 hexadecimal digits, in lower case, got 5"),
    ],
)
def test_what_cannot_be_loaded(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssl_eo.load(*arguments)


def test_what_is_no_encoder(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        ssl_eo.load(tmp_path)
    with pytest.raises(ValueError, match="a checkpoint has checksums of its own"):
        ssl_eo.load(run.folder, sha256="0" * 8)
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: weights alone, expected a bundle"):
        ssl_eo.load(tmp_path / "weights.pth")


# --- train ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_done(run: ssl_eo.TrainedRun) -> None:
    assert run.is_finished
    assert run.step == 2
    assert run.folder.name == "debug_mae"
    *_, last = (json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    assert run.metrics == last
    again = ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={run.folder.parent}")
    assert again == run  # which had nothing to do


def test_a_mapping_is_what_a_file_would_hold(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    """The same losses, with an include, a path, an interpolation and overrides."""
    config = {
        "include": "debug/mae",
        "run": {"name": "${optim.warmup_steps}_step", "out_dir": tmp_path},
        "train": {"total_steps": 2, "global_batch_size": 8},
        "optim": {"warmup_steps": 1, "lr": 1e-3},
        "log": {"every_n_steps": 1, "report": False},
    }
    trained = ssl_eo.train(config, "data.n_workers=0", "eval.every_n_steps=0", "checkpoint.every_n_steps=1")
    assert trained.folder == tmp_path / "1_step"
    assert (trained.step, trained.metrics["loss"]) == (2, run.metrics["loss"])


def test_a_run_that_is_stopped_goes_on(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    stopped = ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={tmp_path}", "train.time_limit_s=0")
    assert (stopped.is_finished, stopped.step) == (False, 1)
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == handlers
    done = ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={tmp_path}")
    assert (done.is_finished, done.step, done.metrics["loss"]) == (True, 2, run.metrics["loss"])


def test_a_signal_saves_and_the_process_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "debug_mae"

    def ask() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    old = signal.signal(signal.SIGTERM, lambda *_: None)  # if it comes too late the test fails, and lives
    try:
        thread.start()
        stopped = ssl_eo.train("debug/mae", *SHORT, "train.total_steps=100000", f"run.out_dir={tmp_path}")
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, old)
    assert not stopped.is_finished
    assert (folder / "checkpoints" / f"step_{stopped.step:08d}").is_dir()


def test_what_cannot_be_trained(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    """The errors of the command, raised."""
    with pytest.raises(ValueError, match=r"^objectiv: unknown key; did you mean 'objective'"):
        ssl_eo.train({"include": "debug/mae", "objectiv": 1})
    with pytest.raises(ValueError, match=r"^config: needs the environment variable GONE_"):
        ssl_eo.train({"include": "debug/mae", "run": {"name": "${oc.env:GONE_}"}})
    with pytest.raises(ValueError, match=r"config: a mapping must hold what a YAML file can hold: .* not complex"):
        ssl_eo.train({"include": "debug/mae", "run": {"seed": 1j}})
    with pytest.raises(ValueError, match="write key=value"):
        ssl_eo.train("debug/mae", "optim.lr")
    for wrong in (3, ["optim.lr=0.1"]):
        with pytest.raises(ValueError, match=r"an override is text, key=value, got (3|\['optim)"):
            ssl_eo.train("debug/mae", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds a run of another config .*optim\.lr"):
        ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={run.folder.parent}", "optim.lr=0.5")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be used: Not a directory; set another run\.name or run\.out_dir"):
        ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={tmp_path}/file")


def test_the_main_thread_alone_trains() -> None:
    raised: list[BaseException] = []

    def call() -> None:
        try:
            ssl_eo.train("debug/mae")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "must be called in the main thread" in str(raised[0])


def test_a_finished_run_without_its_records(run: ssl_eo.TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    (tmp_path / run.folder.name / "metrics.jsonl").unlink()
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl holds no record, though the run has"):
        ssl_eo.train("debug/mae", *SHORT, f"run.out_dir={tmp_path}")
