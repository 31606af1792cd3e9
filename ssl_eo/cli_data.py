"""The commands `ssl-eo data pack | stats | index | check`. Everything heavy is imported inside its command."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ssl_eo.cluster import EXIT_FAILURE
from ssl_eo.progress import progress

__all__ = ["add_commands"]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add `pack`, `stats`, `index` and `check` to the parser of `ssl-eo data`."""
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
    pack.set_defaults(run=_pack)
    stats = actions.add_parser("stats", help="per-band statistics of a source or of packed shards")
    stats.set_defaults(run=_stats)
    index = actions.add_parser(
        "index",
        help="write an index beside each tar",
        description="Write NAME.index.npz beside each NAME.tar of a folder, where the members of the tar are: for the"
        " indexes that a packed dataset has lost, or to read the tars of another tool by ssl_eo.data.shards.",
    )
    index.set_defaults(run=_index)
    check = actions.add_parser(
        "check",
        help="verify every byte of a packed dataset",
        description="Read every byte of what 'data pack' wrote and compare it with index and manifest.",
    )
    check.set_defaults(run=_check)
    for action in (pack, stats):
        action.add_argument("--source", required=True, help="a module of ssl_eo.data.sources, or a dotted name")
        action.add_argument("--root", default=None, help="where the source's files are")
        action.add_argument("options", nargs="*", metavar="key=value", help="other options of the source")
    for action in (index, check):
        action.add_argument("--root", required=True, help="folder of the shards")
    for action in (pack, stats, index, check):
        action.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 works in this one")


def _pack(arguments: argparse.Namespace) -> int:
    from ssl_eo.config import bound_values
    from ssl_eo.data.opening import open_source
    from ssl_eo.data.pack import pack

    cfg = _source_config(arguments)
    source = open_source(cfg)
    with progress("packing") as tell:
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
            progress=tell,
        )
    print(
        f"{report.folder}: {report.n_samples} samples in {report.n_shards} shards, {report.n_bytes / 1e6:.1f} MB"
        f" ({report.n_shards_kept} shards kept from an earlier run, {report.n_bad} bad samples left out)"
    )
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ssl_eo.data.opening import open_source
    from ssl_eo.data.pack import stats

    source = open_source(_source_config(arguments))
    with progress("measuring") as tell:
        report = stats(source, n_workers=arguments.workers, progress=tell)
    table = Table(title=f"{report.n_samples} samples ({report.n_bad} bad left out), stored units")
    for column in ("tile", "band", "valid pixels", "mean", "std", "min", "max"):
        table.add_column(column, justify="left" if column in ("tile", "band") else "right", overflow="fold")
    for tile, band, count, *values in report.rows():
        table.add_row(tile, band, f"{count:,}", *(f"{v:.6g}" for v in values))
    Console().print(table)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from ssl_eo.data.pack import index

    with progress("indexing") as tell:
        report = index(arguments.root, n_workers=arguments.workers, progress=tell)
    print(f"{arguments.root}: indexed {report.n_samples} samples in {report.n_shards} shards")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from ssl_eo.data.pack_check import check

    with progress("checking") as tell:
        report = check(arguments.root, n_workers=arguments.workers, progress=tell)
    for p in report.problems:
        where = f"{p.shard}: {p.member or 'the shard'}, byte {p.offset}"
        print(f"{where}: {p.reason}", file=sys.stderr)
    if not report.ok:
        problems = f"{len(report.problems)} problems; fetch or pack the shards named above again"
        print(f"ssl-eo: {problems}", file=sys.stderr)
        return EXIT_FAILURE
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
