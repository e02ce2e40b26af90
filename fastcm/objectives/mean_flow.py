"""MeanFlow: the mean velocity of a step of any size, from an identity instead of from halves."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.jvp import jvp
from fastcm.losses import AdaptiveL2, Metric
from fastcm.networks.conditions import Null, each, unconditional
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.schedules import LogitNormal, TimeSampler


@dataclass(frozen=True)
class MeanFlow:
    """u(x_t, t, s) against v - (t - s) du/dt, the derivative along the way of x_t, stopped.

    v = z - x0 is the velocity, and du/dt is along (v, 1, 0) in (x, t, s). Rows with s = t have no
    derivative in their target: they cost what flow matching costs, and the others are one call of
    `fastcm.jvp.jvp`. The network takes two times.

    Args:
        instant: share of rows with s = t, a fraction a / b with b <= 16: a of every b rows. The
            paper's is 3/4; 1/4 in the authors' PyTorch code, which takes AdaptiveL2(0.75, 1e-3).
        times: density of two times, whose larger is t and whose smaller s.
        metric: distance of velocities.
        guidance: weight w of the guided velocity w v + k u_c + (1 - w - k) u_u, whose u is the
            network's own at s = t, with and without condition; None for v.
        mixing: k, of the conditional velocity in it; the guidance reached is w / (1 - k).
        null_condition: what stands for "no condition" under guidance and condition dropout.
        condition_dropout: share of rows trained without condition, and with v.
        predicted_tangent: the derivative along the network's own velocity instead of v, which has
            the same mean and less variance (improved MeanFlow).

    Source: Geng et al. 2025, "Mean flows for one-step generative modeling", eq. 6, 9-10, 19-21;
    improved: Geng et al. 2025, "Improved mean flows", section 4.
    """

    parameterization: Parameterization = Parameterization()
    instant: float = 0.75
    times: TimeSampler = LogitNormal(-0.4, 1.0)
    metric: Metric = AdaptiveL2()
    guidance: float | None = None
    mixing: float = 0.0
    null_condition: Null = None
    condition_dropout: float = 0.0
    predicted_tangent: bool = False

    two_times = True
    target_average = None
    derives = True

    def __post_init__(self) -> None:
        check_velocity(self.parameterization)
        if not 0 <= self.instant < 1 or self.share != Fraction(self.instant).limit_denominator(999):
            raise ValueError(
                "MeanFlow instant must be a fraction a / b in [0, 1) with b <= 16, got "
                f"{self.instant}"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        if not 0 <= self.mixing < 1:
            raise ValueError(f"MeanFlow mixing must be in [0, 1), got {self.mixing}")
        if (self.guidance is not None or self.condition_dropout) and self.null_condition is None:
            raise ValueError("guidance and condition_dropout need null_condition, got None")

    @property
    def period(self) -> int:
        """Row i of a batch is treated as row i + period."""
        return self.share.denominator

    @property
    def share(self) -> Fraction:
        """Of the rows with s = t."""
        return Fraction(self.instant).limit_denominator(16)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, s), t >= s, float64 ``[B]``."""
        first = self.times(batch.uniform(rng.TIME), 0.0, 1.0)
        second = self.times(batch.uniform(rng.LEVEL), 0.0, 1.0)
        a, b = self.share.numerator, self.share.denominator
        instant = torch.arange(len(first), device=first.device) % b < a
        return torch.maximum(first, second), torch.where(
            instant, torch.maximum(first, second), torch.minimum(first, second)
        )

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        rows = _Rows(len(batch.x0), self.share.numerator, self.share.denominator)
        if self.null_condition is not None and self.condition_dropout > 0:
            batch, dropped = batch.dropping(self.null_condition, self.condition_dropout)
        else:
            dropped = None
        t, s = self.draw(batch)
        one = torch.ones_like(t)
        x, v = batch.stored((1.0 - t, t), (-one, one))
        inputs, t32, s32 = x.to(batch.input_dtype), t.float(), s.float()
        if self.guidance is not None:
            v = self._guided(net, batch, inputs, t32, v, dropped)
        still, moving = rows.split(inputs, t32, s32, v, batch.cond)
        F_still = net(still[0], still[1], still[4], s=still[1]) if rows.a else None
        x_m, t_m, s_m, v_m, cond_m = moving
        along = v_m
        if self.predicted_tangent:
            with torch.no_grad():
                along = net(x_m, t_m, cond_m, s=t_m)
        F_moving, slope = jvp(
            lambda x, t, s: net(x, t, cond_m, s=s),
            (x_m, t_m, s_m),
            (along.to(x_m.dtype), torch.ones_like(t_m), torch.zeros_like(s_m)),
        )
        target = ops.euler_step(v_m, slope.detach(), (t_m - s_m).double())
        F = check_output("net", rows.join(F_still, F_moving), inputs)
        target = rows.join(None if F_still is None else still[3], target)
        return Loss.of(F, x, torch.zeros_like(t), one, target, metric=self.metric, weight=one)

    @torch.no_grad()
    def _guided(
        self,
        net: Network,
        batch: Batch,
        x: Tensor,
        t: Tensor,
        v: Tensor,
        dropped: Tensor | None,
    ) -> Tensor:
        """The velocity of the guided field; of v itself in rows whose condition was dropped."""
        assert self.guidance is not None
        if batch.cond is None:
            raise ValueError("guidance needs a batch with cond, got cond=None")
        w, k = self.guidance, self.mixing
        null = unconditional(batch.cond, self.null_condition)
        out = w * v + (1.0 - w - k) * net(x, t, null, s=t).float()
        if k:
            out = out + k * net(x, t, batch.cond, s=t).float()
        if dropped is None:
            return out
        return torch.where(dropped.reshape(-1, *[1] * (v.dim() - 1)), v, out)


class _Rows:
    """a of every b rows, and the others."""

    def __init__(self, count: int, a: int, b: int) -> None:
        if count % b:
            raise ValueError(
                f"MeanFlow with {a} of {b} rows at s = t needs (micro-)batches of a multiple of "
                f"{b} rows, got {count}"
            )
        self.groups, self.a, self.b = count // b, a, b

    def split(self, *given: Any) -> tuple[list[Any], list[Any]]:
        """Both kinds of rows of each tensor or condition, None of None."""
        return self._some(slice(None, self.a), given), self._some(slice(self.a, None), given)

    def _some(self, part: slice, given: tuple[Any, ...]) -> list[Any]:
        def rows(x: Tensor) -> Tensor:
            return x.reshape(self.groups, self.b, *x.shape[1:])[:, part].flatten(0, 1)

        return [None if x is None else each(rows, x) for x in given]

    def join(self, first: Tensor | None, second: Tensor) -> Tensor:
        """The inverse of `split`; `first` is None where a = 0."""
        if first is None:
            return second
        parts = [x.reshape(self.groups, -1, *x.shape[1:]) for x in (first, second.to(first.dtype))]
        return torch.cat(parts, dim=1).flatten(0, 1)
