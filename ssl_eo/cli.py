"""The command line: `ssl-eo train | eval | study | predict | embed | export | import | data | report | config | ...`.

Exit status: 0 done, 2 wrong usage or config, 1 failure, 75 stopped on request and resumable. Everything heavy is
imported inside its command.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ssl_eo import __version__, cli_adapt, cli_data, cli_doctor, cli_embed, cli_eval, cli_report
from ssl_eo.cluster import (
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    STOP_SIGNALS,
    STOPPED_EARLY,
    StoppedEarlyError,
    finish,
    read_launch,
    signals_stop_early,
)
from ssl_eo.components import MissingExtraError

__all__ = ["entry", "leave", "main"]

EXIT_USAGE = 2
_OTHER_TELLS_WITHIN_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on stderr and status 2."""
    with _ended_when_unread():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parsed(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        status: int = arguments.run(arguments)
    except (ValueError, MissingExtraError) as error:
        return _fail(str(error), EXIT_USAGE, _is_told_elsewhere(error))
    except (RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("SSL_EO_TRACEBACK") or (isinstance(error, BrokenPipeError) and _is_unread()):
            raise
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
        message = f"{text}{notes} (set SSL_EO_TRACEBACK=1 for the traceback)"
        return _fail(message, EXIT_FAILURE, _is_told_elsewhere(error))
    except StoppedEarlyError:
        return _fail("stopped on request before training began; the same command goes on", STOPPED_EARLY)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return status


def entry() -> NoReturn:
    """`main` as a process of its own."""
    try:
        status = main()
    except SystemExit as stop:  # of wrong usage and of --help
        status = stop.code if isinstance(stop.code, int) else EXIT_USAGE
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process, whose command ended with `status`, with what its launcher is to see."""
    if status in (EXIT_RESUMABLE, STOPPED_EARLY):
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


@contextlib.contextmanager
def _ended_when_unread() -> Iterator[None]:
    """End where nobody reads what is printed any more (`| head`): without a word, with the status of SIGPIPE."""
    try:
        try:
            yield
        except SystemExit:  # of --help and --list-tasks
            print(end="", flush=True)
            raise
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread():
            raise
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())  # Python writes what is left when it ends
        raise SystemExit(128 + signal.SIGPIPE) from None


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False  # no file
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(message: str, status: int, is_told_elsewhere: bool = False) -> int:
    if is_told_elsewhere:
        time.sleep(_OTHER_TELLS_WITHIN_S)  # torchrun ends the first rank as soon as another has ended
    else:
        print(f"ssl-eo: {message}", file=sys.stderr, flush=True)
    return status


def _is_told_elsewhere(error: Exception) -> bool:
    """Whether all ranks have this error, and another one says so."""
    distributed = sys.modules.get("ssl_eo.distributed")
    return distributed is not None and distributed.told_by(error) not in (None, distributed.rank())


class _Once(argparse.Action):
    """Stores what is given, once: of an option that is there twice, the first value would be lost in silence."""

    _is_given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if self._is_given and option is not None:
            how = "once" if self.nargs is None else "once, with all values behind it"
            raise argparse.ArgumentError(self, f"given twice; give it {how}")
        self._is_given = True
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, as every other error; `--help` has the rest. Good for one command line."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"ssl-eo: {message} (see {self.prog} --help)\n")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """What `argv` says; `key=value` may stand behind options, too, where argparse does not look for it."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    strange = [text for text in left if text.startswith("-") or "=" not in text]
    if strange or (left and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


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
    export.add_argument("--checkpoint", required=True, help="a run directory, one step_ directory of it, or a bundle")
    _add_released(export, "write a .pth or .safetensors file that the published code of this encoder loads")
    export.add_argument("--whole", action="store_true", help="both encoders of croma, and what joins them")
    one = "a plain convolution for one sensor that the encoder knows, or some bands of it: sentinel2_l2a:B04,B03,B02"
    export.add_argument("--bake", metavar="SENSOR", default=None, help=one)
    of_weights = "of the weights, as the bundle says it; without it the licences of the data are written down"
    export.add_argument("--licence", metavar="TEXT", default=None, help=of_weights)
    export.add_argument("--out", required=True, help="the bundle folder to write; with --as the file")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=_export)

    imported = commands.add_parser("import", help="write a bundle from a file of published weights")
    imported.add_argument("file", metavar="FILE", help="weights in the layout of their authors")
    _add_released(imported, "which encoder it is, where the name of the file does not tell")
    imported.add_argument("--prefix", default=None, help="which encoder of a file with several: student.backbone")
    imported.add_argument("--out", required=True, help="the bundle folder to write")
    imported.add_argument("--overwrite", action="store_true", help="replace the bundle that is there")
    imported.set_defaults(run=_import)

    elsewhere = {
        "eval": ("probe a frozen encoder; the same command goes on", cli_eval.add_arguments),
        "report": ("write a page about runs, or about what ssl-eo eval measured", cli_report.add_arguments),
        "study": ("train decoders and encoders on labels, and compare them", cli_adapt.add_study),
        "predict": ("classes of all pixels of a scene, by a model of a study", cli_adapt.add_predict),
        "export-ensemble": ("write an ensemble of all runs and bundles of a folder", cli_adapt.add_export_ensemble),
        "embed": ("features of all patches of a scene, by any encoder", cli_embed.add_embed),
        "doctor": ("look at this machine and installation, with advice", cli_doctor.add_doctor),
        "data": ("pack, index, measure and check data", cli_data.add_commands),
    }
    for name, (what, add_to) in elsewhere.items():
        add_to(commands.add_parser(name, help=what))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file, or a name below configs/ such as 'demo'")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optim.lr=0.001")


def _add_released(parser: argparse.ArgumentParser, what: str) -> None:
    names = "panopticon_vitb14, dinov2_vits14, dinov2_vitb14_reg, ..."
    parser.add_argument("--as", dest="released", metavar="NAME", default=None, help=f"{what}: {names}")


def _train(arguments: argparse.Namespace) -> int:
    # How often libgomp's threads look for work before they sleep. Its own choice is fastest on idle cores, by a tenth,
    # and several times slower where other work shares them. It is read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # When a rank is gone torch warns with the stack of its own code, around the one line that says which.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with signals_stop_early():
        from ssl_eo.config import load
        from ssl_eo.train.trainer import train

        try:
            config = load(arguments.config, arguments.overrides)
        except ValueError as error:  # all ranks of a node read the same file: the first one says what is wrong
            return _fail(str(error), EXIT_USAGE, is_told_elsewhere=read_launch(os.environ).local_rank > 0)
        return train(config)


def _config(arguments: argparse.Namespace) -> int:
    from ssl_eo.config import load, to_yaml

    config = load(arguments.config, arguments.overrides)
    if arguments.plan:
        from ssl_eo.train.plan import plan
        from ssl_eo.train.plan_table import print_plan

        n_ranks = 1 if arguments.ranks is None else arguments.ranks
        print_plan(plan(config, n_ranks, arguments.device), config, sys.stdout)
        return 0
    for option in ("ranks", "device"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for --plan: add that, or leave it out")
    print(to_yaml(config), end="")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ssl_eo.train.export import export_encoder, export_pair, open_encoder, open_pair
    from ssl_eo.weights import croma

    checkpoint, out = Path(arguments.checkpoint), Path(arguments.out)
    licence, sensor = arguments.licence, arguments.bake
    if sensor is not None and (arguments.whole or arguments.released is not None):
        raise ValueError("--bake is for a bundle of one encoder: leave out --whole and --as")
    if licence is not None and arguments.released is not None:
        raise ValueError("--licence is for a bundle, and other layouts have no place for it: leave out --as")
    if arguments.released is None and arguments.whole:
        step = export_pair(checkpoint, out, arguments.overwrite, licence)
    elif arguments.released is None:
        step = export_encoder(checkpoint, out, arguments.overwrite, licence, sensor)
    elif arguments.released in croma.PAIRS:
        pair = open_pair(checkpoint)
        step = pair.facts["step"]
        croma.export_pair(pair.model, arguments.released, pair.inputs, out, arguments.overwrite)
    else:
        from ssl_eo.weights.base import export_released

        found = open_encoder(checkpoint)
        step = found.facts["step"]
        export_released(found.encoder, arguments.released, out, arguments.overwrite)
    print(f"wrote {out} (encoder after step {step})")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from ssl_eo.weights import croma
    from ssl_eo.weights.base import import_released, released_name_of

    file, out = Path(arguments.file), Path(arguments.out)
    name = released_name_of(file) if arguments.released is None else arguments.released
    if name in croma.PAIRS:
        if arguments.prefix is not None:
            raise ValueError(f"--prefix {arguments.prefix}: a file of {name} holds one model")
        pair = croma.import_pair(file, name, out, arguments.overwrite)
        print(f"wrote {out} ({pair.name}; its weights are under {pair.licence}, see {pair.source})")
        return 0
    released = import_released(file, name, out, arguments.prefix, arguments.overwrite)
    print(f"wrote {arguments.out} ({released.name}; its weights are under {released.licence}, see {released.source})")
    return 0
