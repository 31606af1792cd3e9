"""Masked autoencoder (He et al. 2022, arXiv 2111.06377) on any sensor.

A view is cut into patches, most are hidden, the encoder sees the visible ones, a small decoder predicts the pixels of
the hidden ones. The spectral output head predicts any set of channels with the same weights.

B batch, C channels, H W pixels, P patch size, N patches, K visible, M predicted, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_eo.data.masking import MaskConfig, draw, n_masked, predicted, stack_masks
from ssl_eo.data.plans import CropConfig, resized_crop
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, PixelBatch, Sample, TileSchema, ViewPlan
from ssl_eo.losses.reconstruction import masked_mse, normalise_patches, patchify, unpatchify
from ssl_eo.losses.targets import gradient_histograms, moments_of, patch_statistics
from ssl_eo.models.decoders import DecoderConfig, LinearOutput, MaskedDecoder, SpectralConfig, SpectralOutput
from ssl_eo.models.vit import EncoderConfig, EncoderInput
from ssl_eo.objectives import base
from ssl_eo.objectives.base import Losses, Schemas, ema_update_, encoder_for, teacher_of
from ssl_eo.schedules import Constant, Schedule
from ssl_eo.sensors import ChannelMeta

__all__ = ["Config", "MaskedViews", "Objective"]

_ROLE = "image"


@dataclass
class Config:
    """Paper values where the paper has one; sizes are those of the debug scale and are set by recipes."""

    # Which tile of a sample to learn from; None: its only one. Of a list, one that the sample has is drawn: products or
    # sensors with as many bands.
    tile: str | list[str] | None = None
    crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=64))
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    output: Literal["spectral", "linear"] = "spectral"  # any sensor; or one fixed number of channels, as in the paper
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    norm_pix: bool = True  # predict each patch with its own mean and variance taken out
    norm_pix_eps: float = 1e-6  # added to that variance; larger values stop flat patches from becoming pure noise
    # Predicted beside the pixels, with equal weight: mean and log spread of each channel of a patch (what norm_pix
    # takes out), and log histograms of oriented gradients (arXiv 2112.09133).
    extra_targets: list[Literal["statistics", "gradients"]] = field(default_factory=list)
    gradient_bins: int = 8  # orientations of a histogram
    gradient_cell_px: int = 4  # histograms are taken over cells of this side; divides the patch size
    ema_momentum: float | None = None  # keep a moving average of the encoder, probed and exported in its stead

    def __post_init__(self) -> None:
        if self.ema_momentum is not None and not 0 <= self.ema_momentum < 1:
            raise ValueError(f"ema_momentum must be in [0, 1) or null, got {self.ema_momentum}")
        if not self.norm_pix_eps > 0:
            raise ValueError(f"norm_pix_eps must be positive, got {self.norm_pix_eps}")
        if self.gradient_bins < 2 or self.gradient_cell_px < 1:
            raise ValueError(
                f"gradient_bins must be at least 2 and gradient_cell_px at least 1, got {self.gradient_bins} and"
                f" {self.gradient_cell_px}"
            )


class MaskedPlan(NamedTuple):
    """One view, which of its patches are hidden, and which of those are predicted."""

    view: ViewPlan
    hidden: NDArray[np.bool_]
    predicted: NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedViews:
    """One random crop and one random mask for each sample."""

    cfg: Config
    grid: tuple[int, int]
    schemas: Schemas

    def plan(self, sample: Sample, rng: np.random.Generator) -> MaskedPlan:
        allowed = [self.cfg.tile] if isinstance(self.cfg.tile, str) else self.cfg.tile
        names = [name for name in sample.tiles if allowed is None or name in allowed]
        if not names:
            raise ValueError(f"it has none of the tiles of objective.tile, but {', '.join(sample.tiles)}")
        name = names[0] if len(names) == 1 else names[int(rng.integers(len(names)))]
        view = resized_crop(sample, name, self.cfg.crop, rng)
        hidden = draw(self.cfg.mask, rng, self.grid)
        return MaskedPlan(view, hidden, predicted(self.cfg.mask, rng, hidden))

    def collate(
        self, planned: list[tuple[Sample, MaskedPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples = [sample for sample, _ in planned]
        plans = [plan for _, plan in planned]
        tiles, views = stack(samples, {_ROLE: [[plan.view for plan in plans]]}, self.schemas[source])
        return Batch(
            step=step,
            source=source,
            keys=[sample.key for sample in samples],
            tiles=tiles,
            views=views,
            masks={_ROLE: stack_masks([plan.hidden for plan in plans], [plan.predicted for plan in plans])},
        )


class Objective(base.Objective):
    """`student` is encoder, decoder and output head; the teacher, if any, is the moving average of the encoder."""

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        tiles = [schema[name] for schema in schemas for name in _tile_names(cfg, schema)]
        if encoder_cfg.mask_token:
            raise ValueError("model.mask_token: hidden patches never reach the encoder of mae; leave it false")
        encoder = encoder_for(encoder_cfg, tiles)
        self.patch_size = encoder_cfg.patch_size
        self.student = nn.ModuleDict(
            {
                "encoder": encoder,
                "decoder": MaskedDecoder(cfg.decoder, encoder_cfg.width),
                "output": _output_head(cfg, encoder.n_channels, encoder_cfg.patch_size),
            }
        )
        if "gradients" in cfg.extra_targets:
            n_cells = (self.patch_size // cfg.gradient_cell_px) ** 2
            self.student["gradient_output"] = LinearOutput(cfg.decoder.embed_dim, cfg.gradient_bins, n_cells)
        self.teacher = None if cfg.ema_momentum is None else teacher_of(self.student, ["encoder"])

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MaskedViews:
        size, patch, cell = cfg.crop.size_px, encoder_cfg.patch_size, cfg.gradient_cell_px
        if size % patch:
            raise ValueError(f"objective.crop.size_px {size} is not a multiple of model.patch_size {patch}")
        if "gradients" in cfg.extra_targets and patch % cell:
            raise ValueError(f"objective.gradient_cell_px {cell} does not divide model.patch_size {patch}")
        for schema in schemas:
            _tile_names(cfg, schema)
        n_patches = (size // patch) ** 2
        if not 0 < (n_hidden := n_masked(n_patches, cfg.mask.mask_ratio)) < n_patches:
            raise ValueError(
                f"objective.mask.mask_ratio {cfg.mask.mask_ratio} hides {n_hidden} of {n_patches} patches; some must be"
                " hidden and some visible"
            )
        return MaskedViews(cfg, (size // patch, size // patch), schemas)

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        view, mask = batch.pixels[_ROLE], batch.masks[_ROLE]
        features = self._decode(view, mask.ids_keep, mask.ids_masked)  # [B, M, d]
        pixels, statistics = self._split(self.student["output"](features, view.channels), view.channels)
        answers = {"pixels": pixels}
        if "statistics" in self.cfg.extra_targets:
            answers["statistics"] = statistics
        if "gradients" in self.cfg.extra_targets:
            answers["gradients"] = self.student["gradient_output"](features, view.channels)
        with torch.autocast(pixels.device.type, enabled=False):
            targets = self._targets(view, mask.ids_masked)
            parts = {name: masked_mse(pred.float(), *targets[name]) for name, pred in answers.items()}
            total = torch.stack(list(parts.values())).sum()
        return Losses(total=total, parts={name: part.detach() for name, part in parts.items()})

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {} if self.cfg.ema_momentum is None else {"momentum": Constant(self.cfg.ema_momentum)}

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.teacher is not None:
            ema_update_(self.teacher, self.student, now["momentum"], finite)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        view, mask = batch.pixels[_ROLE], batch.masks[_ROLE]
        pixels, hidden = view.pixels, mask.mask
        ids_hidden = hidden.nonzero()[:, 1].view(len(hidden), -1)  # [n, N-K]
        features = self._decode(view, mask.ids_keep, ids_hidden)  # [n, N-K, d]
        pred, statistics = self._split(self.student["output"](features, view.channels).float(), view.channels)
        patches = patchify(pixels, self.patch_size)  # [n, N, P*P*C]
        if self.cfg.norm_pix:
            mean, var = self._moments(_gather(patches, ids_hidden), statistics)
            pred = pred * (var + self.cfg.norm_pix_eps).sqrt() + mean  # [n, N-K, P*P*C]
        index = ids_hidden[..., None].expand_as(pred)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        masked = patches.masked_fill(hidden[..., None], torch.nan)  # a hole in the picture
        return {
            "input": pixels,
            "masked": unpatchify(masked, self.patch_size, grid),
            "reconstruction": unpatchify(patches.scatter(1, index, pred), self.patch_size, grid),
        }

    def _decode(self, view: PixelBatch, ids_keep: Tensor, ids: Tensor) -> Tensor:
        """Features `[B, M, d]` of the patches `ids [B, M]` from those at `ids_keep [B, K]` alone."""
        inputs = EncoderInput(view.pixels, view.channels, view.gsd_m, ids_keep=ids_keep)
        visible = self.student["encoder"]([inputs])[0]  # [B, P+K, D]
        features: Tensor = self.student["decoder"](visible, ids_keep, ids)
        return features

    def _split(self, values: Tensor, channels: ChannelMeta) -> tuple[Tensor, Tensor]:
        """Pixels `[B, M, P*P*C]` and statistics `[B, M, 2*C]` (empty unless asked for) of the head's output."""
        n_pixels = self.patch_size**2 * channels.n_channels
        return values[..., :n_pixels], values[..., n_pixels:]

    def _moments(self, truth: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each patch, `[B, M, 1]`: predicted ones if there are, else those of `truth`."""
        if "statistics" in self.cfg.extra_targets:
            mean, var = moments_of(statistics)
            return mean, var * (truth.shape[-1] / (truth.shape[-1] - 1))
        var, mean = torch.var_mean(truth, -1, keepdim=True)
        return mean, var

    def _targets(self, view: PixelBatch, ids: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Target and validity of each thing that is predicted for the patches `ids [B, M]`."""
        patches = _gather(patchify(view.pixels, self.patch_size), ids)  # [B, M, P*P*C]
        valid = None if view.valid is None else _gather(patchify(view.valid, self.patch_size), ids)
        targets = {
            "pixels": (
                normalise_patches(patches, valid, self.cfg.norm_pix_eps) if self.cfg.norm_pix else patches,
                valid,
            )
        }
        if "statistics" in self.cfg.extra_targets:
            targets["statistics"] = patch_statistics(patches, view.channels.n_channels, valid)
        if "gradients" in self.cfg.extra_targets:
            cfg = self.cfg
            histograms = gradient_histograms(
                view.pixels, self.patch_size, cfg.gradient_bins, cfg.gradient_cell_px, view.valid
            )
            targets["gradients"] = (
                _gather(histograms[0], ids),
                None if histograms[1] is None else _gather(histograms[1], ids),
            )
        return targets


def _gather(patches: Tensor, ids: Tensor) -> Tensor:
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))


