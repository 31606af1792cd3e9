"""Addressed randomness: every generator is seeded by a hash of what it is for, never by what ran before it.

`numpy_generator(run_seed, "plan", step, key)` gives the same stream on any rank, in any worker and after any resume,
so no generator state is ever stored. A part's type is hashed along with its value: `1` and `"1"` differ.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["derive_seed", "numpy_generator", "torch_generator", "uniforms"]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of integers and strings, e.g. ``derive_seed(run_seed, "mask", step, key)``."""
    digest = blake2b(digest_size=8)
    for part in parts:
        tag = "i" if isinstance(part, int) else "s"
        text = f"{tag}{part}".encode()
        digest.update(len(text).to_bytes(4, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator at the address `parts`."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))


def uniforms(seed: int, keys: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    """`[K, n]` numbers uniform in [0, 1): row k is a function of `seed` and `keys[k]`, whatever the others are.

    For many small addresses at once, where a generator for each would take longer than what is drawn from it. The
    numbers are halves of those of SplitMix64 (Steele et al. 2014) at counters from the seed on.
    """
    import numpy as np

    n_words = (n + 1) // 2
    start = np.uint64(derive_seed(seed, "uniforms"))
    x: NDArray[Any] = keys.astype(np.uint64)[:, None] * np.uint64(n_words) + (
        np.arange(n_words, dtype=np.uint64) + start
    )
    x *= np.uint64(0x9E3779B97F4A7C15)  # [K, W], modulo 2^64 like all that follows
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    halves = x.astype("<u8", copy=False).view("<u4")[:, :n]
    drawn: NDArray[np.float32] = (halves >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    return drawn


def torch_generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator at the address `parts`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
