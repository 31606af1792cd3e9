"""The cost of features: equal to a count by hand, whatever kernel attention takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from toy import tasks

from ssl_eo.eval.cost import forward_gflop
from ssl_eo.eval.features import patch_taps, pooled_taps
from ssl_eo.eval.tasks import Task
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens

_WIDTH, _N_BLOCKS, _PATCH_PX, _N_BANDS = 16, 2, 4, 3


def _encode(encoder: Encoder, layers: list[int], inputs: EncoderInput) -> list[Tokens]:
    return encoder.intermediates(inputs, layers)


def _by_hand(side_px: int) -> float:
    n_patches = (side_px // _PATCH_PX) ** 2
    n = n_patches + 1  # the CLS token
    embedding = 2 * n_patches * _WIDTH * _N_BANDS * _PATCH_PX**2
    linear = 2 * n * _WIDTH * _WIDTH * (3 + 1 + 4 + 4)  # qkv, projection, both layers of the MLP
    attention = 2 * 2 * n * n * _WIDTH
    return (embedding + _N_BLOCKS * (linear + attention)) / 1e9


@pytest.mark.parametrize("size_px", [None, 16])
@pytest.mark.parametrize("max_train", [12, None])
def test_gflop_are_those_of_one_sample(size_px: int | None, max_train: int | None) -> None:
    task = Task(tasks.task(size_px=size_px, max_train=max_train, n_train=12))
    featurise = pooled_taps(partial(_encode, tasks.encoder(), [_N_BLOCKS - 1]), ["last"], "mean")
    found = forward_gflop(featurise, task.train, torch.device("cpu"))
    assert found == pytest.approx(_by_hand(size_px or 8), rel=1e-12)


def test_a_second_tap_costs_nothing() -> None:
    task = Task(tasks.task())
    encoder = tasks.encoder()
    one, two = (
        forward_gflop(patch_taps(partial(_encode, encoder, layers), names), task.train, torch.device("cpu"))
        for layers, names in (([1], ["last"]), ([0, 1], ["half", "last"]))
    )
    assert one == two
