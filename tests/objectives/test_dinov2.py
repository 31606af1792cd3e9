"""Self-distillation against loops over views, pairs and patches; who sees what; ranks; steps that are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import fit
from pairing import batch_of, config_of, objective_of, source_of
from torch import Tensor, nn

from ssl_eo.cli import main
from ssl_eo.config import Config
from ssl_eo.data.types import Batch, PixelBatch
from ssl_eo.distributed import mean_over_ranks
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.dinov2 import Objective
from ssl_eo.seeding import numpy_generator
from ssl_eo.train.optim import OptimConfig, build_optimizer, step_if_finite
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug"
NOW = {"momentum": 0.9, "teacher_temp": 0.05}
SEPARATE = "objective.ibot_head={n_prototypes: 96, hidden_dim: 128, bottleneck_dim: 32}"


def _config(*overrides: str, name: str = "dinov2") -> Config:
    return config_of(name, *overrides)


def _objective(config: Config, name: str = "dinov2") -> Objective:
    """Student, teacher and centers differ from one another, and no bias is zero."""
    return objective_of(config, name)


def _batch(config: Config, n: int = 4, name: str = "dinov2") -> Batch:
    return batch_of(config, name, n)


def _setup(*overrides: str, n: int = 4, name: str = "dinov2") -> tuple[Objective, Batch]:
    config = _config(*overrides, name=name)
    return _objective(config, name), _batch(config, n, name)


# The formula


def _input(view: PixelBatch, mask: Tensor | None = None) -> EncoderInput:
    return EncoderInput(view.pixels, view.channels, view.gsd_m, mask=mask)


def _encode(network: nn.ModuleDict, view: PixelBatch, mask: Tensor | None = None) -> Any:
    return network["encoder"]([_input(view, mask)])[0]


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def _cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
    return float(-(target * np.log(_softmax(logits / 0.1))).sum())


def _sinkhorn(z: np.ndarray, temperature: float) -> np.ndarray:
    q = np.exp(z / temperature)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    return q * q.shape[0]


def _targets(objective: Objective, logits: np.ndarray, center: Tensor) -> np.ndarray:
    if objective.cfg.centering == "sinkhorn":
        return _sinkhorn(logits, NOW["teacher_temp"])
    return np.array([_softmax((z - center.double().numpy()) / NOW["teacher_temp"]) for z in logits])


@torch.no_grad()
def _naive(objective: Objective, batch: Batch) -> dict[str, float]:
    """The losses in float64, by loops over views, pairs and patches, from tokens and heads called one by one."""
    cfg, n = objective.cfg, len(batch.keys)
    n_global = cfg.crops.n_global
    mask = batch.ragged_masks["global"].mask
    head, patch_head = "dino_head", "ibot_head" if cfg.ibot_head else "dino_head"
    seen = _encode(objective.teacher, batch.pixels["global"])
    told = [_encode(objective.student, batch.pixels["global"], mask), _encode(objective.student, batch.pixels["local"])]

    targets = _targets(objective, objective.teacher[head](seen.cls).double().numpy(), objective.center)
    logits = np.concatenate([objective.student[head](tokens.cls).double().numpy() for tokens in told])
    pairs = [(s, t) for s in range(len(logits) // n) for t in range(n_global) if s != t]
    dino = [_cross_entropy(targets[t * n + b], logits[s * n + b]) for s, t in pairs for b in range(n)]

    every = [(image, patch) for image in range(n_global * n) for patch in range(mask.shape[1]) if mask[image, patch]]
    hidden = [torch.stack([tokens.patches[image, patch] for image, patch in every]) for tokens in (seen, told[0])]
    of_patches = _targets(objective, objective.teacher[patch_head](hidden[0]).double().numpy(), objective.ibot_center)
    said = objective.student[patch_head](hidden[1]).double().numpy()
    ibot = 0.0
    for (image, _), target, z in zip(every, of_patches, said, strict=True):
        ibot += _cross_entropy(target, z) / int(mask[image].sum())

    koleo = 0.0
    for view in told[0].cls.double().unflatten(0, (-1, n)).numpy():
        unit = [row / np.linalg.norm(row) for row in view]
        nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
        koleo -= sum(map(math.log, nearest)) / n

    mean = targets.mean(0)
    parts = {"dino": float(np.mean(dino)), "ibot": ibot / (n_global * n), "koleo": koleo}
    return {
        **parts,
        "total": sum(getattr(cfg, f"{name}_weight") * value for name, value in parts.items()),
        "teacher_entropy": float(-(targets * np.log(targets)).sum(1).mean()),
        "teacher_entropy_of_mean": float(-(mean * np.log(mean)).sum()),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (SEPARATE, "objective.dino_weight=0.7", "objective.ibot_weight=1.3"),
        ("objective.centering=sinkhorn",),
        ("objective.crops.n_global=3", "objective.mask.n_views=2", "objective.crops.bands_per=step"),
    ],
    ids=["shared head", "separate heads", "sinkhorn", "three global views"],
)
def test_forward_is_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = _setup(*overrides)
    found, expected = objective(batch, NOW), _naive(objective, batch)
    values = {**found.parts, **found.metrics, "total": found.total}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=2e-5)
    assert all(value.dtype == torch.float32 for value in values.values())


def test_one_head_for_both_is_one_head_used_twice() -> None:
    shared, batch = _setup()
    twice = _objective(_config("objective.ibot_head={n_prototypes: 128, hidden_dim: 128, bottleneck_dim: 32}"))
    state = shared.state_dict()
    copies = {name.replace(".dino_head.", ".ibot_head."): v for name, v in state.items() if ".dino_head." in name}
    twice.load_state_dict({**state, **copies})
    losses = [objective(batch, NOW).total for objective in (shared, twice)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for name, parameter in shared.student["dino_head"].named_parameters():
        both = [twice.student[head].get_parameter(name).grad for head in ("dino_head", "ibot_head")]
        torch.testing.assert_close(sum(both), parameter.grad, rtol=1e-4, atol=1e-6)


# Who sees what


def test_plans_are_in_the_order_of_the_rows() -> None:
    config, source = _config("objective.crops.bands_per=step"), source_of("dinov2")
    views = Objective.views(config.objective.options, config.model, [source.schema])
    planned = []
    for slot in range(3):
        sample = source.read(slot)
        sample.slot = slot
        planned.append((sample, views.plan(sample, numpy_generator("view", slot))))
    batch = views.collate(planned, 0, 0, numpy_generator("batch"))
    rows = [(view, sample) for view in range(2) for sample in range(3)]
    assert batch.ragged_masks["global"].mask.any(1).unflatten(0, (2, 3)).sum(0).tolist() == [1, 1, 1]
    boxes: dict[int, list[float]] = {}
    for found in batch.views["global"]:
        at = range(6) if found.place is None else (found.place[:, 0] // found.role_shape[1]).tolist()
        boxes.update(zip(at, found.box.tolist(), strict=True))
    for row, (view, sample) in enumerate(rows):
        assert boxes[row] == pytest.approx(planned[sample][1]["global"][view].box)


def test_the_two_global_views_of_a_place_are_two_sensors() -> None:
    config, source = _config(), source_of("dinov2")
    views = Objective.views(config.objective.options, config.model, [source.schema])
    for slot in range(5):
        plan = views.plan(source.read(slot), numpy_generator("view", slot))
        assert {view.tile for view in plan["global"]} == {"sentinel2_l2a", "landsat8_9"}


def test_the_teacher_sees_every_patch() -> None:
    objective, batch = _setup()
    before = objective(batch, NOW)
    with torch.no_grad():
        objective.teacher["encoder"].mask_token.fill_(torch.nan)
    after = objective(batch, NOW)
    assert torch.equal(before.total, after.total)
    assert torch.equal(before.state["ibot_center"], after.state["ibot_center"])
    with torch.no_grad():
        objective.student["encoder"].mask_token.fill_(torch.nan)
    assert objective(batch, NOW).total.isnan()


def _caught(module: nn.Module) -> list[Tensor]:
    """What the module returns, with gradients kept."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in [t.x for t in output] if isinstance(output, list) else [output]:
            if tensor.requires_grad:
                tensor.retain_grad()
            found.append(tensor)

    module.register_forward_hook(keep)
    return found


