"""The command `ssl-eo doctor`: what it finds, what it advises, how it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssl_eo
from ssl_eo import doctor, installation, two_ranks
from ssl_eo.cli import main
from ssl_eo.components import MissingExtraError, import_extra
from ssl_eo.doctor import Finding, examine, is_well
from ssl_eo.installation import ALWAYS, Requirement, requirements

ROOT = Path(__file__).parent.parent
GB = 10**9


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def found(*paths: str, limit_s: float = 0) -> dict[str, Finding]:
    """What is found, by topic; two processes are not started unless they have time."""
    findings = examine(paths, limit_s)
    by_topic = {finding.topic: finding for finding in findings}
    assert len(by_topic) == len(findings)
    return by_topic


def test_a_machine_that_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, two processes included."""
    assert main(["doctor", "debug/mae", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    findings = {entry["topic"]: entry for entry in said["findings"]}
    assert said["ok"] is True
    assert findings["two ranks, gloo"]["found"] == "met and added two numbers"
    assert findings["ssl_eo"]["found"].startswith(ssl_eo.__version__)
    assert findings["torch"]["found"].startswith(torch.__version__)
    expected = {
        *("python", "platform", "ssl_eo", "packages", "torch", "bfloat16", "NCCL", "TMPDIR", "shared memory"),
        *("open files", "launcher", "SSL_EO_SAMPLES", "SSL_EO_DATA", "debug/mae", "the folder of runs (runs)"),
    }
    assert expected <= findings.keys()
    assert all(set(entry) == {"topic", "status", "found", "advice"} for entry in said["findings"])
    assert all(entry["advice"] for entry in said["findings"] if entry["status"] != "ok")


def test_what_is_wrong_is_in_the_table_and_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--limit-s", "0"]) == 0
    said = capsys.readouterr().out
    assert "all that is needed is there" in said
    assert "two ranks" not in said
    assert main(["doctor", "debug/mea", "--limit-s", "0"]) == 1
    said = capsys.readouterr().out
    assert "wrong" in said
    assert "1 of " in said
    assert main(["doctor", "--limit-s", "-1"]) == 2
    assert "--limit-s must be seconds" in capsys.readouterr().err


def test_without_torch_the_rest_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "ssl_eo", "doctor", "--json", "debug/mae"]
    for kind in ("ImportError", "RuntimeError"):
        (tmp_path / "torch.py").write_text(f"raise {kind}('libtorch.so: no such file')")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        said = json.loads(done.stdout)
        wrong = [entry for entry in said["findings"] if entry["status"] == "wrong"]
        assert [entry["topic"] for entry in wrong] == ["torch"]
        assert "libtorch.so" in wrong[0]["found"]
        assert "launcher" in {entry["topic"] for entry in said["findings"]}


def test_without_tables_there_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An installation that lacks what prints tables is one to look at."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding("a", "ok", "b"), Finding("c", "wrong", "d", "e")])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "a: ok, b\nc: wrong, d; e\n"


def test_the_commit_is_that_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed inside another project's checkout is of none."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=a"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "ssl_eo").mkdir()
    (tmp_path / "inside" / "ssl_eo").mkdir(parents=True)
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "ssl_eo" / "installation.py"))
    assert installation.commit() == head
    (tmp_path / "file").write_text("b")
    assert installation.commit() == f"{head}+"
    for other in (tmp_path / "inside" / "ssl_eo", tmp_path / "gone"):
        monkeypatch.setattr(installation, "__file__", str(other / "installation.py"))
        assert installation.commit() is None


# --- packages ---------------------------------------------------------------------------------------------------------


def test_every_extra_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    topics = found()
    for extra, texts in project["optional-dependencies"].items():
        finding = topics[f"extra {extra}"]
        assert finding.status in ("ok", "note")
        assert (finding.status == "ok") == (finding.advice == "")
        own = {need.name for need in requirements()[extra]}
        assert own >= {text.split(">")[0].split("<")[0] for text in texts if not text.startswith("ssl_eo")}
    assert {need.name for need in requirements()["s3"]} == {"fsspec", "aiohttp", "s3fs"}
    assert requirements()[ALWAYS][0].name == "torch"


