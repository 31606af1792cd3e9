"""Files for torch.hub: from a path or an address, checked and kept; bundles that are packed in a zip file."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import torch.hub

from ssl_eo.components import one_line
from ssl_eo.files import atomic_file

__all__ = ["how_to_renew", "local_file", "unpacked_bundle"]

_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20
_LONGEST_NAME = 100  # characters of a kept file, of which file systems take 255 bytes
_MEMBERS = ("encoder.json", "encoder.safetensors")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)
_MOST_UNPACKED = 100  # times the packed size, of any that is worth packing


def local_file(where: str | Path, sha256: str | None = None) -> Path:
    """The file at a path or a `file://` address, or that of `https://`, fetched once into `torch.hub.get_dir()`.

    With `sha256`, its first 8 to 64 digits, the file is read and compared; one kept before that differs is fetched
    again. Raises `ValueError` that begins with the path or address where there is no such file, or another one.
    """
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{8,64}", sha256)):
        raise ValueError(f"sha256 must be the first 8 to 64 hexadecimal digits, in lower case, got {sha256!r:.80}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(where)) if isinstance(where, str) else None
    if scheme is None or scheme[1].lower() == "file":
        path = Path(where) if scheme is None else _of_file_address(str(where))
        if not _is_file(path):
            raise ValueError(f"{where!s}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    elif scheme[1].lower() != "https":
        raise ValueError(
            f"{_shown(str(where))}: an address begins with https:// or file://; or give the path of a file"
        )
    else:
        path = _kept_at(str(where))
        if _is_file(path) and (sha256 is None or _digest(path).startswith(sha256)):
            return path
        _fetch(str(where), path)
    if sha256 is not None and not (found := _digest(path)).startswith(sha256):
        raise ValueError(f"{_shown(str(where))}: its SHA-256 is {found}, expected {sha256}: another file, or damaged")
    return path


@contextmanager
def unpacked_bundle(path: Path) -> Iterator[Path]:
    """A folder with the bundle in the zip file `path`, removed at the end.

    Only its two files are taken out, at the top or in one folder, whatever else is there. Raises `ValueError` that
    begins with `path` for what is no such file; one that the body raises names `path` instead of the folder.
    """
    with TemporaryDirectory(prefix="ssl_eo-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in _MEMBERS:
                    with archive.open(_member(archive, name, path)) as packed, Path(folder, name).open("wb") as file:
                        shutil.copyfileobj(packed, file, _CHUNK_BYTES)
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                where = Path(folder).parent
                raise ValueError(
                    f"{path}: cannot be unpacked in {where} ({error.strerror}); set TMPDIR to a folder with more"
                ) from None
            reason = one_line(error) or type(error).__name__
            raise ValueError(
                f"{path}: neither a bundle folder nor a zip file of one ({reason}){how_to_renew(path)}"
            ) from None
        try:
            yield Path(folder)
        except ValueError as error:
            raise ValueError(f"{str(error).replace(folder, str(path))}{how_to_renew(path)}") from None


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> zipfile.ZipInfo:
    """The one file `name` in the zip file `path`, which says itself how long it is, packed and unpacked."""
    found = [member for member in archive.infolist() if re.fullmatch(rf"([^/]+/)?{re.escape(name)}", member.filename)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files in it are named {name}, expected one")
    if found[0].compress_type not in _METHODS:
        raise ValueError(f"{name} is neither stored nor deflated; pack it anew with zip")
    if found[0].compress_size > path.stat().st_size:
        raise ValueError(f"{name} is said to take {found[0].compress_size:,} bytes, more than the file")
    if found[0].file_size > _MOST_UNPACKED * max(found[0].compress_size, _CHUNK_BYTES):
        raise ValueError(f"{name} would become {found[0].file_size:,} bytes")
    return found[0]


def _of_file_address(url: str) -> Path:
    """The path in a `file://` address of this machine, read in place: a copy would not follow its changes."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"{url}: no address ({error})") from None
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url}: a file of another machine, {parts.netloc}; write file:///PATH, or give the path")
    return Path(url2pathname(parts.path))


def _kept_at(url: str) -> Path:
    """Where the file of an address is kept: one folder an address, for many files have one name."""
    try:
        name = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(url).path)).name, flags=re.ASCII).strip(".") or "file"
        return _kept() / hashlib.sha256(url.encode()).hexdigest()[:16] / name[-_LONGEST_NAME:]
    except ValueError as error:
        raise ValueError(f"{ascii(_shown(url))[1:-1]}: no address ({one_line(error)})") from None


def _kept() -> Path:
    return Path(torch.hub.get_dir()) / "ssl_eo"


def how_to_renew(path: Path) -> str:
    """What to do about a wrong file, if it is one that was fetched: it would be taken again and again."""
    return "; it was fetched from an address: delete it to have it fetched again" if _kept() in path.parents else ""


def _shown(url: str) -> str:
    """An address without what may be secret: who asks, and what is signed."""
    return re.sub(r"//[^/?#]*@", "//", re.sub(r"[?#].*", "", url, flags=re.DOTALL)) if "://" in url else url


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise ValueError(f"{path!s:.200}: {error.strerror}") from None


def _fetch(url: str, path: Path) -> None:
    sys.stderr.write(f"fetching {_shown(url)} to {path}\n")
    try:
        # Only https:// comes here, and a redirection leads to no file.
        response = urlopen(Request(url, headers={"User-Agent": "ssl_eo"}), timeout=_TIMEOUT_S)
    except (OSError, HTTPException, ValueError) as error:
        raise _not_fetched(url, one_line(error)) from None
    with response:
        if urlsplit(response.url).scheme != urlsplit(url).scheme:
            raise _not_fetched(url, f"it leads to {_shown(response.url)}, which is not safe")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                for chunk in _chunks(url, response):
                    file.write(chunk)
        except OSError as error:
            raise ValueError(
                f"{_shown(url)}: cannot be kept in {path.parent} ({one_line(error)}); set TORCH_HOME to a folder that"
                " can be written"
            ) from None


def _chunks(url: str, response: Any) -> Iterator[bytes]:
    """The content of `response`, all of what it announced."""
    announced, n_bytes = response.headers.get("Content-Length"), 0
    try:
        while chunk := response.read(_CHUNK_BYTES):
            n_bytes += len(chunk)
            yield chunk
    except (OSError, HTTPException) as error:
        raise _not_fetched(url, one_line(error)) from None
    if announced is not None and announced != str(n_bytes):
        raise _not_fetched(url, f"{n_bytes} bytes came, {announced} were announced")


def _not_fetched(url: str, reason: str) -> ValueError:
    return ValueError(
        f"{_shown(url)}: could not be fetched ({reason}); try again, or fetch it yourself and give its path"
    )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
