"""Consistency distillation: a teacher's Euler step leads to the point of the target network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastcm import ops, rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, PseudoHuber, Weight, inverse_gap
from fastcm.networks.protocol import Network, check_output, unconditional
from fastcm.objectives.base import Batch, Loss, target_output
from fastcm.objectives.consistency_training import check_consistency
from fastcm.ops import Denoised, Noised
from fastcm.parameterization import Parameterization
from fastcm.schedules import Curriculum, Grid, TimeSampler, UniformGrid, draw_interval, intervals


@dataclass(frozen=True)
class ConsistencyDistillation:
    """f_theta(x_t, t) against f_ema(xhat_s, s), xhat_s = x_t - (t - s) v_teacher(x_t, t).

    Args:
        teacher: network of a pretrained flow or diffusion model; frozen here.
        parameterization: of the student.
        teacher_parameterization: default the student's; it must share the student's path (wrap the
            teacher in `Rescaled` to serve another).
        discretization, grid, times, metric, weight, target_average: see `ConsistencyTraining`.
        guidance: weight w of v_u + w (v_c - v_u), evaluated as one batch of conditional and
            unconditional rows; None uses the conditional velocity alone.
        null_condition: what stands for "no condition" under guidance: a label or a tensor.

    Source: seed eq. 12-13; Song et al. 2023, algorithm 2; guidance: Luo et al. 2023 (LCM).
    """

    teacher: nn.Module = field(repr=False)
    parameterization: Parameterization = Parameterization()
    teacher_parameterization: Parameterization | None = None
    discretization: int | Curriculum = 40
    grid: Grid = UniformGrid()
    times: TimeSampler | None = None
    metric: Metric = PseudoHuber()
    weight: Weight = inverse_gap
    target_average: Average | None = EMA(0.9)
    guidance: float | None = None
    null_condition: Tensor | int | None = None

    def __post_init__(self) -> None:
        check_consistency(self.parameterization, self.discretization)
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher must be an nn.Module, got {type(self.teacher).__name__}")
        theirs = self.teacher_parameterization
        if theirs is not None and theirs.path != self.parameterization.path:
            raise ValueError(
                f"teacher path {theirs.path} differs from the student's "
                f"{self.parameterization.path}; wrap the teacher in fastcm.Rescaled to serve it"
            )
        if self.guidance is not None and self.null_condition is None:
            raise ValueError("guidance needs null_condition, got None")
        self.teacher.requires_grad_(False).eval()

    @property
    def shares_weights(self) -> bool:
        """Whether the target is the student itself."""
        return self.target_average is None

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p = self.parameterization
        n = intervals(self.discretization, batch.key.step)
        t, s = draw_interval(batch.uniform(rng.TIME), n, self.grid, p.path, self.times)
        (x_t,) = batch.states(p, t)
        (input_t,) = batch.network_inputs(p, (t, x_t))
        at_t, at_s = p.coefficients(t), p.coefficients(s)
        with torch.no_grad():
            x_s, input_s = self._teacher_step(batch, t, s, x_t, input_t)
            F_s = target_output(net, target_net, input_s, p.c_noise(s), batch.cond)
        F_t = check_output("net", net(input_t, p.c_noise(t), batch.cond), input_t)
        return Loss.of(
            F_t,
            x_t,
            at_t.a,
            at_t.b,
            Denoised(x_s, F_s, at_s.a, at_s.b),
            metric=self.metric,
            weight=self.weight(t, s, p.path),
        )

    def _teacher_step(
        self, batch: Batch, t: Tensor, s: Tensor, x_t: Tensor | Noised, input_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """xhat_s in float32 and the target network's input.

        c_in belongs to the path, so the student's input serves the teacher.
        """
        p = self.parameterization
        q = self.teacher_parameterization or p
        at, dt = q.coefficients(t), t - s
        c_noise, cond, teacher = q.c_noise(t), batch.cond, batch.network(self.teacher)
        F_uncond = weight = None
        if self.guidance is None:
            F = check_output("teacher", teacher(input_t, c_noise, cond), input_t)
        elif cond is None:
            raise ValueError("guidance needs a batch with cond, got cond=None")
        else:
            inputs = torch.cat([input_t, input_t])
            conds = torch.cat([cond, unconditional(cond, self.null_condition)])
            both = check_output("teacher", teacher(inputs, c_noise.repeat(2), conds), inputs)
            F, F_uncond = both.chunk(2)
            weight = torch.full_like(t, self.guidance)
        x_s, input_s = ops.euler_step(
            x_t,
            F,
            dt * at.d,
            v_uncond=F_uncond,
            guidance=weight,
            scale=1.0 - dt * at.c,
            input_scale=p.c_in(s),
            input_dtype=batch.input_dtype,
        )
        return x_s, input_s
