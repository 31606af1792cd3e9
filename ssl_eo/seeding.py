"""Addressed randomness: every generator is seeded by a hash of what it is for, never by what ran before it.

`numpy_generator(run_seed, "plan", step, key)` gives the same stream on any rank, in any worker and after any resume,
so no generator state is ever stored. A part's type is hashed along with its value: `1` and `"1"` differ.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np

__all__ = ["derive_seed", "numpy_generator", "torch_generator"]


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


def torch_generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator at the address `parts`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
