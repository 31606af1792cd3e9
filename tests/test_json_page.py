"""A page that is damaged, or was made to do harm, is one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssl_eo import json_page
from ssl_eo.json_page import read_page


def test_an_object_comes_back(tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_page(tmp_path / "page.json") == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "can't decode byte"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'["a"]', r"it holds no object, but \['a'\]"),
        (b"{" + b" " * 200 + b"}", "it has 202 bytes, expected at most 199"),
    ],
)
def test_what_is_no_page_is_one_clear_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"  " in content:
        monkeypatch.setattr(json_page, "_MOST_BYTES", 199)
    (tmp_path / "page.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_page(tmp_path / "page.json")
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_page(tmp_path / "page.json")
    os.mkfifo(tmp_path / "pipe.json")  # to open it would wait without end
    with pytest.raises(ValueError, match="it is no regular file"):
        read_page(tmp_path / "pipe.json")
