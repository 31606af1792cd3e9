"""DOFA (Xiong et al. 2024, arXiv 2403.15356): one encoder for all sensors, whose kernels are written from wavelengths.

A masked autoencoder whose patch embedding and output layer are both generated from the wavelengths of the channels;
beside it, the student's features of a few channels are to be like those of a frozen encoder that knows images already.
A batch is of one sensor, so each generator runs once for a set of channels and step.

B batch, C channels, H W pixels, P patch size, N patches, K visible, M predicted, L tokens, D encoder width, T teacher
width, c channels that the teacher sees, G generator width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.data.masked_views import MaskedPlan, MaskedViews
from ssl_eo.data.masking import MaskConfig, stack_masks
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, PixelBatch, Sample, TileSchema, ViewPlan
from ssl_eo.losses.feature_distillation import cosine_loss
from ssl_eo.losses.reconstruction import masked_mse, normalise_patches, patch_moments, patchify, pictures_of
from ssl_eo.models.decoders import DecoderConfig, MaskedDecoder
from ssl_eo.models.generated_output import GeneratedOutput
from ssl_eo.models.heads import MLPHead
from ssl_eo.models.patch_embed import DynamicPatchEmbed
from ssl_eo.models.position import take_patches
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.objectives import base
from ssl_eo.objectives.base import Losses, Schemas, encoder_for

__all__ = ["Config", "DofaViews", "Objective"]

_ROLE, _COMPARED = "image", "compared"


@dataclass
class Config:
    """Paper values where the paper has one; sizes are those of the debug scale and are set by recipes."""

    # Which tile of a sample to learn from; null: its only one. Of a list, the one that a source has.
    tile: str | list[str] | None = None
    crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=64))
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    norm_pix: bool = True  # predict each patch with its own mean and variance taken out
    norm_pix_eps: float = 1e-6  # added to that variance; larger values stop flat patches from becoming pure noise
    # The frozen encoder whose features are learned from; its weights come by `init`. null: pixels alone are learned
    # from.
    teacher: EncoderConfig | None = None
    random_teacher: bool = False  # let the teacher keep random weights, where only the engine is to be tried
    distill_weight: float = 1.0  # of the loss between student and teacher
    # Side of the view that both see, pixels; null: crop.size_px. They see every patch, and so cost most of a step:
    # half the side is a quarter of that.
    distill_size_px: int | None = None
    # Which bands both see: of optical tiles those nearest to these wavelengths (micrometres), each once; of SAR tiles
    # VV and VH. A teacher with a convolution has as many channels as wavelengths are named here.
    distill_um: list[float] = field(default_factory=lambda: [0.665, 0.56, 0.49])
    distill_bands: dict[str, list[str]] = field(default_factory=dict)  # {tile: bands} where others are to be seen

    def __post_init__(self) -> None:
        if not self.norm_pix_eps > 0:
            raise ValueError(f"norm_pix_eps must be positive, got {self.norm_pix_eps}")
        if not self.distill_weight > 0:
            raise ValueError(
                f"distill_weight must be positive, got {self.distill_weight}; leave it out by teacher: null"
            )
        if self.random_teacher and self.teacher is None:
            raise ValueError("random_teacher is true, but teacher says of no encoder what it is")
        if self.distill_size_px is not None and self.distill_size_px < 1:
            raise ValueError(
                f"distill_size_px must be at least 1, or null for crop.size_px, got {self.distill_size_px}"
            )
        if not self.distill_um or not all(um > 0 for um in self.distill_um):
            raise ValueError(f"distill_um must be one or more positive micrometres, got {self.distill_um}")
        for tile, bands in self.distill_bands.items():
            if not bands or len(set(bands)) < len(bands):
                raise ValueError(f"distill_bands.{tile} must name at least one band, and each once, got {bands}")


class DofaPlan(NamedTuple):
    """One masked view; and the same view of a few bands, perhaps smaller, for student and teacher to compare."""

    masked: MaskedPlan
    compared: ViewPlan | None


@dataclass(frozen=True)
class DofaViews:
    """One random crop and one random mask for each sample; the same crop, whole and of a few bands, for the teacher."""

    masked: MaskedViews
    bands: Mapping[tuple[str, tuple[str, ...]], tuple[int, ...]]  # of (tile, its bands); empty without a teacher
    size_px: int  # of the view for the teacher

    def plan(self, sample: Sample, rng: np.random.Generator) -> DofaPlan:
        masked = self.masked.plan(sample, rng)
        if not self.bands:
            return DofaPlan(masked, None)
        (view,), size = masked.views, (self.size_px, self.size_px)
        bands = self.bands[view.tile, tuple(sample.tiles[view.tile].bands)]
        return DofaPlan(masked, replace(view, size=size, bands=bands))

    def collate(
        self, planned: list[tuple[Sample, DofaPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples, masked = [sample for sample, _ in planned], [plan.masked for _, plan in planned]
        roles = {_ROLE: [[plan.views[0] for plan in masked]]}
        if self.bands:
            compared = [plan.compared for _, plan in planned if plan.compared is not None]
            assert len(compared) == len(planned), "a view for the teacher is missing"
            roles[_COMPARED] = [compared]
        tiles, views = stack(samples, roles, self.masked.schemas[source])
        masks = stack_masks([plan.hidden for plan in masked], [plan.predicted for plan in masked])
        return Batch(step, source, [sample.key for sample in samples], tiles, views, {_ROLE: masks})


class Objective(base.Objective):
    """`student` is encoder, decoder, output head, and projector to the teacher's features; the teacher is frozen."""

    frozen_teacher: ClassVar[bool] = True

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        tiles = [schema[_tile_of(cfg, schema)] for schema in schemas]
        _check_student(encoder_cfg)
        self.patch_size = encoder_cfg.patch_size
        self.student = nn.ModuleDict(
            {
                "encoder": encoder_for(encoder_cfg, tiles),
                "decoder": MaskedDecoder(cfg.decoder, encoder_cfg.width),
                "output": GeneratedOutput(cfg.decoder.embed_dim, encoder_cfg.patch_size**2, encoder_cfg.dynamic),
            }
        )
        self.teacher = None
        if cfg.teacher is not None:
            width = cfg.teacher.width
            self.student["projector"] = MLPHead(encoder_cfg.width, width, width, n_layers=1, batch_norm=False)
            teacher = nn.ModuleDict({"encoder": _teacher_for(cfg, cfg.teacher, schemas)})
            self.teacher = teacher.requires_grad_(False).eval()

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> DofaViews:
        chosen = [(name := _tile_of(cfg, schema), schema[name]) for schema in schemas]
        for name in cfg.distill_bands:
            if name not in (known := list(dict.fromkeys(tile for tile, _ in chosen))):
                raise ValueError(
                    f"objective.distill_bands: {name} is no tile that is learned from (these are {', '.join(known)})"
                )
        masked = MaskedViews(cfg.crop, cfg.mask, encoder_cfg.patch_size, 1, schemas, cfg.tile)
        masked.check()
        size = cfg.distill_size_px or cfg.crop.size_px
        if cfg.teacher is None:
            return DofaViews(masked, {}, size)
        for key, patch in ("model", encoder_cfg.patch_size), ("objective.teacher", cfg.teacher.patch_size):
            if size % patch:
                raise ValueError(
                    f"objective.distill_size_px, or else objective.crop.size_px, {size} is not a multiple of"
                    f" {key}.patch_size {patch}"
                )
        bands = {(name, tuple(tile.bands)): _compared_bands(cfg, name, tile) for name, tile in chosen}
        return DofaViews(masked, bands, size)

    def given(self) -> dict[str, str]:
        if self.teacher is None or self.cfg.random_teacher:
            return {}
        return {
            "teacher.": "nothing is learned from a random teacher: write"
            r" init: [{path: BUNDLE, rename: {'^encoder\.': 'teacher.encoder.'}}] into the config, where BUNDLE is the"
            " folder that ssl-eo import wrote of a published encoder (for a file of weights, rename: {'^':"
            " 'teacher.encoder.'}); to try the engine only, set objective.random_teacher: true; objective.teacher: null"
            " learns from pixels alone"
        }

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        view, mask = batch.pixels[_ROLE].of_one_sensor(), batch.masks[_ROLE]
        pred = self._predict(view, mask.ids_keep, mask.ids_masked)  # [B, M, P*P*C]
        features = None if self.teacher is None else self._compare(batch.pixels[_COMPARED].of_one_sensor())
        with torch.autocast(pred.device.type, enabled=False):
            parts = {"pixels": (1.0, masked_mse(pred.float(), *self._target(view, mask.ids_masked)))}
            if features is not None:
                found, wanted = features
                parts["distill"] = (self.cfg.distill_weight, cosine_loss(found.float(), wanted.float()))
            total = torch.stack([weight * loss for weight, loss in parts.values()]).sum()
        return Losses(total=total, parts={name: loss.detach() for name, (_, loss) in parts.items()})

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """As the masked autoencoder's; a prediction without mean and variance gets those of the true patch."""
        view, hidden = batch.pixels[_ROLE].of_one_sensor(), batch.masks[_ROLE].mask
        ids = hidden.nonzero()[:, 1].view(len(hidden), -1)  # [n, N-K]
        pred = self._predict(view, batch.masks[_ROLE].ids_keep, ids).float()  # [n, N-K, P*P*C]
        patches = patchify(view.pixels, self.patch_size)  # [n, N, P*P*C]
        if self.cfg.norm_pix:
            valid = None if view.valid is None else take_patches(patchify(view.valid, self.patch_size), ids)
            mean, var = patch_moments(take_patches(patches, ids), valid)
            pred = pred * (var + self.cfg.norm_pix_eps).sqrt() + mean
        grid = (view.pixels.shape[2] // self.patch_size, view.pixels.shape[3] // self.patch_size)
        predicted = patches.scatter(1, ids[..., None].expand_as(pred), pred)
        return pictures_of(patches, hidden, predicted, self.patch_size, grid)

    def _predict(self, view: PixelBatch, ids_keep: Tensor, ids: Tensor) -> Tensor:
        """Values `[B, M, P*P*C]` of the patches `ids [B, M]` from those at `ids_keep [B, K]` alone."""
        encoder = self.published_encoder()
        visible = encoder([EncoderInput(view.pixels, view.channels, view.gsd_m, ids_keep=ids_keep)])[0]  # [B, P+K, D]
        features = self.student["decoder"](visible, ids_keep, ids)  # [B, M, d]
        embed = encoder.patch_embed
        assert isinstance(embed, DynamicPatchEmbed)
        # As in DOFA both generators read the same codes, and train them.
        values: Tensor = self.student["output"](features, embed.codes(view.channels))
        return values

    def _target(self, view: PixelBatch, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values `[B, M, P*P*C]` of the patches `ids [B, M]`, and which of them were measured."""
        target = take_patches(patchify(view.pixels, self.patch_size), ids)
        valid = None if view.valid is None else take_patches(patchify(view.valid, self.patch_size), ids)
        return normalise_patches(target, valid, self.cfg.norm_pix_eps) if self.cfg.norm_pix else target, valid

    def _compare(self, view: PixelBatch) -> tuple[Tensor, Tensor]:
        """Features `[B, T]` of the student and of the teacher: the mean over all tokens of the last block but one."""
        assert self.teacher is not None
        teacher = self.teacher["encoder"]
        assert isinstance(teacher, Encoder)
        inputs = EncoderInput(view.pixels, view.channels, view.gsd_m)
        found: Tensor = self.student["projector"](_mean_token(self.published_encoder(), inputs))
        with torch.no_grad():
            if teacher.n_channels is not None:  # channels for which there is no band are 0, as in DOFA
                n_missing = teacher.n_channels - view.pixels.shape[1]
                inputs = replace(inputs, pixels=F.pad(view.pixels, (0, 0, 0, 0, 0, n_missing)))
            return found, _mean_token(teacher, inputs)


def _mean_token(encoder: Encoder, inputs: EncoderInput) -> Tensor:
    """The mean `[B, D]` over CLS and patches, of the last block but one, before any norm; registers are left out."""
    (tokens,) = encoder.intermediates(inputs, [len(encoder.blocks) - 2], norm=False)  # [B, L, D]
    n_cls = tokens.n_prefix_tokens - encoder.cfg.n_registers
    return torch.cat((tokens.x[:, :n_cls], tokens.patches), dim=1).mean(1)


def _check_student(cfg: EncoderConfig) -> None:
    if cfg.patch_embed != "dynamic":
        raise ValueError(
            f"model.patch_embed must be dynamic, whose kernels dofa generates from wavelengths, got {cfg.patch_embed}"
        )
    if cfg.mask_token:
        raise ValueError("model.mask_token: hidden patches never reach the encoder of dofa; leave it false")
    if cfg.n_blocks < 2:
        raise ValueError(f"model.depth must be at least 2: the last block but one is compared, got {cfg.n_blocks}")


def _teacher_for(cfg: Config, teacher_cfg: EncoderConfig, schemas: Schemas) -> Encoder:
    """The teacher, with a channel for each of `distill_um` if it is a convolution; it can embed what it is to see."""
    if teacher_cfg.takes_series and teacher_cfg.position != "sincos_3d":
        raise ValueError("objective.teacher: it sees single dates, without when and where; leave tubelet and codes out")
    if teacher_cfg.n_blocks < 2:
        raise ValueError(f"objective.teacher.depth must be at least 2, got {teacher_cfg.n_blocks}")
    is_conv, n_channels = teacher_cfg.patch_embed == "conv", len(cfg.distill_um)
    teacher = Encoder(teacher_cfg, n_channels if is_conv else None)
    for name, tile in ((name := _tile_of(cfg, schema), schema[name]) for schema in schemas):
        bands = [tile.bands[i] for i in _compared_bands(cfg, name, tile)]
        if is_conv and len(bands) > n_channels:
            raise ValueError(
                f"objective.distill_bands.{name} names {len(bands)} bands, but the convolution of objective.teacher has"
                f" {n_channels} channels, as many as objective.distill_um"
            )
        if not is_conv:
            with torch.device("cpu"):  # a check must not wait for an accelerator, nor run on meta
                teacher.check(tile.sensor.channel_meta(bands))
    return teacher


def _tile_of(cfg: Config, schema: Mapping[str, TileSchema]) -> str:
    """The tile of a source that is learned from: one, so that a batch is of one sensor."""
    allowed = [cfg.tile] if isinstance(cfg.tile, str) else cfg.tile
    names = [name for name in schema if allowed is None or name in allowed]
    if len(names) == 1:
        return names[0]
    if not names:
        raise ValueError(f"objective.tile: a source has none of {', '.join(allowed or ())}, but {', '.join(schema)}")
    raise ValueError(
        f"objective.tile: a batch of dofa is of one sensor, but a source has {', '.join(names)}; name one of them, and"
        " let several sources take turns by data.mixing: step (with sample they are one source of all their tiles)"
    )


def _compared_bands(cfg: Config, name: str, tile: TileSchema) -> tuple[int, ...]:
    """Positions in the tile of the bands that student and teacher compare, in the order of a colour image."""
    if name in cfg.distill_bands:
        if unknown := [band for band in cfg.distill_bands[name] if band not in tile.bands]:
            raise ValueError(f"objective.distill_bands.{name}: no band {unknown[0]!r}, but {', '.join(tile.bands)}")
        return tuple(tile.bands.index(band) for band in cfg.distill_bands[name])
    bands = [tile.sensor.bands[i] for i in tile.sensor.index(tile.bands)]
    optical = [i for i, band in enumerate(bands) if band.kind in ("optical", "thermal")]
    chosen: list[int] = []
    for um in cfg.distill_um[: len(optical)]:
        chosen.append(min((i for i in optical if i not in chosen), key=lambda i: abs(bands[i].wavelength_um - um)))
    if not chosen:
        at = {band.polarization: i for i, band in reversed(list(enumerate(bands))) if band.kind == "sar"}
        chosen = [at[polarization] for polarization in ("VV", "VH") if polarization in at] or sorted(at.values())
    if not chosen:
        raise ValueError(
            f"objective.distill_bands: name what the teacher is to see of {name}, which has no usual bands"
        )
    return tuple(chosen)
