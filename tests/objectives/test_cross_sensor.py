"""What training on pairs of sensors is for: a place is found again through another sensor, also through a new one.

Places are scenes that no training has seen; one in a hundred is found by chance. S places, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from launching import ROOT, command, finish, records, start
from torch import Tensor

from ssl_eo.config import build
from ssl_eo.eval.health import effective_rank
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.train.export import open_encoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAINED, NEW = ("sentinel2_l2a", "landsat8_9"), "superdove"
N_PLACES, N_PROTOTYPES = 100, 128
EXTENT_M = 1110.0  # whole pixels of all three sensors
RECIPE = (
    f"data.sources=[{{name: synthetic, n_samples: 512, sensors: [{', '.join(TRAINED)}], extent_m: {EXTENT_M}}}]",
    *("objective.crops.global_crop.scale=[0.6,1.0]", "objective.crops.local_crop.scale=[0.2,0.6]"),
    *("objective.start_teacher_temp=null", "objective.teacher_temp_warmup_steps=0", "objective.teacher_temp=0.05"),
    *("objective.centering=sinkhorn", "objective.koleo_weight=0.5", "objective.momentum=0.97"),
    *("train.total_steps=600", "checkpoint.every_n_steps=600"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes on a core that does nothing else."""
    out_dir = tmp_path_factory.mktemp("runs")
    process = start(command(str(ROOT / "configs" / "debug" / "dinov2.yaml"), out_dir, *RECIPE))
    status, output = finish(process, timeout_s=1500)
    assert status == 0, output
    return out_dir / "debug_dinov2"


@pytest.fixture(scope="module")
def places() -> dict[str, EncoderInput]:
    """The same places, all of each, through every sensor, in 32 pixels."""
    found, keys = {}, set()
    for sensor in (*TRAINED, NEW):
        source = {"name": "synthetic", "sensors": [sensor], "extent_m": EXTENT_M}
        raw = {"name": "places", "train": {**source, "n_samples": 64}, "test": {**source, "split": "test"}}
        split = Task(build(TaskConfig, {**raw, "max_test": N_PLACES, "size_px": 32}, "")).test
        (batch,) = split.batches(torch.arange(N_PLACES), N_PLACES, torch.device("cpu"))
        found[sensor] = batch.inputs
        keys.add(tuple(split.keys))
    assert len(keys) == 1
    return found


@torch.inference_mode()
def _shares_found(encoder: Encoder, places: Mapping[str, EncoderInput]) -> dict[frozenset[str], float]:
    """For each pair of sensors, how many places are nearest to themselves, the mean of both ways."""
    seen = {}
    for sensor, inputs in places.items():
        cls = encoder.eval()([inputs])[0].cls  # [S, D]
        seen[sensor] = torch.nn.functional.normalize(cls - cls.mean(0), dim=-1)
    pairs = [(a, b) for a in seen for b in seen if a < b]
    return {frozenset(pair): _share_found(*(seen[sensor] for sensor in pair)) for pair in pairs}


def _share_found(a: Tensor, b: Tensor) -> float:
    similarity, own = a @ b.T, torch.arange(len(a))  # [S, S]
    return float(torch.stack([similarity.argmax(d) == own for d in (0, 1)]).double().mean())


def test_places_are_found_through_another_sensor_and_a_new_one(run: Path, places: dict[str, EncoderInput]) -> None:
    encoder = open_encoder(run).encoder
    torch.manual_seed(0)
    random = Encoder(encoder.cfg)
    random.init_weights()
    found, by_chance = _shares_found(encoder, places), _shares_found(random, places)
    print({" - ".join(sorted(pair)): (share, by_chance[pair]) for pair, share in found.items()})
    first, second = TRAINED
    assert found[frozenset(TRAINED)] >= max(0.25, 2 * by_chance[frozenset(TRAINED)])
    assert found[frozenset((NEW, second))] >= max(0.2, 2 * by_chance[frozenset((NEW, second))])
    # Its bands are much like those of Sentinel-2, so random weights find many places already.
    assert found[frozenset((NEW, first))] >= by_chance[frozenset((NEW, first))] + 0.05


def test_the_teacher_does_not_collapse(run: Path, places: dict[str, EncoderInput]) -> None:
    """Neither onto one prototype, nor onto all of them equally, nor onto few directions."""
    last = records(run / "metrics.jsonl")[-1]
    uniform = float(torch.tensor(N_PROTOTYPES).log())
    encoder = open_encoder(run).encoder
    with torch.inference_mode():
        ranks = {s: effective_rank(encoder.eval()([inputs])[0].cls) for s, inputs in places.items()}
    print(last["teacher_entropy"], last["teacher_entropy_of_mean"], uniform, ranks)
    assert last["teacher_entropy_of_mean"] > uniform - 0.1
    assert last["teacher_entropy"] < uniform - 0.5
    assert min(ranks.values()) > 15  # of at most 64; one point has 1
