"""`launch/submitit_launch.py` without Slurm: the batch script, the runs of a sweep, and errors of one line."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT

from ssl_eo.config import load

SCRIPT = ROOT / "launch" / "submitit_launch.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submitit_launch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["submitit_launch"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


launcher = _load()


def _dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], str, list[str]]:
    """Options of the batch script, what it runs, and the runs that are named."""
    assert launcher.main(["--dry-run", *arguments, "--config", "debug/mae"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    body = "\n".join(line for line in lines if not line.startswith("#"))
    return options, body, captured.err.splitlines()


@pytest.fixture(autouse=True)
def _without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither sbatch nor srun can be found, and nothing may be left in the folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    size = ("--nodes=4", "--gpus-per-node=8", "--cpus-per-task=12", "--time-min=90", "--signal-delay-s=240")
    place = ("--partition=long", "--account=eo", "--qos=low", "--slurm=mem=0", "--slurm=exclusive", "--folder=logs")
    options, body, runs = _dry_run(capsys, *size, *place, "data.n_lanes=32", "train.global_batch_size=32")
    expected = {
        *("--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=12", "--time=90"),
        *("--partition=long", "--account=eo", "--qos=low", "--mem=0", "--exclusive"),
        *("--signal=USR2@240", "--requeue", "--open-mode=append", "--job-name=ssl_eo"),
        f"--output={tmp_path}/logs/%j_0_log.out",
    }
    assert expected <= set(options)
    assert not [option for option in options if option.startswith("--array")]
    commands = [shlex.split(line) for line in body.splitlines() if line]
    assert commands[-1][0] == "srun"
    assert "--kill-on-bad-exit=1" in commands[-1]
    assert {"export", "SSL_EO_REQUEUE=1"} in [set(words) for words in commands]
    assert {"export", "SRUN_CPUS_PER_TASK=12"} in [set(words) for words in commands]
    assert runs == ["would train debug_mae: --config debug/mae data.n_lanes=32 train.global_batch_size=32"]
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    options, _, runs = _dry_run(
        capsys, "--sweep=optim.lr=1e-3,5e-4", "--sweep=run.seed=0,1,2", "--array-parallelism=4", "run.name=base"
    )
    assert "--array=0-5%4" in options
    assert len(runs) == 6
    assert runs[0].startswith("would train base-lr1e-3-seed0: ")


def test_each_run_of_a_sweep_builds_and_has_its_values() -> None:
    sweeps = ["optim.betas=[0.9,0.95],[0.9,0.99]", "objective.norm_pix=true,false"]
    runs = launcher.plan_runs("debug/mae", ["optim.lr=0.5"], sweeps)
    configs = [load(run.arguments[1], run.arguments[2:]) for run in runs]
    found = [(tuple(c.optim.betas), c.objective.options.norm_pix) for c in configs]
    assert found == [((0.9, b), norm) for b in (0.95, 0.99) for norm in (True, False)]
    assert {c.optim.lr for c in configs} == {0.5}
    assert [c.run.name for c in configs] == [run.name for run in runs]
    assert runs[0].name == "debug_mae-betas_0.9_0.95_-norm_pixtrue"
    assert len({c.run_dir for c in configs}) == 4


@given(st.lists(st.sampled_from(["1e-3", "[1,2]", "{a: 1, b: [2,3]}", "'x,y'", '"(,"', "true"]), min_size=1))
def test_values_are_cut_at_commas_outside_brackets_and_quotes(values: list[str]) -> None:
    assert list(launcher.split_values(",".join(values))) == values
    assert list(launcher.split_values(" , ".join(values))) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep=optim.lr",), "--sweep 'optim.lr': write key=v1,v2"),
        (("--sweep=optim.lr=1,,2",), "write key=v1,v2"),
        (("--sweep=optim.lr=1e-3,-1",), "lr must be positive"),
        (("--sweep=optim.lerning=1",), "optim.lerning"),
        (("--sweep=run.seed=1,1",), "several runs would be named debug_mae-seed1"),
        (("--gpus-per-node=8", "--tasks-per-node=1"), "there is one task for each GPU"),
        (("--gpus-per-node=8", "optim.lr=x"), "optim.lr"),
        (("--sweep=run.seed=0,1", "--sweep=run.seed=2,3"), "run.seed comes twice"),
        (("--nodes=4", "--gpus-per-node=8"), "data.n_lanes = 8 must be a multiple of the world size 32"),
        (("--slurm=mem=0\nrm x",), "would be several lines of the batch script"),
        (("--partition=a\n#SBATCH --exclusive",), "would be several lines of the batch script"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert launcher.main(["--dry-run", "--config", "debug/mae", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_no_slurm_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--config", "debug/mae"]) == 1
    captured = capsys.readouterr()
    assert "srun" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_help_needs_no_extra() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--sweep" in done.stdout
