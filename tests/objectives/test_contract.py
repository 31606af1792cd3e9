"""What every objective must be, over every objective in the package, on its own debug config."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ssl_eo import components
from ssl_eo.config import Config, load
from ssl_eo.data.loader import Loader, open_source
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch
from ssl_eo.hub import load_bundle, write_bundle
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.base import Objective
from ssl_eo.train.optim import OptimConfig, build_optimizer, set_hyper_parameters, step_if_finite
from ssl_eo.train.parallel import build_objective

NAMES = components.available("ssl_eo.objectives")
DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug"

# Rows that only SAR channels look up; the debug data is optical.
SAR_TABLES = ("embed_transmit", "embed_receive", "embed_orbit")

# What eight samples must be learned down to in 60 steps, as a ratio of the first loss.
OVERFIT_RATIO = {"mae": 0.6}


def _setup(name: str, *overrides: str) -> tuple[Config, Objective, Batch]:
    config = load(DEBUG / f"{name}.yaml", ["data.n_workers=0", *overrides])
    sources = [open_source(s) for s in config.data.sources]
    schemas = [s.schema for s in sources]
    method = components.resolve("ssl_eo.objectives", name).Objective
    views = method.views(config.objective.options, config.model, schemas)
    objective = build_objective(
        lambda: method(config.objective.options, config.model, schemas), config.run.seed, torch.device("cpu")
    )
    with Loader(config.data, sources, views, seed=0, global_batch_size=8, total_steps=1) as loader:
        batch = next(iter(loader))
    batch.pixels = Renderer(schemas).render(batch)
    return config, objective, batch


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_has_a_debug_config(name: str) -> None:
    assert (DEBUG / f"{name}.yaml").is_file()


def test_forward_is_pure_and_every_student_parameter_gets_a_gradient(name: str) -> None:
    _, objective, batch = _setup(name)
    now = {k: s(0) for k, s in objective.schedules(100).items()}
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    first, second = objective(batch, now), objective(batch, now)
    assert torch.equal(first.total, second.total)
    for key, value in objective.state_dict().items():
        assert torch.equal(value, before[key]), f"forward changed {key}"
    assert first.total.dtype == torch.float32
    assert all(v.isfinite() and v.ndim == 0 for v in (first.total, *first.parts.values()))
    first.total.backward()
    gradients = {n: p.grad for n, p in objective.student.named_parameters()}
    missing = [n for n, g in gradients.items() if g is None]
    assert not missing, f"no gradient reaches {missing}"
    zero = [n for n, g in gradients.items() if g is not None and not g.any() and not n.endswith(SAR_TABLES)]
    assert not zero, f"the gradient is zero for {zero}"
    if objective.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())


def test_views_are_picklable_and_pure(name: str) -> None:
    config, _, _ = _setup(name)
    sources = [open_source(s) for s in config.data.sources]
    method = components.resolve("ssl_eo.objectives", name).Objective
    views = method.views(config.objective.options, config.model, [s.schema for s in sources])
    batches = []
    for v in (views, pickle.loads(pickle.dumps(views))):
        with Loader(config.data, sources, v, seed=0, global_batch_size=8, total_steps=1) as loader:
            batches.append(next(iter(loader)))
    for a, b in zip(*(batch.views.values() for batch in batches), strict=True):
        assert torch.equal(a.box, b.box)
        assert torch.equal(a.rot90, b.rot90)


def test_builds_on_meta_and_init_depends_on_the_seed_alone(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed * 7 + 1)
        _, objective, _ = _setup(name, f"run.seed={seed}")
        states.append(objective.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_overfits_eight_samples(name: str) -> None:
    _, objective, batch = _setup(name)
    optimizer = build_optimizer(OptimConfig(lr=3e-3), objective)
    losses = []
    for step in range(60):
        now = {k: s(step) for k, s in objective.schedules(60).items()}
        set_hyper_parameters(optimizer, 3e-3 * min(1.0, (step + 1) / 10), 0.0)
        loss = objective(batch, now).total
        loss.backward()
        step_if_finite(optimizer, torch.ones(()))
        optimizer.zero_grad()
        objective.after_step(now, torch.ones(()))
        losses.append(float(loss.detach()))
    assert losses[-1] < OVERFIT_RATIO[name] * losses[0]


def test_exported_encoder_is_what_evaluation_sees(name: str, tmp_path: Path) -> None:
    _, objective, batch = _setup(name)
    view = next(iter(batch.pixels.values()))
    inputs = EncoderInput(view.pixels, view.channels, view.gsd_m)
    objective.eval()
    with torch.no_grad():
        expected = objective.encode(inputs)[0]
        write_bundle(tmp_path / "bundle", objective.published_encoder(), {}, {})
        bundle = load_bundle(tmp_path / "bundle")
        found = bundle.encoder([inputs])[0]
    assert torch.equal(found.x, expected.x)
