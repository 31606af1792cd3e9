"""Files behind `https://`, `s3://` or another address that fsspec knows, read in ranges.

A request that fails is repeated, ever later. A server that stays away stops the run: replacing samples that are not at
fault would change the batches.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_eo.components import import_extra, one_line
from ssl_eo.data.manifest import MANIFEST_NAME, Manifest

__all__ = ["RemoteConfig", "RemoteError", "RemoteFolder", "is_remote"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0  # between attempts; doubled each time
_NOT_IN_FILE = 416  # HTTP: the file ends before the bytes that were asked for
_PASSING = (408, _NOT_IN_FILE, 425, 429)  # of the 4xx states of HTTP, those that may go by themselves


def is_remote(root: str) -> bool:
    """Whether `root` is an address for fsspec rather than a folder."""
    return "://" in root


@dataclass
class RemoteConfig:
    """How shards are fetched. Credentials belong in the environment, not here: the config is saved with the run."""

    # a local disk of the node, shared by its processes; null: ssl_eo in $XDG_CACHE_HOME or ~/.cache
    cache_dir: str | None = None
    cache_gb: float = 50.0  # how much is kept; at least twice what the lanes of this node shuffle together
    n_connections: int = 4  # requests of one process at the same time, to read ahead
    request_mb: float = 16.0  # largest range request
    n_retries: int = 8  # of one request; pauses grow from half a second to a minute
    timeout_s: float = 60.0  # a server (https://, s3://) that is silent for so long counts as failed
    options: dict[str, Any] = field(default_factory=dict)  # for fsspec's file system: endpoint_url, anon, ...

    def __post_init__(self) -> None:
        for name in ("cache_gb", "request_mb", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.n_connections < 1:
            raise ValueError(f"n_connections must be at least 1, got {self.n_connections}")
        if self.n_retries < 0:
            raise ValueError(f"n_retries must not be negative, got {self.n_retries}")

    @property
    def folder(self) -> Path:
        """Where the cache is."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssl_eo"


class RemoteError(RuntimeError):
    """A server does not answer, or refuses. No sample is at fault, so this is none of the errors that replace one."""


class _ShorterFileError(OSError):
    """The file is there, but not all of it: what it lacks are bad samples."""


def _is_refusal(error: Exception) -> bool:
    """Whether asking again is of no use."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING:
        return True
    # botocore's errors for missing and incomplete credentials share no class but the one of all its errors.
    return isinstance(error, (PermissionError, NotImplementedError)) or "Credential" in type(error).__name__


class RemoteFolder:
    """The files below an address. It may be pickled and forked: every process opens a connection of its own."""

    def __init__(self, url: str, cfg: RemoteConfig) -> None:
        self.url = url.rstrip("/")
        self.cfg = cfg
        self._pid = 0  # of the process that is connected
        self._system: tuple[Any, str] | None = None
        self._connecting = threading.Lock()

    def manifest(self) -> Manifest:
        """The manifest of the packed dataset here."""
        try:
            content = self._request(MANIFEST_NAME, None, None, is_listed=False)
        except FileNotFoundError:
            raise ValueError(
                f"{self.url}/{MANIFEST_NAME}: no such file; the address must be that of a folder that"
                " 'ssl-eo data pack' wrote, or of one with the split in it"
            ) from None
        return Manifest.parse(content, f"{self.url}/{MANIFEST_NAME}")

    def read(self, name: str, span: tuple[int, int] | None = None) -> bytes:
        """A whole file in one request, or its bytes [start, stop) in sequential ones of `request_mb` at most.

        The file is one that a manifest lists. `FileNotFoundError`, or another `OSError` when it is shorter than that,
        is raised only when it stays so; `RemoteError` when the server refuses or does not answer in time; `ValueError`
        for an address that fsspec does not know.
        """
        if span is None:
            return self._request(name, None, None)
        (start, stop), step = span, max(1, int(self.cfg.request_mb * 1e6))
        return b"".join(self._request(name, at, min(at + step, stop)) for at in range(start, stop, step))

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url, self.cfg)

    def _request(self, name: str, start: int | None, stop: int | None, is_listed: bool = True) -> bytes:
        """One request, repeated until it is answered in full."""
        system, root = self._file_system()
        attempt, n_attempts, pause = 1, self.cfg.n_retries + 1, _FIRST_PAUSE_S
        while True:
            try:
                return self._answer(system, f"{root}/{name}", start, stop)
            except FileNotFoundError:
                what = f"{self.url}/{name}: no such file"
                if attempt == n_attempts or not is_listed:
                    raise FileNotFoundError(what) from None
            except _ShorterFileError as error:
                what = str(error)
                if attempt == n_attempts:
                    raise
            except Exception as error:  # each file system has errors of its own
                what = f"{self.url}/{name}: {type(error).__name__} {one_line(error)}".rstrip()
                if _is_refusal(error):
                    raise RemoteError(f"{what} (access is set by 'options' of the source's 'remote')") from error
                if attempt == n_attempts:
                    raise RemoteError(f"{what} ({attempt} attempts); run the same command when it answers") from error
            wait = pause * random.SystemRandom().uniform(0.5, 1.0)  # workers should not come back together
            logger.warning("%s; attempt %d of %d follows in %.1f s", what, attempt + 1, n_attempts, wait)
            time.sleep(wait)
            attempt, pause = attempt + 1, min(2 * pause, _LONGEST_PAUSE_S)

    def _answer(self, system: Any, path: str, start: int | None, stop: int | None) -> bytes:
        try:
            data: bytes = system.cat_file(path, start=start, end=stop)
        except Exception as error:
            if stop is not None and getattr(error, "status", None) == _NOT_IN_FILE:
                raise _ShorterFileError(f"{path} ends before byte {stop}; copy it there again") from None
            raise
        if start is not None and stop is not None and len(data) != stop - start:
            if len(data) > stop - start:
                raise NotImplementedError("the server ignores byte ranges; shards need one that supports them")
            size = system.size(path)
            if size is not None and size < stop:
                raise _ShorterFileError(f"{path} has {size} bytes, expected {stop} or more; copy it there again")
            raise OSError(f"the server sent {len(data)} of {stop - start} bytes from {start} on")
        return data

    def _file_system(self) -> tuple[Any, str]:
        """fsspec's file system of this process, and the folder in it."""
        with self._connecting:
            if self._system is None or self._pid != os.getpid():
                self._system, self._pid = self._connect(), os.getpid()
            return self._system

    def _connect(self) -> tuple[Any, str]:
        fsspec = import_extra("remote", "fsspec", f"reading from {self.url}")
        options = dict(self.cfg.options)
        protocol = self.url.partition("://")[0]
        if protocol in ("http", "https"):
            timeout = import_extra("remote", "aiohttp", f"reading from {self.url}").ClientTimeout(
                total=None, sock_connect=self.cfg.timeout_s, sock_read=self.cfg.timeout_s
            )
            options["client_kwargs"] = {"timeout": timeout, **options.get("client_kwargs", {})}
        elif protocol == "s3":
            import_extra("s3", "s3fs", f"reading from {self.url}")
            limits: dict[str, Any] = {"read_timeout": self.cfg.timeout_s, "connect_timeout": self.cfg.timeout_s}
            limits["retries"] = {"max_attempts": 1}  # ours are enough
            options["config_kwargs"] = {**limits, **options.get("config_kwargs", {})}
        try:
            system, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **options)
        except (ValueError, ImportError) as error:  # no such protocol; its package is not installed
            raise ValueError(f"root: {self.url}: {one_line(error)}") from None
        return system, root.rstrip("/")
