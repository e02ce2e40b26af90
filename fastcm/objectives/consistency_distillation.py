"""Consistency distillation: a teacher's solver leads to the point of the target network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastcm import ops, rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, PseudoHuber, Weight, inverse_gap
from fastcm.networks.conditions import Null, append_weight, joined, unconditional
from fastcm.networks.guidance import check_rescale, guided
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, learned, target_output
from fastcm.objectives.consistency_training import check_consistency
from fastcm.ops import Denoised, Noised
from fastcm.parameterization import Moment, Parameterization, Rescaled
from fastcm.paths import VarianceExploding
from fastcm.schedules import (
    CMCurriculum,
    Curriculum,
    Grid,
    TimeSampler,
    UniformGrid,
    draw_interval,
    intervals,
)


class _Drawn(NamedTuple):
    """The two times of the rows, and what follows from them."""

    t: Moment
    s: Moment
    step: tuple[Tensor, Tensor]
    """Of the teacher: factors of x_t and -F, from t to s."""
    second: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Heun's: factors of x_s and F, a half and minus one."""
    guidance: Tensor | None
    """The weight w, as drawn."""
    weight: Tensor


@dataclass(frozen=True)
class ConsistencyDistillation:
    """f_theta(x_t, t) against f_ema(xhat_s, s), where the teacher's ODE leads from x_t to xhat_s.

    Args:
        teacher: network of a pretrained flow or diffusion model; frozen here.
        parameterization: of the student.
        teacher_parameterization: default the student's; a teacher of another path is wrapped in
            `Rescaled`.
        solver: of the teacher's step: "euler", x_t - (t - s) v_teacher(x_t, t), the seed's; "heun",
            two evaluations, the one of the consistency models' own recipe; "ddim", for teachers on
            `VariancePreserving` (also the first step of DPM-Solver++).
        skip: intervals of the grid from t down to s in one step of the solver; LCM: 20 of 1,000.
        discretization, grid, times, metric, weight, target_average: see `ConsistencyTraining`.
        guidance: weight w of v_u + w (v_c - v_u), evaluated as one batch of conditional and
            unconditional rows; None uses the conditional velocity alone. A range (low, high) draws
            w uniformly for each row, and the student reads it from `cond`, whose last column it
            is, in a dict "guidance": `append_weight` packs it, and networks here are then
            ``guided=True``.
        null_condition: what stands for "no condition" under guidance; see
            `fastcm.networks.conditions.Null`.
        guidance_interval: times (low, high) of the student's path outside which w is 1; None: all.
            A step is guided by the time that it starts at.
        guidance_rescale: share in [0, 1] in which the guided output gets back the standard
            deviation of the conditional one, over each sample; None: 0. The output is what the
            teacher predicts; see `fastcm.networks.guidance.guided`.
        embedded_guidance: the teacher takes w as an input, as Flux does, and is evaluated once, no
            null_condition needed; teacher and student read it from a `cond` that `append_weight`
            packs.

    Source: seed eq. 12-13; Song et al. 2023, algorithm 2; guidance, skipping and DDIM: Luo et al.
    2023 (LCM), section 4; interval: Kynkäänniemi et al. 2024; an embedding teacher: Meng et al.
    2022, "On distillation of guided diffusion models", whose student it is.
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
    guidance: float | tuple[float, float] | None = None
    null_condition: Null = None
    solver: Literal["euler", "heun", "ddim"] = "euler"
    skip: int = 1
    guidance_interval: tuple[float, float] | None = None
    embedded_guidance: bool = False
    guidance_rescale: float | None = None

    def __post_init__(self) -> None:
        check_consistency(self.parameterization, self.discretization)
        check_skip(self.discretization, self.skip)
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher must be an nn.Module, got {type(self.teacher).__name__}")
        ours, theirs = self.parameterization, self.teacher_parameterization or self.parameterization
        if theirs.path != ours.path:
            serves = Parameterization(
                ours.path, "edm" if isinstance(ours.path, VarianceExploding) else "v"
            )
            object.__setattr__(self, "teacher", Rescaled(self.teacher, theirs, serves))
            theirs = serves
        object.__setattr__(self, "teacher_parameterization", theirs)
        if self.solver not in ("euler", "heun", "ddim"):
            raise ValueError(f"solver must be euler, heun or ddim, got {self.solver!r}")
        if self.solver == "heun":
            start = torch.tensor([ours.path.t_min], dtype=torch.float64, device="cpu")
            at = theirs.coefficients(start)
            if not (at.c.isfinite() & at.d.isfinite()).all():
                raise ValueError(
                    f"solver 'heun' needs the velocity at t_min, which {theirs} does not have: "
                    "take 'ddim'"
                )
        self._check_guidance()
        self.teacher.requires_grad_(False).eval()

    def _check_guidance(self) -> None:
        if self.guidance is None:
            for name in ("guidance_interval", "guidance_rescale", "embedded_guidance"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs guidance, got None")
        elif self.embedded_guidance and self.null_condition is not None:
            raise ValueError("embedded_guidance has no use for null_condition: leave one out")
        elif self.embedded_guidance and self.guidance_rescale:
            raise ValueError(
                "guidance_rescale needs the conditional output, which a teacher with "
                "embedded_guidance does not show: leave one out"
            )
        elif not self.embedded_guidance and self.null_condition is None:
            raise ValueError("guidance needs null_condition, got None")
        check_rescale(self.guidance_rescale)
        for name, value in (
            ("guidance", self.guidance),
            ("guidance_interval", self.guidance_interval),
        ):
            if isinstance(value, tuple):
                if len(value) != 2 or not value[0] <= value[1]:
                    raise ValueError(f"{name} must be a range (low, high), got {value}")
            elif not isinstance(value, int | float | None):
                raise TypeError(f"{name} must be a number or a range (low, high), got {value!r}")

    @property
    def shares_weights(self) -> bool:
        """Whether the target is the student itself."""
        return self.target_average is None

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p = self.parameterization
        drawn = batch.fused(self._drawn)
        at_t, at_s, w, cond = drawn.t, drawn.s, drawn.guidance, batch.cond
        (x_t,) = batch.states(p, at_t)
        (input_t,) = batch.network_inputs(p, (at_t, x_t))
        if w is not None and (self.embedded_guidance or isinstance(self.guidance, tuple)):
            cond = append_weight(cond, w)
        with torch.no_grad():
            x_s, input_s = self._teacher_step(batch, drawn, x_t, input_t)
            F_s = target_output(net, target_net, input_s, at_s.c_noise, cond)
        F_t = check_output("net", net(input_t, at_t.c_noise, cond), input_t)
        a, b, _, _ = at_t.coefficients
        target_a, target_b, _, _ = at_s.coefficients
        return Loss.of(
            F_t,
            x_t,
            a,
            b,
            Denoised(x_s, F_s, target_a, target_b),
            metric=self.metric,
            weight=drawn.weight,
            log_variance=learned(self.weight, net, p, at_t.t),
        )

    def _drawn(self, batch: Batch) -> _Drawn:
        p, q = self.parameterization, self.teacher_parameterization
        assert q is not None
        n = intervals(self.discretization, batch.key.step)
        t, s = draw_interval(batch.uniform(rng.TIME), n, self.grid, p.path, self.times, self.skip)
        at_t, at_s, of_t, dt = p.moment(t), p.moment(s), q.coefficients(t), t - s
        if self.solver == "ddim":
            keep = at_s.sigma / at_t.sigma
            gain = at_s.alpha - keep * at_t.alpha  # of the denoiser
            step = keep + gain * of_t.a, -gain * of_t.b
        else:
            step = 1.0 - dt * of_t.c, dt * of_t.d
        second = None
        if self.solver == "heun":
            of_s, half = q.coefficients(s), torch.full_like(t, 0.5)
            second = 0.5 * (1.0 - dt * of_s.c), -0.5 * dt * of_s.d, half, -2.0 * half
        weight = self.weight(t, s, p.path)
        return _Drawn(at_t, at_s, step, second, self._guidance(batch), weight)

    def _guidance(self, batch: Batch) -> Tensor | None:
        """The weight of each row, float64 ``[B]``."""
        if self.guidance is None:
            return None
        if isinstance(self.guidance, tuple):
            low, high = self.guidance
            return low + (high - low) * batch.uniform(rng.LEVEL)
        return torch.full(
            batch.x0.shape[:1], self.guidance, dtype=torch.float64, device=batch.x0.device
        )

    def _weights(self, drawn: _Drawn) -> Tensor | None:
        """w of each row, where its step is guided, else 1."""
        if drawn.guidance is None or self.guidance_interval is None:
            return drawn.guidance
        low, high = self.guidance_interval
        inside = (drawn.t.t >= low) & (drawn.t.t <= high)
        return drawn.guidance.where(inside, 1.0)

    def _teacher_step(
        self, batch: Batch, drawn: _Drawn, x_t: Tensor | Noised, input_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """xhat_s, float32 or float64 like x_t, and the target network's input.

        c_in and c_noise belong to the path, so the student's serve the teacher.
        """
        w, (scale, factor) = self._weights(drawn), drawn.step
        if w is not None and self.embedded_guidance:
            batch, w = replace(batch, cond=append_weight(batch.cond, w)), None
        to_input: dict[str, Any] = {"input_scale": drawn.s.c_in, "input_dtype": batch.input_dtype}
        F, F_uncond = self._evaluated(batch, drawn.t.c_noise, input_t)
        by = w
        if self.guidance_rescale and F_uncond is not None and w is not None:
            F, F_uncond, by = guided(F, F_uncond, w, self.guidance_rescale), None, None
        x_s, input_s = ops.euler_step(
            x_t, F, factor, v_uncond=F_uncond, guidance=by, scale=scale, **to_input
        )
        if drawn.second is None:
            return x_s, input_s
        F, F_uncond = self._evaluated(batch, drawn.s.c_noise, input_s)
        if F_uncond is not None and w is not None:
            F = guided(F, F_uncond, w, self.guidance_rescale)
        # x_t - dt (v_t + v_s) / 2 = (x_t + x_s - dt v_s) / 2 with Euler's x_s
        a, b, half, minus_one = drawn.second
        y = ops.boundary(x_s, F, a, b)
        x_s, input_s = ops.euler_step(x_t, y, minus_one, scale=half, **to_input)
        return x_s, input_s

    def _evaluated(self, batch: Batch, c_noise: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's output, and under guidance that without condition."""
        cond, teacher = batch.cond, batch.network(self.teacher)
        if self.guidance is None or self.embedded_guidance:
            return check_output("teacher", teacher(x, c_noise, cond), x), None
        if cond is None:
            raise ValueError("guidance needs a batch with cond, got cond=None")
        inputs = torch.cat([x, x])
        conds = joined(cond, unconditional(cond, self.null_condition))
        both = check_output("teacher", teacher(inputs, c_noise.repeat(2), conds), inputs)
        F, F_uncond = both.chunk(2)
        return F, F_uncond


def check_skip(n: int | Curriculum, skip: int) -> None:
    """Raise ValueError unless every grid of the discretization has `skip` intervals."""
    if not isinstance(skip, int):
        raise TypeError(f"skip must be an int, got {skip!r}")
    fewest = n if isinstance(n, int) else n.s0 - isinstance(n, CMCurriculum)
    if not 1 <= skip <= fewest:
        raise ValueError(f"skip must be in 1..{fewest}, the intervals of {n}, got {skip}")
