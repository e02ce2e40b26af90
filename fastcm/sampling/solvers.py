"""ODE solvers from noise to data over given descending times: each step one affine map.

Velocity and denoiser are affine in (x, F), so a step of Euler is a map of (x, F), the second half
of Heun's or of the midpoint's one of (x, x_euler, F), and DPM-Solver++(2M) one of
(x, D, D_previous). The coefficients are Python floats, computed in float64
(`fastcm.sampling.levels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from fastcm import ops
from fastcm.sampling.guidance import Evaluator, Guided
from fastcm.sampling.held import Rows, plain_rows
from fastcm.sampling.levels import Level
from fastcm.sampling.steps import Step

Renoise = Callable[[Tensor, Step], Tensor]
"""``renoise(x, step)``: x with the noise of a step that has some."""

Solver = Callable[[Evaluator, Tensor, Sequence[Step], Renoise], Tensor]
"""``solver(evaluate, x, steps, renoise)``: x at the end of the last step."""


def stepwise(step_of: Callable[[Evaluator, Tensor, Step], Tensor]) -> Solver:
    """The solver of a formula that knows one step alone."""

    def solve(evaluate: Evaluator, x: Tensor, steps: Sequence[Step], renoise: Renoise) -> Tensor:
        for step in steps:
            if step.noise is not None:
                x = renoise(x, step)
            x = step_of(evaluate, x, step)
        return x

    return solve


def euler(evaluate: Evaluator, x: Tensor, step: Step) -> Tensor:
    """x_s = x_t - (t - s) v(x_t, t): an evaluation and one pass.

    Source: seed eq. 8; on `Linear` and `VarianceExploding` the same as `ddim`.
    """
    return evaluate(x, step.at, step.i).map(x, *euler_map(step))


def euler_map(step: Step) -> tuple[float, float]:
    """(a, b) of its a x + b F."""
    at, dt = step.at, step.at.t - step.to.t
    return 1.0 - dt * at.c, -dt * at.d


def ddim(evaluate: Evaluator, x: Tensor, step: Step) -> Tensor:
    """x_s = alpha_s f + sigma_s z_estimate: an evaluation and one pass.

    Euler in sigma / alpha, the same on every path; on `VariancePreserving`, whose sigma rises as
    the root of t, far better than Euler in t. Source: Song et al. 2020, "Denoising diffusion
    implicit models", eq. 12 with no noise.
    """
    return evaluate(x, step.at, step.i).map(x, *ddim_map(step))


def ddim_map(step: Step) -> tuple[float, float]:
    """(a, b) of its a x + b F."""
    keep, gain = _exponential(step.at, step.to)
    return keep + gain * step.at.a, gain * step.at.b


def heun(evaluate: Evaluator, x: Tensor, step: Step) -> Tensor:
    """Trapezoidal steps of two evaluations; down to data, where v may be infinite, `euler`.

    With the Euler point y = x - dt v_1, the step x - dt (v_1 + v_2) / 2 is (x + y - dt v_2) / 2:
    one pass, two under guidance. Source: Karras et al. 2022, algorithm 1.
    """
    y = euler(evaluate, x, step)
    if _is_last(step):
        return y
    to, dt = step.to, step.at.t - step.to.t
    out = evaluate(y, to, step.i + 1)
    return _moved(evaluate, 0.5, x, out, y, 0.5 * (1.0 - dt * to.c), -0.5 * dt * to.d)


def midpoint(evaluate: Evaluator, x: Tensor, step: Step) -> Tensor:
    """x - dt v(x - dt v_1 / 2, the middle in t): two evaluations; down to data `euler`.

    Source: Runge 1895.
    """
    if _is_last(step):
        return euler(evaluate, x, step)
    assert step.middle is not None
    y = euler(evaluate, x, step._replace(to=step.middle))
    return _down(evaluate, x, y, step.middle, step.i, step.at.t - step.to.t)


def rk4(evaluate: Evaluator, x: Tensor, step: Step) -> Tensor:
    """x - dt (v_1 + 2 v_2 + 2 v_3 + v_4) / 6: four evaluations; down to data `euler`.

    With the points y_2, y_3, y_4 of the last three velocities it is
    (y_2 + 2 y_3 + y_4 - x) / 3 - dt v_4 / 6. Source: Kutta 1901.
    """
    if _is_last(step):
        return euler(evaluate, x, step)
    assert step.middle is not None
    middle, to, dt, i = step.middle, step.to, step.at.t - step.to.t, step.i
    y2 = euler(evaluate, x, step._replace(to=middle))
    y3 = _down(evaluate, x, y2, middle, i, 0.5 * dt)
    y4 = _down(evaluate, x, y3, middle, i, dt)
    out = evaluate(y4, to, i + 1)
    base = combine((-1 / 3, x), (1 / 3, y2), (2 / 3, y3), rows=evaluate.rows)
    return _moved(evaluate, 1.0, base, out, y4, 1 / 3 - dt * to.c / 6, -dt * to.d / 6)


def dpmpp_2m(evaluate: Evaluator, x: Tensor, steps: Sequence[Step], renoise: Renoise) -> Tensor:
    """DPM-Solver++(2M): an evaluation a step.

    x_s = (sigma_s / sigma_t) x + alpha_s (1 - e^-h) ((1 + e) D - e D_previous) with h the step in
    ln(alpha / sigma), e = h / (2 h_previous) and D the denoiser: one pass for D, one for x. A step
    is of first order (`ddim`) where nothing precedes it, from pure noise (h_previous infinite), and
    down to sigma = 0 (h infinite). The order is 2 on grids even in ln(alpha / sigma), or nearly, as
    Karras's; on a grid even in t, whose last steps are long in that, about 1.6.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    h = [step.to.log_snr - step.at.log_snr for step in steps]
    before: Tensor | None = None
    for i, step in enumerate(steps):
        assert step.noise is None
        at, to = step.at, step.to
        out = evaluate(x, at, i)
        wanted = i + 1 < len(h) and 0.0 < h[i + 1] / h[i] < math.inf
        second = i > 0 and 0.0 < h[i] / h[i - 1] < math.inf
        D = out.map(x, at.a, at.b) if wanted or second else None
        if second:
            assert D is not None and before is not None
            keep, gain = _exponential(at, to)
            e = 0.5 * h[i] / h[i - 1]
            terms = (keep, x), (gain * (1.0 + e), D), (-gain * e, before)
            x = combine(*terms, rows=evaluate.rows)
        else:
            x = out.map(x, *ddim_map(step))
        before = D
    return x


def _is_last(step: Step) -> bool:
    return step.to.sigma == 0.0


def _down(evaluate: Evaluator, x: Tensor, y: Tensor, at: Level, i: int, dt: float) -> Tensor:
    """x - dt v(y) for y at a level."""
    return _moved(evaluate, 1.0, x, evaluate(y, at, i), y, -dt * at.c, -dt * at.d)


def _moved(
    evaluate: Evaluator, k: float, x: Tensor, out: Guided, y: Tensor, a: float, b: float
) -> Tensor:
    """k x + a y + b F for the output F at y: one pass, two under guidance."""
    rows = evaluate.rows
    if out.F_uncond is None:
        return combine((k, x), (a, y), (b, out.F), rows=rows)
    return ops.boundary(x, out.map(y, a, b), rows(x, k), rows(x, 1.0))


def _exponential(at: Level, to: Level) -> tuple[float, float]:
    """(k, g) of x_s = k x_t + g f, exact where the denoiser f does not change."""
    keep = to.sigma / at.sigma
    return keep, to.alpha - keep * at.alpha


def combine(*terms: tuple[float, Tensor], rows: Rows = plain_rows) -> Tensor:
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
