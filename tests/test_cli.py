"""Every command on real, small data: what it writes and prints, its exit status, and errors of one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, records

from ssl_eo import __version__
from ssl_eo.cli import main
from ssl_eo.config import load
from ssl_eo.data.manifest import Manifest
from ssl_eo.data.shards import ShardIndex, index_path
from ssl_eo.hub import load_bundle

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SOURCE = ("--source", "synthetic", "n_samples=6", "sensors=[sentinel2_l2a,dem]", "extent_m=300")
TASK = """\
train: {name: synthetic, sensors: [sentinel2_l2a], extent_m: 160.0, n_samples: 60, split: train}
test: {name: synthetic, sensors: [sentinel2_l2a], extent_m: 160.0, n_samples: 30, split: test}
max_train: 60
max_test: 30
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of four steps, with checkpoints of steps 2 and 4."""
    out_dir = tmp_path_factory.mktemp("runs")
    short = ("data.n_workers=0", "train.total_steps=4", "train.global_batch_size=8", "optim.warmup_steps=1")
    logs = ("checkpoint.every_n_steps=2", "log.every_n_steps=2", "eval.pool=cls", "eval.taps=[0.5,1.0]")
    assert main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *short, *logs]) == 0
    return out_dir / "debug_mae"


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    out = run.parent / "bundle"
    assert main(["export", "--checkpoint", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    assert main(["data", "pack", *SOURCE, "--out", str(out), "--split", "train", "--workers", "0"]) == 0
    return out / "train"


# --- train, config, report --------------------------------------------------------------------------------------------


def test_train_leaves_a_complete_run_directory(run: Path) -> None:
    assert [r["step"] for r in records(run / "metrics.jsonl")] == [2, 4]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    for name in ("config.yaml", "env.json", "schemas.json", "report.html", "pictures/step_00000004.png"):
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.partial"))


def test_config_prints_what_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", "debug/mae", "optim.lr=0.25"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load(tmp_path / "printed.yaml")
    assert printed == load(DEBUG, ["optim.lr=0.25"])
    assert printed.optim.lr == 0.25
    # Defaults are written out too.
    assert yaml.safe_load((tmp_path / "printed.yaml").read_text())["train"]["accumulate"] == 1


def test_report_of_several_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run), str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" * 2
    assert "debug_mae" in (run / "report.html").read_text()


# --- export, eval -----------------------------------------------------------------------------------------------------


def test_export_of_a_run_is_that_of_its_last_step(
    run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        out = tmp_path / str(step)
        assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"wrote {out} (encoder after step {step})\n"
    of_run, of_2, of_4 = (load_bundle(path) for path in (bundle, tmp_path / "2", tmp_path / "4"))
    assert (of_run.facts["step"], of_2.facts["step"], of_4.facts["step"]) == (4, 2, 4)
    assert of_run.facts["objective"] == "mae"
    last, second, fourth = (model.encoder.state_dict() for model in (of_run, of_2, of_4))
    assert all(torch.equal(last[name], fourth[name]) for name in last)
    assert any(not torch.equal(last[name], second[name]) for name in last)
    images = torch.randint(0, 4000, (2, 12, 32, 32), dtype=torch.int32)
    assert of_run(images, sensor="sentinel2_l2a").shape == (2, 64)


def test_run_and_bundle_are_measured_alike(
    run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scenes.yaml").write_text(TASK)
    results = []
    for model, chosen in ((run, ()), (bundle, ("--pool", "cls", "--taps", "0.5", "1.0"))):
        out = tmp_path / model.name
        arguments = ["--model", str(model), "--tasks", str(tmp_path / "scenes.yaml"), "--out", str(out), *chosen]
        assert main(["eval", *arguments, "--resamples", "20"]) == 0
        own = ("model", "date", "seconds_features", "seconds_probe")
        results.append([{k: v for k, v in r.items() if k not in own} for r in records(out / "results.jsonl")])
        assert len((out / "results.csv").read_text().splitlines()) == 1 + len(results[-1])
    assert results[0] == results[1]
    assert {(r["features"], r["step"]) for r in results[0]} >= {
        ("encoder", 4),
        ("random_encoder", None),
        ("band_statistics", None),
    }
    assert {r["tap"] for r in results[0] if r["features"] == "encoder"} == {"depth_0.50", "last", "all"}
    shown = capsys.readouterr().out
    assert "scenes: accuracy of frozen features" in shown
    assert "margin over random encoder" in shown


def test_eval_takes_lists_and_goes_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scenes.yaml").write_text(TASK)
    command = ["eval", "--model", str(run), "--tasks", str(tmp_path / "scenes.yaml"), "--out", str(tmp_path / "out")]
    chosen = ["--protocol", "knn,ridge", "--partitions", "0.10x,1.00x", "--bands", "all", "rgb", "--size", "native"]
    chosen += ["--taps", "1", "--seeds", "0,1", "--resamples", "0"]
    assert main([*command, *chosen]) == 0
    found = records(tmp_path / "out" / "results.jsonl")
    told = [(r["features"], r["subset"], r["probe"], r["partition"], r["seed"]) for r in found]
    assert len(told) == len(set(told)) == 5 * 2 * 2 * 2 * 2
    assert "scenes, labels 0.10x, bands rgb: accuracy of frozen features" in capsys.readouterr().out
    assert main([*command, *chosen]) == 0
    assert records(tmp_path / "out" / "results.jsonl") == found


def test_tasks_may_be_patterns() -> None:
    from ssl_eo.cli_eval_tasks import known_tasks

    assert known_tasks(["synthetic_*", "mine.yaml", "synthetic_scenes"]) == ["synthetic_scenes", "mine.yaml"]
    with pytest.raises(ValueError, match=r"--tasks: 'nothing/\*' matches none of .*synthetic_scenes"):
        known_tasks(["nothing/*"])


def test_eval_of_a_task_that_cannot_be_measured_fails(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = yaml.safe_load(TASK)
    for split in ("train", "test"):
        task[split]["sensors"] = ["dem"]
        task[split]["extent_m"] = 60.0  # two pixels: too small for a patch of eight
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(task))
    arguments = ["--model", str(bundle), "--tasks", str(tmp_path / "small.yaml"), "--out", str(tmp_path)]
    assert main(["eval", *arguments]) == 1
    assert f"{bundle.name} could not be measured: ValueError" in capsys.readouterr().out


# --- data -------------------------------------------------------------------------------------------------------------


def test_pack_then_read_again(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", *SOURCE, "--out", str(packed.parent), "--split", "train", "--workers", "0"]) == 0
    assert "6 samples in 1 shards" in (again := capsys.readouterr().out)
    assert "1 shards kept from an earlier run, 0 bad samples left out" in again
    source = ("--source", "shards", "--root", str(packed.parent), "split=train", "tiles=[dem]")
    assert main(["data", "pack", *source, "--out", str(tmp_path), "--codec", "raw", "--workers", "2"]) == 0
    assert f"{tmp_path}: 6 samples" in capsys.readouterr().out


def test_a_packed_dataset_says_what_it_was_packed_from(tmp_path: Path) -> None:
    assert main(["data", "pack", *SOURCE, "--out", str(tmp_path), "--workers", "0"]) == 0
    source = Manifest.load(tmp_path)
    assert source.source_name == "synthetic"
    assert source.source_options["n_samples"] == 6
    assert source.source_options["split"] == "train"


def test_codecs_may_differ_between_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = ["data", "pack", *SOURCE, "--workers", "0", "--out"]
    assert main([*pack, str(tmp_path / "a"), "--codec", "dem=blosc"]) == 0
    codecs = {name: tile.codec for name, tile in Manifest.load(tmp_path / "a").tiles.items()}
    assert codecs == {name: "blosc" if name == "dem" else "raw" for name in codecs}
    assert len(codecs) > 1
    assert main([*pack, str(tmp_path / "b"), "--codec", "blosc"]) == 0
    assert {tile.codec for tile in Manifest.load(tmp_path / "b").tiles.values()} == {"blosc"}
    capsys.readouterr()
    for wrong, match in (
        (["--codec", "raw", "--codec", "dem=blosc"], "--codec is one codec for all tiles, or TILE=CODEC for some"),
        (["--codec", "dem=raw", "--codec", "dem=blosc"], "for some, once each"),
        (["--codec", "zip"], "no codec 'zip' (allowed: ['raw', 'blosc'])"),
        (["--codec", "demm=raw"], "codec: the source has no tiles demm"),
    ):
        assert main([*pack, str(tmp_path / "c"), *wrong]) == 2
        assert match in capsys.readouterr().err


def test_progress_without_a_terminal_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = ["data", "pack", *SOURCE, "--workers", "0", "--shard-size-mb", "0.05", "--out"]
    assert main([*pack, str(tmp_path / "quick")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("ssl_eo.progress.PROGRESS_EVERY_S", 0.0)
    assert main([*pack, str(tmp_path / "slow")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(re.fullmatch(r"packing: \d of 6, \d:\d\d:\d\d left", line) for line in lines)
    assert lines[-1] == "packing: 6 of 6, 0:00:00 left"


def test_pack_stops_at_bad_samples_unless_allowed(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    (shard,) = damaged.glob("*.tar")
    index, data = ShardIndex.load(index_path(shard)), bytearray(shard.read_bytes())
    data[int(index.offset[3, 1] + index.size[3, 1]) - 5] ^= 1
    shard.write_bytes(data)
    source = ("--source", "shards", "--root", str(damaged), "verify=true")
    pack = ["data", "pack", *source, "--out", str(tmp_path / "again"), "--workers", "0"]
    assert _status(pack) == 2
    line = _error(capsys)
    assert line.startswith(
        "ssl-eo: 1 bad samples so far, allowed are 0 of 6: repair them, or raise max_bad_ratio (--max"
    )
    assert f"The first are sample 3: {shard}, member " in line
    assert _status([*pack, "--max-bad-ratio", "0.2"]) == 0
    assert "5 samples in 1 shards" in (out := capsys.readouterr().out)
    assert "1 bad samples left out" in out


def test_stats_of_a_source_and_of_its_shards_agree(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", *SOURCE, "--workers", "0"]) == 0
    of_source = capsys.readouterr().out
    assert main(["data", "stats", "--source", "shards", "--root", str(packed), "--workers", "0"]) == 0
    assert capsys.readouterr().out == of_source
    assert "6 samples (0 bad left out)" in of_source
    for name in ("sentinel2_l2a", "B8A", "dem", "5,400"):  # whole names; 6 samples of 30 x 30 pixels
        assert name in of_source


def test_index_then_check(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = packed.glob("*.tar")
    index_path(shard).unlink()
    assert main(["data", "index", "--root", str(packed), "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{packed}: indexed 6 samples in 1 shards\n"
    assert main(["data", "check", "--root", str(packed), "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{packed}: 6 samples in 1 shards are whole\n"


def test_index_of_foreign_tars_is_no_packed_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    subprocess.run(["tar", "cf", tmp_path / "shard-000000.tar", "-C", tmp_path, "a.txt"], check=True)
    assert main(["data", "index", "--root", str(tmp_path), "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: indexed 1 samples in 1 shards\n"
    assert _status(["data", "check", "--root", str(tmp_path), "--workers", "0"]) == 2
    assert "'ssl-eo data pack' did not write these tars" in _error(capsys)
    assert _status(["data", "index", "--help"]) == 0
    assert "beside each NAME.tar" in " ".join(capsys.readouterr().out.split())


def test_check_names_a_flipped_byte(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = packed.glob("*.tar")
    index, whole = ShardIndex.load(index_path(shard)), shard.read_bytes()
    offset, size = int(index.offset[3, 1]), int(index.size[3, 1])
    place = offset + size - 5
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
        assert main(["data", "check", "--root", str(packed), "--workers", "0"]) == 1
    finally:
        shard.write_bytes(whole)
    shown = capsys.readouterr()
    assert shown.out == ""
    problem, summary = shown.err.splitlines()
    assert problem.startswith(f"{shard.name}: {index.member_name(3, 1)}, byte {offset}: its CRC-32 is ")
    assert summary == "ssl-eo: 1 problems; fetch or pack the shards named above again"


# --- usage and errors -------------------------------------------------------------------------------------------------


def _status(arguments: Sequence[str]) -> int:
    """What the process would exit with."""
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse ends the process itself
        return stop.code if isinstance(stop.code, int) else 1


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("ssl-eo: ")
    return line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["--version"]) == 0
    assert capsys.readouterr().out == f"ssl_eo {__version__}\n"


def test_python_m_is_the_same_command(tmp_path: Path) -> None:
    """In a folder of its own, with its own exit status."""
    command = [sys.executable, "-m", "ssl_eo", "train", "--config", "debug/mea"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ssl-eo: no config file 'debug/mea'; did you mean 'debug/mae'?")


@pytest.mark.parametrize("arguments", [["eval", "--list-tasks"], ["config", "--config", "demo"]], ids=" ".join)
def test_what_nobody_reads_ends_without_a_word(arguments: list[str]) -> None:
    """As `| head` does it, whether it is more than a buffer or less."""
    command = [sys.executable, "-m", "ssl_eo", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 141


EVAL = ("eval", "--model", "{run}", "--tasks", "synthetic_scenes", "--out", "{tmp}")
WRONG_USAGE: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: command (see ssl-eo --help)"),
    (["trian"], "invalid choice: 'trian'"),
    (["eval", "--model", "m"], "required: --tasks, --out (see ssl-eo eval --help)"),
    (["data", "stats", "--source", "synthetic", "--workers", "two"], "argument --workers: invalid int value: 'two'"),
    ([*EVAL, "--model", "{run}"], "argument --model: given twice; give it once (see ssl-eo eval --help)"),
    ([*EVAL, "--tasks", "eurosat_ms"], "argument --tasks: given twice; give it once, with all values behind it"),
    (["train", "--config", "demo", "--config", "debug/mae"], "argument --config: given twice"),
    (["data", "stats", "--source", "synthetic", "--source=eurosat"], "argument --source: given twice"),
    (["train", "--config", "debug/mea"], "no config file 'debug/mea'; did you mean 'debug/mae'?"),
    (["train", "--config", DEBUG, "optim.lr"], "'optim.lr': write key=value, for instance optim.lr=0.001"),
    (["train", "--config", DEBUG, "optim.lrr=1"], "optim.lrr: unknown key; did you mean 'lr'?"),
    (["train", "--config", DEBUG, "optim.lr=fast"], "optim.lr: expected float, got 'fast'"),
    (["train", "--config", DEBUG, "optim.betas=[1"], "'optim.betas=[1': the value is not YAML: "),
    (["train", "--config", DEBUG, "objective.name=mea"], "objective.name: there is no component 'mea'"),
    (["train", "--config", DEBUG, "data.sources.0.name=synthetc"], "did you mean 'synthetic'?"),
    (["train", "--config", DEBUG, "data.sources.0.sensors=[sentinel9]"], "has no 'sentinel9'"),
    (["config", "--config", "{tmp}/broken.yaml"], "broken.yaml: cannot be read as YAML: "),
    (["export", "--checkpoint", "{tmp}", "--out", "{tmp}/b"], "no run with a whole checkpoint here"),
    (["export", "--checkpoint", "{run}/checkpoints/step_00000099", "--out", "{tmp}/b"], "no run with a whole"),
    (["eval", "--model", "{tmp}", "--tasks", "synthetic_scenes", "--out", "{tmp}"], "no run with a whole checkpoint"),
    (["eval", "--model", "{run}", "--tasks", "synthetic_scens", "--out", "{tmp}"], "did you mean 'synthetic_scenes'?"),
    (["eval", "--model", "{run}", "--tasks", "{tmp}/broken.yaml", "--out", "{tmp}"], "cannot be read as YAML: "),
    (["eval", "--model", "{run}", "--tasks", "synthetic_scenes", "--out", "{tmp}", "--pool", "max"], "--pool: got"),
    (["eval", "--model", "{run}", "--tasks", "synthetic_scenes", "--out", "{tmp}", "--taps", "2"], "--taps: taps are"),
    ([*EVAL, "--taps", "deep"], "--taps: 'deep' is no number"),
    ([*EVAL, "--protocol", "knn, knnn"], "--protocol: there is no component 'knnn'"),
    ([*EVAL, "--partitions", "half"], "--partitions: 'half' is no part"),
    ([*EVAL, "--size", "big"], "--size: 'big' must be task, native"),
    ([*EVAL, "--bands", "nir"], "--bands: got 'nir', must be one of all, rgb, no-rgb, random"),
    (["report", "{tmp}"], "it is not a run directory"),
    (["data", "pack", "--source", "synthetc", "--out", "{tmp}"], "there is no component 'synthetc'"),
    (["data", "pack", "--source", "synthetic", "n_sample=3", "--out", "{tmp}"], "did you mean 'n_samples'?"),
    (["data", "pack", "--source", "synthetic", "n_samples", "--out", "{tmp}"], "'n_samples': write key=value"),
    (["data", "pack", "--source", "synthetic", "sensors=[", "--out", "{tmp}"], "the value is not YAML: "),
    (["data", "pack", *SOURCE, "--out", "{tmp}", "--codec", "zip"], "no codec 'zip' (allowed: ['raw', 'blosc'])"),
    (["data", "pack", *SOURCE, "--out", "{tmp}", "--max-bad-ratio", "2"], "max_bad_ratio must lie in 0 to 1, got 2.0"),
    (["data", "pack", *SOURCE, "weight=2", "--out", "{tmp}"], "--source.weight: unknown key"),
    (["data", "stats", "--source", "shards"], "--source.root: missing; this key has no default"),
    (
        ["data", "pack", *SOURCE, "--out", "{tmp}/broken.yaml/x"],
        "cannot be used: Not a directory; choose another folder",
    ),
    (["data", "index", "--root", "{tmp}"], "holds no .tar file"),
    (["data", "check", "--root", "{tmp}"], "manifest.json: no such file; write the dataset with 'ssl-eo data pack'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE, ids=[message for _, message in WRONG_USAGE])
def test_wrong_usage_is_one_line_and_status_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }\n")
    if arguments[:1] == ["train"]:
        arguments = [*arguments, f"run.out_dir={tmp_path}"]
    assert _status([a.format(tmp=tmp_path, run=run) if a[:1] == "{" else a for a in arguments]) == 2
    assert message in _error(capsys)


def test_failure_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotADirectoryError(20, "Not a directory", "somewhere")

    monkeypatch.setattr("ssl_eo.config.load", fail)
    assert _status(["config", "--config", "demo"]) == 1
    assert _error(capsys) == (
        "ssl-eo: [Errno 20] Not a directory: 'somewhere' (set SSL_EO_TRACEBACK=1 for the traceback)"
    )
    monkeypatch.setenv("SSL_EO_TRACEBACK", "1")
    with pytest.raises(OSError, match="Not a directory"):
        main(["config", "--config", "demo"])


def test_a_lack_of_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("ssl_eo.config.load", fail)
    assert _status(["config", "--config", "demo"]) == 1
    assert _error(capsys) == "ssl-eo: out of memory (set SSL_EO_TRACEBACK=1 for the traceback)"


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("numcodecs", "codec", ["data", "pack", *SOURCE, "--out", "{tmp}/out", "--codec", "blosc", "--workers", "0"]),
        ("rasterio", "geo", ["data", "stats", "--source", "eurosat", "--root", "{tmp}", "split=all", "--workers", "0"]),
        ("tensorboard", "tensorboard", ["train", "--config", DEBUG, "run.out_dir={tmp}", "log.tensorboard=true"]),
    ],
    ids=["numcodecs", "rasterio", "tensorboard"],
)
def test_missing_extra_is_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    extra: str,
    arguments: list[str],
) -> None:
    (tmp_path / "Forest").mkdir()
    (tmp_path / "Forest" / "Forest_1.tif").touch()
    monkeypatch.setitem(sys.modules, package, None)
    assert _status([a.format(tmp=tmp_path) for a in arguments]) == 2
    assert _error(capsys).endswith(f"needs the package {package}: pip install 'ssl_eo[{extra}]'")


def test_damaged_bundle_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page: dict[str, Any] = json.loads((bundle / "encoder.json").read_text())
    del page["encoder"]
    (tmp_path / "encoder.json").write_text(json.dumps(page))
    assert _status(["eval", "--model", str(tmp_path), "--tasks", "synthetic_scenes", "--out", str(tmp_path)]) == 2
    assert _error(capsys) == f"ssl-eo: --model: {tmp_path}/encoder.json: key 'encoder' is missing"
