"""CROMA (Fuller et al. 2023, arXiv 2311.00566): contrastive radar-optical masked autoencoders, for any two sensors.

Two groups of sensors look at one crop of the ground; they are called optical and radar, whatever they are. Each has an
encoder that sees a few patches of its view, other ones for each. The pooled views of one place are to be found among
those of all places (contrastive loss). A cross encoder, whose queries are radar patches and whose context are optical
ones, and a small decoder answer for the hidden patches of both (masked autoencoder).

B samples, N patches of a view, Q visible radar and K visible optical patches, M hidden ones, C channels, P patch size,
D encoder width, d decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_eo.data.masking import MaskConfig, draw, n_masked, stack_masks
from ssl_eo.data.multicrop import Image, crop_image, images_of
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, PixelBatch, Sample, View
from ssl_eo.distributed import local_part
from ssl_eo.losses.contrastive import pair_contrasts
from ssl_eo.losses.reconstruction import masked_mse, normalise_patches, patch_moments, patchify, pictures_of
from ssl_eo.models.cross_encoder import CrossEncoder, OpticalRadar, PairHead, PoolHead
from ssl_eo.models.decoders import DecoderConfig, LinearOutput, MaskedDecoder, SpectralConfig, SpectralOutput
from ssl_eo.models.position import take_patches
from ssl_eo.models.vit import EncoderConfig, EncoderInput, Tokens
from ssl_eo.objectives import base
from ssl_eo.objectives._groups import GROUPS, SensorGroups
from ssl_eo.objectives.base import Losses, Schemas, common_n_channels, encoder_for

__all__ = ["Config", "Objective", "PairedViews"]


@dataclass
class Config:
    """Values of the published code; it leaves crop and mask to its caller, and those are the paper's sizes."""

    # Which tiles are of which group: their names, or kinds (optical, thermal, sar, elevation) that all their bands are
    # of. Of several images of a group that a sample has (sensors, dates), one is drawn.
    optical: str | list[str] = "optical"
    radar: str | list[str] = "sar"  # likewise, of the other group
    published: Literal["optical", "radar"] = "optical"  # whose encoder is probed and exported
    radar_depth: int | None = None  # blocks of the radar encoder; null: half of model.depth, which is the optical one's
    cross_depth: int | None = None  # blocks of the cross encoder; null: half of model.depth
    crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=120))  # of both, on the same ground
    mask: MaskConfig = field(default_factory=MaskConfig)  # drawn for each group by itself
    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(embed_dim=512, depth=1, n_heads=8, norm_eps=1e-5)
    )
    output: Literal["spectral", "linear"] = "linear"  # of each group: any sensor; or one fixed number of channels
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    # What mean and variance are taken out of before a patch is predicted: all values of both views there; those of
    # each view by itself; or none.
    norm_pix: Literal["joint", "group", "none"] = "joint"
    norm_pix_eps: float = 1e-6  # added to that variance
    contrast_weight: float = 1.0  # of the contrastive loss
    mae_weight: float = 1.0  # of the reconstruction, the sum of both groups' means
    temperature: float = 0.07  # of the contrastive loss at the start; it is learned
    min_temperature: float = 0.01  # it is held there or above, after each step

    def __post_init__(self) -> None:
        for key in ("radar_depth", "cross_depth"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, or null for half of model.depth, got {value}")
        for key in ("contrast_weight", "mae_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.contrast_weight and not self.mae_weight:
            raise ValueError("contrast_weight and mae_weight are both 0: nothing would be learned")
        if not 0 < self.min_temperature <= self.temperature:
            raise ValueError(
                "temperature must be at least min_temperature, and that above 0, got"
                f" {self.temperature} and {self.min_temperature}"
            )
        if not self.norm_pix_eps > 0:
            raise ValueError(f"norm_pix_eps must be positive, got {self.norm_pix_eps}")
        if self.mask.predict_ratio != 1:
            raise ValueError(
                f"mask.predict_ratio must be 1, got {self.mask.predict_ratio}: the decoder answers for every patch,"
                " since those hidden in one view are visible in the other"
            )


class PairedPlan(NamedTuple):
    """A view of each group on the same ground, and which patches of each are hidden."""

    views: dict[str, View]
    hidden: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class PairedViews:
    """One random crop of each sample, through an image of each group, and a random mask for each."""

    cfg: Config
    grid: tuple[int, int]
    schemas: Schemas
    groups: SensorGroups

    def plan(self, sample: Sample, rng: np.random.Generator) -> PairedPlan:
        images = {group: _one_of(images_of(sample, self.groups.names(sample, group)), rng) for group in GROUPS}
        plans = iter(crop_image(sample, tuple(name for image in images.values() for name in image), self.cfg.crop, rng))
        parts = {group: tuple(next(plans) for _ in image) for group, image in images.items()}
        return PairedPlan(
            views={group: found if len(found) > 1 else found[0] for group, found in parts.items()},
            hidden={group: draw(self.cfg.mask, rng, self.grid) for group in GROUPS},
        )

    def collate(
        self, planned: list[tuple[Sample, PairedPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples, plans = [sample for sample, _ in planned], [plan for _, plan in planned]
        order = sorted(GROUPS, key=lambda group: group != self.cfg.published)  # the published encoder's view is first
        roles = {group: [[plan.views[group] for plan in plans]] for group in order}
        tiles, views = stack(samples, roles, self.schemas[source])
        masks = {group: stack_masks([plan.hidden[group] for plan in plans]) for group in order}
        return Batch(step, source, [sample.key for sample in samples], tiles, views, masks)


def _one_of(images: list[Image], rng: np.random.Generator) -> Image:
    return images[0] if len(images) == 1 else images[int(rng.integers(len(images)))]


class Objective(base.Objective):
    """Student: encoders and pooling heads of both groups, cross encoder, projections, decoder, output heads.

    `student["encoder"]` is the published one of the two, `student["radar_encoder"]` or `["optical_encoder"]` the other.
    """

    batch_coupled: ClassVar[bool] = True

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_size = encoder_cfg.patch_size
        if encoder_cfg.mask_token:
            raise ValueError("model.mask_token: hidden patches never reach an encoder of croma; leave it false")
        groups = SensorGroups.of(cfg.optical, cfg.radar, schemas)
        half = max(1, encoder_cfg.n_blocks // 2)
        configs = {"optical": encoder_cfg, "radar": replace(encoder_cfg, depth=cfg.radar_depth or half)}
        encoders = {group: encoder_for(configs[group], groups.shown(group)) for group in GROUPS}
        self.student = nn.ModuleDict({self._encoder_name(group): encoder for group, encoder in encoders.items()})
        width = encoder_cfg.width
        self.student["cross_encoder"] = CrossEncoder(encoder_cfg, cfg.cross_depth or half)
        for group in GROUPS:
            self.student[f"{group}_head"] = PoolHead(width, encoder_cfg.norm_eps)
        self.student["pair_head"] = PairHead(width, cfg.temperature)
        self.student["decoder"] = MaskedDecoder(cfg.decoder, width)
        for group in GROUPS:
            n_channels = common_n_channels(groups.shown(group))
            self.student[f"{group}_output"] = _output_head(cfg, group, n_channels, self.patch_size)
        self.teacher = None
        self.published = cfg.published
        self.shown = {group: groups.shown(group) for group in GROUPS}

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> PairedViews:
        size, patch = cfg.crop.size_px, encoder_cfg.patch_size
        if size % patch:
            raise ValueError(f"objective.crop.size_px {size} is not a multiple of model.patch_size {patch}")
        n_patches = (size // patch) ** 2
        if not 0 < (n_hidden := n_masked(n_patches, cfg.mask.mask_ratio)) < n_patches:
            raise ValueError(
                f"objective.mask.mask_ratio {cfg.mask.mask_ratio} hides {n_hidden} of {n_patches} patches; some must be"
                " hidden and some visible"
            )
        groups = SensorGroups.of(cfg.optical, cfg.radar, schemas)
        return PairedViews(cfg, (size // patch, size // patch), schemas, groups)

    def whole(self) -> OpticalRadar:
        """The parts that outlive pretraining, as one model that shares their weights."""
        part: Any = self.student
        optical, radar = (part[self._encoder_name(group)] for group in GROUPS)
        return OpticalRadar(optical, radar, part["cross_encoder"], part["optical_head"], part["radar_head"])

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        cfg, student = self.cfg, self.student
        tokens = {group: self._encode_visible(batch, group) for group in GROUPS}
        pooled = [student[f"{group}_head"](tokens[group]) for group in GROUPS]  # [B, D] each
        optical, radar, logit_scale = student["pair_head"](*pooled)
        predicted = self._predict(batch, tokens)
        with torch.autocast(optical.device.type, enabled=False):
            contrasts = pair_contrasts(optical.float(), radar.float(), logit_scale)
            targets = self._targets(batch.pixels)
            parts = {"contrast": torch.stack([contrast.loss() for contrast in contrasts]).mean()}
            for group, (target, valid) in targets.items():
                ids = batch.masks[group].ids_masked
                of_hidden = [
                    None if x is None else take_patches(x, ids) for x in (predicted[group].float(), target, valid)
                ]
                parts[group] = masked_mse(*of_hidden)  # type: ignore[arg-type]  # only valid may be None
            mae = parts["optical"] + parts["radar"]
            total = cfg.contrast_weight * parts["contrast"] + cfg.mae_weight * mae
            accuracy = torch.stack([contrast.accuracy() for contrast in contrasts]).mean()
        return Losses(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            metrics={"contrast_accuracy": accuracy, "temperature": (-logit_scale.detach().float()).exp()},
        )

    @torch.no_grad()
    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        # Once pairs are told apart the scale would grow for ever, and with it the gradients of the few that are not. In
        # the forward pass a clamp would take the scale's gradient away, and it would never come back.
        head = self.student["pair_head"]
        assert isinstance(head, PairHead)
        scale = local_part(head.logit_scale)
        finite = finite.to(scale.device)
        scale.copy_(torch.where(finite > 0, scale.clamp(max=-math.log(self.cfg.min_temperature)), scale))

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Of the published encoder's group."""
        group = self.cfg.published
        view, hidden = batch.pixels[group], batch.masks[group].mask
        predicted = self._predict(batch, {group: self._encode_visible(batch, group) for group in GROUPS})[group]
        patches = patchify(view.pixels, self.patch_size)  # [n, N, P*P*C]
        mean, std = self._taken_out(batch.pixels)
        grid = (view.pixels.shape[2] // self.patch_size, view.pixels.shape[3] // self.patch_size)
        return pictures_of(patches, hidden, predicted.float() * std + mean, self.patch_size, grid)

    def _encoder_name(self, group: str) -> str:
        return "encoder" if group == self.cfg.published else f"{group}_encoder"

    def _encode_visible(self, batch: Batch, group: str) -> Tokens:
        view, ids_keep = batch.pixels[group], batch.masks[group].ids_keep
        inputs = EncoderInput(view.pixels, view.channels, view.gsd_m, ids_keep=ids_keep)
        tokens: Tokens = self.student[self._encoder_name(group)]([inputs])[0]
        return tokens

    def _predict(self, batch: Batch, tokens: Mapping[str, Tokens]) -> dict[str, Tensor]:
        """For each group the pixels of all patches, `[B, N, P*P*C]`; a hidden one may be visible in the other view."""
        ids = {group: batch.masks[group].ids_keep for group in GROUPS}
        joint = self.student["cross_encoder"](tokens["radar"], tokens["optical"], ids["radar"], ids["optical"])
        features = self.student["decoder"](joint, ids["radar"], batch.masks["radar"].ids_masked, all_patches=True)
        return {group: self.student[f"{group}_output"](features, batch.pixels[group].channels) for group in GROUPS}

    def _targets(self, pixels: Mapping[str, PixelBatch]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """For each group what is to be predicted of all patches, `[B, N, P*P*C]`, and its validity."""
        patches, valid = self._patches(pixels)
        if self.cfg.norm_pix == "joint":
            sizes = [patches[group].shape[-1] for group in GROUPS]
            both = normalise_patches(*self._joined(patches, valid), self.cfg.norm_pix_eps)
            patches = dict(zip(GROUPS, torch.split(both, sizes, dim=-1), strict=True))
        elif self.cfg.norm_pix == "group":
            patches = {g: normalise_patches(patches[g], valid[g], self.cfg.norm_pix_eps) for g in GROUPS}
        return {group: (patches[group], valid[group]) for group in GROUPS}

    def _taken_out(self, pixels: Mapping[str, PixelBatch]) -> tuple[Tensor | float, Tensor | float]:
        """Mean and spread that were taken out of the published group's patches, `[n, N, 1]` each."""
        if self.cfg.norm_pix == "none":
            return 0.0, 1.0
        patches, valid = self._patches(pixels)
        is_joint = self.cfg.norm_pix == "joint"
        group = self.cfg.published
        mean, var = patch_moments(*(self._joined(patches, valid) if is_joint else (patches[group], valid[group])))
        return mean, (var + self.cfg.norm_pix_eps).sqrt()

    def _patches(self, pixels: Mapping[str, PixelBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Values and validity of all patches by group, `[B, N, P*P*C]`."""
        patches, valid = {}, {}
        for group in GROUPS:
            view = pixels[group]
            patches[group] = patchify(view.pixels, self.patch_size)
            valid[group] = None if view.valid is None else patchify(view.valid, self.patch_size)
        return patches, valid

    def _joined(
        self, patches: Mapping[str, Tensor], valid: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Of both groups side by side."""
        both = torch.cat([patches[group] for group in GROUPS], dim=-1)
        if all(valid[group] is None for group in GROUPS):
            return both, None
        known = [torch.ones_like(patches[g], dtype=torch.bool) if (v := valid[g]) is None else v for g in GROUPS]
        return both, torch.cat(known, dim=-1)


def _output_head(cfg: Config, group: str, n_channels: int | None, patch_size: int) -> nn.Module:
    if cfg.output == "spectral":
        return SpectralOutput(cfg.decoder.embed_dim, patch_size**2, cfg.spectral)
    if n_channels is None:
        raise ValueError(f"objective.output: linear needs one number of bands in objective.{group}; use spectral")
    return LinearOutput(cfg.decoder.embed_dim, n_channels, patch_size**2)
