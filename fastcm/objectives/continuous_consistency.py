"""Continuous-time consistency models (sCM): training (sCT), and distillation of a teacher (sCD)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastcm import rng
from fastcm.jvp import jvp
from fastcm.losses import Learned, Metric, SquaredL2, Weight
from fastcm.networks.conditions import Null, joined, unconditional
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, learned
from fastcm.parameterization import Parameterization, Rescaled, rescaled
from fastcm.paths import TrigFlow
from fastcm.schedules import normal_quantile


@dataclass(frozen=True)
class ContinuousConsistency:
    """F(x_t, t) against F + g, where g is the derivative of f along the way of x_t, normalised.

    On `TrigFlow` with s the standard deviation of the data and f = cos t x - sin t s F,
    g = cos t df/dt = -cos^2 t (s F - dx/dt) - r cos t (sin t x + s dF/dt), r rising from 0 to 1.
    dx/dt is s cos t z - sin t x0, or with a teacher its velocity. A student of another path is
    trained as the network of `TrigFlow` that a rescaling of its input and output makes of it.

    Args:
        parameterization: of the student; prediction "v".
        teacher: network of a pretrained flow or diffusion model; frozen here. None for sCT.
        teacher_parameterization: default the student's.
        sigma_data: s, where the path has none; a `TrigFlow` has its own.
        mean, std: of ln(s tan t), which is normal; the paper's are -1.0 and 1.4.
        warmup: steps in which r rises from 0 to 1; the paper's is 10,000.
        normalization: of g: "norm", g / (|g| + c) of the whole sample, the paper's; "rms",
            g / (|g| / sqrt(D) + c), of D elements; "clip", each element to [-1, 1].
        c: see `normalization`.
        prior: weight of the loss before it is learnt, "tangent", 1 / (s tan t), the paper's, which
            makes g what it is above; "one" makes it g s tan t.
        weight: further weight(t, t_min, path); the paper's is learnt.
        metric: distance of network outputs.
        guidance: weight w of the teacher's v_u + w (v_c - v_u); None uses v_c.
        null_condition: what stands for "no condition" under guidance.

    Source: Lu & Song 2024, "Simplifying, stabilizing and scaling continuous-time consistency
    models", section 4, algorithm 1.
    """

    parameterization: Parameterization = Parameterization(TrigFlow())
    teacher: nn.Module | None = field(default=None, repr=False)
    teacher_parameterization: Parameterization | None = None
    sigma_data: float = 0.5
    mean: float = -1.0
    std: float = 1.4
    warmup: int = 10_000
    normalization: Literal["norm", "rms", "clip"] = "norm"
    c: float = 0.1
    prior: Literal["tangent", "one"] = "tangent"
    weight: Weight = Learned()
    metric: Metric = SquaredL2()
    guidance: float | None = None
    null_condition: Null = None
    served: Parameterization = field(init=False, repr=False)
    """What the student is trained as."""

    target_average = None
    derives = True

    def __post_init__(self) -> None:
        p = self.parameterization
        if p.prediction != "v":
            raise ValueError(f"ContinuousConsistency needs prediction 'v', got {p.prediction!r}")
        for name, allowed in (
            ("normalization", ("norm", "rms", "clip")),
            ("prior", ("tangent", "one")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("sigma_data", "std", "c"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0 steps, got {self.warmup}")
        if self.guidance is not None and (self.teacher is None or self.null_condition is None):
            raise ValueError("guidance needs a teacher and null_condition")
        path = p.path if isinstance(p.path, TrigFlow) else TrigFlow(self.sigma_data)
        object.__setattr__(self, "served", Parameterization(path))
        if self.teacher is None:
            return
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher must be an nn.Module, got {type(self.teacher).__name__}")
        theirs = self.teacher_parameterization or p
        if theirs != self.served:
            object.__setattr__(self, "teacher", Rescaled(self.teacher, theirs, self.served))
        object.__setattr__(self, "teacher_parameterization", self.served)
        assert self.teacher is not None
        self.teacher.requires_grad_(False).eval()

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p, q = self.parameterization, self.served
        assert isinstance(q.path, TrigFlow)
        s = q.path.sigma_data
        tau = self.mean + self.std * normal_quantile(batch.uniform(rng.TIME))
        t = torch.atan2(tau.exp(), torch.full_like(tau, s))
        cos, sin = t.cos(), t.sin()
        x, dx = batch.stored((cos, s * sin), (-sin, s * cos))
        inputs, t32 = (x / s).to(batch.input_dtype), t.float()
        if self.teacher is not None:
            dx = s * self._velocity(batch, inputs, t32).float()

        def served(x: Tensor, t: Tensor) -> Tensor:
            if p.path == q.path:
                return net(x, t, batch.cond)
            return rescaled(net, p, q, x, t, batch.cond)

        prior = cos if self.prior == "tangent" else s * sin
        F, slope = jvp(
            served,
            (inputs, t32),
            ((_lift(prior * sin / s, x) * dx).to(inputs.dtype), (prior * sin).float()),
        )
        check_output("net", F, inputs)
        with torch.no_grad():
            r = (batch.key.step / max(self.warmup, 1)).clamp(max=1.0) if self.warmup else 1.0
            value = F.detach().to(x.dtype)
            g = -_lift(prior * cos, x) * (s * value - dx)
            g = g - (r * _lift(prior * sin, x)) * x - (r * s) * slope.to(x.dtype)
            target = value + self._normalised(g)
        one = torch.ones_like(t)
        return Loss.of(
            F,
            x,
            torch.zeros_like(t),
            one,
            target,
            metric=self.metric,
            weight=self.weight(t, torch.zeros_like(t), q.path),
            log_variance=learned(self.weight, net, q, t),
        )

    def _normalised(self, g: Tensor) -> Tensor:
        if self.normalization == "clip":
            return g.clamp(-1.0, 1.0)
        norm: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1)
        if self.normalization == "rms":
            norm = norm / math.sqrt(g[0].numel())
        return g / (norm + self.c).reshape(-1, *[1] * (g.dim() - 1))

    @torch.no_grad()
    def _velocity(self, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's F, guided."""
        assert self.teacher is not None
        teacher, cond = batch.network(self.teacher), batch.cond
        if self.guidance is None:
            return check_output("teacher", teacher(x, t, cond), x)
        if cond is None:
            raise ValueError("guidance needs a batch with cond, got cond=None")
        conds = joined(cond, unconditional(cond, self.null_condition))
        inputs = torch.cat([x, x])
        both = check_output("teacher", teacher(inputs, t.repeat(2), conds), inputs)
        F, F_uncond = both.float().chunk(2)
        return torch.lerp(F_uncond, F, self.guidance)


def _lift(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