def test_no_view_is_its_own_target() -> None:
    """The gradient of a cross-entropy says what the target was: softmax less gradient, by its factor."""
    objective, batch = _setup(name="dino")
    said, seen = _caught(objective.student["dino_head"]), _caught(objective.teacher["dino_head"])
    objective(batch, NOW).total.backward()
    n, n_views, n_pairs = 4, 6, 2 + 2 * 4
    logits, grad = (x.detach().unflatten(0, (n_views, n)) for x in (said[0], said[0].grad))
    target = ((seen[0].unflatten(0, (2, n)) - objective.center) / NOW["teacher_temp"]).softmax(-1)
    for view in range(n_views):
        of = [1] if view == 0 else [0] if view == 1 else [0, 1]
        pulled_to = len(of) * (logits[view] / 0.1).softmax(-1) - grad[view] * 0.1 * n_pairs * n
        torch.testing.assert_close(pulled_to, target[of].sum(0), atol=2e-5, rtol=0)


def test_only_hidden_patches_are_learned_from() -> None:
    objective, batch = _setup("objective.dino_weight=0", "objective.koleo_weight=0")
    tokens = _caught(objective.student["encoder"])
    objective(batch, NOW).total.backward()
    touched = tokens[0].grad.abs().sum(-1) > 0  # [V*B, 1 + N]
    assert torch.equal(touched[:, 1:], batch.ragged_masks["global"].mask)
    assert not touched[:, 0].any()
    assert not tokens[1].grad.any()


