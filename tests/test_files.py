"""Files that a kill, a full disk or a second process cannot spoil."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from ssl_eo.files import atomic_file, atomic_write, locked_folder


def test_the_old_content_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_stops_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write(b"first")
        second.write(b"second, and longer")
    assert path.read_bytes() == b"first"  # it was closed last
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8(tmp_path: Path) -> None:
    atomic_write(tmp_path / "f", "é")
    assert (tmp_path / "f").read_bytes() == "é".encode()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "f"
    with pytest.raises(FileNotFoundError, match=f"{path} could not be written: No such file"):
        atomic_write(path, b"")
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"{path} could not be written: Is a directory"):
        atomic_write(path, b"")
    assert list(tmp_path.iterdir()) == [path]


def _live_on(folder: Path) -> None:
    """Say that this child runs, so has let go of what its parent holds, and outlive the parent."""
    (folder / "held").touch()
    time.sleep(8)


def _hold_beside_a_child(folder: Path) -> None:
    """Hold the folder and fork a child that lives on, until killed."""
    with locked_folder(folder, "another"):
        multiprocessing.get_context("fork").Process(target=_live_on, args=(folder,)).start()
        time.sleep(60)


def test_death_frees_a_folder_although_a_child_lives_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold_beside_a_child, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="in use by another process"), locked_folder(tmp_path, "another"):
        pass
    process.kill()
    process.join()
    with locked_folder(tmp_path, "another"):
        pass
