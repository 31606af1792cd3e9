"""Addressed generators and schedules."""

import math

import numpy as np
import pytest
import torch

from ssl_eo.schedules import Constant, Linear, Trapezoid, WarmupCosine
from ssl_eo.seeding import derive_seed, numpy_generator, torch_generator, uniforms


def test_seed_depends_on_every_part_its_type_and_its_place() -> None:
    seeds = [
        derive_seed(*parts)
        for parts in [
            (1, "view", 2),
            (1, "view", 3),
            (2, "view", 2),
            (1, "vie", "w2"),
            ("1", "view", 2),
            (1, 2, "view"),
        ]
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, "view", 2) == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_same_address_same_stream() -> None:
    a, b = (numpy_generator(0, "mask", 7, "key").random(5) for _ in range(2))
    assert np.array_equal(a, b)
    x, y = (torch.rand(5, generator=torch_generator(0, "mask", 7)) for _ in range(2))
    assert torch.equal(x, y)


def test_uniforms_depend_on_seed_and_key_alone() -> None:
    keys = np.arange(-3, 2000)
    drawn = uniforms(7, keys, 5)
    assert drawn.shape == (2003, 5)
    assert drawn.dtype == np.float32
    assert np.array_equal(uniforms(7, keys[::-1], 5), drawn[::-1])
    assert not np.isin(uniforms(8, keys, 5), drawn).mean() > 0.01
    assert 0 <= drawn.min() < 0.001 < 0.999 < drawn.max() < 1
    shares, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert np.abs(shares / drawn.size - 0.05).max() < 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.1  # columns do not follow one another
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.1  # nor keys


def test_warmup_cosine() -> None:
    schedule = WarmupCosine(peak=2.0, end=0.5, total_steps=110, warmup_steps=10)
    assert schedule(0) == 0
    assert schedule(5) == pytest.approx(1.0)
    assert schedule(10) == 2.0
    assert schedule(60) == pytest.approx(1.25)
    assert schedule(110) == schedule(1000) == pytest.approx(0.5)
    assert schedule(35) == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 4)))


def test_trapezoid_linear_constant() -> None:
    schedule = Trapezoid(peak=1.0, end=0.0, total_steps=100, warmup_steps=10, cooldown_steps=20)
    assert [schedule(s) for s in (0, 5, 10, 50, 80, 90, 100)] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
    assert [Linear(1.0, 3.0, 4)(s) for s in (0, 2, 4, 9)] == [1, 2, 3, 3]
    assert Constant(0.3)(12345) == 0.3
