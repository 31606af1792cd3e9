"""What a run needs of a machine and of this installation: is it there, and what to do where it is not."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import ssl_eo
from ssl_eo.cluster import read_launch
from ssl_eo.components import one_line
from ssl_eo.installation import ALWAYS, Requirement, commit, import_faults, requirements
from ssl_eo.resources import resource_dir
from ssl_eo.two_ranks import add_on_two_ranks

if TYPE_CHECKING:
    from ssl_eo.config import Config
    from ssl_eo.data.opening import SourceConfig

__all__ = ["Finding", "examine", "examine_models", "is_well", "print_findings"]

_GB = 1e9
_LEAST_DISK, _ENOUGH_DISK = 1 * _GB, 20 * _GB  # checkpoints are written beside each other
_LEAST_SHARED, _ENOUGH_SHARED = 0.032 * _GB, 1 * _GB  # batches go through it from the processes that read
_LEAST_FILES, _ENOUGH_FILES = 256, 4096  # each reading process keeps its shards open
_SHOWN = 10  # packages of an extra
_FOR_GPUS = "cuda"  # an extra
_FOR_TESTS = "dev"  # another
_FIRST_GPU = "cuda:0"  # a topic
_NVIDIA = Path("/dev/nvidiactl")
_SHARED = Path("/dev/shm")


Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `wrong`: runs will fail; `note`: they need not, and `advice` says what helps."""

    topic: str
    status: Status
    found: str
    advice: str = ""


def examine(paths: Sequence[str], limit_s: float) -> list[Finding]:
    """Look at this machine, at this installation, and at `paths`: configs (by file or name) and folders of data.

    Two processes that meet have `limit_s` for it, and as long has one that imports the packages; with 0 none is
    started. Nothing is written but what they leave in temporary files while they run, and nothing is fetched.
    """
    of_torch = list(_torch())
    has_gpu = any(finding.topic == _FIRST_GPU for finding in of_torch)
    findings = [
        *_software(),
        *_packages(has_gpu, limit_s if of_torch[0].status == "ok" else 0),  # many of them import torch
        *of_torch,
        *_storage(Path("runs"), "the folder of runs"),
        *_temporary("export TMPDIR=..., a folder with more"),
        *_shared_memory(),
        *_open_files(),
        *_launcher(os.environ),
        *_variables(os.environ),
    ]
    if of_torch[0].status == "wrong":  # the rest needs it
        return findings
    return [*findings, *(found for path in paths for found in _path(path)), *(_collectives(limit_s) if limit_s else ())]


def examine_models(names: Sequence[str]) -> Iterator[Finding]:
    """Compute the reference outputs of published architectures, one after the other; of all of them without `names`.

    No weights are needed, and memory for those of the largest one. Raises `ValueError` for a name that is not known.
    """
    from ssl_eo.weights._reference import compare, reference_names, reference_of

    for name in names:
        reference_of(name)
    for name in names or reference_names():
        found = compare(name)
        said = f"{found.output} is {found.worst:.1e} away from the reference at most, allowed are {found.tolerance:g}"
        advice = "this machine computes something else: try another build of torch"
        yield Finding(name, "ok", said) if found.is_same else Finding(name, "wrong", said, advice)


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether all is there that is needed."""
    return all(finding.status != "wrong" for finding in findings)


def print_findings(findings: Sequence[Finding], stream: TextIO) -> None:
    """Print them as a table, and how many are wrong."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what runs need", title_justify="left")
    for column in ("", "what", "found, and what helps"):  # in two columns there is no room for either in a terminal
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", "bold")
        table.add_row(Text(finding.status, styles[finding.status]), Text(finding.topic), text)
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    console.print(table)
    n = sum(finding.status == "wrong" for finding in findings)
    console.print("all that is needed is there" if n == 0 else f"{n} of {len(findings)} are wrong")


def _software() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("platform", "ok", f"{platform.platform()}; CPUs for this process: {cpus}")
    found = commit()
    yield Finding("ssl_eo", "ok", f"{ssl_eo.__version__}, {f'commit {found}' if found else 'not a git checkout'}")


