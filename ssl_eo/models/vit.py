"""The vision transformer encoder: list of inputs in, list of tokens out, one pass for views of all sizes.

State dict names and shapes are those of DINOv2 and Panopticon, so their released weights load as they are.

B samples, C channels, T dates, s dates of a tubelet, H W pixels, h w grid, N = T/s * h*w patches, K visible patches (N
when nothing is hidden), P prefix tokens (CLS if there is one, then registers), L = P + K, D width, A heads, R packed
rows of all inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.components import suggest
from ssl_eo.models.alibi import alibi_bias
from ssl_eo.models.layers import Block, Group, init_layers
from ssl_eo.models.patch_embed import (
    ChannelAttentionConfig,
    ChannelAttentionPatchEmbed,
    ConvConfig,
    ConvPatchEmbed,
    DynamicConfig,
    DynamicPatchEmbed,
    PatchEmbed,
    WeightProducts,
)
from ssl_eo.models.position import (
    interpolate_table,
    pad_rope,
    rope_tables,
    sincos_grid,
    sincos_metres,
    sincos_resized,
    take_patches,
)
from ssl_eo.models.space_time import CoordinateEncoding, TokenGrid, as_images, sincos_3d
from ssl_eo.sensors import ChannelMeta

__all__ = ["SIZES", "Encoder", "EncoderConfig", "EncoderInput", "Tokens"]

SIZES = {  # width, blocks, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}
_MAX_GRID = 256  # patches a side; no file bounds the tables that are computed


@dataclass
class EncoderConfig:
    """Everything that decides the encoder's weights and what it computes from them."""

    size: str = "small"  # tiny, small, base, large, huge or giant; the next three override it
    embed_dim: int | None = None  # width of a token
    depth: int | None = None  # number of blocks
    n_heads: int | None = None  # of attention; divides the width
    patch_size: int = 16  # pixels
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu is gated (DINOv2 giant)
    mlp_ratio: float = 4.0  # hidden width / width of a plain MLP; a swiglu one takes two thirds of it
    qkv_bias: bool = True  # of the queries, keys and values of attention
    cls_token: bool = True  # a token of the whole view; without it, pool the patches
    n_registers: int = 0  # extra tokens without a position (arXiv 2309.16588); beside a CLS token
    layer_scale_init: float | None = None  # None leaves LayerScale out; DINOv2 uses 1e-5
    drop_path_prob: float = 0.0  # stochastic depth, the same in all blocks
    norm_eps: float = 1e-6  # of LayerNorm
    final_norm: bool = True  # a LayerNorm after the last block; MultiMAE has none
    # Of patches: by index in the grid, by metres on the ground, by index in the grid of image_size stretched to that of
    # the view (MultiMAE), the same with the number of the date (sincos_3d, of Prithvi), a learned table, rotary in two
    # dimensions, or alibi: attention falls with the distance in patches (arXiv 2311.00566).
    position: Literal["sincos", "sincos_metres", "sincos_resized", "sincos_3d", "learned", "rope", "alibi"] = "sincos"
    image_size: int = 224  # pixels, square; native size of the tables that are stretched
    # How the learned table is stretched to other sizes: as in DINOv2 without registers, or in DINOv2 with registers.
    position_resize: Literal["offset", "antialias"] = "offset"
    reference_gsd_m: float = 10.0  # sincos_metres: pixel size at which a position is the patch index
    tubelet: int = 1  # of a series: dates that one token spans; more than one with patch_embed: conv alone
    time_encoding: bool = False  # add a code of year and day of the year to the patches of a date
    location_encoding: bool = False  # add a code of latitude and longitude to all patches
    mask_token: bool = False  # for objectives that hide tokens inside the encoder
    # conv: one fixed set of bands; channel_attention (Panopticon) and dynamic (DOFA): any sensor.
    patch_embed: Literal["conv", "channel_attention", "dynamic"] = "channel_attention"
    conv: ConvConfig = field(default_factory=ConvConfig)
    channel_attention: ChannelAttentionConfig = field(default_factory=ChannelAttentionConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(
                f"size must be one of {', '.join(SIZES)}, got {self.size!r}{suggest(self.size, list(SIZES))}"
            )
        for key in ("embed_dim", "depth", "n_heads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, or null for that of the size, got {value}")
        if self.n_registers < 0 or not self.mlp_ratio > 0 or not self.norm_eps > 0:
            raise ValueError(
                "n_registers must not be negative, mlp_ratio and norm_eps must be positive, got"
                f" {self.n_registers}, {self.mlp_ratio} and {self.norm_eps}"
            )
        if self.width % self.heads:
            raise ValueError(f"n_heads must divide embed_dim, got {self.heads} and {self.width}")
        if self.n_registers and not self.cls_token:
            raise ValueError(f"n_registers {self.n_registers} needs cls_token: true")
        if self.patch_size < 1 or self.image_size < 1:
            raise ValueError(
                f"patch_size and image_size must be at least 1 pixel, got {self.patch_size} and {self.image_size}"
            )
        if not 0.0 <= self.drop_path_prob < 1.0:
            raise ValueError(f"drop_path_prob must be in [0, 1), got {self.drop_path_prob}")
        if self.position.startswith("sincos") and self.width % 4:
            raise ValueError(f"position {self.position} needs embed_dim divisible by 4, got {self.width}")
        if self.position == "rope" and self.width // self.heads % 4:
            raise ValueError(f"position rope needs a head width divisible by 4, got {self.width // self.heads}")
        if self.position == "sincos_3d" and self.width % 16:
            raise ValueError(f"position sincos_3d needs embed_dim divisible by 16, got {self.width}")
        if (self.time_encoding or self.location_encoding) and self.width % 4:
            raise ValueError(f"time_encoding and location_encoding need embed_dim divisible by 4, got {self.width}")
        if self.tubelet < 1 or (self.tubelet > 1 and (self.patch_embed != "conv" or self.time_encoding)):
            raise ValueError(
                "tubelet must be 1 date, or more with patch_embed: conv and time_encoding: false, got"
                f" {self.tubelet} with {self.patch_embed} and {str(self.time_encoding).lower()}"
            )
        if self.position in ("learned", "sincos_resized", "sincos_3d") and self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.position in ("sincos_resized", "sincos_3d") and self.image_size > _MAX_GRID * self.patch_size:
            raise ValueError(
                f"image_size must be at most {_MAX_GRID} patches, a table of all is made, got {self.image_size}"
            )
        if not self.reference_gsd_m > 0:
            raise ValueError(f"reference_gsd_m must be positive metres, got {self.reference_gsd_m}")

    @property
    def takes_series(self) -> bool:
        """Whether several dates are more to it than a bag of images."""
        return self.position == "sincos_3d" or self.time_encoding or self.tubelet > 1

    @property
    def width(self) -> int:
        return self.embed_dim or SIZES[self.size][0]

    @property
    def n_blocks(self) -> int:
        return self.depth or SIZES[self.size][1]

    @property
    def heads(self) -> int:
        return self.n_heads or SIZES[self.size][2]


@dataclass
class EncoderInput:
    """One group of views: `pixels [B, C, H, W]`, or `[B, C, T, H, W]` of several dates, normalised.

    `gsd_m` is the ground size of a pixel (`[B]` or one number), needed for positions in metres. `ids_keep [B, K]`: only
    these patches are embedded. `mask [B, N]` (True = hidden): these become the mask token before positions are added.
    Encoders that know when and where take `dates [B, T, 2]` (year, day of the year) and `location [B, 2]` (latitude,
    longitude), float32, NaN for those not known; without them nothing is added.
    """

    pixels: Tensor
    channels: ChannelMeta
    gsd_m: Tensor | float | None = None
    ids_keep: Tensor | None = None
    mask: Tensor | None = None
    dates: Tensor | None = None
    location: Tensor | None = None


@dataclass
class Tokens:
    """Encoder output `x [B, P + K, D]`, of a view whose patches form `grid` (h, w); with `ids_keep`, K of them.

    Patches of a series are in order of time: those of `n_steps` = T/s grids.
    """

    x: Tensor
    n_prefix_tokens: int
    grid: tuple[int, int]
    n_steps: int = 1

    @property
    def cls(self) -> Tensor:
        """`[B, D]`; `ValueError` where there is none."""
        if not self.n_prefix_tokens:
            raise ValueError("this encoder has no CLS token (model.cls_token: false): pool the mean over its patches")
        return self.x[:, 0]

    @property
    def registers(self) -> Tensor:
        """`[B, P - 1, D]`."""
        return self.x[:, 1 : self.n_prefix_tokens]

    @property
    def patches(self) -> Tensor:
        """`[B, K, D]`."""
        return self.x[:, self.n_prefix_tokens :]

    @property
    def pooled(self) -> Tensor:
        """What stands for the whole view, `[B, D]`: the CLS token, or the mean over patches where there is none."""
        return self.cls if self.n_prefix_tokens else self.patches.mean(1)


class Encoder(nn.Module):
    """Vision transformer (arXiv 2010.11929) for any sensor. Build it anywhere, then `init_weights` or load.

    `n_channels` is needed by the `conv` patch embedding alone; with the others, which take any number, it is None.
    """

    def __init__(self, cfg: EncoderConfig, n_channels: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_channels = n_channels if cfg.patch_embed == "conv" else None
        self.embed_dim = cfg.width
        self.patch_size = cfg.patch_size
        self.n_prefix_tokens = int(cfg.cls_token) + cfg.n_registers
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.width)) if cfg.cls_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, cfg.n_registers, cfg.width)) if cfg.n_registers else None
        self.native_grid = cfg.image_size // cfg.patch_size
        n_positions = int(cfg.cls_token) + self.native_grid**2
        self.pos_embed = nn.Parameter(torch.empty(1, n_positions, cfg.width)) if cfg.position == "learned" else None
        self.mask_token = nn.Parameter(torch.empty(1, cfg.width)) if cfg.mask_token else None
        self.time_encoding = CoordinateEncoding(cfg.width) if cfg.time_encoding else None
        self.location_encoding = CoordinateEncoding(cfg.width) if cfg.location_encoding else None
        self.patch_embed = _build_patch_embed(cfg, n_channels)
        sizes = (cfg.width, cfg.heads, cfg.mlp_ratio, cfg.mlp, cfg.layer_scale_init, cfg.drop_path_prob)
        self.blocks = nn.ModuleList(Block(*sizes, cfg.norm_eps, cfg.qkv_bias) for _ in range(cfg.n_blocks))
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps) if cfg.final_norm else nn.Identity()

    def forward(self, inputs: Sequence[EncoderInput]) -> list[Tokens]:
        """Tokens of each input after the final norm. All inputs share every matmul; the numbers are those of one call
        per input. Raises `ValueError` for sizes that the patch size does not divide.
        """
        x, groups, layouts = self._embed(inputs)  # [R, D]
        for block in self.blocks:
            x = block(x, groups)  # [R, D]
        return self._unpack(self.norm(x), groups, layouts)

    def intermediates(self, input: EncoderInput, layers: int | Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens after the blocks `layers` (counted from 0; an int n means the last n), in that order.

        The final norm is applied to each unless `norm` is False. Blocks after the last one asked for are not run.
        """
        n_blocks = len(self.blocks)
        wanted = list(range(n_blocks - layers, n_blocks)) if isinstance(layers, int) else list(layers)
        if not wanted or min(wanted) < 0 or max(wanted) >= n_blocks:
            raise ValueError(f"layers must name blocks 0 to {n_blocks - 1}, or be their number, got {layers}")
        x, groups, layouts = self._embed([input])
        found: dict[int, Tokens] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, groups)  # [B*L, D]
            if i in wanted:
                found[i] = self._unpack(self.norm(x) if norm else x, groups, layouts)[0]
        return [found[i] for i in wanted]

    def forward_patches(self, x: Tensor, grid: tuple[int, int], ids: Tensor) -> Tokens:
        """Tokens after the final norm of patches `x [B, K, D]` that are embedded already, and have their positions.

        They lie at `ids [B, K]` of `grid`, several of them at one place where several images of a ground are seen. What
        is to be added to a patch for its position is in `position_table`.
        """
        x = self._with_prefix(x)  # [B, P + K, D]
        group = Group(x.shape[0], x.shape[1], self._rope(x.device, grid, ids), self._bias(x.device, grid, ids))
        rows = x.flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, [group])  # [B*L, D]
        return self._unpack(self.norm(rows), [group], [TokenGrid(grid, 1)])[0]

    def position_table(
        self, grid: tuple[int, int], device: torch.device, gsd_m: Tensor | None = None, n_steps: int = 1
    ) -> Tensor | None:
        """What is added to the patches of a view, `[N, D]`, or `[B, N, D]` where it depends on `gsd_m [B]`.

        Of a series of `n_steps` grids all have the same, but for `sincos_3d`.
        """
        if self.cfg.position == "sincos_3d":
            return sincos_3d(n_steps, grid, self.embed_dim, self.native_grid, device)
        table = self._table_of_grid(grid, device, gsd_m)  # [h*w, D] or [B, h*w, D]
        return table if table is None or n_steps == 1 else torch.cat([table] * n_steps, dim=-2)

    def _table_of_grid(self, grid: tuple[int, int], device: torch.device, gsd_m: Tensor | None) -> Tensor | None:
        if self.pos_embed is not None:
            antialias = self.cfg.position_resize == "antialias"
            table = self.pos_embed[0, int(self.cfg.cls_token) :]
            return interpolate_table(table, self.native_grid, grid, antialias)
        if self.cfg.position == "sincos":
            return sincos_grid(grid, self.embed_dim, device)
        if self.cfg.position == "sincos_resized":
            return sincos_resized(self.native_grid, grid, self.embed_dim, device)
        if self.cfg.position == "sincos_metres":
            if gsd_m is None:
                raise ValueError("model.position sincos_metres needs gsd_m, the ground size of a pixel in metres")
            return sincos_metres(grid, self.embed_dim, gsd_m.double() / self.cfg.reference_gsd_m)
        return None

    def check(self, channels: ChannelMeta) -> None:
        """Raise `ValueError` if a channel cannot be embedded. Call it once, with `channels` on the CPU."""
        self.patch_embed.check(channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter, wherever the module was built."""
        for block in self.blocks:
            init_layers(block)
        init_layers(self.norm)
        self.patch_embed.init_weights()
        for encoding in (self.time_encoding, self.location_encoding):
            if encoding is not None:
                encoding.init_weights()
        for token in (self.cls_token, self.register_tokens, self.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)

    def _embed(self, inputs: Sequence[EncoderInput]) -> tuple[Tensor, list[Group], list[TokenGrid]]:
        """Packed tokens `[R, D]` of all inputs, the shape of each, and where its patches are."""
        products = self.patch_embed.products()
        rows, groups, layouts = [], [], []
        for item in inputs:
            x, layout = self._embed_one(item, products)  # [B, L, D]
            rows.append(x.flatten(0, 1))
            ids = layout.in_grid(item.ids_keep, x.device)
            rope, bias = self._rope(x.device, layout.grid, ids), self._bias(x.device, layout.grid, ids)
            groups.append(Group(x.shape[0], x.shape[1], rope, bias))
            layouts.append(layout)
        return rows[0] if len(rows) == 1 else torch.cat(rows), groups, layouts

    def _embed_one(self, item: EncoderInput, products: WeightProducts | None) -> tuple[Tensor, TokenGrid]:
        # FSDP casts every floating tensor that enters a unit, unless told not to with cast_forward_inputs=False.
        assert item.channels.wavelength_um.dtype.itemsize >= 4, "wavelengths were rounded to half precision"
        pixels, n_steps = as_images(item.pixels, self.cfg.tubelet, self.patch_size)  # [B, C*s, T/s*H, W]
        x, (height, width) = self.patch_embed(pixels, item.channels, item.ids_keep, products)  # [B, K, D]
        layout = TokenGrid((height // n_steps, width), n_steps)
        if item.mask is not None:
            if self.mask_token is None:
                raise ValueError("masked input needs an encoder with a mask token: set model.mask_token: true")
            mask = item.mask if item.ids_keep is None else item.mask.gather(1, item.ids_keep)  # [B, K]
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        gsd_m = item.gsd_m
        if isinstance(gsd_m, float | int):
            gsd_m = torch.full(x.shape[:1], float(gsd_m), dtype=torch.float64, device=x.device)  # [B]
        position = self.position_table(layout.grid, x.device, gsd_m, n_steps)  # [N, D] or [B, N, D]
        if position is not None:
            x = x + take_patches(position, item.ids_keep)
        return self._with_prefix(self._with_coordinates(x, item, layout)), layout

    def _with_coordinates(self, x: Tensor, item: EncoderInput, layout: TokenGrid) -> Tensor:
        """Patches `x [B, K, D]` with what is known of when and where they were seen."""
        if self.time_encoding is not None and item.dates is not None:
            x = x + layout.of_patches(self.time_encoding(item.dates), item.ids_keep)
        if self.location_encoding is not None and item.location is not None:
            x = x + self.location_encoding(item.location)[:, None]
        return x

    def _with_prefix(self, x: Tensor) -> Tensor:
        """The prefix tokens before those of patches: `[B, K, D]` -> `[B, P + K, D]`."""
        if self.cls_token is None:
            return x
        cls = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]  # [1, 1, D]
        prefix = cls if self.register_tokens is None else torch.cat((cls, self.register_tokens), dim=1)  # [1, P, D]
        return torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)

    def _rope(self, device: torch.device, grid: tuple[int, int], ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.cfg.position != "rope":
            return None
        sin, cos = rope_tables(grid, self.cfg.width // self.cfg.heads, device)
        return pad_rope(take_patches(sin, ids), take_patches(cos, ids), self.n_prefix_tokens)

    def _bias(self, device: torch.device, grid: tuple[int, int], ids: Tensor | None) -> Tensor | None:
        if self.cfg.position != "alibi":
            return None
        return alibi_bias(grid, self.cfg.heads, device, ids, n_prefix=self.n_prefix_tokens)

    def _unpack(self, x: Tensor, groups: Sequence[Group], layouts: Sequence[TokenGrid]) -> list[Tokens]:
        parts = torch.split(x, [g.n_rows for g in groups])
        return [
            Tokens(part.view(g.n_samples, g.n_tokens, -1), self.n_prefix_tokens, layout.grid, layout.n_steps)
            for part, g, layout in zip(parts, groups, layouts, strict=True)
        ]


def _build_patch_embed(cfg: EncoderConfig, n_channels: int | None) -> PatchEmbed:
    if cfg.patch_embed == "channel_attention":
        return ChannelAttentionPatchEmbed(cfg.width, cfg.patch_size, cfg.channel_attention)
    if cfg.patch_embed == "dynamic":
        return DynamicPatchEmbed(cfg.width, cfg.patch_size, cfg.dynamic)
    if n_channels is None:
        raise ValueError("model.patch_embed: conv needs the number of channels it is built for")
    return ConvPatchEmbed(cfg.width, cfg.patch_size, n_channels, cfg.conv, cfg.tubelet)
