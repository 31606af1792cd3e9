"""Files from addresses, and bundles in zip files: what lies, what cannot be kept, and what must not be shown."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
import torch

from ssl_eo.weights import _downloads
from ssl_eo.weights._downloads import local_file, unpacked_bundle
from ssl_eo.weights._reading import read_state_dict


@pytest.fixture(autouse=True)
def hub(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub"
    torch.hub._hub_dir = before


def _zip(path: Path, method: int = zipfile.ZIP_DEFLATED, page: bytes = b"{}") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("encoder.json", page)
        archive.writestr("encoder.safetensors", b"x")
    return path


def _refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught, unpacked_bundle(path):
        pass
    assert str(caught.value).startswith(f"{path}: neither a bundle folder nor a zip file of one (")
    assert "()" not in str(caught.value)
    return str(caught.value)


def test_a_packed_size_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """It would let any unpacked size pass."""
    path = _zip(tmp_path / "b.zip", page=bytes(102 << 20))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 24] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    assert "encoder.json is said to take 1,073,741,824 bytes, more than the file" in _refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_methods_of_packing_are_refused(tmp_path: Path, method: int) -> None:
    assert "encoder.json is neither stored nor deflated" in _refused(_zip(tmp_path / "b.zip", method))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_files_are_taken(tmp_path: Path, method: int) -> None:
    with unpacked_bundle(_zip(tmp_path / "b.zip", method)) as folder:
        assert (folder / "encoder.json").read_bytes() == b"{}"


def test_a_file_that_ends_early_says_so(tmp_path: Path) -> None:
    """The reason of an EOFError is empty."""
    path = _zip(tmp_path / "b.zip", zipfile.ZIP_STORED, b"y" * 5000)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = (2000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    _refused(path)


def _serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    class Response(io.BytesIO):
        url, headers = "https://a.org/b.zip", Message()

    monkeypatch.setattr(_downloads, "urlopen", lambda *args, **kwargs: Response(content))


def test_a_wrong_file_that_is_kept_says_how_to_renew_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, b"<html>")
    assert _refused(local_file("https://a.org/b.zip")).endswith(
        "fetched from an address: delete it to have it fetched again"
    )
    (tmp_path / "own.zip").write_bytes(b"<html>")
    assert "delete" not in _refused(tmp_path / "own.zip")
    with pytest.raises(ValueError, match=r"one of torch\.save, or damaged .*delete it to have it fetched again$"):
        read_state_dict(local_file("https://a.org/b.zip"))


def test_where_nothing_can_be_kept_the_setting_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, b"x")
    hub.write_text("a file")
    with pytest.raises(ValueError, match=rf"^https://a\.org/b\.zip: cannot be kept in {hub}.*; set TORCH_HOME to a"):
        local_file("https://a.org/b.zip")


def test_a_folder_in_the_place_of_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, b"x")
    path = local_file("https://a.org/b.zip")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"^https://a\.org/b\.zip: cannot be kept in .*; set TORCH_HOME"):
        local_file("https://a.org/b.zip")


def test_secrets_of_an_address_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _serve(monkeypatch, b"x")
    with pytest.raises(ValueError, match=r"^https://a\.org/b\.zip: its SHA-256") as caught:
        local_file("https://me:hidden@a.org/b.zip?sign=hidden#hidden", "0" * 64)
    shown = capfd.readouterr().err
    assert "fetching https://a.org/b.zip to " in shown
    assert "hidden" not in f"{shown}{caught.value}"


def test_a_file_address_is_read_in_place(tmp_path: Path, hub: Path) -> None:
    """So what it gives is what the file holds now."""
    path = tmp_path / "a b.zip"
    path.write_bytes(b"first")
    for url in (path.as_uri(), path.as_uri().replace("file://", "FILE://localhost")):
        assert local_file(url) == path
    assert not hub.exists()
    for url, message in (("file://other/a", "a file of another machine, other"), ("file:///no/such", "no such file")):
        with pytest.raises(ValueError, match=f"^{url}: {message}"):
            local_file(url)


@pytest.mark.parametrize("url", ["https://[::1/x", "file://[::1/x", "https://a.org/\udcff"])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(ascii(url)[1:-1])}: no address"):
        local_file(url)


def test_a_long_name_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, b"x")
    assert local_file(f"https://a.org/{'a' * 5000}.zip").read_bytes() == b"x"
