"""What a decoder is given, and what it is told of that before.

A decoder is a module of this package with `KINDS`, the kinds of labels that it serves, `Config`, its options with their
defaults, and

    class Decoder(nn.Module):
        def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None
        def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor

which gives logits, never probabilities: `[B, K, *size]` of every pixel, or `[B, K]` of the image, where `size` is of no
account. Weights are those of a new model as soon as it is built.

B images, T taps, D width of a tap, h w patches of a tap, H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["TapMaps", "TapShape"]


@dataclass(frozen=True)
class TapShape:
    """The taps of an encoder, from the first that it comes to: their widths, and how many pixels a cell of each spans.

    A plain vision transformer has the same stride everywhere; taps of a pyramid are finest first.
    """

    widths: tuple[int, ...]
    strides_px: tuple[int, ...]
    has_cls: bool = False

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.strides_px):
            raise ValueError(f"an encoder has one stride for each width, got {self.widths} and {self.strides_px}")
        if sorted(self.strides_px) != list(self.strides_px):
            raise ValueError(f"taps of a pyramid are finest first, got strides of {self.strides_px} pixels")

    @property
    def is_pyramid(self) -> bool:
        """Whether cells grow from tap to tap."""
        return len(set(self.strides_px)) > 1


@dataclass(frozen=True)
class TapMaps:
    """What an encoder gives a decoder: features of patches at each tap, `[B, D, h, w]`, in the order of `TapShape`."""

    maps: Sequence[Tensor]
    cls: Tensor | None = None  # [B, D], the CLS token of the last tap, where the encoder has one