def test_an_installed_package_knows_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What pip keeps of it, which is in another order and another writing."""

    class About(dict[str, Any]):
        def get_all(self, key: str) -> list[str] | None:
            return self.get(key)

    wanted = ["torch<2.14,>=2.10", 'numcodecs<1,>=0.13; extra == "codec"', 'ssl-eo[codec]; extra == "dev"']
    about = About({"Provides-Extra": ["codec", "dev"], "Requires-Dist": [*wanted, "scipy (>=1.11) ; extra == 'dev'"]})
    monkeypatch.setattr(installation, "_of_checkout", lambda path: None)
    monkeypatch.setattr(installation.metadata, "metadata", lambda name: about)
    codec = Requirement("numcodecs", "<1,>=0.13")
    assert requirements() == {
        ALWAYS: [Requirement("torch", "<2.14,>=2.10")],
        "codec": [codec],
        "dev": [codec, Requirement("scipy", ">=1.11")],
    }

    def missing(name: str) -> About:
        raise installation.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "metadata", missing)
    finding = found()["packages"]
    assert finding.status == "wrong"
    assert "pip install" in finding.advice
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    monkeypatch.undo()
    assert installation._of_checkout(tmp_path / "pyproject.toml") is None


@pytest.mark.parametrize(
    ("bounds", "version", "allowed"),
    [
        (">=2.10,<2.14", "2.10", True),
        (">=2.10,<2.14", "2.9.1", False),
        (">=2.10,<2.14", "2.13.0+cpu", True),
        (">=2.10,<2.14", "2.14.0rc1", False),
        (">=6", "6.0.3", True),
        ("==1.0", "1.0.0", True),
        ("!=1.5, >1, <=2", "1.5", False),
        ("!=1.5, >1, <=2", "2", True),
        ("", "0.1.dev3", True),
    ],
)
def test_versions(bounds: str, version: str, allowed: bool) -> None:
    assert Requirement("x", bounds).allows(version) is allowed


def test_a_bound_of_a_kind_that_is_not_read_is_ours_to_mend() -> None:
    with pytest.raises(AssertionError):
        Requirement("x", "~=1.4").allows("1.4")


@pytest.mark.parametrize(("n", "said"), [(2, "a, b"), (3, "a, b and 1 other"), (5, "a, b and 3 others")])
def test_long_lists_end_in_a_number(n: int, said: str) -> None:
    assert doctor._first(2, "abcde"[:n]) == said


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Requirement("no_such_package", ">=1")
    needed = {ALWAYS: [Requirement("numpy", ">=99")], "geo": [nowhere], "lora": [Requirement("numpy", "<1")]}
    monkeypatch.setattr(doctor, "requirements", lambda: needed)
    topics = found()
    assert topics["packages"].status == "wrong"
    assert topics["packages"].found.endswith("not numpy>=99")
    assert topics["extra geo"] == Finding(
        "extra geo", "note", "without no_such_package>=1", "python -m pip install 'ssl_eo[geo]'"
    )
    assert topics["extra lora"].status == "note"  # nobody needs it who does not use it
    needed[ALWAYS] = [nowhere]
    assert found()["packages"].found == "without no_such_package>=1"


def test_the_extra_for_gpus_is_advised_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {ALWAYS: [], "cuda": [Requirement("no_such_package", ">=1")]}
    monkeypatch.setattr(doctor, "requirements", lambda: needed)
    finding = Finding("extra cuda", "ok", "not needed: torch uses no GPU here")
    on_cpus, gpu = Finding("torch", "ok", "2.10+cpu"), Finding("cuda:0", "ok", "a GPU")
    monkeypatch.setattr(doctor, "_torch", lambda: iter([on_cpus]))
    assert found()["extra cuda"] == finding
    monkeypatch.setattr(doctor, "_torch", lambda: iter([on_cpus, gpu]))
    assert found()["extra cuda"].advice == "python -m pip install 'ssl_eo[cuda]'"
    needed["cuda"] = [Requirement("numpy", ">=1")]
    monkeypatch.setattr(doctor, "_torch", lambda: iter([on_cpus]))
    assert found()["extra cuda"].found.startswith("numpy ")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Some that can be imported, and some that cannot."""
    texts = {
        "mine_loud": "print('loading')",
        "mine_broken": "raise ImportError('libgdal.so:\\n no such file')",
        "mine_fine": "",
        "mine_old": "raise ValueError",
        "mine_fatal": "import os; os._exit(3)",
        "mine_last": "raise ImportError('not looked at')",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return list(texts)


def test_modules_that_cannot_be_imported(modules: list[str]) -> None:
    broken, old = "ImportError: libgdal.so: no such file", "ValueError:"
    assert installation.import_faults(modules, 60) == {
        "mine_broken": broken,
        "mine_old": old,
        "mine_fatal": "it ends the process that imports it, with status 3",
    }
    assert installation.import_faults(["mine_loud", "mine_fine"], 60) == {}
    late = installation.import_faults(["mine_broken"], 1e-3)
    assert late == {"mine_broken": "it takes longer than 0.001 s"}


def test_an_extra_that_is_installed_and_cannot_be_imported(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {ALWAYS: [Requirement("mine-fine", "")], "geo": [Requirement("mine_broken", "")]}
    monkeypatch.setattr(doctor, "requirements", lambda: needed)
    monkeypatch.setattr(installation.metadata, "version", lambda name: "1.0")
    topics = {finding.topic: finding for finding in doctor._packages(has_gpu=False, limit_s=60)}
    assert topics["packages"] == Finding("packages", "ok", "mine-fine 1.0")
    assert topics["extra geo"] == Finding(
        "extra geo",
        "note",
        "mine_broken cannot be imported: ImportError: libgdal.so: no such file",
        "python -m pip install --force-reinstall mine_broken",
    )
    message = (
        "reading needs the package mine_broken, which is installed and cannot be imported (libgdal.so: no such file):"
        " pip install --force-reinstall mine_broken"
    )
    with pytest.raises(MissingExtraError, match=f"^{re.escape(message)}$"):
        import_extra("geo", "mine_broken.io", "reading")
    with pytest.raises(MissingExtraError, match=r"^reading needs .* be imported \(ValueError\)"):
        import_extra("geo", "mine_old", "reading")
    with pytest.raises(MissingExtraError, match=r"^reading needs the package mine_gone: pip install 'ssl_eo\[geo\]'$"):
        import_extra("geo", "mine_gone", "reading")


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(30 * GB, "ok"), (5 * GB, "note"), (GB // 2, "wrong"), (0, "wrong")])
def test_disks(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, free))
    topics = found()
    for topic in ("TMPDIR", "the folder of runs (runs)"):
        assert topics[topic].status == status
        assert f"{free / GB:,.1f} GB free" in topics[topic].found
        assert bool(topics[topic].advice) == (status != "ok")


@pytest.mark.parametrize(("free", "status"), [(2 * GB, "ok"), (64 << 20, "note"), (1 << 20, "wrong")])
def test_shared_memory(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, free))
    monkeypatch.setattr(doctor, "_SHARED", ROOT)
    finding = found()["shared memory"]
    assert finding.status == status
    assert ("--shm-size" in finding.advice) == (status != "ok")
    monkeypatch.setattr(doctor, "_SHARED", ROOT / "none")
    assert found()["shared memory"].status == "ok"


@pytest.mark.parametrize(("soft", "status"), [(100, "wrong"), (1024, "note"), (4096, "ok"), (-1, "ok")])
def test_open_files(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, -1))
    finding = found()["open files"]
    assert finding.status == status
    assert finding.advice == ("" if status == "ok" else "ulimit -n unlimited")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    finding = found()["the folder of runs (runs)"]
    assert (finding.status, finding.advice) == ("wrong", "set run.out_dir to a folder with more")
    assert f"{tmp_path / 'runs'} is no folder" in finding.found


