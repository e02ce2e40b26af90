"""What the objectives share: what they see of a step, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.ema import Average
from fastcm.ops import Noised
from fastcm.parameterization import Parameterization
from fastcm.rng import NoiseKey

Network = Callable[..., Tensor]
"""``net(x, t, cond) -> F``: x ``[B, ...]``, t ``[B]`` float32, F like x."""


class Loss(NamedTuple):
    """Scalar mean, which is differentiated, and the ``[B]`` values of the samples."""

    mean: Tensor
    per_sample: Tensor


@dataclass(frozen=True)
class Batch:
    """One step as an objective sees it.

    Args:
        x0: data ``[B, ...]``, uint8 (x / 127.5 - 1) or float.
        key: noise key; ``key.step`` is the step counter.
        cond: any tensor with B rows, or None.
        first_sample: index of row 0 in the global batch (accumulation, data parallelism).
        input_dtype: dtype of the network's x.
    """

    x0: Tensor
    key: NoiseKey
    cond: Tensor | None = None
    first_sample: int = 0
    input_dtype: torch.dtype = torch.float32

    def uniform(self, stream: int) -> Tensor:
        """One uniform number per sample in (0, 1), float64 ``[B]``."""
        return rng.uniform(
            self.x0.shape[0], self.key, stream=stream, first_sample=self.first_sample
        )

    def affine(self, alpha: Tensor, sigma: Tensor) -> Noised:
        """alpha x0 + sigma z of this step's noise, in closed form."""
        return Noised(self.x0, alpha, sigma, self.key, rng.NOISE, self.first_sample)

    def at(self, p: Parameterization, t: Tensor) -> Noised:
        """x_t in closed form."""
        point = p.path.at(t)
        return self.affine(point.alpha, point.sigma)

    def network_inputs(self, p: Parameterization, *times: Tensor) -> tuple[Tensor, ...]:
        """c_in x_t for one or two times that share z, in the dtype of the network's input."""
        rows = []
        for t in times:
            point, c_in = p.path.at(t), p.c_in(t)
            scale = torch.ones_like(point.alpha) if c_in is None else c_in
            rows.append((scale * point.alpha, scale * point.sigma))
        alpha, sigma = (torch.stack(list(c)) for c in zip(*rows))
        out = ops.noising(
            self.x0,
            alpha if len(times) > 1 else alpha[0],
            sigma if len(times) > 1 else sigma[0],
            self.key,
            first_sample=self.first_sample,
            out_dtype=self.input_dtype,
        )
        return out if isinstance(out, tuple) else (out,)

    def without_condition(self, null: Tensor | int, probability: float) -> Batch:
        """This batch with `cond` replaced by `null` in a random share of the rows."""
        if self.cond is None:
            raise ValueError("condition dropout needs a batch with cond, got cond=None")
        drop = self.uniform(rng.CONDITION) < probability
        drop = drop.reshape(-1, *[1] * (self.cond.dim() - 1))
        return replace(self, cond=torch.where(drop, null, self.cond))


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


def check_output(name: str, F: Tensor, x: Tensor) -> Tensor:
    """Raise ValueError if a network's output has another shape than its input."""
    if F.shape != x.shape:
        raise ValueError(
            f"{name} must return a tensor of the shape of its input, {list(x.shape)}, "
            f"got {list(F.shape)}"
        )
    return F


def unconditional(cond: Tensor, null: Tensor | int | None) -> Tensor:
    """The null condition for every row of `cond`."""
    if isinstance(null, Tensor):
        return null.to(cond).expand_as(cond)
    if null is None:
        raise ValueError("guidance needs null_condition, got None")
    return torch.full_like(cond, null)
