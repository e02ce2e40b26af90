"""What the objectives share: what they see of a step, and what they return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastcm import ops, rng
from fastcm.ema import Average
from fastcm.losses import Learned, Metric, Weight
from fastcm.networks.conditions import Null, replaced
from fastcm.networks.protocol import Network
from fastcm.ops import Denoised, Noised
from fastcm.ops.dispatch import Door, door
from fastcm.ops.loss import consistency_loss_and_gradient
from fastcm.ops.normals import noising_versions
from fastcm.ops.reference import lift
from fastcm.parameterization import Moment, Parameterization
from fastcm.precision import Autocast
from fastcm.rng import NoiseKey

T = TypeVar("T")


@functools.cache
def _fuser() -> Callable[..., Any]:
    """make(*arguments), compiled for each `make` and kind of arguments."""
    return torch.compile(lambda make, *arguments: make(*arguments), dynamic=False)


class Loss(NamedTuple):
    """Scalar mean, which is differentiated, and the ``[B]`` values of the samples.

    Where the mean's derivative in the network's output was made along with it, `gradient` is that
    and `output` what it belongs to: a backward pass may begin there, and at `also`, a scalar that
    does not depend on the output.
    """

    mean: Tensor
    per_sample: Tensor
    output: Tensor | None = None
    gradient: Tensor | None = None
    also: Tensor | None = None

    @classmethod
    def of(
        cls,
        F: Tensor,
        x_t: Tensor | Noised,
        a: Tensor,
        b: Tensor,
        target: Tensor | Noised | Denoised,
        *,
        metric: Metric,
        weight: Tensor,
        log_variance: Tensor | None = None,
    ) -> Loss:
        """The distance of a x_t + b F from a target; see `fastcm.ops.consistency_loss`.

        With a learned log-variance u ``[B]`` it is exp(-u) distance / D + u for D elements.
        """
        if log_variance is not None:
            weight = weight * ((-log_variance.detach()).exp() / F[0].numel())
        mean, values, gradient = consistency_loss_and_gradient(
            F, x_t, a, b, target, metric=metric, weight=weight
        )
        output = None if gradient is None else F
        if log_variance is None:
            return cls(mean, values, output, gradient)
        u = log_variance.to(values.dtype)
        # values.detach() at this u, as a function of u; its value is in the mean already
        also = (values.detach() * (u.detach() - u).exp() + u).mean()
        values = values + u.detach()
        if gradient is None:
            return cls(values.mean() + (also - also.detach()), values)
        return cls(values.mean(), values, output, gradient, also)

    def plus(self, other: Loss) -> Loss:
        """The sum of two losses of one network output."""
        mean, values = self.mean + other.mean, self.per_sample + other.per_sample
        if self.gradient is None or other.gradient is None:
            return Loss(mean, values)
        also = self.also if other.also is None else other.also
        if self.also is not None and other.also is not None:
            also = self.also + other.also
        return Loss(mean, values, self.output, self.gradient + other.gradient, also)

    def backward(self, share: float = 1.0) -> None:
        """Add the gradients of `share` times the mean to the parameters behind it."""
        if self.output is None or self.gradient is None:
            torch.autograd.backward(self.mean if share == 1.0 else share * self.mean)
        else:
            start = self.gradient if share == 1.0 else share * self.gradient
            ends, starts = [self.output], [start]
            if self.also is not None:
                ends, starts = [*ends, self.also], [*starts, torch.full_like(self.also, share)]
            torch.autograd.backward(ends, starts)


def learned(weight: Weight, net: Network, p: Parameterization, t: Tensor) -> Tensor | None:
    """The log-variance that the weight `Learned` asks of the network, ``[B]``; None for others.

    Raises:
        ValueError: the network holds none.
    """
    if not isinstance(weight, Learned):
        return None
    module = getattr(net, "log_variance", None)
    if module is None:
        raise ValueError(
            "the weight Learned() needs a network with a log_variance: construct it with "
            "log_variance=True, or give yours `self.log_variance = fastcm.networks.LogVariance()`"
        )
    at = p.path.at(t)
    u: Tensor = module(torch.atan2(at.sigma, at.alpha))
    return u


@dataclass(frozen=True)
class Batch:
    """One step as an objective sees it.

    Args:
        x0: data ``[B, ...]``, uint8 (x / 127.5 - 1) or float; float64 keeps the arithmetic around
            the network in float64.
        key: noise key; ``key.step`` is the step counter.
        cond: a tensor with B rows, containers of such (see `fastcm.networks.conditions`), or None.
        first_sample: index of row 0 in the global batch (accumulation, data parallelism).
        input_dtype: dtype of the network's x; a network in float64 needs that here, too.
        z: the noise ``[B, ...]`` that each row of x0 was made from; None draws it by the key.
        fuse: whether `fused` compiles, which takes seconds and pays over thousands of steps.
    """

    x0: Tensor
    key: NoiseKey
    cond: Any = None
    first_sample: int = 0
    input_dtype: torch.dtype = torch.float32
    z: Tensor | None = None
    fuse: bool = False

    def fused(self, make: Callable[..., T], *arguments: Any) -> T:
        """make(batch, *arguments): the times of the rows and what follows from them alone.

        On a GPU that is a hundred launches for a few numbers a row, which `fuse` makes a few.
        """
        if not self.fuse or torch.compiler.is_compiling():
            return make(self, *arguments)
        made: T = _fuser()(make, self, *arguments)
        return made

    def uniform(self, stream: int) -> Tensor:
        """One uniform number per sample in (0, 1), float64 ``[B]``."""
        return ops.uniform(
            self.x0.shape[0], self.key, stream=stream, first_sample=self.first_sample
        )

    def affine(self, alpha: Tensor, sigma: Tensor) -> Noised:
        """alpha x0 + sigma z of this step's noise, in closed form."""
        return Noised(self.x0, alpha, sigma, self.key, rng.NOISE, self.first_sample)

    def versions(self, *coefficients: tuple[Tensor, Tensor]) -> tuple[Tensor | Noised, ...]:
        """alpha x0 + sigma z for one or two (alpha, sigma), as operands of the loss.

        In closed form where a kernel regenerates them, since memory traffic is what costs there;
        else stored, since they are the network's inputs, too, where c_in is 1.
        """
        if self.z is None and door(self.x0, noisy=True) is Door.KERNEL:
            return tuple(self.affine(alpha, sigma) for alpha, sigma in coefficients)
        return self._noising(coefficients, self._dtype)

    def states(self, p: Parameterization, *times: Tensor | Moment) -> tuple[Tensor | Noised, ...]:
        """x_t for one or two times that share z; see `versions`."""
        at = (t if isinstance(t, Moment) else p.path.at(t) for t in times)
        return self.versions(*((here.alpha, here.sigma) for here in at))

    def network_inputs(
        self, p: Parameterization, *states: tuple[Tensor | Moment, Tensor | Noised]
    ) -> tuple[Tensor, ...]:
        """c_in x_t in the dtype of the network's input, for one or two (t, x_t)."""
        closed, stored = [], []
        for t, x in states:
            c_in = t.c_in if isinstance(t, Moment) else p.c_in(t)
            if isinstance(x, Tensor):
                stored.append(self._scaled(c_in, x))
            elif c_in is None:
                closed.append((x.alpha, x.sigma))
            else:
                closed.append((c_in * x.alpha, c_in * x.sigma))
        return self._noising(closed, self.input_dtype) if closed else tuple(stored)

    def stored(self, *coefficients: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """alpha x0 + sigma z for one or two (alpha, sigma), in float32, or float64 as x0 is."""
        return self._noising(coefficients, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the arithmetic around the network."""
        return torch.float64 if self.x0.dtype == torch.float64 else torch.float32

    def _scaled(self, c_in: Tensor | None, x: Tensor) -> Tensor:
        return (x if c_in is None else lift(c_in, x) * x).to(self.input_dtype)

    def _noising(
        self, coefficients: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        if self.z is not None:
            return tuple(ops.boundary(self.x0, self.z, a, s).to(dtype) for a, s in coefficients)
        return noising_versions(
            self.x0, coefficients, self.key, first_sample=self.first_sample, out_dtype=dtype
        )

    def network(self, net: Network) -> Network:
        """A network of the objective's own, such as a teacher, in the precision of this step.

        One in half precision is so in any step.
        """
        first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
        own = None if first is None else first.dtype
        if own in (torch.bfloat16, torch.float16):
            return Autocast(net, self.x0.device.type, own)
        if self.input_dtype in (torch.float32, torch.float64):
            return net
        return Autocast(net, self.x0.device.type)

    def without_condition(self, null: Null, probability: float) -> Batch:
        """This batch with `cond` replaced by `null` in a random share of the rows."""
        return self.dropping(null, probability)[0]

    def dropping(self, null: Null, probability: float) -> tuple[Batch, Tensor]:
        """`without_condition`, and in which rows, bool ``[B]``."""
        if self.cond is None:
            raise ValueError("condition dropout needs a batch with cond, got cond=None")
        drop = self.uniform(rng.CONDITION) < probability
        return replace(self, cond=replaced(self.cond, null, drop)), drop


class Objective(Protocol):
    """A training method: draw times, evaluate networks, one loss."""

    @property
    def parameterization(self) -> Parameterization: ...

    @property
    def target_average(self) -> Average | None:
        """The average of the weights that its targets come from, or None."""
        ...

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch, differentiable in the parameters of `net`."""
        ...


def target_output(
    net: Network, target_net: Network | None, x: Tensor, t: Tensor, cond: Any
) -> Tensor:
    """The target network's output, without gradient; without one, that of `net` itself.

    Then the random numbers it draws are put back, so that the student's dropout masks are the
    same. Compiled or captured code cannot do that, and is not used for a network with dropout.
    """
    with torch.no_grad():
        if target_net is not None:
            return target_net(x, t, cond)
        if torch.compiler.is_compiling() or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return net(x, t, cond)
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            return net(x, t, cond)
