"""Loss and gradients of a batch: eager or compiled, whichever is faster; whole or in parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from fastcm.networks.conditions import rows_of
from fastcm.networks.protocol import Network
from fastcm.objectives.base import Batch, Loss, Objective
from fastcm.ops.dispatch import Door, door
from fastcm.planning import shortage
from fastcm.precision import Autocast, Precision, check_precision, half_of
from fastcm.rng import NoiseKey
from fastcm.tracing import part
from fastcm.training.blocks import compile_blocks
from fastcm.training.half_weights import HalfWeights, half_weights
from fastcm.training.mean_gradients import MeanGradients
from fastcm.training.processes import Processes, lost_peers
from fastcm.training.sharded import Sharding

Compile = Literal["auto", "regional"] | bool

# Compiling forward and backward takes tens of seconds on a small machine, so "auto" does not try
# where the whole run is not worth more than a few times that.
_WORTH_COMPILING_S = 120.0
# Compiling times and coefficients takes 1.3 s, or 2.7 the first time. It saves a step some 70
# launches, for which the host needs 0.12 to 0.22 ms beside the launches themselves.
_WORTH_FUSING_STEPS = 10_000
_TIMED_STEPS = 5
_WARMUP = 2


class Gradients:
    """Computes loss and gradients of a batch; noise, times and network in one function.

    Args:
        net: the student.
        objective: the method.
        target_net: the average that serves as target, or None.
        precision: "fp32", or "bf16": the networks run under autocast and see bfloat16 inputs; the
            arithmetic around them stays float32. Always bf16 for a student with such weights.
        compile: True, False, "auto": time both at the first step and keep the faster, or
            "regional": compile the repeated blocks of the networks, which is quicker to do for a
            deep one. On a GPU both of these compile times and coefficients in any long run.
        paired: whether the rows of x0 come with their noise, ``[B, 2, ...]``.
        accumulate: micro-batches that a batch is cut into. Noise and times are those of the
            whole batch, gradients too, to rounding.
        processes: that compute gradients of their rows each; their mean is what is left.
        spread: what made shards of the networks, which then average gradients themselves: those of
            each micro-batch at once, so that its shard is all that a process keeps of them.
        optimizer: of the student; where that pays, it keeps bfloat16 weights, see `HalfWeights`.
        log: receives one line about the choice that "auto" made.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        target_net: nn.Module | None,
        *,
        precision: Precision = "fp32",
        compile: Compile = "auto",
        accumulate: int = 1,
        paired: bool = False,
        processes: Processes | None = None,
        spread: Sharding | None = None,
        optimizer: Optimizer | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_precision(precision)
        if compile not in ("auto", "regional", True, False):
            raise ValueError(f"compile must be 'auto', 'regional', True or False, got {compile!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be >= 1, got {accumulate}")
        if spread is not None and compile is True:
            raise ValueError(
                "compile=True is not possible with shards, which are gathered between the blocks "
                "of a network: give 'regional', which compiles these, or False"
            )
        if spread is not None and compile == "auto":
            compile = False
        self.net = net
        self.objective = objective
        self.target_net = target_net
        self.precision: Precision = "bf16" if half_of(net) is torch.bfloat16 else precision
        if self.precision != precision:
            log("precision: bf16, as the weights are")
        self.accumulate = accumulate
        self.paired = paired
        self.processes = processes or Processes()
        self.spread = spread
        self._mean: MeanGradients | None = None
        self._half: HalfWeights | None = None
        if self.precision == "bf16" and not self.processes.joined and spread is None:
            self._half = half_weights(net, target_net, optimizer, objective.target_average)
        self._log = log
        if compile == "regional":
            compile_blocks(net)
            if target_net is not None:
                compile_blocks(target_net)
        elif compile and self.masks_are_shared:
            if compile is True:
                raise ValueError(
                    "student and target share weights and dropout masks, which compiled code does "
                    "not keep: give compile=False, or a network without dropout"
                )
            compile = False
        self.compiled: bool | None = None if compile == "auto" else compile is True
        self._compiled_loss: Callable[..., Loss] = torch.compile(self._loss)
        self._may_fuse = compile is not False
        self._fuse: bool | None = None
        self._warm = 0
        self._parameters = [p for p in net.parameters() if p.requires_grad]

    def check_batch(self, size: int) -> None:
        """Raise ValueError unless a batch of this size can be cut into equal micro-batches."""
        if size % self.accumulate:
            raise ValueError(f"batch_size {size} is not a multiple of accumulate {self.accumulate}")

    @property
    def masks_are_shared(self) -> bool:
        """Whether the target is the student itself, and must drop the same activations."""
        drops = any(isinstance(m, _DropoutNd) and m.p > 0 for m in self.net.modules())
        return drops and getattr(self.objective, "shares_weights", False)

    def __call__(self, x0: Tensor, cond: Any, key: NoiseKey, *, remaining: int = 1) -> Tensor:
        """Add the gradients of the mean loss to the parameters; returns the loss, detached.

        Args:
            x0, cond: the batch, on the device.
            key: its noise.
            remaining: how many steps the run still has; decides whether compiling can pay.
        """
        if self._fuse is None:
            self._warn_of_memory(x0, cond)
            long = remaining >= _WORTH_FUSING_STEPS
            self._fuse = self._may_fuse and long and door(x0, noisy=True) is Door.KERNEL
        if self._half is not None and not self._half.found:
            with _undone(self.net, self._parameters, x0.device):
                self._half.find(lambda: self._loss(x0, cond, key.tensor))
        if self.processes.joined and self._mean is None and self.spread is None:
            self._mean = self._prepared(x0, cond, key)
        if self.compiled is None:
            self.compiled = self.processes.from_first(
                lambda: self._choose(x0, cond, key, remaining)
            )
        with lost_peers():
            loss = self._run(self.compiled, x0, cond, key, self._mean)
        if self.spread is not None:
            self.spread.forget()
        return loss

    def refresh(self) -> None:
        """Take note of weights that were written from outside, before a captured step."""
        if self._half is not None:
            self._half.refresh()

    def _warn_of_memory(self, x0: Tensor, cond: Any) -> None:
        """Say once, before the first step, if less memory is free than it will need."""
        line = shortage(
            self.net,
            self.objective,
            x0,
            cond,
            accumulate=self.accumulate,
            paired=self.paired,
            precision=self.precision,
        )
        if line is not None:
            self._log(line)

    def _prepared(self, x0: Tensor, cond: Any, key: NoiseKey) -> MeanGradients:
        """Averages gradients from the first step as from any later one.

        It sums them in the order of their first arrival, so that has to be before: two passes that
        leave no trace, the first of which tells who receives none.
        """
        with _undone(self.net, self._parameters, x0.device):
            self._backward(self._loss, x0, cond, key)
            idle = any(p.grad is None for p in self._parameters)
            for parameter in self._parameters:
                parameter.grad = None
            mean = MeanGradients(self._parameters, idle=idle)
            with lost_peers():
                self._backward(self._loss, x0, cond, key, mean)
        return mean

    def _run(
        self,
        compiled: bool,
        x0: Tensor,
        cond: Any,
        key: NoiseKey,
        mean: MeanGradients | None = None,
    ) -> Tensor:
        if not compiled:
            return self._backward(self._loss, x0, cond, key, mean)
        self._warm += 1
        if self._warm <= _WARMUP:
            return self._backward(self._compiled_loss, x0, cond, key, mean)
        # every shape has been seen: another compilation would be a mistake that costs minutes
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._backward(self._compiled_loss, x0, cond, key, mean)

    def _backward(
        self,
        loss: Callable[..., Loss],
        x0: Tensor,
        cond: Any,
        key: NoiseKey,
        mean: MeanGradients | None = None,
    ) -> Tensor:
        if self.accumulate == 1:
            return self._pass(loss, x0, cond, key.tensor, mean).mean.detach()
        count, ragged = divmod(len(x0), self.accumulate)
        if ragged:
            raise ValueError(f"{len(x0)} samples do not make {self.accumulate} equal micro-batches")
        total = torch.zeros((), dtype=torch.float64, device=x0.device)
        at = key.tensor.clone()
        for rows in range(0, len(x0), count):
            some = (x0[rows : rows + count], rows_of(cond, slice(rows, rows + count)))
            last = rows + count == len(x0)
            value = self._pass(loss, *some, at, mean, share=1 / self.accumulate, last=last)
            total += value.mean.detach() / self.accumulate
            at = at.clone()  # the noise of row i is that of row i of the whole batch
            at[2] += count
        return total.to(value.mean.dtype)

    def _pass(
        self,
        loss: Callable[..., Loss],
        x0: Tensor,
        cond: Any,
        key: Tensor,
        mean: MeanGradients | None,
        *,
        share: float = 1.0,
        last: bool = True,
    ) -> Loss:
        """Forward and backward, of which `share` counts."""
        given = (x0, cond, key)
        with part("backward"), nullcontext() if self._half is None else self._half():
            with part("compiled" if loss is self._compiled_loss else "loss"):
                value = loss(*given) if mean is None else mean(loss, *given, last=last)
            value.backward(share)
        return value

    def _loss(self, x0: Tensor, cond: Any, key: Tensor) -> Loss:
        bf16 = self.precision == "bf16"
        x0, z = (x0[:, 0], x0[:, 1]) if self.paired else (x0, None)
        batch = Batch(
            x0,
            NoiseKey.wrap(key),
            cond,
            input_dtype=torch.bfloat16 if bf16 else torch.float32,
            z=z,
            fuse=self._fuse or False,
        )
        net: Network = self.net
        target_net: Network | None = self.target_net
        if bf16:
            net = Autocast(net, x0.device.type)
            target_net = target_net and Autocast(target_net, x0.device.type)
        loss = self.objective.loss(net, batch, target_net)
        if loss.gradient is None:
            return loss
        # or compiled code would also differentiate the mean
        mean, per_sample, output, gradient, also = loss
        return Loss(mean.detach(), per_sample.detach(), output, gradient, also)

    def _choose(self, x0: Tensor, cond: Any, key: NoiseKey, remaining: int) -> bool:
        with _undone(self.net, self._parameters, x0.device):
            eager = self._time(False, x0, cond, key)
            if remaining * eager < _WORTH_COMPILING_S:
                self._log(
                    f"compile: off, {remaining} steps of {1e3 * eager:.1f} ms "
                    "are too few to pay for compiling"
                )
                return False
            try:
                compiled = self._time(True, x0, cond, key)
            except Exception as error:  # no compiler, or a network it cannot take
                self._log(f"compile: off, it failed: {type(error).__name__}: {error!s:.200}")
                return False
        chosen = compiled < eager
        self._log(
            f"compile: {'on' if chosen else 'off'}, "
            f"{1e3 * compiled:.1f} ms compiled, {1e3 * eager:.1f} ms eager"
        )
        return chosen

    def _time(self, compiled: bool, x0: Tensor, cond: Any, key: NoiseKey) -> float:
        """Seconds a step, the median of a few after one to warm up."""
        seconds = []
        for _ in range(1 + _TIMED_STEPS):
            start = time.perf_counter()
            self._run(compiled, x0, cond, key)
            if x0.is_cuda:
                torch.cuda.synchronize(x0.device)
            seconds.append(time.perf_counter() - start)
            for parameter in self._parameters:
                parameter.grad = None
        return sorted(seconds[1:])[_TIMED_STEPS // 2]


@contextmanager
def _undone(net: nn.Module, parameters: list[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Steps taken inside leave no trace: gradients, buffers and random state are put back."""
    grads: list[Any] = [p.grad for p in parameters]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for p in parameters:
        p.grad = None
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for p, grad in zip(parameters, grads):
            p.grad = grad
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