def _tile_names(cfg: Config, schema: Mapping[str, TileSchema]) -> list[str]:
    """The tiles of a source that are learned from, all with as many bands."""
    if cfg.tile is None and len(schema) > 1:
        raise ValueError(f"objective.tile: a source has several tiles, name one or more of {', '.join(schema)}")
    allowed = list(schema) if cfg.tile is None else [cfg.tile] if isinstance(cfg.tile, str) else cfg.tile
    names = [name for name in schema if name in allowed]
    if not names:
        raise ValueError(
            f"objective.tile: no tile {', '.join(map(repr, allowed))} in a source that has {', '.join(schema)}"
        )
    if len({len(schema[name].bands) for name in names}) > 1:
        counts = ", ".join(f"{name} has {len(schema[name].bands)}" for name in names)
        raise ValueError(f"objective.tile: the tiles of one source need as many bands each, but {counts}")
    return names


def _output_head(cfg: Config, n_channels: int | None, patch_size: int) -> nn.Module:
    """The head that answers for every channel of a patch: its pixels, then its statistics if they are predicted."""
    n_values = patch_size**2 + 2 * ("statistics" in cfg.extra_targets)
    if cfg.output == "spectral":
        return SpectralOutput(cfg.decoder.embed_dim, n_values, cfg.spectral)
    if n_channels is None:
        raise ValueError("objective.output: linear needs sources with the same number of bands; use spectral")
    return LinearOutput(cfg.decoder.embed_dim, n_channels, n_values)
