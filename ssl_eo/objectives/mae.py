"""Masked autoencoder (He et al. 2022, arXiv 2111.06377) on any sensor.

A view is cut into patches, most are hidden, the encoder sees the visible ones, a small decoder predicts the pixels of
the hidden ones. The spectral output head predicts any set of channels with the same weights. A view may be a series of
several dates (Prithvi, arXiv 2310.18660 and 2412.02732): then patches of all its dates are hidden and predicted.

B batch, C channels, T dates of a view, s of a tubelet, H W pixels, P patch size, N patches of a view, K visible, M
predicted, D encoder width, d decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.data.masked_views import ROLE, MaskedViews
from ssl_eo.data.masking import MaskConfig
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.series import SeriesConfig, series_of
from ssl_eo.data.types import Batch, PixelBatch
from ssl_eo.losses.reconstruction import masked_mse, normalise_patches, patch_moments, patchify, pictures_of
from ssl_eo.losses.targets import gradient_histograms, moments_of, patch_statistics
from ssl_eo.models.decoders import DecoderConfig, LinearOutput, MaskedDecoder, SpectralConfig, SpectralOutput
from ssl_eo.models.position import sincos_grid, take_patches
from ssl_eo.models.space_time import CoordinateEncoding, below_each_other, one_by_one, sincos_3d
from ssl_eo.models.vit import EncoderConfig, EncoderInput, Tokens
from ssl_eo.objectives import base
from ssl_eo.objectives.base import Losses, Schemas, common_n_channels, ema_update_, encoder_for, teacher_of
from ssl_eo.schedules import Constant, Schedule
from ssl_eo.sensors import ChannelMeta

__all__ = ["Config", "Objective"]


@dataclass
class Config:
    """Paper values where the paper has one; sizes are those of the debug scale and are set by recipes."""

    # Which tile of a sample to learn from; null: its only one. Of a list, one that the sample has is drawn (products or
    # sensors with as many bands), or as many as a series has dates.
    tile: str | list[str] | None = None
    series: SeriesConfig = field(default_factory=SeriesConfig)
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


class Objective(base.Objective):
    """`student` is encoder, decoder and output head; the teacher, if any, is the moving average of the encoder."""

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        tiles = _views_of(cfg, encoder_cfg, schemas).tiles
        if encoder_cfg.mask_token:
            raise ValueError("model.mask_token: hidden patches never reach the encoder of mae; leave it false")
        encoder = encoder_for(encoder_cfg, tiles, takes_series=True)
        self.patch_size, self.tubelet = encoder_cfg.patch_size, encoder_cfg.tubelet
        self.is_series = cfg.series.n_dates > 1
        self.has_dated_positions = self.is_series or encoder_cfg.position == "sincos_3d"
        self.student = nn.ModuleDict(
            {
                "encoder": encoder,
                "decoder": MaskedDecoder(cfg.decoder, encoder_cfg.width),
                "output": _output_head(cfg, common_n_channels(tiles), encoder_cfg),
            }
        )
        for name in ("time_encoding", "location_encoding"):
            if getattr(encoder_cfg, name):
                self.student[f"decoder_{name}"] = CoordinateEncoding(cfg.decoder.embed_dim)
        if "gradients" in cfg.extra_targets:
            n_cells = (self.patch_size // cfg.gradient_cell_px) ** 2
            self.student["gradient_output"] = LinearOutput(cfg.decoder.embed_dim, cfg.gradient_bins, n_cells)
        self.teacher = None if cfg.ema_momentum is None else teacher_of(self.student, ["encoder"])

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MaskedViews:
        patch, cell = encoder_cfg.patch_size, cfg.gradient_cell_px
        if "gradients" in cfg.extra_targets and patch % cell:
            raise ValueError(f"objective.gradient_cell_px {cell} does not divide model.patch_size {patch}")
        _check_series(cfg, encoder_cfg)
        views = _views_of(cfg, encoder_cfg, schemas)
        views.check()
        return views

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        view, mask = self._view(batch), batch.masks[ROLE]
        features = self._decode(view, batch.meta, mask.ids_keep, mask.ids_masked)  # [B, M, d]
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
        told = {f"known_{name}": values.isfinite().float().mean() for name, values in batch.meta.items()}
        return Losses(total=total, parts={name: part.detach() for name, part in parts.items()}, metrics=told)

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {} if self.cfg.ema_momentum is None else {"momentum": Constant(self.cfg.ema_momentum)}

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.teacher is not None:
            ema_update_(self.teacher, self.student, now["momentum"], finite)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        view, mask = self._view(batch), batch.masks[ROLE]
        pixels, hidden = self._tall(view.pixels), mask.mask
        ids_hidden = hidden.nonzero()[:, 1].view(len(hidden), -1)  # [n, N-K]
        features = self._decode(view, batch.meta, mask.ids_keep, ids_hidden)  # [n, N-K, d]
        pred, statistics = self._split(self.student["output"](features, view.channels).float(), view.channels)
        patches = patchify(pixels, self.patch_size)  # [n, N, P*P*C]
        if self.cfg.norm_pix:
            valid = None if view.valid is None else patchify(self._tall(view.valid), self.patch_size)
            known = None if valid is None else take_patches(valid, ids_hidden)
            mean, var = self._patch_moments(take_patches(patches, ids_hidden), known, statistics)
            pred = pred * (var + self.cfg.norm_pix_eps).sqrt() + mean  # [n, N-K, P*P*C]
        index = ids_hidden[..., None].expand_as(pred)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        pictures = pictures_of(patches, hidden, patches.scatter(1, index, pred), self.patch_size, grid)
        if self.tubelet == 1:
            return pictures
        n_dates = self.cfg.series.n_dates
        return {name: one_by_one(tall, n_dates, self.tubelet).flatten(2, 3) for name, tall in pictures.items()}

    def _view(self, batch: Batch) -> PixelBatch:
        """Pixels `[B, C, H, W]`, or `[B, C, T, H, W]` of a series."""
        view = batch.pixels[ROLE]
        return series_of(view, self.cfg.series.n_dates) if self.is_series else view

    def _tall(self, values: Tensor) -> Tensor:
        """`[B, C, T, H, W]` as what patches are cut from: `[B, C*s, T/s*H, W]`."""
        return below_each_other(values, self.tubelet) if self.is_series else values

    def _decode(self, view: PixelBatch, meta: Mapping[str, Tensor], ids_keep: Tensor, ids: Tensor) -> Tensor:
        """Features `[B, M, d]` of the patches `ids [B, M]` from those at `ids_keep [B, K]` alone."""
        inputs = EncoderInput(view.pixels, view.channels, view.gsd_m, ids_keep=ids_keep, **meta)
        visible = self.student["encoder"]([inputs])[0]  # [B, P+K, D]
        features: Tensor = self.student["decoder"](visible, ids_keep, ids, self._decoder_table(visible, meta))
        return features

    def _decoder_table(self, tokens: Tokens, meta: Mapping[str, Tensor]) -> Tensor | None:
        """What is added to the patches in the decoder, `[N, d]` or `[B, N, d]`; None for its own table of a grid."""
        dim, device, student = self.cfg.decoder.embed_dim, tokens.x.device, self.student
        if not self.has_dated_positions and not meta:
            return None
        if self.has_dated_positions:
            table = sincos_3d(tokens.n_steps, tokens.grid, dim, tokens.grid[0], device)
        else:
            table = sincos_grid(tokens.grid, dim, device)
        if "decoder_time_encoding" in student:
            when = student["decoder_time_encoding"](meta["dates"])  # [B, T, d]
            table = table + when.repeat_interleave(tokens.grid[0] * tokens.grid[1], dim=1)
        if "decoder_location_encoding" in student:
            table = table + student["decoder_location_encoding"](meta["location"])[:, None]
        return table

    def _split(self, values: Tensor, channels: ChannelMeta) -> tuple[Tensor, Tensor]:
        """Pixels `[B, M, P*P*C*s]` and statistics `[B, M, 2*C*s]` (empty unless asked for) of the head's output."""
        n_pixels = self.patch_size**2 * channels.n_channels * self.tubelet
        return values[..., :n_pixels], values[..., n_pixels:]

    def _patch_moments(self, truth: Tensor, valid: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each patch, `[B, M, 1]`: predicted ones if there are, else those of `truth`."""
        if "statistics" in self.cfg.extra_targets:
            mean, var = moments_of(statistics)
            return mean, var * (truth.shape[-1] / (truth.shape[-1] - 1))
        return patch_moments(truth, valid)

    def _targets(self, view: PixelBatch, ids: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Target and validity of each thing that is predicted for the patches `ids [B, M]`."""
        patches = take_patches(patchify(self._tall(view.pixels), self.patch_size), ids)  # [B, M, P*P*C*s]
        valid = None if view.valid is None else take_patches(patchify(self._tall(view.valid), self.patch_size), ids)
        targets = {
            "pixels": (
                normalise_patches(patches, valid, self.cfg.norm_pix_eps) if self.cfg.norm_pix else patches,
                valid,
            )
        }
        if "statistics" in self.cfg.extra_targets:
            targets["statistics"] = patch_statistics(patches, view.channels.n_channels * self.tubelet, valid)
        if "gradients" in self.cfg.extra_targets:
            values, known = self._histograms(view)
            targets["gradients"] = (take_patches(values, ids), None if known is None else take_patches(known, ids))
        return targets

    def _histograms(self, view: PixelBatch) -> tuple[Tensor, Tensor | None]:
        """Those of all patches, `[B, N, Q]`, and their validity; each date by itself, since its edges are none."""
        cfg, n_samples = self.cfg, len(view.pixels)
        pixels, valid = (
            values.transpose(1, 2).flatten(0, 1) if values is not None and self.is_series else values
            for values in (view.pixels, view.valid)
        )  # [B*T, C, H, W]
        assert pixels is not None
        values, known = gradient_histograms(pixels, self.patch_size, cfg.gradient_bins, cfg.gradient_cell_px, valid)
        by_sample = (n_samples, -1, values.shape[-1])
        return values.view(by_sample), None if known is None else known.view(by_sample)


def _views_of(cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MaskedViews:
    told = {"dates": encoder_cfg.time_encoding, "location": encoder_cfg.location_encoding}
    tells = tuple(key for key, is_told in told.items() if is_told)
    size = encoder_cfg.patch_size, encoder_cfg.tubelet
    return MaskedViews(cfg.crop, cfg.mask, *size, schemas, cfg.tile, cfg.series, tells)


def _check_series(cfg: Config, encoder_cfg: EncoderConfig) -> None:
    """Raise `ValueError` where the model cannot take so many dates, or a target is not defined for tubelets."""
    n_dates, tubelet, dim = cfg.series.n_dates, encoder_cfg.tubelet, cfg.decoder.embed_dim
    if n_dates % tubelet:
        raise ValueError(f"model.tubelet {tubelet} does not divide objective.series.n_dates {n_dates}")
    if tubelet > 1 and (cfg.output == "spectral" or "gradients" in cfg.extra_targets):
        raise ValueError(f"model.tubelet {tubelet} needs objective.output: linear, and no gradients in extra_targets")
    if n_dates > tubelet and encoder_cfg.position != "sincos_3d" and not encoder_cfg.time_encoding:
        raise ValueError(
            f"nothing would tell the {n_dates} dates of objective.series.n_dates apart: set model.position: sincos_3d,"
            " or model.time_encoding: true"
        )
    if (n_dates > 1 or encoder_cfg.position == "sincos_3d") and dim % 16:
        raise ValueError(
            "objective.decoder.embed_dim must be divisible by 16 for several dates or model.position sincos_3d, got"
            f" {dim}"
        )
    for key, dropped, is_told in (
        ("time_encoding", "drop_dates_prob", encoder_cfg.time_encoding),
        ("location_encoding", "drop_location_prob", encoder_cfg.location_encoding),
    ):
        if not is_told and (prob := getattr(cfg.series, dropped)):
            raise ValueError(
                f"objective.series.{dropped} is {prob}, but nothing is told to the model: set it to 0, or"
                f" model.{key}: true"
            )


def _output_head(cfg: Config, n_channels: int | None, encoder_cfg: EncoderConfig) -> nn.Module:
    """The head that answers for every channel of a patch: its pixels, then its statistics if they are predicted."""
    n_values = encoder_cfg.patch_size**2 + 2 * ("statistics" in cfg.extra_targets)
    if cfg.output == "spectral":
        return SpectralOutput(cfg.decoder.embed_dim, n_values, cfg.spectral)
    if n_channels is None:
        raise ValueError("objective.output: linear needs sources with the same number of bands; use spectral")
    return LinearOutput(cfg.decoder.embed_dim, n_channels * encoder_cfg.tubelet, n_values)
