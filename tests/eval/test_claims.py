"""Claims with real processes: each piece of work is done once, and that of a process which dies by another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ssl_eo.eval import claims
from ssl_eo.eval.claims import Claim, claimed, next_turn, work_through

NAMES = [f"piece {i}" for i in range(12)]
FORK = multiprocessing.get_context("fork")


def _start(n: int, work: Callable[..., None], *args: Any) -> list[int | None]:
    """Exit codes of `n` processes that all do `work(all_begun, *args)`."""
    all_begun = FORK.Barrier(n)
    processes = [FORK.Process(target=work, args=(all_begun, *args)) for _ in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in processes]


def _note(folder: Path, name: str, text: str = "") -> None:
    with (folder / "log").open("a") as file:
        file.write(f"{name};{text}\n")


def _log(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "log").read_text().splitlines()
    return sorted((name, text) for name, _, text in (line.partition(";") for line in lines))


def _work_once(all_begun: Any, folder: Path) -> None:
    has_begun = False

    def work(name: str, claim: Claim) -> None:
        nonlocal has_begun
        if not has_begun:
            all_begun.wait(30)  # nothing has ended before all processes have begun
            has_begun = True
        _note(folder, name, str(claim.n_before))

    work_through(folder / "claims", NAMES, work)


def test_each_piece_is_done_once_by_three_processes(tmp_path: Path) -> None:
    assert _start(3, _work_once, tmp_path) == [0, 0, 0]
    assert _log(tmp_path) == sorted((name, "0") for name in NAMES)


def test_a_later_process_looks_at_each_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert _start(1, _work_once, tmp_path) == [0]
    assert _log(tmp_path) == sorted([(name, "0") for name in NAMES] * 2)


def _die_at_the_first(all_begun: Any, folder: Path) -> None:
    """Whoever comes to `piece 0` first is killed at it."""
    has_begun = False

    def work(name: str, claim: Claim) -> None:
        nonlocal has_begun
        if not has_begun:
            all_begun.wait(30)
            has_begun = True
        if name == NAMES[0] and claim.n_before == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _note(folder, name, str(claim.n_before))

    work_through(folder / "claims", NAMES, work)


def test_what_a_killed_process_was_at_is_taken_up_by_another(tmp_path: Path) -> None:
    codes = _start(2, _die_at_the_first, tmp_path)
    assert sorted(codes, key=str) == [-signal.SIGKILL, 0]
    assert _log(tmp_path) == sorted((name, "1" if name == NAMES[0] else "0") for name in NAMES)


def _give_up_after_two(all_begun: Any, folder: Path) -> None:
    has_begun = False

    def work(name: str, claim: Claim) -> None:
        nonlocal has_begun
        if not has_begun:
            all_begun.wait(30)
            has_begun = True
        if name == NAMES[0] and claim.n_before < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        _note(folder, name, "given up" if claim.n_before == 2 else "done")

    work_through(folder / "claims", NAMES, work)


def test_a_piece_that_was_given_up_kills_no_more_of_those_who_saw_it(tmp_path: Path) -> None:
    codes = _start(4, _give_up_after_two, tmp_path)
    assert sorted(codes, key=str) == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    assert _log(tmp_path) == sorted((name, "given up" if name == NAMES[0] else "done") for name in NAMES)


def test_a_piece_that_was_given_up_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        work_through(tmp_path, ["a"], lambda _, claim: seen.append(claim.n_before))
    assert seen == [0, 0]


def test_a_piece_that_ended_before_a_call_is_looked_at_again_and_one_that_ends_during_it_is_not(tmp_path: Path) -> None:
    seen: list[str] = []
    work_through(tmp_path, ["a", "b"], lambda name, _: seen.append(name))

    def work(name: str, _: Claim) -> None:
        seen.append(name)
        with claimed(tmp_path, "b") as claim:  # by somebody else
            assert claim is not None
            claim.finish()

    work_through(tmp_path, ["a", "b"], work)
    assert seen == ["a", "b", "a"]


def _draw(all_begun: Any, folder: Path, n: int) -> None:
    all_begun.wait(30)
    turns = [next_turn(folder) for _ in range(n)]
    assert turns == sorted(set(turns))
    for turn in turns:
        _note(folder, f"{turn:06d}")


def test_turns_are_drawn_once_by_any_process(tmp_path: Path) -> None:
    assert _start(3, _draw, tmp_path, 50) == [0, 0, 0]
    assert [int(name) for name, _ in _log(tmp_path)] == list(range(1, 151))


def test_an_error_is_no_death(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, ValueError):

        def fail(name: str, claim: Claim, error: type[BaseException] = error) -> None:
            raise error("stop")

        with pytest.raises(error):
            work_through(tmp_path, ["a"], fail)
    with claimed(tmp_path, "a") as claim:
        assert claim is not None
        assert (claim.n_before, claim.ended) == (0, None)


def test_a_claim_is_of_one_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path, "a") as first:
        assert first is not None
        with claimed(tmp_path, "a") as second, claimed(tmp_path, "b") as other:
            assert second is None
            assert other is not None
    with claimed(tmp_path, "a") as third:
        assert third is not None
        assert third.n_before == 0  # it was held, and never begun


def _hold_beside_a_child(folder: Path) -> None:
    """Begin a piece of work and fork a child that lives on, until killed."""
    with claimed(folder, "a") as claim:
        assert claim is not None
        claim.begin()
        FORK.Process(target=time.sleep, args=(8,)).start()
        (folder / "held").touch()
        time.sleep(60)


def test_death_frees_a_claim_although_a_child_lives_on(tmp_path: Path) -> None:
    """As one that reads samples does for seconds."""
    process = FORK.Process(target=_hold_beside_a_child, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    with claimed(tmp_path, "a") as claim:
        assert claim is not None
        assert claim.n_before == 1


def test_who_waits_for_another_process_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other, looks = ExitStack(), list[float]()
    other.enter_context(claimed(tmp_path, "a"))
    other.enter_context(claimed(tmp_path, "b"))

    def look_again(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            other.close()

    monkeypatch.setattr(claims, "_SILENT_S", 0.0)
    monkeypatch.setattr(time, "sleep", look_again)
    seen: list[str] = []
    work_through(tmp_path, ["a", "b", "c"], lambda name, _: seen.append(name))
    assert seen == ["c", "a", "b"]
    assert [r.getMessage() for r in caplog.records] == ["waiting for another process, which is at a and 1 more"]


@pytest.mark.parametrize("turns", [None, b"", bytes(8), b"12 monkeys", b"1"], ids=repr)
def test_work_is_looked_at_again_whatever_became_of_the_turns(tmp_path: Path, turns: bytes | None) -> None:
    seen: list[str] = []
    for _ in range(3):
        work_through(tmp_path, ["a", "b"], lambda name, _: seen.append(name))
    (path,) = tmp_path.glob(".turns")
    path.unlink() if turns is None else path.write_bytes(turns)
    work_through(tmp_path, ["a", "b"], lambda name, _: seen.append(name))
    assert seen == ["a", "b"] * 4
    assert next_turn(tmp_path) > 9


@pytest.mark.parametrize("content", [bytes(9), b"ended " + bytes(3), b"ended", b"x\0", "ended ½".encode()], ids=repr)
def test_a_damaged_claim_has_never_ended_and_nobody_has_died_at_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with claimed(tmp_path, "a") as claim:
        assert claim is not None
        assert (claim.n_before, claim.ended) == (0, None)
    seen: list[str] = []
    work_through(tmp_path, ["a"], lambda name, _: seen.append(name))
    assert seen == ["a"]


def test_names_may_be_anything_and_stay_apart(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a b", "", ".", "..", ".turns", "x" * 300, "x" * 301, "é" * 200, "a\0b", "../a", "\ud800"]
    seen: list[str] = []
    work_through(tmp_path / "claims", names, lambda name, _: seen.append(name))
    assert seen == names
    assert len(list((tmp_path / "claims").iterdir())) == len(names) + 1  # and the turns
    assert [path.name for path in tmp_path.iterdir()] == ["claims"]
