"""torch.hub entries, see `docs/released-weights.md`: `torch.hub.load(<repository>, "encoder", <bundle>)`.

Of published encoders `pretrained` is the path or address of the authors' file, or False for random weights, and
`sha256` the first digits of the file's checksum. Of our recipes (`configs/pretrain`), whose entries have their names
(that of DOFA, which is published too, `dofa_vitb16_recipe`), `pretrained` is a bundle. All are returned in eval mode.
Nothing is unpickled but tensors.
"""

from __future__ import annotations

dependencies = ["torch"]

from ssl_eo.hub import BundleEncoder as _Encoder  # noqa: E402
from ssl_eo.hub import BundlePair as _Pair  # noqa: E402
from ssl_eo.weights import _entries, _recipes  # noqa: E402


def encoder(path_or_url: str, sha256: str | None = None) -> _Encoder | _Pair:
    """The encoder of a bundle (of `ssl-eo export`): its folder, a zip file of it, or the address of such a file."""
    return _entries.open_bundle(path_or_url, sha256)


def panopticon_vitb14(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """Panopticon ViT-B/14, any sensor; normalised pixels."""
    return _entries.released("panopticon_vitb14", pretrained, sha256)


def dofa_vitb16(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DOFA ViT-B/16, any optical sensor or Sentinel-1; first version, current layout."""
    return _entries.released("dofa_vitb16", pretrained, sha256)


def dofa_vitl16(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DOFA ViT-L/16, any optical sensor or Sentinel-1; first version, current layout."""
    return _entries.released("dofa_vitl16", pretrained, sha256)


def croma_base(pretrained: str | bool = True, sha256: str | None = None) -> _Pair:
    """CROMA base: Sentinel-2 and Sentinel-1, each alone and both together."""
    return _entries.released_pair("croma_base", pretrained, sha256)


def croma_large(pretrained: str | bool = True, sha256: str | None = None) -> _Pair:
    """CROMA large: Sentinel-2 and Sentinel-1, each alone and both together."""
    return _entries.released_pair("croma_large", pretrained, sha256)


def prithvi_eo_v1_100m(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """Prithvi-EO 1.0 of 100M parameters: series of six bands of HLS."""
    return _entries.released("prithvi_eo_v1_100", pretrained, sha256)


def prithvi_eo_v2_300m(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """Prithvi-EO 2.0 of 300M parameters: series of six bands of HLS."""
    return _entries.released("prithvi_eo_v2_300", pretrained, sha256)


def mae_vitb16(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """MAE ViT-B/16, RGB."""
    return _entries.released("mae_vitb16", pretrained, sha256)


def multimae_eo_vitb8(pretrained: str | bool = True, sha256: str | None = None, group: str = "rgb") -> _Encoder:
    """MultiMAE-EO ViT-B/8, one group of bands of Sentinel-2: rgb, ired (B05 to B07), ebands (B8A, B08) or sired."""
    return _entries.released(f"multimae_eo_vitb8_{group}", pretrained, sha256)


def dinov2_vits14(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-S/14, RGB."""
    return _entries.released("dinov2_vits14", pretrained, sha256)


def dinov2_vits14_reg(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-S/14, RGB, with four registers."""
    return _entries.released("dinov2_vits14_reg", pretrained, sha256)


def dinov2_vitb14(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-B/14, RGB."""
    return _entries.released("dinov2_vitb14", pretrained, sha256)


def dinov2_vitb14_reg(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-B/14, RGB, with four registers."""
    return _entries.released("dinov2_vitb14_reg", pretrained, sha256)


def dinov2_vitl14(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-L/14, RGB."""
    return _entries.released("dinov2_vitl14", pretrained, sha256)


def dinov2_vitl14_reg(pretrained: str | bool = True, sha256: str | None = None) -> _Encoder:
    """DINOv2 ViT-L/14, RGB, with four registers."""
    return _entries.released("dinov2_vitl14_reg", pretrained, sha256)


globals().update(_recipes.entries(taken=globals()))
