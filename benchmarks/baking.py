"""What a forward pass costs before and after `ssl-eo export --bake`.

Before, an encoder writes its kernels from wavelengths in each call; after, it has a plain convolution for one sensor.

    python benchmarks/baking.py [--turns N] [--size toy]

Sentinel-2 in 12 bands, encoders with random weights. Processor time of one thread, the best of all turns; the ratio is
to the encoder as it was trained. `--size toy` shows in a second that it works; its figures say nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import _table
import torch
from _timing import best_processor_seconds

from ssl_eo.baking import bake
from ssl_eo.bundle_inputs import SensorInput
from ssl_eo.bundles import BundleEncoder
from ssl_eo.models.patch_embed import DynamicConfig
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor

CASES = (
    ("tiny", 64, 1),
    ("tiny", 64, 32),
    ("small", 64, 1),
    ("small", 224, 1),
    ("base", 224, 1),
)  # size, pixels, batch
SENSOR = "sentinel2_l2a"


@torch.no_grad()
def rows_of(size: str, side_px: int, n_images: int, n_turns: int) -> Iterator[_table.Row]:
    """Milliseconds a call, as trained and baked, and the greatest difference of their features."""
    torch.manual_seed(0)
    sensor = load_sensor(SENSOR)
    n_bands = len(sensor.bands)
    inputs = {SENSOR: SensorInput(sensor, sensor.band_names, (1500.0,) * n_bands, (800.0,) * n_bands, 10.0)}
    toy = {"embed_dim": 16, "depth": 1, "n_heads": 2, "dynamic": DynamicConfig(generator_dim=16, ffn_dim=16)}
    encoder = Encoder(EncoderConfig(patch_embed="dynamic", **(toy if size == "toy" else {"size": size})))
    encoder.init_weights()
    models = {
        "as trained": BundleEncoder(encoder, inputs, {}).eval(),
        "baked": BundleEncoder(*bake(encoder, inputs, SENSOR), {}).eval(),
    }
    images = torch.rand(n_images, n_bands, side_px, side_px) * 4000
    features = [model(images, SENSOR) for model in models.values()]
    seconds = best_processor_seconds({name: partial(model, images, SENSOR) for name, model in models.items()}, n_turns)
    section = f"{size}, {side_px} px, {n_images}"
    for name, taken in seconds.items():
        yield _table.Row(section, name, 1000 * taken, "ms", taken / seconds["as trained"])
    gap = float((features[0] - features[1]).abs().max())
    yield _table.Row(section, "difference", 1e6 * gap, "ppm", most=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help="turns, of which the best counts")
    parser.add_argument("--size", choices=("all", "toy"), default="all", help="toy: one tiny encoder")
    arguments = parser.parse_args()
    cases = [("toy", 32, 1)] if arguments.size == "toy" else CASES
    print(_table.text([row for case in cases for row in rows_of(*case, arguments.turns)]))
    print(f"\n{_table.machine()}, 1 thread{', --size toy' if arguments.size == 'toy' else ''}")


if __name__ == "__main__":
    main()