@pytest.mark.parametrize(
    ("is_cuda_build", "visible", "status", "text"),
    [
        (True, None, "wrong", "driver is too old"),
        (True, "", "note", "CUDA_VISIBLE_DEVICES hides"),
        (False, None, "wrong", "built without CUDA"),
    ],
)
def test_a_gpu_that_torch_does_not_use(
    is_cuda_build: bool, visible: str | None, status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_NVIDIA", ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor._no_gpu(is_cuda_build, ["the driver is too old"])
    assert finding.status == status
    assert text in finding.found
    assert finding.advice
    monkeypatch.setattr(doctor, "_NVIDIA", ROOT / "none")
    assert doctor._no_gpu(is_cuda_build, []).status == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_are_named() -> None:
    topics = found()
    assert torch.cuda.get_device_name(0) in topics["cuda:0"].found
    assert topics["NCCL"].status == "ok"


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found()["launcher"].found == "none: a single process"
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    broken = found()["launcher"]
    assert broken.status == "wrong"
    assert "MASTER_ADDR" in broken.found
    monkeypatch.setenv("MASTER_ADDR", "gpu7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert found()["launcher"] == Finding("launcher", "ok", "torchrun, rank 1 of 4, meeting at gpu7:29500")


# --- data -------------------------------------------------------------------------------------------------------------


def test_folders_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", str(tmp_path))
    monkeypatch.setenv("SSL_EO_DATA", str(tmp_path / "gone"))
    monkeypatch.delenv("SSL_EO_WEIGHTS", raising=False)
    topics = found()
    assert topics["SSL_EO_SAMPLES"] == Finding("SSL_EO_SAMPLES", "ok", str(tmp_path))
    assert topics["SSL_EO_DATA"].status == "wrong"
    assert topics["SSL_EO_DATA"].found == f"{tmp_path / 'gone'} is not there"
    assert topics["SSL_EO_WEIGHTS"].status == "note"
    assert "pretrain/" in topics["SSL_EO_WEIGHTS"].advice


def test_what_a_config_names(tmp_path: Path, real_samples: Callable[[str], Path]) -> None:
    """A shipped config on real data: its folders are there, or which key names one that is not."""
    data = real_samples("eurosat_rgb")
    text = "include: debug/mae\ndata:\n  sources:\n  - {{name: eurosat, root: {root}}}\nrun: {{out_dir: {out}}}\n"
    for name, root in (("good", data), ("bad", tmp_path / "gone")):
        (tmp_path / f"{name}.yaml").write_text(text.format(root=root, out=tmp_path / "runs"))
    good, bad = (str(tmp_path / f"{name}.yaml") for name in ("good", "bad"))
    topics = found(good, bad)
    assert topics[good] == Finding(good, "ok", "mae on eurosat")
    assert topics[f"data.sources[0].root of {good}"] == Finding(f"data.sources[0].root of {good}", "ok", str(data))
    wrong = topics[f"data.sources[0].root of {bad}"]
    assert (wrong.status, wrong.found) == ("wrong", f"{tmp_path / 'gone'} is not there")
    assert wrong.advice == "set data.sources[0].root to what is there"
    assert f"run.out_dir of {good} ({tmp_path / 'runs'})" in topics
    assert not (tmp_path / "runs").exists()


def test_weights_and_data_far_away(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "include: debug/mae\ninit: [{path: gone.pth}]\ndata:\n  sources:\n"
        "  - {name: shards, root: 'https://example.org/shards'}\n"
    )
    topics = found(str(path))
    assert topics[f"init[0].path of {path}"].status == "wrong"
    assert topics[f"data.sources[0].root of {path}"].found == "https://example.org/shards (far away: not looked at)"


def test_a_config_of_a_study_is_not_judged_as_one_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", "samples")
    finding = found("eval/land_cover_study")["eval/land_cover_study"]
    assert (finding.status, finding.found) == ("note", "of a study, not of a run")


def test_paths_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.h5").write_bytes(b"")
    (tmp_path / "bad.yaml").write_text("objectiv: 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSL_EO_DATA", raising=False)
    topics = found("bad.yaml", "gone", "pretrain/simclr_vits16_s2")
    assert [topics[key].status for key in ("bad.yaml", "gone", "pretrain/simclr_vits16_s2")] == ["wrong"] * 3
    assert "objectiv" in topics["bad.yaml"].found
    assert "no config file 'gone'" in topics["gone"].found
    assert "needs the environment variable SSL_EO_DATA" in topics["pretrain/simclr_vits16_s2"].found
    assert found("data.h5")["data"] == Finding("data", "ok", "data.h5")


# --- two ranks --------------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_meet_in_time_end() -> None:
    started: list[int] = []
    start = two_ranks._start

    def note(*arguments: Any) -> Any:
        process = start(*arguments)
        started.append(process.pid)
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_ranks, "_start", note)
        assert two_ranks.add_on_two_ranks(on_gpus=False, limit_s=0.05) == "they have not met within 0.05 s"
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ranks_end_with_the_process_that_started_them() -> None:
    """However it ends: a killed one cannot end them itself, and they would wait for its store as long as they may."""
    script = (
        "import os, time; from ssl_eo import two_ranks as t; start = t._start; ranks = []\n"
        "def note(*arguments):\n    ranks.append(start(*arguments)); return ranks[-1]\n"
        "def wait(*_):\n    print(*[rank.pid for rank in ranks], flush=True); time.sleep(600)\n"
        "t._start, t._wait = note, wait\n"
        "t.add_on_two_ranks(on_gpus=False, limit_s=600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    limit = time.monotonic() + 60  # two seconds, and what a busy machine takes to start a Python
    try:
        while any(map(_is_running, pids)):
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        for pid in filter(_is_running, pids):
            os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended without anybody having asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ranks_that_cannot_meet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_card")
    (finding,) = doctor._collectives(60.0)
    assert finding.status == "wrong"
    assert "ended with status 1" in finding.found
    assert "no_such_card" in finding.found
    assert "GLOO_SOCKET_IFNAME" in finding.advice
    assert not is_well([finding])


def test_without_a_temporary_file_ranks_do_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(two_ranks.tempfile, "tempdir", str(tmp_path / "gone"))
    found = two_ranks.add_on_two_ranks(on_gpus=False, limit_s=60)
    assert found == "no temporary file can be made: No such file or directory"
