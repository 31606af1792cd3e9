"""Where a patch is: fixed sin-cos in grid units or metres, a learned table that stretches, rotary angles.

Tokens are row-major. Grids need not be square. Fixed tables are computed in float64 and cached per grid and device.

B samples, h w grid, N = h*w patches, K visible patches, P prefix tokens, D width, d head width, M side of the learned
table's native grid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "interpolate_table",
    "pad_rope",
    "rope_tables",
    "sincos",
    "sincos_grid",
    "sincos_metres",
    "sincos_resized",
    "take_patches",
]

_ROPE_BASE = 100.0


def sincos(position: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """`[sin(p w_k), cos(p w_k)]`, w_k = base^(-k / (dim/2)), of `position [...]` -> `[..., dim]`, in its dtype."""
    if dim % 2:
        raise ValueError(f"a sin-cos code needs an even width, got {dim}")
    exponent = torch.arange(dim // 2, device=position.device, dtype=position.dtype) / (dim // 2)
    # A reciprocal of a power, not a power of a negative: released models were trained with the former's rounding.
    phase = position[..., None] * (1.0 / base**exponent)
    return torch.cat((phase.sin(), phase.cos()), dim=-1)


def _over_grid(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows `[..., h, E]` and of columns `[..., w, E]`, each repeated over the grid: 2 x `[..., N, E]`."""
    h, w = row.shape[-2], column.shape[-2]
    return row.repeat_interleave(w, dim=-2), column.repeat(*(1,) * (column.ndim - 2), h, 1)


@lru_cache(maxsize=64)
def sincos_grid(grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """2-D sin-cos table `[N, D]`, float32, of patch indices: column code, then row code (MAE, arXiv 2111.06377)."""
    with torch.inference_mode(False):
        h, w = grid
        row = sincos(torch.arange(h, dtype=torch.float64, device=device), dim // 2)
        column = sincos(torch.arange(w, dtype=torch.float64, device=device), dim // 2)
        rows, columns = _over_grid(row, column)
        return torch.cat((columns, rows), dim=-1).float()


def sincos_metres(grid: tuple[int, int], dim: int, gsd_ratio: Tensor) -> Tensor:
    """Sin-cos of ground distance: `[B, N, D]`, float32, for `gsd_ratio [B]` = pixel size / reference pixel size.

    A patch's coordinate is the distance of its centre from the view's top-left corner, in reference patches, shifted
    by half a patch so that ratio 1 gives `sincos_grid`. After Scale-MAE (arXiv 2212.14532, eq. 2).
    """
    ratio = gsd_ratio.double()[:, None]
    h, w = (torch.arange(n, dtype=torch.float64, device=ratio.device) for n in grid)
    row = sincos((h + 0.5) * ratio - 0.5, dim // 2)  # [B, h, D/2]
    column = sincos((w + 0.5) * ratio - 0.5, dim // 2)  # [B, w, D/2]
    rows, columns = _over_grid(row, column)
    return torch.cat((columns, rows), dim=-1).float()


def interpolate_table(table: Tensor, native: int, grid: tuple[int, int], antialias: bool = False) -> Tensor:
    """Stretch a learned table `[M*M, D]` to `grid`: `[N, D]`, float32 at least. The native grid is returned as it is.

    Bicubic. Without antialiasing the scale factors are (h + 0.1) / M and (w + 0.1) / M, as in DINOv2: the offset moves
    the sampling points, so asking for an output size instead gives other numbers than the released models expect. Its
    models with registers have no offset, and average where the grid is coarser (`antialias`).
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    if grid == (native, native):
        return table
    h, w = grid
    image = table.view(1, native, native, -1).permute(0, 3, 1, 2)  # [1, D, M, M]
    if antialias:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)  # [1, D, h, w]
    else:
        scale = ((h + 0.1) / native, (w + 0.1) / native)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=False)  # [1, D, h, w]
    assert image.shape[-2:] == grid
    return image.flatten(2).squeeze(0).T


@lru_cache(maxsize=64)
def sincos_resized(
    native: int, grid: tuple[int, int], dim: int, device: torch.device, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """`[N, D]`, float32: row code, then column code, of a `native` x `native` grid, stretched to `grid`.

    As MultiMAE (arXiv 2204.01678) takes the table of its native size to other sizes: without antialiasing.
    """
    with torch.inference_mode(False):
        code = sincos(torch.arange(native, dtype=torch.float64, device=device), dim // 2)
        image = torch.cat(_over_grid(code, code), dim=-1).float().T.view(1, dim, native, native)
        return F.interpolate(image, size=grid, mode=mode, align_corners=False).flatten(2).squeeze(0).T.contiguous()


@lru_cache(maxsize=64)
def rope_tables(grid: tuple[int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine tables `[N, d]`, float32, of 2-D axial rotary position (DINOv3, arXiv 2508.10104).

    Patch centres are scaled to [-1, 1] per axis; angle = 2 pi coordinate / 100^(4 j / d); rows fill the first quarter
    of a head, columns the second, and both are repeated. d divisible by 4.
    """
    with torch.inference_mode(False):
        exponent = 4.0 * torch.arange(head_dim // 4, dtype=torch.float64, device=device) / head_dim
        frequency = 2.0 * torch.pi / _ROPE_BASE**exponent  # [d/4]
        h, w = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n * 2.0 - 1.0 for n in grid)
        angle = torch.cat(_over_grid(h[:, None] * frequency, w[:, None] * frequency), dim=-1).repeat(1, 2)  # [N, d]
        return angle.sin().float(), angle.cos().float()


def pad_rope(sin: Tensor, cos: Tensor, n_prefix: int) -> tuple[Tensor, Tensor]:
    """Tables `[N, d]` or `[B, K, d]` of patches -> `[1 or B, 1, P + K, d]` of tokens; a prefix token is not turned."""
    padded = (F.pad(t, (0, 0, n_prefix, 0), value=at_zero) for t, at_zero in ((sin, 0.0), (cos, 1.0)))
    tables = tuple(t[None, None] if t.ndim == 2 else t[:, None] for t in padded)
    return tables[0], tables[1]


def take_patches(table: Tensor, ids: Tensor | None) -> Tensor:
    """Rows `ids [B, K]` of a table `[N, D]` shared by all samples, or `[B, N, D]`: `[B, K, D]`. None takes all."""
    if ids is None:
        return table
    return table[ids] if table.ndim == 2 else table.take_along_dim(ids[..., None], dim=1)
