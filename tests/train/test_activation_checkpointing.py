"""Activation checkpointing of blocks: the same bits, kept or computed again."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, assert_same_bits, read_checkpoint, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_eo.config import load
from ssl_eo.distributed import AgreedFlag, init_world
from ssl_eo.models.layers import Block, CrossBlock, Group, init_layers
from ssl_eo.train.activation_checkpointing import ActivationCheckpointing, checkpoint_activations
from ssl_eo.train.trainer import Trainer
from ssl_eo.train.watch import Watch

DIM, GROUPS = 32, [Group(6, 10), Group(4, 5)]
N_BLOCKS = 3
MODES: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Stack(nn.Module):
    def __init__(self, drop_path_prob: float) -> None:
        super().__init__()
        options = {"layer_scale_init": 0.1, "drop_path_prob": drop_path_prob}
        self.blocks = nn.ModuleList(Block(DIM, 4, **options) for _ in range(N_BLOCKS))
        self.cross = CrossBlock(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, GROUPS)
        out: Tensor = self.cross(x[None, :3], x[None])
        return out


def _run(mode: ActivationCheckpointing, drop_path_prob: float = 0.3) -> tuple[list[Tensor], Counter[str], int]:
    """Output and gradients; how often each operator ran; bytes that the stack itself left for backward."""
    torch.manual_seed(0)
    stack = _Stack(drop_path_prob)
    init_layers(stack)
    checkpoint_activations(stack, mode)
    x = torch.randn(sum(g.n_rows for g in GROUPS), DIM, requires_grad=True)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with _Calls() as calls:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = stack(x)
        torch.randn(7)  # what is drawn between forward and backward must not matter
        out.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in stack.parameters())]
    return [out.detach(), *(g for g in gradients if g is not None)], calls.n, kept


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("drop_path_prob", [0.0, 0.3])
def test_output_and_gradients_are_the_same_bits(mode: ActivationCheckpointing, drop_path_prob: float) -> None:
    expected, found = (_run(m, drop_path_prob)[0] for m in ("none", mode))
    assert len(expected) == len(found) == 2 + len(list(_Stack(0.0).parameters()))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_full_keeps_inputs_alone_and_selective_repeats_no_matmul() -> None:
    calls, kept = {}, {}
    for mode in MODES:
        _, calls[mode], kept[mode] = _run(mode)
    assert kept["full"] < 0.1 * kept["none"]
    for name in ("addmm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert calls["none"][name] == calls["selective"][name] > 0
        last = name == "addmm"  # of the cross block: nothing needs its result in backward
        assert calls["full"][name] == 2 * calls["none"][name] - last
    assert calls["selective"]["gelu"] == calls["full"]["gelu"] == 2 * calls["none"]["gelu"]


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_heeds_the_key(mode: ActivationCheckpointing, tmp_path: Path) -> None:
    settings = [f"run.out_dir={tmp_path}", "data.n_workers=0", f"parallel.activation_checkpointing={mode}"]
    config, world = load(ROOT / "configs" / "debug" / "mae.yaml", settings), init_world()
    with contextlib.closing(Trainer(config, world, AgreedFlag(), Watch(world, 60.0))) as trainer:
        blocks = [module for module in trainer.objective.modules() if isinstance(module, Block | CrossBlock)]
        assert blocks
        assert {"forward" in vars(block) for block in blocks} == {mode != "none"}


def test_a_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    settings = ("train.total_steps=3", "optim.warmup_steps=1", "model.drop_path_prob=0.2", "checkpoint.every_n_steps=3")
    ends = []
    for mode in MODES:
        overrides = (*settings, f"parallel.activation_checkpointing={mode}")
        status, output = train(str(ROOT / "configs" / "debug" / "dinov2.yaml"), tmp_path / mode, *overrides)
        assert status == 0, output
        ends.append(read_checkpoint(tmp_path / mode / "debug_dinov2" / "checkpoints" / "step_00000003"))
    for other in ends[1:]:
        assert_same_bits(ends[0], other)


def test_names_stay() -> None:
    stack = _Stack(0.0)
    names = [name for name, _ in stack.named_parameters()], list(stack.state_dict())
    checkpoint_activations(stack, "full")
    assert names == ([name for name, _ in stack.named_parameters()], list(stack.state_dict()))