def test_nothing_reaches_the_teacher() -> None:
    objective, batch = _setup()
    losses = objective(batch, NOW)
    losses.total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert not any(v.requires_grad for v in (*losses.state.values(), *losses.parts.values(), *losses.metrics.values()))
    assert all(p.grad is not None and p.grad.any() for p in objective.student["dino_head"].parameters())


# The centers


def _centered_logits(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """The teacher's logits of this rank that each center is the running mean of."""
    with torch.no_grad():
        tokens = _encode(objective.teacher, batch.pixels["global"])
        head = objective.teacher["dino_head"]
        patches = head(tokens.patches[batch.ragged_masks["global"].mask])
    return {"center": head(tokens.cls), "ibot_center": patches}


def test_centers_move_after_the_step_by_the_mean_of_all_rows() -> None:
    """One step late: what a forward sees is what steps before it left."""
    objective, batch = _setup()
    before = {name: getattr(objective, name).clone() for name in ("center", "ibot_center")}
    rows = _centered_logits(objective, batch)
    losses = objective(batch, NOW)
    assert all(torch.equal(getattr(objective, name), value) for name, value in before.items())
    objective.after_step(NOW, torch.ones(()), losses.state)
    for name, value in before.items():
        torch.testing.assert_close(getattr(objective, name), 0.9 * value + 0.1 * rows[name].mean(0))
    assert objective(batch, NOW).total != losses.total


def test_sinkhorn_needs_no_center() -> None:
    objective, batch = _setup("objective.centering=sinkhorn")
    assert objective(batch, NOW).state == {}


def _step_of_rank(centering: str, heads: str) -> dict[str, Any]:
    """Loss and gradient as DDP averages them, the centers after the step, and what this rank's part was."""
    overrides = ("objective.koleo_over_ranks=true", f"objective.centering={centering}", *filter(None, [heads]))
    objective, batch = _setup(*overrides, n=8)
    losses = objective(batch, NOW)
    losses.total.backward()
    grads = {name: mean_over_ranks(p.grad) for name, p in objective.student.named_parameters()}
    rows = _centered_logits(objective, batch)
    objective.after_step(NOW, torch.ones(()), losses.state)
    return {
        "keys": batch.keys,
        "n_masked": len(batch.ragged_masks["global"].ids_masked),
        "total": mean_over_ranks(losses.total.detach()),
        "grads": grads,
        "means": {name: row.mean(0) for name, row in rows.items()},
        "centers": {name: getattr(objective, name) for name in rows},
    }


@pytest.mark.parametrize(("centering", "heads"), [("mean", ""), ("sinkhorn", SEPARATE)])
def test_two_ranks_are_one_process_though_they_hide_other_numbers_of_patches(
    on_ranks: Callable[..., list[Any]], centering: str, heads: str
) -> None:
    """Eight ratios over eight slots: the first rank hides few patches, the second many and all count alike."""
    whole = _step_of_rank(centering, heads)
    ranks = on_ranks(2, _step_of_rank, centering, heads)
    assert [*ranks[0]["keys"], *ranks[1]["keys"]] == whole["keys"]
    assert ranks[0]["n_masked"] < ranks[1]["n_masked"]
    assert ranks[0]["n_masked"] + ranks[1]["n_masked"] == whole["n_masked"]
    for found in ranks:
        torch.testing.assert_close(found["total"], whole["total"], rtol=1e-5, atol=0)
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(
                found["grads"][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(found["centers"], whole["centers"])
    if centering == "mean" and not heads:  # the mean of the ranks' means is another
        of_means = (ranks[0]["means"]["ibot_center"] + ranks[1]["means"]["ibot_center"]) / 2
        assert (of_means - whole["means"]["ibot_center"]).abs().max() > 1e-3


# Steps


def _state(objective: Objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.state_dict().items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_leaves_every_bit(value: float) -> None:
    """Student, teacher and centers, and AdamW's moments; the next good batch moves them all."""
    objective, batch = _setup()
    optimizer = build_optimizer(OptimConfig(lr=1e-3), objective)

    def step() -> bool:
        losses = objective(batch, NOW)
        losses.total.backward()
        grads = [p.grad for p in objective.student.parameters()]
        finite = losses.total.isfinite() & torch.stack([g.isfinite().all() for g in grads]).all()
        step_if_finite(optimizer, finite.float())
        optimizer.zero_grad()
        objective.after_step(NOW, finite.float(), losses.state)
        return bool(finite)

    assert step()
    before = _state(objective)
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    good, bad = batch.pixels["global"].pixels, batch.pixels["global"].pixels.clone()
    bad[0, 0, 0, 0] = value
    batch.pixels["global"].pixels = bad
    assert not step()
    assert all(torch.equal(v, before[name]) for name, v in objective.state_dict().items())
    for i, found in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[i][k]) for k, v in found.items())
    batch.pixels["global"].pixels = good
    assert step()
    # Rows of sensors that the batch does not show stay.
    still = {name for name, v in objective.state_dict().items() if torch.equal(v, before[name])}
    assert {name.rpartition(".")[2] for name in still} <= {"embed_transmit", "embed_receive", "embed_orbit"}


def test_schedules() -> None:
    """W = 30 steps of warm-up of the temperature, T = 100 in all."""
    overrides = ("objective.start_teacher_temp=0.04", "objective.teacher_temp=0.07", "objective.momentum=0.992")
    schedules = _objective(_config(*overrides, "objective.teacher_temp_warmup_steps=30")).schedules(100)
    temp, momentum = schedules["teacher_temp"], schedules["momentum"]
    assert [temp(s) for s in (0, 29, 30, 99)] == pytest.approx([0.04, 0.04 + 0.03 * 29 / 30, 0.07, 0.07])
    cosine = [1 + (0.992 - 1) * (1 + math.cos(math.pi * s / 100)) / 2 for s in (0, 29, 30, 99)]
    assert [momentum(s) for s in (0, 29, 30, 99)] == pytest.approx(cosine, rel=1e-12)
    assert momentum(0) == pytest.approx(0.992)
    assert momentum(100) == 1.0
    no_warmup = ("objective.start_teacher_temp=null", "objective.teacher_temp_warmup_steps=0")
    constant = _objective(_config(*overrides, *no_warmup)).schedules(100)
    assert constant["teacher_temp"](0) == 0.07


@torch.no_grad()
def _share_found(objective: Objective, batch: Batch) -> float:
    """For how many places the teacher's answer to one global view is nearest to that to the other of the same place."""
    tokens = _encode(objective.teacher, batch.pixels["global"])
    answers = objective.teacher["dino_head"](tokens.cls).unflatten(0, (2, -1))  # [2, B, K]
    first, second = nn.functional.normalize(answers - answers.mean(1, keepdim=True), dim=-1)
    return ((first @ second.T).argmax(1) == torch.arange(len(first))).double().mean().item()


def test_learning_matches_two_sensors_and_does_not_collapse() -> None:
    """They look unlike to random weights, and alike to a collapsed teacher, which would find one place in eight."""
    no_warmup = ("objective.start_teacher_temp=null", "objective.teacher_temp_warmup_steps=0")
    config = _config("objective.centering=sinkhorn", "objective.teacher_temp=0.05", *no_warmup)
    schemas = [source_of("dinov2").schema]
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, schemas), 0, torch.device("cpu")
    )
    batch = _batch(config, n=8)
    assert _share_found(objective, batch) <= 0.25
    fit(objective, batch, 160)
    assert _share_found(objective, batch) >= 0.75


