"""ODE solvers from noise to data over given descending times: each step one affine map.

Velocity and denoiser are affine in (x, F), so a step of Euler is a map of (x, F), the second half
of Heun's one of (x, x_euler, F), and DPM-Solver++(2M) one of (x, D, D_previous). The coefficients
are Python floats, computed in float64 (`fastcm.sampling.levels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from fastcm import ops
from fastcm.sampling.guidance import Evaluator, Rows, rows
from fastcm.sampling.levels import Level

Solver = Callable[[Evaluator, Tensor, Sequence[Level]], Tensor]
"""``solver(evaluate, x, levels)``: x at the last level, by evaluations at those before it."""


def euler(evaluate: Evaluator, x: Tensor, levels: Sequence[Level]) -> Tensor:
    """x_s = x_t - (t - s) v(x_t, t): ``len(levels) - 1`` evaluations, one pass each.

    Source: seed eq. 8; on `Linear` and `VarianceExploding` the same as `ddim`.
    """
    for i, (at, to) in enumerate(pairwise(levels)):
        dt = at.t - to.t
        x = evaluate(x, at, i).map(x, 1.0 - dt * at.c, -dt * at.d)
    return x


def ddim(evaluate: Evaluator, x: Tensor, levels: Sequence[Level]) -> Tensor:
    """x_s = alpha_s f + sigma_s z_estimate: ``len(levels) - 1`` evaluations, one pass each.

    Euler in sigma / alpha, the same on every path; on `VariancePreserving`, whose sigma rises as
    the root of t, far better than Euler in t. Source: Song et al. 2020, "Denoising diffusion
    implicit models", eq. 12 with no noise.
    """
    for i, (at, to) in enumerate(pairwise(levels)):
        keep, gain = _exponential(at, to)
        x = evaluate(x, at, i).map(x, keep + gain * at.a, gain * at.b)
    return x


def heun(evaluate: Evaluator, x: Tensor, levels: Sequence[Level]) -> Tensor:
    """Trapezoidal steps, the last one Euler: ``2 (len(levels) - 1) - 1`` evaluations.

    With the Euler point y = x - dt v_1, the step x - dt (v_1 + v_2) / 2 is (x + y - dt v_2) / 2:
    one pass, two under guidance. Source: Karras et al. 2022, algorithm 1.
    """
    last = len(levels) - 2
    for i, (at, to) in enumerate(pairwise(levels)):
        dt = at.t - to.t
        y = evaluate(x, at, i).map(x, 1.0 - dt * at.c, -dt * at.d)
        if i == last:
            return y
        out = evaluate(y, to, i + 1)
        a, b = 0.5 * (1.0 - dt * to.c), -0.5 * dt * to.d
        if out.F_uncond is None:
            x = combine((0.5, x), (a, y), (b, out.F), rows=evaluate.rows)
        else:
            x = ops.boundary(x, out.map(y, a, b), evaluate.rows(x, 0.5), evaluate.rows(x, 1.0))
    return x


def dpmpp_2m(evaluate: Evaluator, x: Tensor, levels: Sequence[Level]) -> Tensor:
    """DPM-Solver++(2M): ``len(levels) - 1`` evaluations.

    x_s = (sigma_s / sigma_t) x + alpha_s (1 - e^-h) ((1 + e) D - e D_previous) with h the step in
    ln(alpha / sigma), e = h / (2 h_previous) and D the denoiser: one pass for D, one for x. A step
    is of first order (`ddim`) where nothing precedes it, from pure noise (h_previous infinite), and
    down to sigma = 0 (h infinite). The order is 2 on grids even in ln(alpha / sigma), or nearly, as
    Karras's; on a grid even in t, whose last steps are long in that, about 1.6.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    h = [to.log_snr - at.log_snr for at, to in pairwise(levels)]
    before: Tensor | None = None
    for i, (at, to) in enumerate(pairwise(levels)):
        out = evaluate(x, at, i)
        keep, gain = _exponential(at, to)
        wanted = i + 1 < len(h) and 0.0 < h[i + 1] / h[i] < math.inf
        second = i > 0 and 0.0 < h[i] / h[i - 1] < math.inf
        D = out.map(x, at.a, at.b) if wanted or second else None
        if second:
            assert D is not None and before is not None
            e = 0.5 * h[i] / h[i - 1]
            terms = (keep, x), (gain * (1.0 + e), D), (-gain * e, before)
            x = combine(*terms, rows=evaluate.rows)
        else:
            x = out.map(x, keep + gain * at.a, gain * at.b)
        before = D
    return x


def _exponential(at: Level, to: Level) -> tuple[float, float]:
    """(k, g) of x_s = k x_t + g f, exact where the denoiser f does not change."""
    keep = to.sigma / at.sigma
    return keep, to.alpha - keep * at.alpha


def combine(*terms: tuple[float, Tensor], rows: Rows = rows) -> Tensor:
    """c_0 y_0 + c_1 y_1 + c_2 y_2 in one pass, for three pairs (c, y).

    Of three coefficients two have one sign: they make a weighted mean, with weights in [0, 1], so
    that the sum has the form of a guided Euler step and loses nothing to cancellation.
    """
    first, second, third = terms
    for (c, y), (k, u), (scale, x) in (
        (first, second, third),
        (first, third, second),
        (second, third, first),
    ):
        if c * k >= 0.0:
            total = c + k
            share = c / total if total else 0.0
            return ops.euler_step(
                x, y, rows(x, -total), v_uncond=u, guidance=rows(x, share), scale=rows(x, scale)
            )
    raise AssertionError(f"coefficients are not numbers: {[c for c, _ in terms]}")
