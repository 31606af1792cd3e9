"""Multi-modal masked autoencoder on any set of sensors and class maps, and on what is known of a place.

One crop of the ground is seen through several modalities. Of all their patches together a fixed number is visible,
split over the modalities at random; one encoder sees these, and a small decoder for each target predicts the others
(MultiMAE, Bachmann et al. 2022, arXiv 2204.01678; on Earth-observation data arXiv 2505.14951). Values of a whole sample
may be predicted too (MP-MAE, arXiv 2405.02771).

B batch, C channels, H W pixels, T modalities that are seen, N patches of a view, K visible patches of a sample, n
visible ones of a modality in the batch, E values of a patch, D encoder width, M losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssl_eo.data.joint_views import ImageTargetConfig, JointViews, ModalityConfig, schemas_of
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.token_budget import TokenBudgetConfig
from ssl_eo.data.types import Batch, PixelBatch, TileSchema, VisibleBatch, map_tensors
from ssl_eo.losses.balancing import UncertaintyWeights
from ssl_eo.losses.modalities import class_errors, mean_of_samples, pixel_errors
from ssl_eo.losses.reconstruction import normalise_patches, patchify, pictures_of
from ssl_eo.models.modalities import ClassPatchEmbed, ImageHeads, Parts, take_visible, truncated_standardise
from ssl_eo.models.modality_decoders import DecoderTarget, ModalityDecoderConfig, ModalityDecoders
from ssl_eo.models.patch_embed import ConvPatchEmbed, DynamicPatchEmbed, WeightProducts
from ssl_eo.models.position import sincos_grid, sincos_resized
from ssl_eo.models.vit import EncoderConfig, Tokens
from ssl_eo.objectives import base
from ssl_eo.objectives.base import Losses, Schemas, encoder_for
from ssl_eo.sensors import ChannelMeta

__all__ = ["Config", "Objective"]


_TOLD = ("wavelength_um", "kind", "polarization", "orbit")  # what the dynamic embedding is told of a channel


class Output(NamedTuple):
    """One thing that a decoder predicts: the name of its loss, of its modality, and what of it."""

    name: str
    modality: str
    kind: str  # values or norm_pix


@dataclass
class Config:
    """Defaults are those of MultiMAE; crops are also turned by quarter turns."""

    modalities: dict[str, ModalityConfig]  # by name; their order is that of budget.alpha and of tokens
    crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=224))
    budget: TokenBudgetConfig = field(default_factory=TokenBudgetConfig)
    decoder: ModalityDecoderConfig = field(default_factory=ModalityDecoderConfig)
    image_targets: dict[str, ImageTargetConfig] = field(default_factory=dict)  # by name
    loss_on_visible: bool = False  # predict visible patches too, not hidden ones alone
    norm_pix_eps: float = 1e-6  # added to the variance of a patch, for the target norm_pix
    # Of the losses: their weights are fixed, or divided by variances that are learned.
    balancing: Literal["fixed", "uncertainty"] = "fixed"
    log_variance_bound: float = 5.0  # largest learned log variance, and the smallest with the sign turned

    def __post_init__(self) -> None:
        if not any(modality.input for modality in self.modalities.values()):
            raise ValueError("modalities has none with input: true; nothing would be seen")
        named = [*(output.name for output in self.outputs), *self.image_targets]
        if not named:
            raise ValueError("modalities has none with targets: nothing would be learned")
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"two targets are named {', '.join(twice)}: give a modality or image target another name")
        if bad := [name for name in (*self.modalities, *self.image_targets) if not name.isidentifier()]:
            raise ValueError(f"names of modalities and image targets must be of letters, digits and _, got {bad[0]!r}")
        if not self.norm_pix_eps > 0 or not self.log_variance_bound > 0:
            raise ValueError(
                "norm_pix_eps and log_variance_bound must be positive, got"
                f" {self.norm_pix_eps} and {self.log_variance_bound}"
            )
        if self.crop.jitter_prob:
            raise ValueError("crop.jitter_prob must be 0: a change of values is no part of the ground that is shared")
        if self.balancing == "uncertainty" and any(weight != 1 for weight in self.weights):
            raise ValueError("balancing is uncertainty and learns the weights of losses: leave every weight at 1")

    @property
    def outputs(self) -> list[Output]:
        """What is predicted of patches, in the order of the modalities."""
        kinds = {"values": "", "norm_pix": "norm_"}
        return [
            Output(kinds[kind] + name, name, kind) for name, each in self.modalities.items() for kind in each.targets
        ]

    @property
    def weights(self) -> list[float]:
        """Of the losses: those of patches, then those of samples."""
        of_samples = [self.image_targets[name].weight for name in self.image_targets]
        return [*(self.modalities[output.modality].weight for output in self.outputs), *of_samples]


class Objective(base.Objective):
    """`student` is encoder, embeddings of what the encoder's own does not embed, decoders, heads and loss weights.

    With an any-sensor embedding the encoder embeds all images; with `conv` its own is that of the first one.
    """

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        _check_model(encoder_cfg)
        self.cfg = cfg
        self.teacher = None
        self.patch_size = encoder_cfg.patch_size
        self.grid = (cfg.crop.size_px // self.patch_size,) * 2
        self.inputs = [name for name, modality in cfg.modalities.items() if modality.input]
        shown = {name: schemas_of(name, modality, schemas) for name, modality in cfg.modalities.items()}
        self.n_channels = {name: len(tiles[0].bands) for name, tiles in shown.items()}
        self.n_classes = {name: tiles[0].sensor.bands[0].n_classes or 0 for name, tiles in shown.items()}
        images = [name for name in self.inputs if cfg.modalities[name].kind == "pixels"]
        if not images:
            raise ValueError("objective.modalities: one with input: true must be of kind pixels, for the encoder")
        by_encoder = images[:1] if encoder_cfg.patch_embed == "conv" else images
        if encoder_cfg.patch_embed == "dynamic":
            _check_one_kernel({name: shown[name] for name in images})
        self.student = nn.ModuleDict(
            {"encoder": encoder_for(encoder_cfg, [tile for name in by_encoder for tile in shown[name]])}
        )
        own = {name: self._own_embedding(name, encoder_cfg) for name in self.inputs if name not in by_encoder}
        self.student["embeddings"] = Parts(own)
        if targets := {output.name: self._decoder_target(output.modality) for output in cfg.outputs}:
            self.student["decoders"] = ModalityDecoders(cfg.decoder, encoder_cfg.width, targets, len(self.inputs))
        if cfg.image_targets:
            n_values = {name: target.n_values for name, target in cfg.image_targets.items()}
            self.student["image_heads"] = ImageHeads(encoder_cfg.width, n_values, encoder_cfg.norm_eps)
        if cfg.balancing == "uncertainty":
            self.student["balance"] = UncertaintyWeights(len(cfg.weights), cfg.log_variance_bound)

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> JointViews:
        size, patch = cfg.crop.size_px, encoder_cfg.patch_size
        if size % patch:
            raise ValueError(f"objective.crop.size_px {size} is not a multiple of model.patch_size {patch}")
        for name in cfg.modalities:
            modality: ModalityConfig = cfg.modalities[name]
            schemas_of(name, modality, schemas)
            if patch % modality.stride:
                raise ValueError(
                    f"objective.modalities.{name}.stride {modality.stride} does not divide model.patch_size {patch}"
                )
        views = JointViews(cfg.modalities, cfg.crop, cfg.budget, cfg.image_targets, (size // patch) ** 2, schemas)
        views.check()
        return views

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        visible = batch.visible
        assert visible is not None, "a batch of another objective"
        images = self._images(batch, visible)
        tokens = self._encode(visible, images)
        answers = self._decode(tokens, visible)
        known = self.student["image_heads"](tokens.x) if self.cfg.image_targets else {}
        with torch.autocast(tokens.x.device.type, enabled=False):
            found = {
                output.name: self._patch_loss(output, answers[output.name].float(), images[output.modality], visible)
                for output in self.cfg.outputs
            }
            for name, target in self.cfg.image_targets.items():
                found[name] = _image_loss(target, known[name].float(), batch.meta[name])
            total, metrics = self._balanced(found)
        parts = {name: loss.detach() for name, (loss, _) in found.items()}
        return Losses(total=total, parts=parts, metrics=metrics)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The first modality, if it is an image of which all bands are seen, and predicted."""
        name, visible = next(iter(self.cfg.modalities)), batch.visible
        modality: ModalityConfig = self.cfg.modalities[name]
        is_picture = modality.kind == "pixels" and modality.bands is None and "values" in modality.targets
        if visible is None or name not in batch.pixels or not is_picture:
            return {}
        images = self._images(batch, visible)
        pred = self._decode(self._encode(visible, images), visible)[name].float()  # [B, N, E]
        hidden, patches = self._hidden(name, visible), patchify(images[name].pixels, self.patch_size)
        return pictures_of(patches, hidden, pred, self.patch_size, self.grid)

    def _images(self, batch: Batch, visible: VisibleBatch) -> dict[str, PixelBatch]:
        """The views of each modality; nothing valid where no sample of the batch has it."""
        images = {}
        for name in self.cfg.modalities:
            modality: ModalityConfig = self.cfg.modalities[name]
            image = batch.pixels.get(name)
            if image is None:
                side = self.cfg.crop.size_px // modality.stride
                image = _nothing((len(visible.mask), self.n_channels[name], side, side), visible.mask.device)
            if modality.standardise:
                image = replace(image, pixels=truncated_standardise(image.pixels, image.valid))
            images[name] = image
        return images

    def _encode(self, visible: VisibleBatch, images: Mapping[str, PixelBatch]) -> Tokens:
        """Tokens of the visible patches, the only ones that are embedded."""
        encoder, n_patches = self.published_encoder(), self.grid[0] * self.grid[1]
        products = encoder.patch_embed.products()
        parts = []
        for name in self.inputs:
            rows = visible.rows[name]  # [n]
            x = self._embed(name, images[name], rows, products)  # [n, D]
            table = self._position_table(name, images)
            if table is not None:
                x = x + (table[rows % n_patches] if table.ndim == 2 else table[rows // n_patches, rows % n_patches])
            parts.append(x)
        x = torch.cat(parts).index_select(0, visible.order).view(*visible.ids_keep.shape, -1)  # [B, K, D]
        return encoder.forward_patches(x, self.grid, visible.ids_keep % n_patches)

    def _embed(self, name: str, image: PixelBatch, rows: Tensor, products: WeightProducts | None) -> Tensor:
        """The patches at `rows [n]` of a modality, `[n, D]`. Each goes to its embedding as a view of one patch."""
        modality: ModalityConfig = self.cfg.modalities[name]
        patches = take_visible(image.pixels, rows, self.grid)  # [n, C, P, P]
        embed = self._embedding(name)
        if modality.kind == "classes":
            known = None if image.valid is None else take_visible(image.valid, rows, self.grid)[:, 0]
            labels, is_class = _classes(patches[:, 0], known, self.n_classes[name])
            tokens: Tensor = embed(torch.where(is_class, labels, self.n_classes[name]))
            return tokens
        channels = image.channels
        if channels.kind.ndim == 2 and isinstance(embed, DynamicPatchEmbed):
            channels = _of_first(channels)
        elif channels.kind.ndim == 2:
            samples = rows // (self.grid[0] * self.grid[1])
            channels = map_tensors(lambda column: column[samples], channels)  # [n, C]
        tokens = embed(patches, channels, None, products)[0]  # [n, 1, D]
        return tokens[:, 0]

    def _embedding(self, name: str) -> nn.Module:
        own = self.student["embeddings"]
        assert isinstance(own, Parts)
        if name in own:
            return own[name]
        return self.published_encoder().patch_embed

    def _position_table(self, name: str, images: Mapping[str, PixelBatch]) -> Tensor | None:
        """What is added to the patches of a modality: `[N, D]` or `[B, N, D]`."""
        encoder, device = self.published_encoder(), images[name].pixels.device
        if encoder.cfg.position == "sincos_resized" and self.cfg.modalities[name].kind == "classes":
            return sincos_resized(encoder.native_grid, self.grid, encoder.embed_dim, device, "bilinear")
        # Of one ground, so of one size of pixels, wherever a sample has the image; a pixel of a class map is so many.
        gsd_m = torch.stack([images[n].gsd_m / self.cfg.modalities[n].stride for n in self.inputs])
        return encoder.position_table(self.grid, device, gsd_m.amax(0))

    def _decode(self, tokens: Tokens, visible: VisibleBatch) -> dict[str, Tensor]:
        """`[B, N, E]` of each target of patches."""
        if not self.cfg.outputs:
            return {}
        encoder, dim, device = self.published_encoder(), self.cfg.decoder.embed_dim, tokens.x.device
        if encoder.cfg.position == "sincos_resized":
            table = sincos_resized(encoder.native_grid, self.grid, dim, device, "bilinear")
        else:
            table = sincos_grid(self.grid, dim, device)
        answers: dict[str, Tensor] = self.student["decoders"](tokens, visible.ids_keep, table)
        return answers

    def _hidden(self, name: str, visible: VisibleBatch) -> Tensor:
        """The patches of a modality that are to be predicted, `[B, N]`."""
        masks = visible.mask.chunk(len(self.inputs), dim=1)  # T x [B, N]
        if name not in self.inputs or self.cfg.loss_on_visible:
            return torch.ones_like(masks[0])
        return masks[self.inputs.index(name)]

    def _patch_loss(
        self, output: Output, pred: Tensor, image: PixelBatch, visible: VisibleBatch
    ) -> tuple[Tensor, Tensor]:
        """The loss of `pred [B, N, E]`, and the share of samples that have a value to predict."""
        modality: ModalityConfig = self.cfg.modalities[output.modality]
        side = self.patch_size // modality.stride
        patches = patchify(image.pixels, side)  # [B, N, E]
        valid = None if image.valid is None else patchify(image.valid, side)
        counts = self._hidden(output.modality, visible)[..., None]  # [B, N, 1]
        if modality.kind == "classes":
            labels, valid = _classes(patches, valid, self.n_classes[output.modality])
            errors = class_errors(torch.unflatten(pred, -1, (-1, self.n_classes[output.modality])), labels, valid)
        else:
            target = normalise_patches(patches, valid, self.cfg.norm_pix_eps) if output.kind == "norm_pix" else patches
            errors = pixel_errors(pred, target, valid, modality.loss)
        return mean_of_samples(errors, counts if valid is None else counts & valid)

    def _balanced(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total of the losses by their weights, and what was learned of these."""
        losses = torch.stack([loss for loss, _ in found.values()])  # [M]
        if self.cfg.balancing == "fixed":
            return torch.stack([w * loss for w, loss in zip(self.cfg.weights, losses, strict=True)]).sum(), {}
        balance = self.student["balance"]
        assert isinstance(balance, UncertaintyWeights)
        total = balance(losses, torch.stack([share for _, share in found.values()])).sum()
        learned = balance.clamped().detach().unbind()
        return total, {f"log_variance/{name}": s for name, s in zip(found, learned, strict=True)}

    def _own_embedding(self, name: str, encoder_cfg: EncoderConfig) -> nn.Module:
        modality: ModalityConfig = self.cfg.modalities[name]
        if modality.kind == "classes":
            side = self.patch_size // modality.stride
            return ClassPatchEmbed(encoder_cfg.width, side, self.n_classes[name], modality.code_dim)
        return ConvPatchEmbed(encoder_cfg.width, self.patch_size, self.n_channels[name], encoder_cfg.conv)

    def _decoder_target(self, name: str) -> DecoderTarget:
        modality: ModalityConfig = self.cfg.modalities[name]
        side = self.patch_size // modality.stride
        n = self.n_classes[name] if modality.kind == "classes" else self.n_channels[name]
        return DecoderTarget(side * side * n, self.inputs.index(name) if modality.input else None)


def _of_first(channels: ChannelMeta) -> ChannelMeta:
    """What the first sample has that has any, `[C]` of `[B, C]`: the dynamic embedding writes one kernel for all."""
    if channels.valid is None:
        return map_tensors(lambda column: column[0], channels)
    first = channels.valid.any(1).int().argmax(0, keepdim=True)
    return map_tensors(lambda column: column.index_select(0, first)[0], replace(channels, valid=None))


def _classes(values: Tensor, valid: Tensor | None, n_classes: int) -> tuple[Tensor, Tensor]:
    """Class numbers of `values [...]`, and where there is one."""
    is_class = (values >= 0) & (values < n_classes)
    return values.long(), is_class if valid is None else is_class & valid


def _nothing(shape: tuple[int, int, int, int], device: torch.device) -> PixelBatch:
    """Views of `shape` (B, C, H, W) of which nothing is valid."""
    zeros = torch.zeros(shape[:2], device=device)
    none = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    channels = ChannelMeta(zeros, zeros, none, none, none, zeros, valid=none.bool())
    valid = torch.zeros(shape, dtype=torch.bool, device=device)
    return PixelBatch(torch.zeros(shape, device=device), channels, zeros[:, 0], valid)


def _image_loss(target: ImageTargetConfig, pred: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of `pred [B, n]`, and the share of samples of which `truth` is known."""
    if target.kind == "class":
        valid = (truth >= 0) & (truth < target.n_values)  # NaN is neither
        return mean_of_samples(class_errors(pred, truth.nan_to_num(-1.0).long(), valid), valid)
    valid = truth.isfinite()
    return mean_of_samples(pixel_errors(pred, truth, valid, "mse"), valid)


def _check_model(cfg: EncoderConfig) -> None:
    if cfg.mask_token:
        raise ValueError("model.mask_token: hidden patches never reach the encoder of multimae; leave it false")
    if (cfg.patch_embed == "conv" and cfg.conv.padding) or (cfg.patch_embed == "dynamic" and cfg.dynamic.padding):
        raise ValueError(
            f"model.{cfg.patch_embed}.padding must be 0: multimae embeds each patch by itself, without its neighbours"
        )


def _check_one_kernel(shown: Mapping[str, list[TileSchema]]) -> None:
    """The dynamic embedding writes one kernel for a batch, so all tiles of a modality must have the same channels."""
    with torch.device("cpu"):
        for name, tiles in shown.items():
            metas = [tile.sensor.channel_meta(tile.bands) for tile in tiles]
            if any(not torch.equal(getattr(meta, key), getattr(metas[0], key)) for meta in metas for key in _TOLD):
                raise ValueError(
                    f"objective.modalities.{name}: its tiles have different channels, for which model.patch_embed"
                    " dynamic would need several kernels in one batch; use channel_attention"
                )
