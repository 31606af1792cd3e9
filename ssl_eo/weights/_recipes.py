"""Encoders of our own recipes (`configs/pretrain`), for `hubconf.py`: their architecture, where there is no PyYAML.

`recipes.json` says what each recipe publishes, as bundles say it (`ssl_eo.hub`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ssl_eo.hub import BundleEncoder, BundlePair, dataclass_from
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.weights._entries import fill_pair, open_bundle, weights_of

__all__ = ["RECIPES", "described", "entries", "recipe"]

# By name of a recipe: `described` of what it publishes, `objective`, how it reads `features`, of a pair also which
# encoder is `published`.
_TABLE = Path(__file__).parent.parent / "recipes.json"  # of tests/make_recipes.py
RECIPES: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text(encoding="utf-8"))


def described(model: Encoder | OpticalRadar) -> dict[str, Any]:
    """All that a model of these weights is built from, in plain values."""
    if isinstance(model, Encoder):
        n_channels = model.n_channels if model.cfg.patch_embed == "conv" else None  # others take any number
        cfg = model.cfg
        sizes = replace(cfg, embed_dim=cfg.width, depth=cfg.n_blocks, n_heads=cfg.heads)  # however they were said
        return {"encoder": asdict(sizes), "n_channels": n_channels}
    encoders = {"optical": described(model.optical), "radar": described(model.radar)}
    return {"encoders": encoders, "cross_depth": len(model.cross.blocks)}


def recipe(name: str, pretrained: str | Path | bool, sha256: str | None = None) -> BundleEncoder | BundlePair:
    """What the recipe `name` publishes, in eval mode: from a bundle of `ssl-eo export`, or random for False.

    Raises `ValueError` for True, for no address is known here, for a bundle of another architecture, and as
    `open_bundle` does.
    """
    advice = (
        f"give the folder, zip file or address of its bundle (make one: ssl-eo train --config pretrain/{name}, then"
        f" ssl-eo export{' --whole' if _is_pair(name) else ''})"
    )
    where = weights_of(name, advice, pretrained, sha256)
    if where is None:
        return _random(name)
    found = open_bundle(where, sha256)
    _check_same(name, found, str(where))
    return found


def entries(taken: Collection[str]) -> dict[str, Callable[..., BundleEncoder | BundlePair]]:
    """What `hubconf.py` offers: `recipe` by the name of each, with `_recipe` after a name that is `taken`."""
    found = [_entry(name, f"{name}_recipe" if name in taken else name) for name in RECIPES]
    return {entry.__name__: entry for entry in found}


def _entry(name: str, shown: str) -> Callable[..., BundleEncoder | BundlePair]:
    def entry(pretrained: str | bool = True, sha256: str | None = None) -> BundleEncoder | BundlePair:
        return recipe(name, pretrained, sha256)

    entry.__name__ = entry.__qualname__ = shown
    entry.__doc__ = _summary(name)
    return entry


def _summary(name: str) -> str:
    found = RECIPES[name]
    first = found["encoders"]["optical"] if _is_pair(name) else found
    cfg: EncoderConfig = dataclass_from(EncoderConfig, first["encoder"])
    sizes = f"width {cfg.width}, {cfg.n_blocks} blocks, patches of {cfg.patch_size} pixels"
    what = "two encoders, the optical one of" if _is_pair(name) else "an encoder of"
    channels = f" for {first['n_channels']} bands" if first["n_channels"] else ""
    return f"Our recipe pretrain/{name} ({found['objective']}): {what} {sizes}, {cfg.patch_embed}{channels}."


def _is_pair(name: str) -> bool:
    return "encoders" in RECIPES[name]


def _random(name: str) -> BundleEncoder | BundlePair:
    """Without statistics: pixels are normalised, as those of the data that nobody has seen yet."""
    found = RECIPES[name]
    facts = {key: found[key] for key in ("objective", "features", "published") if key in found} | {"step": 0}
    if not _is_pair(name):
        encoder = Encoder(dataclass_from(EncoderConfig, found["encoder"]), found["n_channels"])
        encoder.init_weights()
        return BundleEncoder(encoder, {}, facts).eval()
    parts = [found["encoders"][group] for group in ("optical", "radar")]
    optical, radar = (dataclass_from(EncoderConfig, part["encoder"]) for part in parts)
    counts = (parts[0]["n_channels"], parts[1]["n_channels"])
    pair = fill_pair(OpticalRadar.of_sizes(optical, radar, counts, found["cross_depth"]))
    return BundlePair(pair, {"optical": {}, "radar": {}}, facts).eval()


def _check_same(name: str, found: BundleEncoder | BundlePair, where: str) -> None:
    """Raise `ValueError` unless a bundle is of the architecture that the recipe makes."""
    if isinstance(found, BundlePair) != _is_pair(name):
        wanted = "two: export it with --whole" if _is_pair(name) else "one"
        held = "two encoders" if isinstance(found, BundlePair) else "one encoder"
        raise ValueError(f"{where}: it holds {held}, and the recipe {name} makes {wanted}")
    said = described(found.model if isinstance(found, BundlePair) else found.encoder)
    expected = _flat(_computed({part: RECIPES[name][part] for part in said}))
    for key, value in _flat(_computed(said)).items():
        if value != expected.get(key):
            raise ValueError(
                f"{where}: not of the recipe {name}: its {key} is {value}, expected {expected.get(key)}; the entry"
                " `encoder` takes any bundle"
            )


def _computed(page: Mapping[str, Any]) -> dict[str, Any]:
    """Of `described` what decides the features: not drop-path, nor the options of other patch embeddings."""
    if "encoders" in page:
        return {**page, "encoders": {group: _computed(part) for group, part in page["encoders"].items()}}
    encoder = page["encoder"]
    unused = {"drop_path_prob", "conv", "channel_attention", "dynamic"} - {encoder["patch_embed"]}
    return {**page, "encoder": {key: value for key, value in encoder.items() if key not in unused}}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
