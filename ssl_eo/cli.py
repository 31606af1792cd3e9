"""The command line: `ssl-eo train | eval | export | import | data | report | config`.

Exit status: 0 done, 2 wrong usage or config, 1 failure, 75 stopped on request and resumable. Everything heavy is
imported inside its command.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from ssl_eo import __version__
from ssl_eo.cluster import EXIT_FAILURE, EXIT_RESUMABLE, STOP_SIGNALS, StoppedEarlyError, finish, signals_stop_early
from ssl_eo.components import MissingExtraError

__all__ = ["entry", "leave", "main"]

EXIT_USAGE = 2
_FIRST_RANK_TELLS_WITHIN_S = 2.0
PROGRESS_EVERY_S = 30.0  # where there is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        status: int = arguments.run(arguments)
    except (ValueError, MissingExtraError) as error:
        return _fail(str(error), EXIT_USAGE, error)
    except (RuntimeError, OSError) as error:
        if os.environ.get("SSL_EO_TRACEBACK"):
            raise
        return _fail(f"{error} (set SSL_EO_TRACEBACK=1 for the traceback)", EXIT_FAILURE, error)
    except StoppedEarlyError:
        return _fail("stopped on request before training began; the same command goes on", EXIT_RESUMABLE)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return status


def entry() -> NoReturn:
    """`main` as a process of its own."""
    leave(main())


def leave(status: int) -> NoReturn:
    """End this process, whose command ended with `status`, with what its launcher is to see."""
    if status == EXIT_RESUMABLE:
        for name in STOP_SIGNALS:  # a scheduler may ask again, and what it asks for is being done
            signal.signal(name, signal.SIG_IGN)
    status = finish(status, os.environ)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # An error on this rank alone: at exit, gloo would wait for collectives that the other ranks never join.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fail(message: str, status: int, error: Exception | None = None) -> int:
    if error is not None and _is_told_elsewhere(error):
        time.sleep(_FIRST_RANK_TELLS_WITHIN_S)  # torchrun ends the first rank as soon as another has ended
    else:
        print(f"ssl-eo: {message}", file=sys.stderr, flush=True)
    return status


def _is_told_elsewhere(error: Exception) -> bool:
    """Whether all ranks have this error, and another one says so."""
    distributed = sys.modules.get("ssl_eo.distributed")
    return distributed is not None and distributed.told_by(error) not in (None, distributed.rank())


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, as every other error; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"ssl-eo: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ssl-eo", description="Self-supervised pretraining for Earth observation.")
    parser.add_argument("--version", action="version", version=f"ssl_eo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="pretrain; the same command resumes")
    _add_config(train)
    train.set_defaults(run=_train)

    config = commands.add_parser("config", help="print the resolved config, or with --plan what it would cost")
    _add_config(config)
    config.add_argument("--plan", action="store_true", help="print parameters, FLOP and memory of a rank instead")
    config.add_argument("--ranks", type=int, default=None, help="with --plan: processes of the run; default 1")
    config.add_argument("--device", choices=["cpu", "cuda"], default=None, help="with --plan; default: as here")
    config.set_defaults(run=_config)

    export = commands.add_parser("export", help="write the encoder of a checkpoint as a bundle")
    export.add_argument(
        "--checkpoint", required=True, help="a run directory, or one step_ directory of it; with --as a bundle too"
    )
    _add_released(export, "write a .pth or .safetensors file that the published code of this encoder loads", False)
    export.add_argument("--whole", action="store_true", help="both encoders of croma, and what joins them")
    export.add_argument("--out", required=True, help="the bundle folder to write; with --as the file")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=_export)

    imported = commands.add_parser("import", help="write a bundle from a file of published weights")
    imported.add_argument("file", metavar="FILE", help="weights in the layout of their authors")
    _add_released(imported, "which encoder it is", True)
    imported.add_argument("--prefix", default=None, help="which encoder of a file with several: student.backbone")
    imported.add_argument("--out", required=True, help="the bundle folder to write")
    imported.add_argument("--overwrite", action="store_true", help="replace the bundle that is there")
    imported.set_defaults(run=_import)

    evaluate = commands.add_parser("eval", help="probe a frozen encoder")
    evaluate.add_argument("--model", required=True, help="a run directory or a bundle folder")
    evaluate.add_argument("--tasks", nargs="+", required=True, help="names in datasets_meta/benchmarks, or YAML files")
    evaluate.add_argument("--pool", default=None, help="cls, mean, cls_mean or mean_std; default: as in training")
    evaluate.add_argument("--taps", nargs="+", type=float, default=None, help="depths that are read; 1 is the last")
    evaluate.add_argument("--out", required=True, help="folder for eval.jsonl")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="write report.html of run directories")
    report.add_argument("paths", nargs="+", metavar="RUN")
    report.set_defaults(run=_report)

    data = commands.add_parser("data", help="pack, index, measure and check data")
    _add_data_commands(data)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file, or a name below configs/ such as 'demo'")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optim.lr=0.001")


def _add_released(parser: argparse.ArgumentParser, what: str, required: bool) -> None:
    names = "panopticon_vitb14, dinov2_vits14, dinov2_vitb14_reg, ..."
    parser.add_argument("--as", dest="released", metavar="NAME", required=required, help=f"{what}: {names}")


def _add_data_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    pack = actions.add_parser("pack", help="write a source as indexed shards; resumable")
    pack.add_argument("--out", required=True, help="folder for the shards")
    pack.add_argument("--split", default=None, help="subfolder of --out, for instance train")
    pack.add_argument(
        "--codec",
        action="append",
        metavar="[TILE=]CODEC",
        help="raw (default) or blosc (lossless, needs an extra), of all tiles; or TILE=CODEC, which may be repeated",
    )
    pack.add_argument("--keep-constant-bands", action="store_true", help="write them out, for readers other than ours")
    pack.add_argument("--shard-size-mb", type=float, default=512)
    pack.add_argument("--max-bad-ratio", type=float, default=0.01, help="share of bad samples above which it stops")
    pack.set_defaults(run=_data_pack)
    stats = actions.add_parser("stats", help="per-band statistics of a source or of packed shards")
    stats.set_defaults(run=_data_stats)
    index = actions.add_parser(
        "index",
        help="write an index beside each tar",
        description="Write NAME.index.npz beside each NAME.tar of a folder, where the members of the tar are: for the"
        " indexes that a packed dataset has lost, or to read the tars of another tool by ssl_eo.data.shards.",
    )
    index.set_defaults(run=_data_index)
    check = actions.add_parser(
        "check",
        help="verify every byte of a packed dataset",
        description="Read every byte of what 'data pack' wrote and compare it with index and manifest.",
    )
    check.set_defaults(run=_data_check)
    for action in (pack, stats):
        action.add_argument("--source", required=True, help="a module of ssl_eo.data.sources, or a dotted name")
        action.add_argument("--root", default=None, help="where the source's files are")
        action.add_argument("options", nargs="*", metavar="key=value", help="other options of the source")
    for action in (index, check):
        action.add_argument("--root", required=True, help="folder of the shards")
    for action in (pack, stats, index, check):
        action.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 works in this one")


def _train(arguments: argparse.Namespace) -> int:
    # How often libgomp's threads look for work before they sleep. Its own choice is fastest on idle cores, by a tenth,
    # and several times slower where other work shares them. It is read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with signals_stop_early():
        from ssl_eo.config import load
        from ssl_eo.train.trainer import train

        return train(load(arguments.config, arguments.overrides))


def _config(arguments: argparse.Namespace) -> int:
    from ssl_eo.config import load, to_yaml

    config = load(arguments.config, arguments.overrides)
    chosen = {key: value for key in ("ranks", "device") if (value := getattr(arguments, key)) is not None}
    if arguments.plan:
        from ssl_eo.train.plan import plan
        from ssl_eo.train.plan_table import print_plan

        print_plan(plan(config, **chosen), config, sys.stdout)
        return 0
    if chosen:
        raise ValueError(f"--{next(iter(chosen))} is for --plan: add that, or leave it out")
    print(to_yaml(config), end="")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ssl_eo.train.export import export_encoder, export_pair, open_encoder, open_pair
    from ssl_eo.weights import croma

    checkpoint, out = Path(arguments.checkpoint), Path(arguments.out)
    if arguments.released is None:
        step = (export_pair if arguments.whole else export_encoder)(checkpoint, out, arguments.overwrite)
    elif arguments.released in croma.PAIRS:
        pair, step, inputs = open_pair(checkpoint)
        croma.export_pair(pair, arguments.released, inputs, out, arguments.overwrite)
    else:
        from ssl_eo.weights.base import export_released

        encoder, step, _ = open_encoder(checkpoint)
        export_released(encoder, arguments.released, out, arguments.overwrite)
    print(f"wrote {out} (encoder after step {step})")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from ssl_eo.weights import croma
    from ssl_eo.weights.base import import_released

    file, name, out = Path(arguments.file), arguments.released, Path(arguments.out)
    if name in croma.PAIRS:
        if arguments.prefix is not None:
            raise ValueError(f"--prefix {arguments.prefix}: a file of {name} holds one model")
        pair = croma.import_pair(file, name, out, arguments.overwrite)
        print(f"wrote {out} ({pair.name}; its weights are under {pair.licence}, see {pair.source})")
        return 0
    released = import_released(file, name, out, arguments.prefix, arguments.overwrite)
    print(f"wrote {arguments.out} ({released.name}; its weights are under {released.licence}, see {released.source})")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ssl_eo.eval.report import write_report

    for path in arguments.paths:
        print(write_report(Path(path)))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from ssl_eo.config import build
    from ssl_eo.eval.hook import EvalConfig
    from ssl_eo.eval.offline import evaluate, print_summary
    from ssl_eo.train.export import open_encoder

    encoder, step, defaults = open_encoder(Path(arguments.model))
    chosen = {k: v for k, v in (("pool", arguments.pool), ("taps", arguments.taps)) if v is not None}
    cfg = build(EvalConfig, {**defaults, **chosen, "every_n_steps": 1, "tasks": arguments.tasks}, "eval")
    out = Path(arguments.out)
    evaluate(encoder, step, cfg, out)
    return 0 if print_summary(out / "eval.jsonl", sys.stdout) else EXIT_FAILURE


def _data_pack(arguments: argparse.Namespace) -> int:
    from ssl_eo.config import bound_values
    from ssl_eo.data.opening import open_source
    from ssl_eo.data.pack import pack

    cfg = _source_config(arguments)
    source = open_source(cfg)
    with _progress("packing") as progress:
        report = pack(
            source,
            arguments.out,
            split=arguments.split,
            codec=_codec(arguments.codec),
            shard_size_mb=arguments.shard_size_mb,
            keep_constant_bands=arguments.keep_constant_bands,
            source_options=dict(bound_values(cfg.options)),
            max_bad_ratio=arguments.max_bad_ratio,
            n_workers=arguments.workers,
            progress=progress,
        )
    print(
        f"{report.folder}: {report.n_samples} samples in {report.n_shards} shards, {report.n_bytes / 1e6:.1f} MB"
        f" ({report.n_shards_kept} shards kept from an earlier run, {report.n_bad} bad samples left out)"
    )
    return 0


def _data_stats(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ssl_eo.data.opening import open_source
    from ssl_eo.data.pack import stats

    source = open_source(_source_config(arguments))
    with _progress("measuring") as progress:
        report = stats(source, n_workers=arguments.workers, progress=progress)
    table = Table(title=f"{report.n_samples} samples ({report.n_bad} bad left out), stored units")
    for column in ("tile", "band", "valid pixels", "mean", "std", "min", "max"):
        table.add_column(column, justify="left" if column in ("tile", "band") else "right", overflow="fold")
    for tile, band, count, *values in report.rows():
        table.add_row(tile, band, f"{count:,}", *(f"{v:.6g}" for v in values))
    Console().print(table)
    return 0


def _data_index(arguments: argparse.Namespace) -> int:
    from ssl_eo.data.pack import index

    with _progress("indexing") as progress:
        report = index(arguments.root, n_workers=arguments.workers, progress=progress)
    print(f"{arguments.root}: indexed {report.n_samples} samples in {report.n_shards} shards")
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from ssl_eo.data.pack_check import check

    with _progress("checking") as progress:
        report = check(arguments.root, n_workers=arguments.workers, progress=progress)
    for p in report.problems:
        where = f"{p.shard}: {p.member or 'the shard'}, byte {p.offset}"
        print(f"{where}: {p.reason}", file=sys.stderr)
    if not report.ok:
        return _fail(f"{len(report.problems)} problems; fetch or pack the shards named above again", EXIT_FAILURE)
    print(f"{arguments.root}: {report.n_samples} samples in {report.n_shards} shards are whole")
    return 0


def _source_config(arguments: argparse.Namespace) -> Any:
    from ssl_eo.config import build, read_overrides
    from ssl_eo.data.opening import SourceConfig

    options = read_overrides(arguments.options)
    root = {} if arguments.root is None else {"root": arguments.root}
    return build(SourceConfig, {"name": arguments.source, **root, **options}, "--source")


def _codec(chosen: list[str] | None) -> str | dict[str, str]:
    """The codec of all tiles, or codecs by tile name."""
    named = dict(entry.split("=", 1) for entry in chosen or () if "=" in entry)
    plain = [entry for entry in chosen or () if "=" not in entry]
    if len(plain) > 1 or (plain and named) or len(plain) + len(named) < len(chosen or ()):
        raise ValueError(
            f"--codec is one codec for all tiles, or TILE=CODEC for some, once each, got {' '.join(chosen or ())}"
        )
    return named or (plain[0] if plain else "raw")


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """How far it is and the time left: a bar on a terminal, elsewhere a line now and then."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(title)
        return
    with Progress(console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _progress_lines(title: str) -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            print(f"{title}: {done:,} of {total:,}, {left} left", file=sys.stderr, flush=True)

    return show
