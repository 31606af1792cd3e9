"""torch.hub entries: `torch.hub.load(<repository>, "encoder", <path of a bundle>)`."""

dependencies = ["torch"]

from ssl_eo.hub import load_bundle as _load_bundle  # noqa: E402


def encoder(path: str):  # type: ignore[no-untyped-def]
    """The encoder in the bundle folder `path` (written by `ssl-eo export`), in eval mode."""
    return _load_bundle(path)
