"""Plans of a config: parameters, FLOPs and memory beside closed forms and real runs; and what cannot be planned."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, finish, start

from ssl_eo.cli import main
from ssl_eo.components import resolve
from ssl_eo.config import Config, load
from ssl_eo.data.opening import open_sources
from ssl_eo.models.position import sincos_grid
from ssl_eo.objectives.base import Objective
from ssl_eo.train.parallel import build_objective
from ssl_eo.train.plan import Plan, plan

DEBUG = ROOT / "configs" / "debug"
KINDS = sorted(path.stem for path in DEBUG.glob("*.yaml"))
MB = 1e6

# Of half a gigabyte or so, by sizes at which a step on one core takes seconds.
_SMALL = ("model.embed_dim=384", "model.n_heads=6", "model.depth=6")
LARGE = {
    "mae": (
        *_SMALL,
        "objective.crop.size_px=96",
        "objective.decoder.embed_dim=192",
        "objective.decoder.depth=2",
        "train.global_batch_size=48",
    ),
    "dinov2": (
        *_SMALL,
        "objective.crops.global_crop.size_px=64",
        "objective.crops.local_crop.size_px=32",
        "objective.crops.global_bands.n_bands=[4,4]",
        "objective.crops.local_bands.n_bands=[4,4]",
        "objective.head.n_prototypes=4096",
        "train.global_batch_size=16",
    ),
    "croma": (*_SMALL, "objective.crop.size_px=96", "train.global_batch_size=24"),
}


@cache
def _plan(kind: str, *overrides: str, ranks: int = 1, **options: Any) -> Plan:
    """Of small batches, unless told otherwise."""
    return plan(load(DEBUG / f"{kind}.yaml", ["train.global_batch_size=8", *overrides]), ranks, **options)


def _built(config: Config) -> Objective:
    schemas = [source.schema for source in open_sources(config.data)]
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    return build_objective(lambda: method(config.objective.options, config.model, schemas), 0, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_can_be_planned_and_has_the_parameters_of_a_real_one(kind: str) -> None:
    found, real = _plan(kind), _built(load(DEBUG / f"{kind}.yaml"))
    parts = {f"student.{name}": part for name, part in real.student.items()}
    parts |= {f"teacher.{name}": part for name, part in (real.teacher or torch.nn.ModuleDict()).items()}
    assert found.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = [p for p in real.student.parameters() if p.requires_grad]
    assert found.n_trained == sum(p.numel() for p in trained)
    assert found.n_published == sum(p.numel() for p in real.published_encoder().parameters())
    state = [*real.parameters(), *real.buffers()]
    for memory in found.memory.values():
        assert memory.weights + memory.teacher == sum(tensor.nbytes for tensor in state)
        assert memory.moments == 2 * sum(p.nbytes for p in trained)
        assert memory.batch > 0
    assert found.memory["forward and backward"].activations > 0
    assert 2 < found.step_flop / found.forward_flop < 3.3
    assert found.global_batch_size == 8


@pytest.mark.parametrize("kind", ["croma", "dinov2", "dofa", "mae_temporal", "multimae"])
def test_blocks_that_are_dropped_and_computed_again_can_be_planned(kind: str) -> None:
    overrides = ("train.precision=bfloat16", "model.drop_path_prob=0.2", "parallel.activation_checkpointing=full")
    plain, full = _plan(kind), _plan(kind, *overrides, device="cuda")
    assert full.parameters == plain.parameters
    assert full.step_flop / full.forward_flop > plain.step_flop / plain.forward_flop
    moment = "forward and backward"
    assert full.memory[moment].activations < plain.memory[moment].activations


def test_no_table_without_values_is_left_behind() -> None:
    _plan("mae")
    assert type(sincos_grid((4, 4), 64, torch.device("cpu"))) is torch.Tensor


# --- FLOPs ------------------------------------------------------------------------------------------------------------

PLAIN = ("model.patch_embed=conv", "data.sources.0.sensors=[sentinel2_l2a]")


def _closed_form(config: Config, n_channels: int) -> tuple[float, float]:
    """FLOPs of two views of a sample through a plain ViT and a projector: forward, and with backward."""
    model, options = config.model, config.objective.options
    d, n_patches = model.width, (options.crops.crop.size_px // model.patch_size) ** 2
    n_tokens = n_patches + 1
    linear = model.n_blocks * n_tokens * 2 * (4 + 2 * model.mlp_ratio) * d**2
    linear += 2 * (d * options.hidden_dim + options.hidden_dim * options.out_dim)
    attention = model.n_blocks * 4 * n_tokens**2 * d
    embedding = n_patches * 2 * n_channels * model.patch_size**2 * d
    # Backward of a product is two products, but pixels need no gradient; fused attention computes its logits again.
    return 2 * (linear + attention + embedding), 2 * (3 * linear + 3.5 * attention + 2 * embedding)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_flops_of_a_plain_vit_are_those_of_the_closed_form(patch_size: int) -> None:
    config = load(DEBUG / "simclr.yaml", [*PLAIN, f"model.patch_size={patch_size}", "train.global_batch_size=8"])
    n_channels = len(open_sources(config.data)[0].schema["sentinel2_l2a"].bands)
    forward, step = _closed_form(config, n_channels)
    found = plan(config)
    assert found.forward_flop == pytest.approx(forward, rel=0.01)
    assert found.step_flop == pytest.approx(step, rel=0.01)


def test_attention_costs_the_same_in_every_kernel() -> None:
    """On a CPU bfloat16 is not fused, and keeps its logits instead of computing them again."""
    fused, plain = (_plan("simclr", "train.precision=bfloat16", device=device) for device in ("cuda", "cpu"))
    assert fused.forward_flop == plain.forward_flop
    assert fused.step_flop > plain.step_flop
    moment = "forward and backward"
    assert fused.memory[moment].activations < plain.memory[moment].activations


def test_selective_checkpoints_repeat_no_product() -> None:
    plain, selective = (_plan("mae", f"parallel.activation_checkpointing={mode}") for mode in ("none", "selective"))
    assert selective.step_flop == plain.step_flop


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "n_ranks", "settings"),
    [
        ("mae", 1, ("parallel.activation_checkpointing=full", "train.global_batch_size=64")),
        ("dinov2", 1, ()),
        ("croma", 2, ("parallel.strategy=ddp",)),
        ("mae", 2, ("parallel.strategy=fsdp",)),
    ],
)
def test_memory_is_within_15_percent_of_a_real_run(
    kind: str, n_ranks: int, settings: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (*LARGE[kind], *settings)
    found = _plan(kind, *overrides, ranks=n_ranks)
    planned = found.memory[found.worst].total
    program = [str(ROOT / "tests" / "measuring.py"), str(tmp_path / "bytes")]
    status, output = finish(start([*program, str(DEBUG / f"{kind}.yaml"), str(tmp_path), *overrides], n_ranks))
    assert status == 0, output
    measured = [int((tmp_path / f"bytes.{rank}").read_text()) for rank in range(n_ranks)]
    print(f"planned {planned / MB:.0f} MB, measured {[round(peak / MB) for peak in measured]} MB")
    # Of buckets that DDP sets apart, a CPU shows what was written to: planned is more there, as it would be on a GPU.
    assert [planned] * n_ranks == pytest.approx(measured, rel=0.15)


def test_fsdp_keeps_shares_and_gathers_blocks() -> None:
    averaged = "objective.ema_momentum=0.9"
    single = _plan("mae", averaged).memory["optimiser"]
    found = _plan("mae", averaged, "parallel.strategy=fsdp", ranks=4).memory
    for part in ("weights", "teacher", "moments", "gradients"):
        # A rank's rows are rounded up, which small parameters feel.
        whole, share = getattr(single, part), getattr(found["optimiser"], part)
        assert whole / 4 <= share < whole / 3
    assert found["optimiser"].gathered == 0
    assert found["forward and backward"].gathered > 0
    halves = ("parallel.strategy=hsdp", "parallel.shard_size=2")
    fewer = _plan("mae", averaged, *halves, ranks=4).memory["optimiser"]
    assert single.weights / 2 <= fewer.weights < single.weights / 1.7


def test_offloaded_state_is_no_memory_of_the_device() -> None:
    overrides = ("parallel.strategy=fsdp", "parallel.cpu_offload=true")
    found = _plan("mae", *overrides, device="cuda").memory["optimiser"]
    assert found.weights == found.moments == found.gradients == 0
    assert found.host == 4 * sum(p.nbytes for p in _built(load(DEBUG / "mae.yaml")).parameters())


def test_gradients_are_kept_between_micro_batches() -> None:
    """FSDP hands out gradients after the last of them: until then every rank has them whole."""
    moment = "forward and backward"
    once, twice = (
        _plan("mae", "parallel.strategy=fsdp", f"train.accumulate={n}", ranks=2).memory[moment] for n in (1, 2)
    )
    assert twice.gradients == _plan("mae").n_trained * 4
    assert once.gradients < twice.gradients
    assert twice.activations < once.activations


# --- the command ------------------------------------------------------------------------------------------------------


def _config_command(*arguments: str) -> int:
    return main(["config", "--config", str(DEBUG / "mae.yaml"), *arguments])


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert _config_command("--plan", "--ranks", "2", "parallel.strategy=fsdp", "train.global_batch_size=8") == 0
    printed = capsys.readouterr().out
    found = _plan("mae", "parallel.strategy=fsdp", ranks=2)
    for text in ("fsdp on 2 ranks", f"{found.n_trained:,}", "FLOP", "AdamW's moments", "gathered from other ranks"):
        assert text in printed
    assert f"At most {found.memory[found.worst].total / MB:,.1f} MB a rank" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "2"), "--ranks is for --plan"),
        (("--device", "cuda"), "--device is for --plan"),
        (("--plan", "--ranks", "0"), "--ranks must be at least 1, got 0"),
        (("--plan", "--ranks", "3"), "must be a multiple of the world size"),
        (("--plan", "--ranks", "2", "parallel.strategy=single"), "single cannot run on 2 processes"),
        (("--plan", "--ranks", "2", "parallel.strategy=hsdp"), "parallel.shard_size: null stands for"),
        (("--plan", "optim.warmup_steps=1000"), "exceed train.total_steps"),
        (("--plan", "objective.name=toys.peeking"), "cannot be planned"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _config_command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_what_the_run_would_refuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.accumulate 2: the loss of objective dinov2 mixes the samples"):
        _plan("dinov2", "train.accumulate=2")
