"""Activation checkpointing: transformer blocks keep less of the forward pass, and backward computes the rest again.

The numbers are those of a step that keeps everything, bit for bit where the device's kernels are deterministic.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ssl_eo.models.layers import Block, CrossBlock, JointBlock

__all__ = ["ActivationCheckpointing", "checkpoint_activations"]

ActivationCheckpointing = Literal["none", "selective", "full"]

_DEAR = {  # what costs more to compute than to keep: products with weights, and attention
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_activations(root: nn.Module, mode: ActivationCheckpointing) -> None:
    """Let every block below `root` keep its input alone (`full`), or that and the results of matmuls and attention.

    Names of modules and parameters stay as they are.
    """
    if mode == "none":
        return
    contexts: dict[str, Any] = {}
    if mode == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in root.modules():
        if isinstance(block, Block | CrossBlock | JointBlock):
            # Drop path draws which samples it keeps: the same ones again in backward.
            draws = isinstance(block, Block) and block.drop_path_prob > 0
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws, **contexts)
            block.forward = again  # type: ignore[method-assign]  # a wrapping module would rename its parameters


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
