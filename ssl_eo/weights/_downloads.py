"""Files for torch.hub: from a path or an address, checked and kept; bundles that are packed in a zip file."""

from __future__ import annotations

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
from urllib.request import Request, urlopen

import torch.hub

from ssl_eo.components import one_line
from ssl_eo.files import atomic_file

__all__ = ["local_file", "unpacked_bundle"]

_SCHEMES = ("https", "file")
_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20
_MEMBERS = ("encoder.json", "encoder.safetensors")
_MOST_UNPACKED = 100  # times the packed size, of any that is worth packing


def local_file(where: str | Path, sha256: str | None = None) -> Path:
    """The file at a path, or that of an address (`https://`, `file://`), fetched once into `torch.hub.get_dir()`.

    With `sha256`, its first 8 to 64 digits, the file is read and compared; one kept before that differs is fetched
    again. Raises `ValueError` that begins with the path or address where there is no such file, or another one.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256 must be the first 8 to 64 hexadecimal digits, in lower case, got {sha256!r}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(where)) if isinstance(where, str) else None
    if scheme is None:
        path = Path(where)
        if not path.is_file():
            raise ValueError(f"{path}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    elif scheme[1].lower() not in _SCHEMES:
        raise ValueError(f"{where}: an address begins with https:// or file://; or give the path of a file")
    else:
        path = _kept_at(str(where))
        if not path.is_file() or (sha256 is not None and not _digest(path).startswith(sha256)):
            _fetch(str(where), path)
    if sha256 is not None and not (found := _digest(path)).startswith(sha256):
        raise ValueError(f"{where}: its SHA-256 is {found}, expected {sha256}: another file, or damaged")
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
                    with archive.open(_member(archive, name)) as packed, Path(folder, name).open("wb") as file:
                        shutil.copyfileobj(packed, file, _CHUNK_BYTES)
        except (
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
            RuntimeError,
            EOFError,
            OSError,
            ValueError,
        ) as error:
            raise ValueError(f"{path}: neither a bundle folder nor a zip file of one ({one_line(error)})") from None
        try:
            yield Path(folder)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(path))) from None


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    found = [member for member in archive.infolist() if re.fullmatch(rf"([^/]+/)?{re.escape(name)}", member.filename)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files in it are named {name}, expected one")
    if found[0].file_size > _MOST_UNPACKED * max(found[0].compress_size, _CHUNK_BYTES):
        raise ValueError(f"{name} would become {found[0].file_size:,} bytes")
    return found[0]


def _kept_at(url: str) -> Path:
    """Where the file of an address is kept: one folder an address, for many files have one name."""
    name = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(url).path)).name).strip(".") or "file"
    return Path(torch.hub.get_dir()) / "ssl_eo" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def _fetch(url: str, path: Path) -> None:
    sys.stderr.write(f"fetching {url} to {path}\n")
    try:
        # Only the schemes of `_SCHEMES` come here, and a redirection leads to no file.
        response = urlopen(Request(url, headers={"User-Agent": "ssl_eo"}), timeout=_TIMEOUT_S)
    except (OSError, HTTPException, ValueError) as error:
        raise _not_fetched(url, one_line(error)) from None
    with response:
        if urlsplit(response.url).scheme != urlsplit(url).scheme:
            raise _not_fetched(url, f"it leads to {response.url}, which is not safe")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for chunk in _chunks(url, response):
                file.write(chunk)


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
    return ValueError(f"{url}: could not be fetched ({reason}); try again, or fetch it yourself and give its path")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
