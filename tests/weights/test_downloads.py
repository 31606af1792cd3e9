"""Files from addresses, and bundles in zip files: what lies, what cannot be kept, and what must not be shown."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
import torch

from ssl_eo.tensor_files import write_tensors
from ssl_eo.weights import _downloads
from ssl_eo.weights._downloads import local_file, unpacked_bundle
from ssl_eo.weights._entries import open_bundle
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


@pytest.mark.parametrize("cut", [1, 40])
def test_wrong_tensors_that_are_kept_say_so_too(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a safetensors file that ends early, in its body or in its header."""
    write_tensors(tmp_path / "own.safetensors", {"a": torch.zeros(2)})
    content = (tmp_path / "own.safetensors").read_bytes()[:-cut]
    (tmp_path / "own.safetensors").write_bytes(content)
    _serve(monkeypatch, content)
    with pytest.raises(ValueError, match=r"^\S*/hub/ssl_eo/\S*: .*truncated.*: delete it to have it fetched again$"):
        read_state_dict(local_file("https://a.org/b.safetensors"))
    with pytest.raises(ValueError, match=r"truncated") as caught:
        read_state_dict(tmp_path / "own.safetensors")
    assert "delete" not in str(caught.value)


def test_a_packed_bundle_that_is_kept_and_wrong_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zip file is whole, what is in it is not."""
    _zip(tmp_path / "own.zip")
    _serve(monkeypatch, (tmp_path / "own.zip").read_bytes())
    for path, advice in ((local_file("https://a.org/b.zip"), True), (tmp_path / "own.zip", False)):
        with pytest.raises(ValueError, match=rf"^{path}: bundle format None") as caught:
            open_bundle(path)
        assert str(caught.value).endswith("delete it to have it fetched again") is advice


def test_a_full_disk_is_not_the_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _zip(tmp_path / "own.zip")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_downloads.shutil, "copyfileobj", full)
    message = r"own\.zip: cannot be unpacked in \S+ \(No space left on device\); set TMPDIR to a folder with more$"
    with pytest.raises(ValueError, match=message):
        open_bundle(tmp_path / "own.zip")


def test_a_kept_file_is_read_once_to_compare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, b"x")
    sha256 = hashlib.sha256(b"x").hexdigest()
    local_file("https://a.org/b.zip", sha256)
    digests: list[Path] = []
    digest = _downloads._digest
    monkeypatch.setattr(_downloads, "_digest", lambda path: (digests.append(path), digest(path))[1])
    assert digests == [local_file("https://a.org/b.zip", sha256)]


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
