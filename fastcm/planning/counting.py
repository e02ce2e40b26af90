"""One step of an objective on the meta device: how often it calls its networks, and what they do.

The objective runs as it does in training. Its networks are copies without memory, so nothing is
allocated and the networks themselves are neither called nor changed.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastcm.networks.blocks import repeated_blocks
from fastcm.objectives.base import Batch, Loss, Objective
from fastcm.ops.dispatch import meta_as_gpu
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
    """What one micro-batch does.

    Args:
        evaluations: in the order of the calls.
        work: FLOPs and bytes of each operator by part: "forward" and "backward" of the student,
            "target", "teacher", "metric" and "metric backward", and "blocks", of the forward pass
            what activation checkpointing computes again; what is in none is `AROUND` them.
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
        elements = math.prod(x0.shape[1 + paired :])
        ledger = Ledger(Saved(student), elements)
        calls: list[_Call] = []
        device = AsOnDevice(device_type)

        def counted(module: nn.Module, role: str) -> _Counted:
            return _Counted(module, role, ledger, calls, precision, device)

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
        target = counted(without_memory(net), "target").requires_grad_(False)
        with ExitStack() as around:
            around.enter_context(device)
            if not memory_only:
                around.enter_context(meta_as_gpu())
                around.enter_context(ledger)
            loss = method.loss(counted(student, "student"), batch, target)
            ledger.saved.settle()
            if not memory_only:
                _backward(loss, ledger, calls)
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
        device: AsOnDevice,
    ) -> None:
        super().__init__()
        self.net = net
        own = getattr(net, "log_variance", None)
        self.log_variance = None if own is None else self._log_variance
        self._role, self._ledger, self._calls = role, ledger, calls
        self._precision = "fp32" if role == "metric" else precision
        self._device = device

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        role, ledger = self._role, self._ledger
        part = {"student": "forward" if torch.is_grad_enabled() else "target"}.get(role, role)
        around: Any = ledger.saved.listening() if role == "student" else nullcontext()
        if role in ("target", "teacher"):
            around = torch.no_grad()
        with ledger.during(part), around, self._device.call(self._precision):
            if self._precision == "bf16":
                x = x.to(torch.bfloat16)
            out: Tensor = self.net(x, *args, **kwargs)
        inputs = [a for a in (x, *args) if isinstance(a, Tensor) and a.requires_grad]
        evaluation = Evaluation(role, len(x), bool(out.requires_grad))
        self._calls.append(_Call(evaluation, inputs, out))
        return out

    def _log_variance(self, t: Tensor) -> Tensor:
        """The student's own, beside its forward pass."""
        with self._ledger.during("forward"):
            out: Tensor = cast(Any, self.net).log_variance(t)
        return out


def _backward(loss: Loss, ledger: Ledger, calls: list[_Call]) -> None:
    """From the loss to the metric, if that is a network, through it, and on to the student.

    What is kept for the backward pass is freed on the way, since no part of it is passed twice.
    """
    ends, gradients = [loss.mean], [torch.ones_like(loss.mean)]
    if loss.output is not None and loss.gradient is not None:
        ends, gradients = [loss.output], [loss.gradient]
    measured = [c for c in calls if c.evaluation.network == "metric" and c.inputs]
    if measured:
        outputs = [call.output for call in measured]
        with_respect = torch.autograd.grad(ends, outputs, gradients)
        ends = [x for call in measured for x in call.inputs]
        with ledger.during("metric backward"):
            gradients = list(torch.autograd.grad(outputs, ends, with_respect))
    heads = [
        call.output
        for call in calls
        if call.evaluation.network == "student" and call.evaluation.differentiated
    ]
    if heads:
        gradients = list(torch.autograd.grad(ends, heads, gradients))
        if loss.also is not None:
            heads, gradients = [*heads, loss.also], [*gradients, torch.ones_like(loss.also)]
        with ledger.during("backward"):
            torch.autograd.backward(heads, gradients)
