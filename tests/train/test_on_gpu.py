"""On one GPU: every option of `parallel` gives the losses of a plain run, in float32 and in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_same_bits, read_checkpoint, records

from ssl_eo.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHORT = (
    "train.total_steps=6",
    "optim.warmup_steps=1",
    "optim.clip_grad_norm=0.5",
    "checkpoint.every_n_steps=3",
    "checkpoint.keep=9",
    "log.every_n_steps=1",
    "log.report=false",
    "data.n_workers=0",
)
PRECISIONS = {"float32": 1e-4, "bfloat16": 2e-2}  # how far apart losses may be: kernels sum in other orders
VARIANTS = {
    "compiled": ("parallel.compile=true",),
    "activations": ("parallel.activation_checkpointing=full",),
    "some activations": ("parallel.activation_checkpointing=selective",),
    "fsdp": ("parallel.strategy=fsdp",),
    "fsdp, all at once": (
        "parallel.strategy=fsdp",
        "parallel.compile=true",
        "parallel.activation_checkpointing=selective",
    ),
    "offloaded": ("parallel.strategy=fsdp", "parallel.cpu_offload=true"),
    "asynchronous": ("checkpoint.asynchronous=true",),
}


def _losses(out_dir: Path, *overrides: str) -> list[float]:
    config = str(ROOT / "configs" / "debug" / "dinov2.yaml")
    assert main(["train", "--config", config, f"run.out_dir={out_dir}", *SHORT, *overrides]) == 0
    return [r["loss"] for r in records(out_dir / "debug_dinov2" / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_leave_the_losses_alone(variant: str, precision: str, tmp_path: Path) -> None:
    plain = _losses(tmp_path / "plain", f"train.precision={precision}")
    found = _losses(tmp_path / "other", f"train.precision={precision}", *VARIANTS[variant])
    assert found == pytest.approx(plain, rel=PRECISIONS[precision])


def test_a_step_that_is_not_finite_is_skipped_where_weights_wait_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag that says so is on the GPU, and the optimiser on the host."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = str(ROOT / "configs" / "debug" / "mae.yaml")
    bad = ("objective.name=toys.stumbling", "objective.bad_steps=[2,4]")
    offloaded = ("parallel.strategy=fsdp", "parallel.cpu_offload=true")
    for name, overrides in {"plain": (), "offloaded": offloaded}.items():
        assert main(["train", "--config", config, f"run.out_dir={tmp_path / name}", *SHORT, *bad, *overrides]) == 0
    runs = [tmp_path / name / "debug_mae" for name in ("plain", "offloaded")]
    skipped = [{r["step"] for r in records(run / "skipped.jsonl")} for run in runs]
    assert skipped == [{2, 4}, {2, 4}]
    a, b = (read_checkpoint(run / "checkpoints" / "step_00000006") for run in runs)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_one_kernel_for_crops_of_all_sizes(kernel: str, tmp_path: Path) -> None:
    if kernel == "xformers":
        pytest.importorskip("xformers")
    plain = _losses(tmp_path / "plain", "train.precision=bfloat16")
    packed = _losses(tmp_path / "packed", "train.precision=bfloat16", f"parallel.attention={kernel}")
    assert packed == pytest.approx(plain, rel=PRECISIONS["bfloat16"])


def test_weights_gathered_in_bfloat16(tmp_path: Path) -> None:
    plain = _losses(tmp_path / "plain", "train.precision=bfloat16")
    overrides = ("parallel.strategy=fsdp", "parallel.gather_dtype=bfloat16")
    halved = _losses(tmp_path / "halved", "train.precision=bfloat16", *overrides)
    assert halved == pytest.approx(plain, rel=PRECISIONS["bfloat16"])


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = _losses(tmp_path / "whole")
        config = str(ROOT / "configs" / "debug" / "dinov2.yaml")
        arguments = ["train", "--config", config, f"run.out_dir={tmp_path / 'halves'}", *SHORT]
        assert main([*arguments, "train.time_limit_s=0.0"]) == 75
        assert main(arguments) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    last = Path("debug_dinov2", "checkpoints", "step_00000006")
    assert_same_bits(read_checkpoint(tmp_path / "whole" / last), read_checkpoint(tmp_path / "halves" / last))
    assert len(whole) == 6