def _packages(has_gpu: bool, limit_s: float) -> Iterator[Finding]:
    """What is needed always, and each extra; that for GPUs where torch has one. With time they are imported too."""
    try:
        needed = requirements()
    except ValueError as error:
        yield Finding("packages", "wrong", str(error), "python -m pip install ssl_eo, or -e and the checkout")
        return
    faults = import_faults(_modules(needed, has_gpu), limit_s) if limit_s else {}
    for extra, wanted in needed.items():
        versions = {need: need.installed() for need in wanted}
        absent = [str(need) for need, version in versions.items() if version is None]
        other = [f"{need.name} {v}, not {need}" for need, v in versions.items() if v and not need.allows(v)]
        broken = [need for need in wanted if need.module in faults]
        topic, named = ("packages", "ssl_eo") if extra == ALWAYS else (f"extra {extra}", f"'ssl_eo[{extra}]'")
        status: Status = "wrong" if extra == ALWAYS else "note"
        if (absent or other) and extra == _FOR_GPUS and not has_gpu:
            yield Finding(topic, "ok", "not needed: torch uses no GPU here")
        elif absent or other:
            lacking = [*other, *([f"without {_listed(absent)}"] if absent else [])]
            yield Finding(topic, status, _listed(lacking), f"python -m pip install {named}")
        elif broken:
            said = _listed(f"{need.name} cannot be imported: {faults[need.module]}" for need in broken)
            anew = " ".join(need.name for need in broken)
            yield Finding(topic, status, said, f"python -m pip install --force-reinstall {anew}")
        else:
            yield Finding(topic, "ok", _first(_SHOWN, [f"{need.name} {v}" for need, v in versions.items()]))


def _modules(needed: Mapping[str, Sequence[Requirement]], has_gpu: bool) -> list[str]:
    """What is imported of the installed packages, each once; torch has been, and tests import theirs themselves."""
    left_out = {_FOR_TESTS} if has_gpu else {_FOR_TESTS, _FOR_GPUS}
    wanted = {need: None for extra, needs in needed.items() if extra not in left_out for need in needs}
    return [need.module for need in wanted if need.name != "torch" and need.installed() is not None]


def _torch() -> Iterator[Finding]:
    """What torch can compute on. It may not be installed as it should: that is said of the packages."""
    try:
        import torch
    except Exception as error:  # of any kind: what a broken build does is not known
        yield Finding("torch", "wrong", f"cannot be imported: {one_line(error)}", "install it anew, see pytorch.org")
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {build}; threads: {torch.get_num_threads()}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus == 0:
        yield _no_gpu(torch.version.cuda is not None, [" ".join(str(w.message).split()) for w in caught])
        yield Finding(
            "bfloat16", "ok", f"on CPUs ({torch.backends.cpu.get_cpu_capability()}), where float32 may be faster"
        )
        yield Finding("NCCL", "ok", "not needed without GPUs: ranks on CPUs meet over gloo")
        return
    for i in range(n_gpus):
        facts = torch.cuda.get_device_properties(i)
        name = f"{facts.name}, {facts.total_memory / _GB:.0f} GB, capability {facts.major}.{facts.minor}"
        yield Finding(f"cuda:{i}", "ok", name)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "ok", "in hardware")
    else:
        yield Finding("bfloat16", "note", "not in hardware of this GPU", "train.precision=float32")
    yield from _nccl(n_gpus)


