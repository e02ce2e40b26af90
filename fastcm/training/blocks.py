"""The blocks that a network repeats: compiled or checkpointed one by one."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastcm.networks.blocks import repeated_blocks

Checkpoint = Literal["blocks"]


def compile_blocks(net: nn.Module) -> None:
    """Compile the blocks that a network repeats: one compilation serves all of a kind."""
    for block in repeated_blocks(net):
        block.compile()


def checkpoint_blocks(net: nn.Module) -> None:
    """Keep of each repeated block its inputs alone, and compute the rest again in backward.

    For good: a block is changed in place. Without gradients it computes as before.

    Raises:
        ValueError: the network repeats no block, or one holds BatchNorm, whose running statistics
            would see each batch twice.
    """
    blocks = repeated_blocks(net)
    if not blocks:
        raise ValueError(
            f"checkpoint='blocks' needs a network that repeats blocks in a ModuleList or "
            f"Sequential, {type(net).__name__} has none"
        )
    for block in blocks:
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            raise ValueError(
                "checkpoint='blocks' computes a block twice, and its BatchNorm would count each "
                "batch twice: use another norm, such as GroupNorm"
            )
    for block in blocks:
        if not is_checkpointed(block):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether `checkpoint_blocks` has changed it."""
    forward = block.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is checkpoint


def apply_checkpoint(given: Checkpoint | None, net: nn.Module, objective: object) -> None:
    """What a trainer does of `checkpoint_blocks`.

    Raises:
        ValueError: `given` is something else, or the objective differentiates in t; see also there.
    """
    if given is None:
        return
    if given != "blocks":
        raise ValueError(f"checkpoint must be None or 'blocks', got {given!r}")
    if getattr(objective, "derives", False):
        raise ValueError(
            f"checkpoint='blocks' is not possible with {type(objective).__name__}: what is "
            "computed again in backward has no derivative in t"
        )
    checkpoint_blocks(net)
