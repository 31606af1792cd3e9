"""A backbone with a decoder on top: images in, logits out.

B images, C channels, H W pixels of the image, K outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssl_eo.adapt.backbone import Backbone, padded_to
from ssl_eo.eval.decoders import TapMaps
from ssl_eo.models.vit import EncoderInput

__all__ = ["TaskModel"]


class TaskModel(nn.Module):
    """`decoder` on `backbone`: `forward(inputs, size)` gives logits, `[B, K, *size]` or `[B, K]` by decoder.

    Numbers (of regression) are learned in units of their spread: `measure_outputs` says what that is, and `values`
    brings what comes out back to the unit of labels.

    A backbone none of whose weights trains stays in eval mode, whatever `train` is called with: no drop path, and no
    statistics that move.
    """

    output_mean: Tensor
    output_std: Tensor

    def __init__(self, backbone: Backbone, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.register_buffer("output_mean", torch.zeros(()))
        self.register_buffer("output_std", torch.ones(()))

    @property
    def is_frozen(self) -> bool:
        """Whether no weight of the backbone trains."""
        return not any(p.requires_grad for p in self.backbone.parameters())

    def train(self, mode: bool = True) -> TaskModel:
        """Training mode of what trains."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def taps(self, inputs: EncoderInput) -> TapMaps:
        """What the decoder is given for `inputs`; without a graph where the backbone is frozen."""
        padded = replace(inputs, pixels=padded_to(inputs.pixels, self._multiple_px))
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            found: TapMaps = self.backbone(padded)
        return found

    def decode(self, taps: TapMaps, shown: Sequence[int], size: Sequence[int]) -> Tensor:
        """Logits in the `size` of labels, from taps of images of `shown` pixels, which `taps` has padded.

        The decoder enlarges to labels of the padded image, and what lies beyond the image is cut off.
        """
        padded = [
            round(-(-pixels // self._multiple_px) * self._multiple_px * labels / pixels)
            for pixels, labels in zip(shown, size, strict=True)
        ]
        logits: Tensor = self.decoder(taps, (padded[0], padded[1]))  # [B, K, *padded] or [B, K]
        return logits[:, :, : size[0], : size[1]] if logits.ndim == 4 else logits

    def forward(self, inputs: EncoderInput, size: Sequence[int] | None = None) -> Tensor:
        """Logits, in the size of the image where labels have no other `size`."""
        shown = inputs.pixels.shape[-2:]
        return self.decode(self.taps(inputs), shown, shown if size is None else size)

    @torch.no_grad()
    def measure_outputs(self, labels: Tensor) -> None:
        """Take mean and spread from numbers `labels [N]`; all of them equal have a spread of 1."""
        std, mean = torch.std_mean(labels.double(), correction=0)
        self.output_mean.copy_(mean)
        self.output_std.copy_(torch.where(std > 0, std, 1.0))

    def targets(self, labels: Tensor) -> Tensor:
        """What logits are to become: numbers in units of their spread, other labels as they are."""
        return (labels - self.output_mean) / self.output_std if labels.is_floating_point() else labels

    def values(self, logits: Tensor) -> Tensor:
        """Logits as they are, or numbers in the unit of labels."""
        return logits * self.output_std + self.output_mean

    @property
    def _multiple_px(self) -> int:
        return max(self.backbone.shape.strides_px)
