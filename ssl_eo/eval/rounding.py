"""How numbers are rounded wherever scores are shown."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

__all__ = ["fixed"]

_N_SETTLED = 3  # decimals behind those that are shown: what is less is noise of float32
_EXACT = Context(prec=400, rounding=ROUND_HALF_EVEN)  # digits enough for the largest float and those behind its point


def fixed(value: float, n_decimals: int, sign: str = "") -> str:
    """`value` with so many decimals, halves to the even digit; with `sign` "+" also that of what is above 0.

    46.25 is shown as 46.2, and so is the 46.2500006 that it is in float32 or as a mean: one score has one text.
    """
    if not math.isfinite(value):
        return f"{value:{sign}}"
    settled = Decimal(f"{value:.{n_decimals + _N_SETTLED}f}")
    return f"{settled.quantize(Decimal(1).scaleb(-n_decimals), context=_EXACT):{sign}f}"
