"""The blocks that a network repeats: what is compiled, checkpointed, sharded and planned as one."""

from __future__ import annotations

from collections import Counter

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """Members of a ModuleList or Sequential: made of modules, and more than one of a kind.

    A block's own members are not looked at: no block is part of another.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in net.modules():  # parents come before their children
        if id(module) in inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        kinds = Counter(type(child) for child in module)
        for child in module:
            is_block = not isinstance(child, _CONTAINERS) and any(True for _ in child.children())
            if is_block and kinds[type(child)] > 1 and id(child) not in inside:
                found.append(child)
                inside |= {id(part) for part in child.modules()}
    return found
