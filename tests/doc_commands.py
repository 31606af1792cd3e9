"""Commands of the docs go through the parsers of the programs that they name, and are not run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from doc_tables import ROOT

from ssl_eo.cli import _parsed, _parser

__all__ = ["check_command", "commands_of", "known_options", "make_targets", "our_commands"]

_SHELL = {"export": r"\w+=\S+", "source": r"\.venv/bin/activate"}  # what may follow
_PYTEST = {"-n", "-k", "-x", "-q"}


class _ParsedError(Exception):
    """A script has read its arguments, and is to go no further."""


def commands_of(block: str) -> Iterator[list[str]]:
    """The words of each command, without comments and variables of the environment before it."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words: Sequence[str]) -> list[str] | None:
    """Fail unless what `words` name is there and takes them; returns the words of `ssl-eo` that are meant, if any."""
    program, rest = Path(words[0]).name, list(words[1:])
    if program == "ssl-eo":
        ours: list[str] | None = rest
    elif program == "torchrun":
        ours = _module_of(_torchrun(rest))
    elif program == "torchrun.sh":
        assert (ROOT / words[0]).is_file(), words[0]
        before = rest.index("--") if "--" in rest else 0
        _torchrun([*rest[:before], "-m", "ssl_eo"])
        ours = ["train", *rest[before + ("--" in rest) :]]
    elif program == "sbatch":  # its own options come first, and are Slurm's
        at = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        assert (ROOT / rest[at]).is_file(), rest[at]
        ours = ["train", *rest[at + 1 :]]
    elif program == "python" and rest[0] == "-m":
        ours = rest[2:]
        assert rest[1] == "ssl_eo", rest[1]
    else:
        ours = _check_other(program, rest)
    if ours is not None:
        try:
            _parsed(ours)
        except SystemExit as stop:
            if stop.code != 0:
                raise
            return None  # an option that prints something and ends, as --help does
    return ours


def _check_other(program: str, rest: list[str]) -> list[str] | None:
    if program == "python":
        arguments = _arguments_of(ROOT / rest[0], rest[1:])
        if hasattr(arguments, "overrides") and not arguments.config.startswith("my_"):  # a file of the reader's own
            return ["train", "--config", arguments.config, *arguments.overrides]
    elif program == "make":
        assert set(rest) <= make_targets(), rest
    elif program == "pytest":
        conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
        for word in rest:
            is_option = word in _PYTEST or f'"{word}"' in conftest
            assert is_option or word.isdecimal() or (ROOT / word).exists(), word
    elif program == "pre-commit":
        assert rest == ["install"], rest
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        assert program in _SHELL, f"{program} is no command that is known here"
        assert all(re.fullmatch(_SHELL[program], word) for word in rest), rest
    return None


def _arguments_of(script: Path, rest: list[str]) -> argparse.Namespace | None:
    """What the parser of `script` makes of `rest`; None for a script without one, which takes nothing."""
    if "argparse" not in script.read_text(encoding="utf-8"):
        assert not rest, f"{script.name} takes no arguments"
        return None
    found: list[argparse.Namespace] = []

    def stopping(name: str) -> Callable[..., None]:
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            found.append(parse(parser, args, namespace))
            raise _ParsedError

        return parse_and_stop

    changed = {"argv": [str(script), *rest], "path": [str(script.parent), *sys.path]}
    ways = {name: stopping(name) for name in ("parse_args", "parse_intermixed_args")}
    with mock.patch.multiple(sys, **changed), mock.patch.multiple(argparse.ArgumentParser, **ways):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _ParsedError:
            return found[0]
    raise AssertionError(f"{script.name} did not read its arguments")


def _torchrun(words: list[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    arguments: argparse.Namespace = get_args_parser().parse_args(words)
    return arguments


def _module_of(arguments: argparse.Namespace) -> list[str]:
    assert arguments.module
    assert arguments.training_script == "ssl_eo"
    return list(arguments.training_script_args)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def our_commands() -> dict[str, set[str]]:
    """The commands of `ssl-eo` (`train`, `data pack`, ...), and the options of each; `""` has those of all."""
    found = dict(_commands(_parser(), ""))
    return {**found, "": set().union(*found.values())}


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
    yield name, {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, its_parser in action.choices.items():
                yield from _commands(its_parser, f"{name} {inner}".strip())


def known_options() -> set[str]:
    """Those of `ssl-eo`, of the scripts of this repository, and of torchrun."""
    from torch.distributed.run import get_args_parser

    scripts = [path for folder in ("benchmarks", "launch") for path in (ROOT / folder).glob("*.py")]
    texts = "".join(path.read_text(encoding="utf-8") for path in scripts)
    own = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', texts))
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    return our_commands()[""] | own | torchrun
