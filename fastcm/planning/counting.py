"""One step of an objective on the meta device: how often it calls its networks, and what they do.

The objective runs as it does in training. Its networks are copies without memory, so nothing is
allocated and the networks themselves are neither called nor changed.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcm.networks.blocks import repeated_blocks
from fastcm.objectives.base import Batch, Objective
from fastcm.planning.ledger import Ledger, Saved, Work
from fastcm.planning.meta import META, AsOnDevice, on_meta, without_memory
from fastcm.precision import Precision, check_precision
from fastcm.rng import NoiseKey


@dataclass(frozen=True)
class Evaluation:
    """One call of a network.

    Args:
        network: "student", "target", "teacher" or "metric".
        rows: of its input.
        differentiated: whether a backward pass goes through it.
    """

    network: str
    rows: int
    differentiated: bool


@dataclass(frozen=True)
class Counts:
    """What the networks of one micro-batch do.

    Args:
        evaluations: in the order of the calls.
        work: FLOPs and bytes of each operator by part: "forward" and "backward" of the student,
            "target", "teacher", "metric" and "metric backward", and "blocks", of the forward pass
            what activation checkpointing computes again.
        activations: bytes kept for the backward pass.
        checkpointed: the same where the blocks are checkpointed.
    """

    evaluations: tuple[Evaluation, ...]
    work: dict[str, Work]
    activations: int
    checkpointed: int

    def flops(self, part: str) -> int:
        """Of all operators of a part; 0 where there is none."""
        return sum(f for f, _ in self.work.get(part, ()))

    def bytes(self, part: str) -> int:
        """That the operators of a part move."""
        return sum(b for _, b in self.work.get(part, ()))


def count(
    net: nn.Module,
    objective: Objective,
    x0: Tensor,
    cond: Any = None,
    *,
    paired: bool = False,
    precision: Precision = "fp32",
    device_type: str = "cpu",
    memory_only: bool = False,
) -> Counts:
    """Run one micro-batch on the meta device.

    Args:
        net: the student, on any device.
        objective: the method, with its teacher if it has one.
        x0: a micro-batch ``[B, ...]``, of which shape and dtype count; ``[B, 2, ...]`` if `paired`.
        cond: its condition.
        precision: "fp32" or "bf16".
        device_type: "cuda" or "cpu", whose autocast differ.
        memory_only: count activations and evaluations, which is quicker; there is no work then.

    Raises:
        Exception: whatever a network raises that cannot be copied or does not run on meta tensors.
    """
    check_precision(precision)
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        memo: dict[int, Any] = {}
        student = without_memory(net, memo).train()
        ledger = Ledger(Saved(student))
        calls: list[_Call] = []

        def counted(module: nn.Module, role: str) -> _Counted:
            return _Counted(module, role, ledger, calls, precision, device_type)

        for role in ("teacher", "metric"):
            module = getattr(objective, role, None)
            if isinstance(module, nn.Module):
                memo[id(module)] = counted(without_memory(module, memo), role)
        method = copy.deepcopy(objective, memo)
        x0, z = on_meta(x0), None
        if paired:
            x0, z = x0[:, 0], x0[:, 1]
        batch = Batch(
            x0,
            NoiseKey.wrap(torch.empty(3, dtype=torch.int64, device=META)),
            on_meta(cond),
            z=z,
            input_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )
        with nullcontext() if memory_only else ledger:
            target = counted(without_memory(net), "target").requires_grad_(False)
            method.loss(counted(student, "student"), batch, target)
            if not memory_only:
                _backward(ledger, calls)
    return Counts(
        tuple(call.evaluation for call in calls),
        dict(ledger.work),
        ledger.saved.whole,
        ledger.saved.checkpointed,
    )


def units(net: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters outside the repeated blocks, and of the largest block."""
    whole, repeated = _size(net), [_size(block) for block in repeated_blocks(net)]
    return whole - sum(repeated), max(repeated, default=0)


def _size(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


@dataclass(frozen=True)
class _Call:
    evaluation: Evaluation
    inputs: list[Tensor]
    output: Tensor


class _Counted(nn.Module):
    """A network whose calls are entered."""

    def __init__(
        self,
        net: nn.Module,
        role: str,
        ledger: Ledger,
        calls: list[_Call],
        precision: str,
        device_type: str,
    ) -> None:
        super().__init__()
        self.net = net
        self.log_variance = getattr(net, "log_variance", None)
        self._role, self._ledger, self._calls = role, ledger, calls
        self._options = precision, device_type

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        role, ledger = self._role, self._ledger
        part = {"student": "forward" if torch.is_grad_enabled() else "target"}.get(role, role)
        around: Any = ledger.saved.listening() if role == "student" else nullcontext()
        if role in ("target", "teacher"):
            around = torch.no_grad()
        low = self._options[0] == "bf16" and role != "metric"
        mode = AsOnDevice(self._options[0] if low else "fp32", self._options[1])
        with ledger.during(part), around, mode:
            if low:
                x = x.to(torch.bfloat16)
            out: Tensor = self.net(x, *args, **kwargs)
        inputs = [a for a in (x, *args) if isinstance(a, Tensor) and a.requires_grad]
        evaluation = Evaluation(role, len(x), bool(out.requires_grad))
        self._calls.append(_Call(evaluation, inputs, out))
        return out


def _backward(ledger: Ledger, calls: list[_Call]) -> None:
    """The backward passes of metric and student; what lies between them is no network's."""
    for call in calls:
        if call.evaluation.network == "metric" and call.inputs:
            with ledger.during("metric backward"):
                torch.autograd.grad(
                    [call.output], call.inputs, [torch.empty_like(call.output)], allow_unused=True
                )
    heads = [
        call.output
        for call in calls
        if call.evaluation.network == "student" and call.evaluation.differentiated
    ]
    if heads:
        with ledger.during("backward"):
            torch.autograd.backward(heads, [torch.empty_like(head) for head in heads])
