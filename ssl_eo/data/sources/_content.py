"""What files hold, for the fingerprint of an archive that is too large to be read for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from ssl_eo.data.regular import check_regular
from ssl_eo.data.sources._side_files import evenly_spaced

__all__ = ["N_READ", "content_of_some"]

N_READ = 16  # files, or rows, that are looked into
_END_BYTES = 1 << 18  # at either end; pictures and tiles are smaller than two of these


def content_of_some(n: int, path_of: Callable[[int], Path]) -> bytes:
    """A digest of the sizes and both ends of `N_READ` evenly spaced ones of `n` files.

    Files without compression have one size whatever they hold, and times of files differ between copies: so some are
    read. One that cannot be read counts as such, since its sample is bad.
    """
    digest = blake2b(digest_size=16)
    for i in evenly_spaced(n, N_READ):
        try:
            check_regular(path_of(i))
            with path_of(i).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(_END_BYTES)
                file.seek(max(size - _END_BYTES, len(ends)))
                ends += file.read(_END_BYTES)
        except OSError:
            digest.update(b"unreadable")
        else:
            digest.update(b"%d " % size + ends)
    return digest.digest()
