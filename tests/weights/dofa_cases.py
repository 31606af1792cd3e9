"""What DOFA is asked, published code and ours alike; weights and pixels come from `released_formula.py`.

C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from released_formula import uniform
from torch import Tensor

SAR_UM = 3.75  # the placeholder of version 1
SENTINEL2_UM = (0.665, 0.56, 0.49, 0.705, 0.74, 0.783, 0.842, 1.61, 2.19)
ALL_SENTINEL2_UM = (0.443, 0.49, 0.56, 0.665, 0.705, 0.74, 0.783, 0.842, 0.865, 0.945, 1.375, 1.61, 2.19)
HYPERSPECTRAL_UM = tuple(round(0.418 + 0.01 * i, 3) for i in range(202))


@dataclass(frozen=True)
class DofaCase:
    """Two images of one size, square as the published code needs them, as `um` says what their channels are."""

    name: str
    um: tuple[float, ...]
    size: int  # pixels
    model: str = "dofa_vitb16"
    depth: int | None = None  # a model of fewer blocks
    global_pool: bool = True  # features are the mean over patches and then fc_norm; else norm and then CLS
    layers: tuple[int, ...] = (0, 5, 11)  # blocks whose tokens are compared

    def pixels(self) -> Tensor:
        """`[2, C, H, W]`; weaker where bands are many, so that tokens, which are sums over bands, stay of order 1."""
        scale = min(1.0, (len(ALL_SENTINEL2_UM) / len(self.um)) ** 0.5)
        return uniform(f"pixels {self.name}", (2, len(self.um), self.size, self.size)) * scale


_SHORT = {"depth": 1, "layers": (0,)}
CASES = (
    DofaCase("rgb", (0.665, 0.56, 0.49), 224),
    DofaCase("rgb, cls", (0.665, 0.56, 0.49), 80, global_pool=False),
    DofaCase("sar", (SAR_UM, SAR_UM), 96),
    DofaCase("four bands", (0.49, 0.56, 0.665, 0.83), 48),
    DofaCase("nine bands", SENTINEL2_UM, 112),
    DofaCase("thirteen bands", ALL_SENTINEL2_UM, 48),
    DofaCase("202 bands", HYPERSPECTRAL_UM, 32),
    DofaCase("legacy rgb", (0.665, 0.56, 0.49), 48, "dofa_vitb16_legacy", **_SHORT),
    DofaCase("legacy sar", (SAR_UM, SAR_UM), 48, "dofa_vitb16_legacy", **_SHORT),
    DofaCase("legacy nine bands", SENTINEL2_UM, 48, "dofa_vitb16_legacy", **_SHORT),
    DofaCase("large", SENTINEL2_UM, 48, "dofa_vitl16", **_SHORT),
    DofaCase("large, legacy", SENTINEL2_UM, 48, "dofa_vitl16_legacy", **_SHORT),
)
