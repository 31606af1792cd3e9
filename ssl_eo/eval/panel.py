"""Pictures of a run as a PNG: what an objective saw and made, row by row on one scale.

n pictures of a row, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["save_panel"]


def save_panel(path: Path, rows: Sequence[tuple[str, ArrayLike]]) -> None:
    """Save pictures as a PNG: each row a title and its pictures, `[n, H, W, 3]` or one `[H, W, 3]`, in any unit.

    A column shows the 2nd and 98th percentile of its picture in the first row as black and white, so that rows compare.
    Values that are not finite are grey: hidden patches, for instance.
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = [(title, _as_strip(pictures)) for title, pictures in rows]
    low, width = _display_ranges(strips[0][1])  # [n, 1, 1, 1]
    gap, header = 4, 24
    zoom = max(1, round(128 / strips[0][1].shape[1]))
    images = []
    for title, strip in strips:
        visible = np.isfinite(strip).all(-1, keepdims=True)
        scaled = np.where(visible, np.clip((np.nan_to_num(strip) - low) / width, 0.0, 1.0), 0.5)
        images.append((title, (scaled * 255).round().astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)))  # [n, H, W, 3]
    total_width = max(len(p) * (p.shape[2] + gap) - gap for _, p in images)
    canvas = Image.new("RGBA", (total_width, sum(p.shape[1] + header for _, p in images)), (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    top = 0
    for title, pictures in images:
        pen.text((0, top + 5), title, fill=(128, 128, 128, 255), font=font)  # grey reads on light and on dark
        for i, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (i * (picture.shape[1] + gap), top + header))
        top += header + pictures.shape[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _as_strip(pictures: ArrayLike) -> NDArray[np.float64]:
    strip = np.asarray(pictures, dtype=np.float64)
    strip = strip[None] if strip.ndim == 3 else strip
    if strip.ndim != 4 or strip.shape[-1] != 3:
        raise ValueError(f"a row of a panel holds pictures [n, H, W, 3], got shape {strip.shape}")
    return strip


def _display_ranges(strip: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is shown as black in each picture, and how far above it white is, `[n, 1, 1, 1]` each.

    A picture of next to nothing (water) is stretched only so far, else its noise would look like a landscape.
    """
    finite = np.isfinite(strip)
    lows, highs = np.zeros(len(strip)), np.ones(len(strip))
    for i, picture in enumerate(strip):
        if finite[i].any():
            lows[i], highs[i] = np.percentile(picture[finite[i]], [2, 98])
    least = 0.2 * np.median(highs - lows)
    widths = np.maximum(highs - lows, max(least, 1e-12))
    return lows[:, None, None, None], widths[:, None, None, None]
