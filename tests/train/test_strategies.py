"""Single process == DDP == FSDP == HSDP, for every objective; and a run goes on elsewhere, in other company."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import exported_features
from launching import ROOT, assert_same_bits, read_checkpoint, records, train

from ssl_eo.cli import main
from ssl_eo.components import resolve
from ssl_eo.config import load
from ssl_eo.data.opening import open_sources
from ssl_eo.distributed import init_world, local_part
from ssl_eo.hub import load_bundle
from ssl_eo.train.export import export_encoder
from ssl_eo.train.parallel import build_objective, wrap

OnRanks = Callable[..., list[Any]]

KINDS = sorted(path.stem for path in (ROOT / "configs" / "debug").glob("*.yaml"))
SHORT = (
    "train.total_steps=4",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "optim.clip_grad_norm=0.5",
    # Some gradients are 0 but for rounding: of key biases, of what a batch norm takes out. AdamW would scale them up,
    # and it would hide a gradient that is a multiple of the right one.
    "optim.eps=1e-3",
    "checkpoint.every_n_steps=4",
    "checkpoint.keep=9",
    "log.every_n_steps=1",
    "log.report=false",
    "data.n_workers=0",
    "eval.every_n_steps=0",
)
# What a step needs to be one of the global batch: neighbours of all ranks, and no samples drawn on each rank.
ALSO = {"dinov2": ("objective.koleo_over_ranks=true",), "panopticon": ("model.drop_path_prob=0.0",)}
# Copies of parts, over what they are taken together: of a queue, of centers, of two groups of sensors, of statistics.
ON_FOUR_RANKS = ("byol", "croma", "dinov2", "moco")
# Gradients are summed in another order: float32 rounding (6e-8), grown over four steps.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def _train(kind: str, out_dir: str, *overrides: str) -> int:
    config = str(ROOT / "configs" / "debug" / f"{kind}.yaml")
    return main(["train", "--config", config, f"run.out_dir={out_dir}", *SHORT, *ALSO.get(kind, ()), *overrides])


def _run(kind: str, out_dir: Path, on_ranks: OnRanks, n_ranks: int, *overrides: str, status: int = 0) -> None:
    if n_ranks == 1:
        assert _train(kind, str(out_dir), *overrides) == status
    else:
        assert on_ranks(n_ranks, _train, kind, str(out_dir), *overrides) == [status] * n_ranks


def _final(kind: str, out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / f"debug_{kind}" / "checkpoints" / "step_00000004")


def _losses(kind: str, out_dir: Path) -> list[float]:
    return [r["loss"] for r in records(out_dir / f"debug_{kind}" / "metrics.jsonl") if "loss" in r]


def _assert_close(kind: str, a: Path, b: Path, tolerance: dict[str, float] = TOLERANCE) -> None:
    expected, found = _final(kind, a), _final(kind, b)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.startswith("objective."):
            torch.testing.assert_close(found[key], value, **tolerance, msg=lambda m, n=key: f"{n}: {m}")
    assert _losses(kind, b) == pytest.approx(_losses(kind, a), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_is_the_same_under_every_strategy(kind: str, tmp_path: Path, on_ranks: OnRanks) -> None:
    _run(kind, tmp_path / "single", on_ranks, 1)
    _run(kind, tmp_path / "ddp", on_ranks, 2, "parallel.strategy=ddp")
    _run(kind, tmp_path / "fsdp", on_ranks, 2, "parallel.strategy=fsdp")
    _assert_close(kind, tmp_path / "single", tmp_path / "ddp")
    _assert_close(kind, tmp_path / "ddp", tmp_path / "fsdp")
    if kind in ON_FOUR_RANKS:
        _run(kind, tmp_path / "hsdp", on_ranks, 4, "parallel.strategy=hsdp", "parallel.shard_size=2")
        _assert_close(kind, tmp_path / "fsdp", tmp_path / "hsdp")
    strategies = ("single", "ddp", "fsdp")
    features = [
        exported_features(tmp_path / name / f"debug_{kind}", tmp_path / f"{name}_bundle") for name in strategies
    ]
    for found in features[1:]:
        torch.testing.assert_close(found, features[0], atol=1e-3, rtol=1e-3)  # of tokens, of order 1


def test_drop_path_is_the_same_whether_weights_are_copied_or_spread(tmp_path: Path, on_ranks: OnRanks) -> None:
    for strategy in ("ddp", "fsdp"):
        overrides = (f"parallel.strategy={strategy}", "model.drop_path_prob=0.5")
        _run("panopticon", tmp_path / strategy, on_ranks, 2, *overrides)
    _assert_close("panopticon", tmp_path / "ddp", tmp_path / "fsdp")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dinov2 on one process, with all that may stand beside training."""
    out_dir = tmp_path_factory.mktemp("single")
    assert _train("dinov2", str(out_dir)) == 0
    return out_dir