def _no_gpu(is_cuda_build: bool, warned: Sequence[str]) -> Finding:
    if not _NVIDIA.exists():
        return Finding("CUDA", "ok", "no GPU: on CPUs")
    if not is_cuda_build:
        advice = "install a build of torch for CUDA, see pytorch.org"
        return Finding("CUDA", "wrong", "there is a GPU, and torch is built without CUDA", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Finding("CUDA", "note", "CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    advice = "run nvidia-smi; the driver must be as new as the CUDA that torch is built for"
    return Finding(
        "CUDA", "wrong", f"there is a GPU that torch cannot use: {_listed(warned) or 'no reason given'}", advice
    )


def _nccl(n_gpus: int) -> Iterator[Finding]:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield Finding("NCCL", "ok", version)
    else:
        status: Status = "wrong" if n_gpus > 1 else "note"
        yield Finding(
            "NCCL", status, "this torch has none: no runs on several GPUs", "install a build of torch with it"
        )


def _storage(folder: Path, what: str) -> Iterator[Finding]:
    yield from _disk(f"{what} ({folder})", folder, "set run.out_dir to a folder with more")


def _temporary(advice: str) -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        yield Finding("TMPDIR", "wrong", one_line(error), advice)
    else:
        yield from _disk("TMPDIR", Path(folder), advice)


def _disk(topic: str, folder: Path, advice: str) -> Iterator[Finding]:
    """Free bytes where `folder` is or would be, and whether files can be written there."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(topic, "wrong", f"{there} is no folder that this user may write to", advice)
        return
    free = shutil.disk_usage(there).free
    yield Finding(topic, *_enough(free, _LEAST_DISK, _ENOUGH_DISK, f"{free / _GB:,.1f} GB free", advice))


def _shared_memory() -> Iterator[Finding]:
    if not _SHARED.is_dir():
        yield Finding("shared memory", "ok", f"there is no {_SHARED} on this platform")
        return
    free = shutil.disk_usage(_SHARED).free
    advice = "in a container --shm-size=8g or --ipc=host; or data.n_workers=0"
    found = f"{free / _GB:,.2f} GB free in {_SHARED}"
    yield Finding("shared memory", *_enough(free, _LEAST_SHARED, _ENOUGH_SHARED, found, advice))


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    limit = float("inf") if soft == resource.RLIM_INFINITY else soft
    found = f"{'unlimited' if limit == float('inf') else soft}; this user may raise it to {most}"
    yield Finding("open files", *_enough(limit, _LEAST_FILES, _ENOUGH_FILES, found, f"ulimit -n {most}"))


def _enough(value: float, least: float, plenty: float, found: str, advice: str) -> tuple[Status, str, str]:
    if value >= plenty:
        return "ok", found, ""
    return ("note" if value >= least else "wrong"), found, advice


def _launcher(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        launch = read_launch(environ)
    except (ValueError, RuntimeError) as error:
        yield Finding("launcher", "wrong", str(error), "start by torchrun or srun, or from a fresh shell")
        return
    if launch.launcher == "none":
        yield Finding("launcher", "ok", "none: a single process" + (f", in job {launch.job}" if launch.job else ""))
    else:
        where = f", meeting at {launch.address}:{launch.port}" if launch.address else ""
        yield Finding("launcher", "ok", f"{launch.launcher}, rank {launch.rank} of {launch.size}{where}")


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Folders that shipped configs take from the environment."""
    users: dict[str, list[str]] = {}
    for kind in ("configs", "datasets_meta"):
        root = resource_dir(kind)
        for path in sorted(root.rglob("*.yaml")):
            text = "\n".join(line.partition(" #")[0] for line in path.read_text(encoding="utf-8").splitlines())
            for name in dict.fromkeys(re.findall(r"\$\{oc\.env:(\w+)\}", text)):
                users.setdefault(name, []).append(path.relative_to(root).with_suffix("").as_posix())
    for name, configs in sorted(users.items()):
        if value := environ.get(name):
            yield _readable(name, value, f"export {name}=... with a folder that is there, or unset it")
        else:
            yield Finding(name, "note", "not set", f"needed by {_first(2, configs)} alone: export {name}=...")


def _path(text: str) -> Iterator[Finding]:
    """A folder of data, or all that a config names."""
    from ssl_eo.config import find_config, load, read_yaml

    if Path(text).exists() and Path(text).suffix not in (".yaml", ".yml"):
        yield _readable("data", text, "give a path that can be read")
        return
    try:
        if "encoders" in read_yaml(find_config(text), []):
            yield Finding(text, "note", "of a study, not of a run", "ssl-eo study checks it before it trains anything")
            return
        config = load(text)
    except (ValueError, OSError) as error:
        yield Finding(text, "wrong", one_line(error), "give data that is there, or a config that loads")
        return
    yield Finding(text, "ok", f"{config.objective.name} on {_listed(source.name for source in config.data.sources)}")
    yield from _storage(Path(config.run.out_dir), f"run.out_dir of {text}")
    for where, value in _named(config):
        yield _readable(f"{where} of {text}", value, f"set {where} to what is there")


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of each path of a config that must be there to read from."""
    sources: dict[str, SourceConfig | None] = {
        f"data.sources[{i}].root": source for i, source in enumerate(config.data.sources)
    }
    for task in config.eval.tasks:
        splits = {"train": task.train, "val": task.val, "test": task.test}
        sources |= {f"eval.tasks ({task.name}).{split}.root": source for split, source in splits.items()}
    for key, source in sources.items():
        if isinstance(root := getattr(source and source.options, "root", None), str):
            yield key, root
    for i, weights in enumerate(config.init):
        yield f"init[{i}].path", weights.path


def _readable(topic: str, value: str, advice: str) -> Finding:
    path = Path(value)
    if "://" in value:
        return Finding(topic, "ok", f"{value} (far away: not looked at)")
    if not path.exists():
        return Finding(topic, "wrong", f"{value} is not there", advice)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return Finding(topic, "wrong", f"{value} cannot be read by this user", advice)
    return Finding(topic, "ok", value)


def _collectives(limit_s: float) -> Iterator[Finding]:
    """Two ranks on CPUs, and on GPUs where there are two."""
    import torch

    kinds = {"two ranks, gloo": False, **({"two ranks, nccl": True} if torch.cuda.device_count() > 1 else {})}
    for topic, on_gpus in kinds.items():
        wrong = add_on_two_ranks(on_gpus, limit_s)
        if wrong is None:
            yield Finding(topic, "ok", "met and added two numbers")
        else:
            names = "NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO" if on_gpus else "GLOO_SOCKET_IFNAME"
            advice = f"see that localhost resolves and no firewall is between; {names}"
            yield Finding(topic, "wrong", wrong, advice)


def _first(n: int, texts: Sequence[str]) -> str:
    """The first `n` of them, and how many others there are."""
    n_others = len(texts) - n
    others = f" and {n_others} other{'s' if n_others > 1 else ''}" if n_others > 0 else ""
    return _listed(texts[:n]) + others


def _listed(texts: Iterator[str] | Sequence[str]) -> str:
    return ", ".join(texts)