def test_autocast_gives_losses_in_float32() -> None:
    objective, batch = _setup()
    expected = objective(batch, NOW)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, NOW)
    for name, part in {**found.parts, **found.state, "total": found.total}.items():
        assert part.dtype == torch.float32, name
    torch.testing.assert_close(found.total, expected.total, rtol=0.02, atol=0)


# What is refused


def test_accumulation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches would have other neighbours, targets and centers than the batch."""
    arguments = ["train", "--config", str(DEBUG / "dinov2.yaml"), f"run.out_dir={tmp_path}"]
    assert main([*arguments, "train.accumulate=2"]) == 2
    assert "train.accumulate 2: the loss of objective dinov2 mixes the samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.dino_weight=-1", "dino_weight must not be negative"),
        ("objective.student_temp=0", "student_temp must be positive"),
        ("objective.momentum=1.5", r"momentum must be in \[0, 1\]"),
        ("objective.center_momentum=-0.1", "center_momentum must be in"),
        ("objective.mask.n_views=3", "mask.n_views 3 is more than crops.n_global 2"),
        ("objective.crops.global_crop.size_px=30", "global_crop.size_px 30 is not a multiple of model.patch_size 8"),
        ("objective.crops.local_crop.size_px=12", "local_crop.size_px 12 is not a multiple of model.patch_size 8"),
        ("objective.mask.mask_ratio=[0.0,0.1]", "hides none of the 16 patches"),
        ("model.mask_token=false", "model.mask_token must be true with objective.ibot_weight 1.0"),
        ("objective.ibot_weight=0", "model.mask_token must be false with objective.ibot_weight 0"),
        ("objective.crops.tiles=[sentinel2]", "no source has sentinel2"),
        ("model.patch_embed=conv", "global_bands.n_bands must be null with model.patch_embed conv"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    schemas = [source_of("dinov2").schema]
    with pytest.raises(ValueError, match=message):  # noqa: PT012 - found at one of three places, all before training
        config = _config(override)
        Objective.views(config.objective.options, config.model, schemas)
        Objective(config.objective.options, config.model, schemas)


def test_heads_and_losses_that_teach_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="both 0: nothing would be learned"):
        _config("objective.dino_weight=0", "objective.ibot_weight=0")
    with pytest.raises(ValueError, match="ibot_head is set but ibot_weight or dino_weight is 0"):
        _config(SEPARATE, "objective.ibot_weight=0")