VARIANTS = {
    "copies of one rank": (2, ("parallel.strategy=hsdp", "parallel.shard_size=1")),
    "a node": (2, ("parallel.strategy=hsdp",)),
    "one rank": (1, ("parallel.strategy=fsdp",)),
    "two ahead": (2, ("parallel.strategy=fsdp", "parallel.n_prefetched=2")),
    "offloaded": (2, ("parallel.strategy=fsdp", "parallel.cpu_offload=true")),
    "activations": (2, ("parallel.strategy=fsdp", "parallel.activation_checkpointing=full")),
    "some activations": (2, ("parallel.strategy=fsdp", "parallel.activation_checkpointing=selective")),
    "asynchronous": (2, ("parallel.strategy=fsdp", "checkpoint.asynchronous=true")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_leave_the_numbers_alone(variant: str, single: Path, tmp_path: Path, on_ranks: OnRanks) -> None:
    n_ranks, overrides = VARIANTS[variant]
    _run("dinov2", tmp_path, on_ranks, n_ranks, *overrides)
    _assert_close("dinov2", single, tmp_path)


def _rows_of_rank(*overrides: str) -> tuple[float, str]:
    """What part of the rows of a block's weights a rank holds, and where."""
    config = load(ROOT / "configs" / "debug" / "mae.yaml", ["train.global_batch_size=8", *overrides])
    world = init_world()
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    schemas = [source.schema for source in open_sources(config.data)]
    objective = build_objective(
        lambda: method(config.objective.options, config.model, schemas), config.run.seed, world.device
    )
    wrap(objective, config.parallel, world)
    weight = objective.shard_units()[0].attn.qkv.weight
    own = local_part(weight)
    return own.shape[0] / weight.shape[0], own.device.type


@pytest.mark.parametrize(
    ("n_ranks", "overrides", "expected"),
    [
        (4, ("parallel.strategy=fsdp",), 1 / 4),
        (4, ("parallel.strategy=hsdp", "parallel.shard_size=2"), 1 / 2),
        (2, ("parallel.strategy=hsdp", "parallel.shard_size=1"), 1),
        (2, ("parallel.strategy=hsdp",), 1 / 2),
        (2, ("parallel.strategy=ddp",), 1),
    ],
)
def test_a_rank_holds_its_part_of_the_weights(
    n_ranks: int, overrides: tuple[str, ...], expected: float, on_ranks: OnRanks
) -> None:
    assert on_ranks(n_ranks, _rows_of_rank, *overrides) == [(expected, "cpu")] * n_ranks


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, on_ranks: OnRanks) -> None:
    _run("mae", tmp_path / "single", on_ranks, 1)
    _run("mae", tmp_path / "fsdp", on_ranks, 2, "parallel.strategy=fsdp", "train.accumulate=2")
    _assert_close("mae", tmp_path / "single", tmp_path / "fsdp")


def test_blocks_that_gather_in_bfloat16_train_as_well(tmp_path: Path, on_ranks: OnRanks) -> None:
    """Blocks see weights of eight bits: other numbers, but a loss within a hundredth; what is kept is float32."""
    overrides = ("parallel.strategy=fsdp", "train.precision=bfloat16")
    _run("mae", tmp_path / "whole", on_ranks, 2, *overrides)
    _run("mae", tmp_path / "halved", on_ranks, 2, *overrides, "parallel.gather_dtype=bfloat16")
    assert _losses("mae", tmp_path / "halved") == pytest.approx(_losses("mae", tmp_path / "whole"), rel=1e-2)
    whole, halved = _final("mae", tmp_path / "whole"), _final("mae", tmp_path / "halved")
    assert all(value.dtype == whole[key].dtype for key, value in halved.items())
    assert any(not torch.equal(value, whole[key]) for key, value in halved.items())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers(tmp_path: Path, on_ranks: OnRanks) -> None:
    """By themselves, and inside FSDP with activations computed twice and samples dropped from blocks.

    In processes of their own: the compiler's threads do not survive a fork.
    """
    spread = ("parallel.strategy=fsdp", "model.drop_path_prob=0.3")
    also = ("parallel.compile=true", "parallel.activation_checkpointing=full")
    for kind, n_ranks, plain, compiled in (
        ("mae", 1, (), ("parallel.compile=true",)),
        ("dinov2", 2, spread, (*spread, *also)),
    ):
        _run(kind, tmp_path / "plain", on_ranks, n_ranks, *plain)
        config, given = str(ROOT / "configs" / "debug" / f"{kind}.yaml"), (*SHORT, *ALSO.get(kind, ()), *compiled)
        status, output = train(config, tmp_path / "compiled", *given, n_ranks=n_ranks)
        assert status == 0, output
        _assert_close(kind, tmp_path / "plain", tmp_path / "compiled")


TRAVELS = {
    "2 -> 1": ((2, "fsdp"), (1, "auto")),
    "1 -> 4": ((1, "auto"), (4, "fsdp")),
    "ddp -> fsdp": ((2, "ddp"), (2, "fsdp")),
    "fsdp -> ddp": ((2, "fsdp"), (2, "ddp")),
    "fsdp -> hsdp": ((2, "fsdp"), (4, "hsdp")),
}


@pytest.mark.parametrize("travel", TRAVELS)
def test_a_run_goes_on_elsewhere(travel: str, single: Path, tmp_path: Path, on_ranks: OnRanks) -> None:
    """Two steps in one place and two in another; the teacher, the centers and AdamW's moments travel too."""
    first, second = TRAVELS[travel]
    stop = ("checkpoint.every_n_steps=2", "log.every_n_steps=2")
    _run("dinov2", tmp_path, on_ranks, first[0], *stop, f"parallel.strategy={first[1]}")
    run = tmp_path / "debug_dinov2" / "checkpoints"
    shutil.rmtree(run / "step_00000004")
    halfway = read_checkpoint(run / "step_00000002")
    _run("dinov2", tmp_path, on_ranks, second[0], *stop, f"parallel.strategy={second[1]}")
    assert_same_bits(halfway, read_checkpoint(run / "step_00000002"))
    expected, found = _final("dinov2", single), _final("dinov2", tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **TOLERANCE, msg=lambda m, n=key: f"{n}: {m}")


def test_probes_pictures_and_export_of_a_spread_run(tmp_path: Path, on_ranks: OnRanks) -> None:
    """Probes see the same encoder as on one process, and so does whoever exports it without a process group."""
    split = "{name: synthetic, sensors: [sentinel2_l2a], extent_m: 320.0, n_samples: 40, split: %s}"
    task = f"{{name: tiny, train: {split % 'train'}, test: {split % 'test'}, max_train: 40, max_test: 20}}"
    beside = ("eval.every_n_steps=2", f"eval.tasks=[{task}]", "log.pictures_every_n_steps=2")
    _run("mae", tmp_path / "single", on_ranks, 1, *beside)
    _run("mae", tmp_path / "fsdp", on_ranks, 2, *beside, "parallel.strategy=fsdp")
    _assert_close("mae", tmp_path / "single", tmp_path / "fsdp")
    results = []
    for name in ("single", "fsdp"):
        run = tmp_path / name / "debug_mae"
        assert len(list((run / "pictures").iterdir())) == 2
        found = [r for r in records(run / "eval.jsonl") if r["kind"] == "health"]
        results.append([(r["step"], r["features"], round(r["effective_rank"], 2)) for r in found])
        export_encoder(run, tmp_path / f"{name}_bundle")
    assert results[0] == results[1]
    a, b = (load_bundle(tmp_path / f"{name}_bundle").encoder.state_dict() for name in ("single", "fsdp"))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, **TOLERANCE)
