"""Encoders that have a name here: those that others published, and those of our own recipes."""

from __future__ import annotations

from pathlib import Path

from ssl_eo.bundles import BundleEncoder, BundlePair
from ssl_eo.components import suggest
from ssl_eo.weights._entries import released, released_pair
from ssl_eo.weights._recipes import entries
from ssl_eo.weights.base import released_names
from ssl_eo.weights.croma import PAIRS

__all__ = ["is_published", "known_names", "named"]


def named(name: str, pretrained: str | Path | bool, sha256: str | None = None) -> BundleEncoder | BundlePair:
    """The encoder `name` in eval mode: what others published, of the path or address of their file; or one of a recipe,
    of a bundle. Random for False.

    Raises `ValueError` for another name, with those there are, and as `released` and `recipe` do.
    """
    if name in PAIRS:
        return released_pair(name, pretrained, sha256)
    if is_published(name):
        return released(name, pretrained, sha256)
    recipes = entries(taken=released_names())
    if name not in recipes:
        known = known_names()
        raise ValueError(f"no encoder is called {name!r:.80}{suggest(name, known)} (known: {', '.join(known)})")
    return recipes[name](pretrained, sha256)


def is_published(name: str) -> bool:
    """Whether others published an encoder, or a pair of such, that is called so."""
    return name in released_names()


def known_names() -> list[str]:
    """What may be asked for: first what others published. A recipe that is called so too has `_recipe` behind it."""
    return [*released_names(), *entries(taken=released_names())]
