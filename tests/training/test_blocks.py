"""Repeated blocks: which they are, and what computing them again in backward changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import ConsistencyTraining, ContinuousConsistency, FlowMatching, MeanFlow, Trainer
from fastcm.networks import MLP, DiT, UNet
from fastcm.networks.blocks import repeated_blocks
from fastcm.training.blocks import checkpoint_blocks, is_checkpointed

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(shape=(1, 8, 8), width=32, depth=6),
    "dit": lambda: DiT(1, 8, width=16, depth=3, num_heads=2),
    "unet": lambda: UNet(1, 8, channel_mults=(1, 2), num_res_blocks=1, num_heads=2),
}


def network(name: str) -> nn.Module:
    """One whose output is not zero, as that of a new one is."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def names(net: nn.Module) -> list[str]:
    blocks = {id(block) for block in repeated_blocks(net)}
    return [name for name, module in net.named_modules() if id(module) in blocks]


def test_blocks_are_what_a_network_repeats() -> None:
    assert names(network("mlp")) == [f"blocks.{i}" for i in range(6)]
    assert names(network("dit")) == ["blocks.0", "blocks.1", "blocks.2"]
    levels = [f"{part}.{i}" for part, n in (("down", 3), ("middle", 2)) for i in range(n)]
    assert names(network("unet")) == [*levels, "up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1"]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))) == []
    inner = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(2)))
    assert names(nn.Sequential(inner, copy.deepcopy(inner))) == ["0", "1"]


def gradients(net: nn.Module) -> tuple[list[Tensor], int]:
    """Of every parameter, and how many elements the forward pass kept for them."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(1)
    x, t = torch.randn(16, 1, 8, 8), torch.rand(16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x, t).square().mean()
    loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None], sum(kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(name: str) -> None:
    wanted, before = gradients(network(name))
    net = network(name)
    checkpoint_blocks(net)
    found, after = gradients(net)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    assert after < 0.6 * before
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        assert torch.equal(net(x, t), network(name)(x, t))


def test_a_copy_computes_with_weights_of_its_own() -> None:
    net = network("mlp")
    checkpoint_blocks(net)
    checkpoint_blocks(net)  # once is enough
    assert all(is_checkpointed(block) for block in repeated_blocks(net))
    assert isinstance(repeated_blocks(net)[0].forward.args[0], type(net.forward))  # type: ignore
    twin, x, t = copy.deepcopy(net), torch.randn(2, 1, 8, 8), torch.rand(2)
    before = net(x, t)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(net(x, t), before) and not twin(x, t).any()


def test_a_training_ends_in_the_same_bits() -> None:
    def weights(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        data = torch.randn(32, 1, 8, 8)
        options = {"batch_size": 8, "compile": False, "progress": False, **options}
        trainer = Trainer(network("dit"), ConsistencyTraining(), data=data, **options).fit(4)
        return {**trainer.net.state_dict(), **trainer.ema_network(1).state_dict(prefix="average.")}

    wanted, found = weights(), weights(checkpoint="blocks")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    bf16 = weights(precision="bf16"), weights(precision="bf16", checkpoint="blocks")
    assert all(torch.equal(bf16[0][name], bf16[1][name]) for name in wanted)


def test_what_cannot_be_computed_again_is_refused() -> None:
    def make(net: nn.Module, objective: Any = None, checkpoint: Any = "blocks") -> None:
        data = torch.randn(8, 1, 8, 8)
        Trainer(net, objective or FlowMatching(), data=data, batch_size=8, checkpoint=checkpoint)

    with pytest.raises(ValueError, match="None or 'blocks', got 'layers'"):
        make(network("mlp"), checkpoint="layers")
    two_times = MLP(shape=(1, 8, 8), width=16, depth=2, two_times=True)
    with pytest.raises(ValueError, match="not possible with MeanFlow"):
        make(two_times, MeanFlow())
    with pytest.raises(ValueError, match="not possible with ContinuousConsistency"):
        make(network("mlp"), ContinuousConsistency(weight=torch.ones_like))
    with pytest.raises(ValueError, match="MLP has none"):
        make(MLP(shape=(1, 8, 8), width=16, depth=1))
    normed = network("mlp")
    normed.blocks[1].more = nn.BatchNorm1d(3)  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="another norm"):
        make(normed)
