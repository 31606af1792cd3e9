"""What objectives of two views share: which views, one call of the encoder for both, what a head is given.

R = 2B rows of the role "global": B samples of a rank in their first view, then in their second. D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from torch import Tensor, nn

from ssl_eo.data.multicrop import MultiCrop, MultiCropConfig, MultiCropViews, SpectralCropConfig
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.types import PixelBatch
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.objectives.base import Schemas, encoder_for
from ssl_eo.sensors import ChannelMeta

__all__ = [
    "PairCropConfig",
    "Pool",
    "check_momentum",
    "check_positive",
    "embed",
    "encoder_of_pairs",
    "one_view",
    "views_of_pairs",
]

Pool = Literal["cls", "mean"]  # what a head is given of a view: the CLS token, or the mean of its patches


@dataclass
class PairCropConfig:
    """The two views of a place."""

    # Tiles that may be shown; null: all with optical, thermal and radar bands (not elevation, not class maps).
    tiles: list[str] | None = None
    crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=224, scale=(0.08, 1.0)))
    # across: the views show different images of a sample if it has them; within: both show one.
    pairing: Literal["across", "within"] = "across"
    bands: SpectralCropConfig = field(default_factory=SpectralCropConfig)
    # sample: each view draws bands of its own; step: all views have the same number of them, as far as their images go,
    # and views of one number and image the same bands, so that views of one sensor are never padded.
    bands_per: Literal["sample", "step"] = "sample"
    hyperspectral_min_bands: int = 100  # an image with so many optical bands in one tile can be mixed into virtual ones

    def __post_init__(self) -> None:
        self.multi_crop()  # checks the values

    def multi_crop(self) -> MultiCropConfig:
        """Two global views and no local ones."""
        return MultiCropConfig(
            tiles=self.tiles,
            global_crop=self.crop,
            n_local=0,
            pairing=self.pairing,
            global_bands=self.bands,
            bands_per=self.bands_per,
            hyperspectral_min_bands=self.hyperspectral_min_bands,
        )


def check_positive(cfg: object, *keys: str) -> None:
    """Raise `ValueError` unless the values of `keys` in a config are above 0."""
    for key in keys:
        if not getattr(cfg, key) > 0:
            raise ValueError(f"{key} must be positive, got {getattr(cfg, key)}")


def check_momentum(cfg: object) -> None:
    """Raise `ValueError` unless `momentum` and `end_momentum` of a config, those of its teacher, are ratios."""
    for key in ("momentum", "end_momentum"):
        if not 0 <= getattr(cfg, key) <= 1:
            raise ValueError(f"{key} must be in [0, 1], got {getattr(cfg, key)}")


def views_of_pairs(crops: PairCropConfig, encoder_cfg: EncoderConfig, schemas: Schemas) -> MultiCropViews:
    """The two views of each sample; `ValueError` where the crops do not fit encoder or sources."""
    if (size := crops.crop.size_px) % encoder_cfg.patch_size:
        raise ValueError(
            f"objective.crops.crop.size_px {size} is not a multiple of model.patch_size {encoder_cfg.patch_size}"
        )
    return MultiCropViews(MultiCrop(crops.multi_crop(), schemas))


def encoder_of_pairs(crops: PairCropConfig, pool: Pool, encoder_cfg: EncoderConfig, schemas: Schemas) -> Encoder:
    """The encoder of all tiles that views may show; `ValueError` where it cannot take them or has no CLS token."""
    if pool == "cls" and not encoder_cfg.cls_token:
        raise ValueError("objective.pool cls needs model.cls_token: true; use pool mean")
    if encoder_cfg.mask_token:
        raise ValueError("model.mask_token: no patch is hidden in an objective of pairs; leave it false")
    if encoder_cfg.patch_embed == "conv" and crops.bands.n_bands is not None:
        raise ValueError(
            "objective.crops.bands.n_bands must be null with model.patch_embed conv, which takes the same bands"
            " in every view"
        )
    return encoder_for(
        encoder_cfg, [tile for usable in MultiCrop(crops.multi_crop(), schemas).tiles for tile in usable.values()]
    )


def embed(encoder: nn.Module, view: PixelBatch, pool: Pool) -> Tensor:
    """What a head is given of each row of `view`: `[R, D]`."""
    tokens = encoder([EncoderInput(view.pixels, view.channels, view.gsd_m)])[0]
    pooled: Tensor = tokens.cls if pool == "cls" else tokens.patches.mean(1)
    return pooled


def one_view(both: PixelBatch, number: int) -> PixelBatch:
    """The rows of the first (0) or the second (1) of two views."""
    n_samples = len(both.pixels) // 2
    rows = slice(number * n_samples, (number + 1) * n_samples)
    channels = {f.name: getattr(both.channels, f.name) for f in fields(ChannelMeta)}
    channels |= {name: value[rows] for name, value in channels.items() if value is not None and value.ndim == 2}
    return replace(
        both,
        pixels=both.pixels[rows],
        channels=ChannelMeta(**channels),
        gsd_m=both.gsd_m[rows],
        valid=None if both.valid is None else both.valid[rows],
    )
