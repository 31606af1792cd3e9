"""What an exported encoder computes beside the run that it is from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssl_eo.bundles import BundleEncoder, BundlePair, SensorInput
from ssl_eo.hub import load_bundle
from ssl_eo.train.export import PairedObjective, export_encoder, export_pair, load_encoder


@torch.no_grad()
def exported_features(run: Path, out: Path) -> dict[str, Tensor]:
    """Tokens of the bundle of `run` for each of its sensors, which are those of the run's objective, bit for bit."""
    step = export_encoder(run, out / "one")
    trained, bundle = load_encoder(run), load_bundle(out / "one")
    assert isinstance(bundle, BundleEncoder)
    assert bundle.inputs
    assert bundle.facts["step"] == trained.step == step
    found = {}
    for sensor, known in bundle.inputs.items():
        images = stored_values(bundle, known)
        found[sensor] = bundle.forward_features(images, sensor).x
        (expected,) = trained.objective.encode(bundle.prepare(images, sensor))
        assert torch.equal(found[sensor], expected.x)
    if isinstance(trained.objective, PairedObjective):
        export_pair(run, out / "pair")
        pair = load_bundle(out / "pair")
        assert isinstance(pair, BundlePair)
        whole = trained.objective.whole().state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in pair.model.state_dict().items())
        shown = [stored_values(part, next(iter(part.inputs.values()))) for part in (pair.optical, pair.radar)]
        found["joint"] = pair(*shown)
    return found


def stored_values(model: BundleEncoder, known: SensorInput) -> Tensor:
    """Images of two patches by three, of as many dates as a token spans where there are dates."""
    cfg = model.encoder.cfg
    dates = (2 * cfg.tubelet,) if cfg.takes_series else ()
    shape = (2, len(known.bands), *dates, 2 * cfg.patch_size, 3 * cfg.patch_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(-1, *[1] * (len(shape) - 2)) for values in (known.mean, known.std))
    return noise * std + mean
