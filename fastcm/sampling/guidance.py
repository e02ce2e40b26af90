"""Evaluating a network in a sampler, with classifier-free guidance F_u + w (F_c - F_u).

Denoiser and velocity are affine in F, so guiding F guides both. Conditional and unconditional
rows go through the network in one call, and the two outputs stay apart (`Guided`) until the affine
map of the sampler reads them: guidance costs no pass of its own.

A network that takes the weight as an input (Luo et al. 2023, LCM) reads it from `cond`, whose
last column it is (`fastcm.networks.protocol.append_weight`), and `guidance` stays None, since such
a network needs no unconditional rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from fastcm import ops
from fastcm.networks.conditions import Null, check_rows, joined, unconditional
from fastcm.networks.guidance import check_rescale, guided
from fastcm.networks.protocol import Network, check_output
from fastcm.ops.reference import compute_dtype, lift
from fastcm.parameterization import Parameterization
from fastcm.sampling.held import Rows, few, held_boundary, held_rows, plain_rows
from fastcm.sampling.levels import Level

Weight = Union[float, Tensor]
"""A number, or one of each sample: floats ``[B]``."""

Guidance = Union[Weight, Sequence[Weight], Callable[[float], Weight]]
"""A weight, one per evaluation time (also ``[times, B]``), or a schedule w(t)."""


class Guided(NamedTuple):
    """A network output F_u + w (F - F_u) whose halves are not yet combined; F_u None: F alone."""

    F: Tensor
    F_uncond: Any = None
    weight: Weight = 1.0
    rows: Rows = plain_rows

    def weights(self, x: Tensor) -> Tensor:
        """w of every sample of x, ``[B]``."""
        return self.weight if isinstance(self.weight, Tensor) else self.rows(x, self.weight)

    def map(self, x: Tensor, a: float, b: float) -> Tensor:
        """a x + b (F_u + w (F - F_u)) in one pass, float32 (float64 if x or F is)."""
        rows = self.rows
        if self.F_uncond is None:
            out = held_boundary(x, self.F, a, b) if rows is held_rows else None
            return ops.boundary(x, self.F, rows(x, a), rows(x, b)) if out is None else out
        return ops.euler_step(
            x,
            self.F,
            rows(x, -b),
            v_uncond=self.F_uncond,
            guidance=self.weights(x),
            scale=rows(x, a),
        )

    def combined(self) -> Tensor:
        """F_u + w (F - F_u)."""
        return self.F if self.F_uncond is None else self.rescaled(0.0).F

    def rescaled(self, share: float) -> Guided:
        """With the halves combined, and a share of the deviation that of F; see `guided`."""
        if self.F_uncond is None:
            return self
        F = guided(self.F, self.F_uncond, self.weights(self.F), share)
        return Guided(F, rows=self.rows)


def guidance_weights(guidance: Guidance, times: Sequence[float], z: Tensor) -> tuple[Weight, ...]:
    """One weight per time: a float, or float64 ``[B]`` on the device of z ``[B, ...]``.

    Raises:
        ValueError: a sequence of another length than `times`, a tensor of another shape than
            ``[B]`` or ``[times, B]``, a weight that is not finite.
        TypeError: a weight that is no number.
    """
    given: Sequence[Weight]
    if isinstance(guidance, Tensor):
        given = guidance.unbind() if guidance.dim() == 2 else [guidance] * len(times)
    elif callable(guidance):
        given = [guidance(t) for t in times]
    elif isinstance(guidance, Sequence):
        given = guidance
    else:
        given = [guidance] * len(times)
    if len(given) != len(times):
        raise ValueError(
            f"guidance must be a number, a function of t or one weight for each of the "
            f"{len(times)} times, got {len(given)} weights"
        )
    return tuple(_weight(w, z) for w in given)


def _weight(w: Weight, z: Tensor) -> Weight:
    if isinstance(w, Tensor) and w.dim() > 0:
        if w.shape != z.shape[:1]:
            raise ValueError(
                f"guidance as a tensor must be of one weight per sample, [{len(z)}] or "
                f"[times, {len(z)}], got weights {list(w.shape)}"
            )
        finite, w = bool(w.isfinite().all()), w.to(z.device, torch.float64)
    else:
        w = float(w)
        finite = math.isfinite(w)
    if not finite:
        raise ValueError(f"guidance weights must be finite, got {w}")
    return w


class Evaluator:
    """The network at the levels of a sampler, one call per evaluation.

    Args:
        net: ``net(x, t, cond) -> F``.
        z: ``[B, ...]``, for the number of samples, the dtype and the device.
        cond: tensor of B rows, or containers of such, or None.
        weights: of the guidance, by time, from `guidance_weights`, or None. Where it is the number
            1 the conditional rows are evaluated alone.
        null_condition: what stands for "no condition"; see `fastcm.networks.conditions.Null`.
        guide: ``guide(x, t, cond) -> F``, a worse network of the same parameterization, whose
            output under the same condition stands in for the unconditional one.
        input_dtype: half precision in which the networks take x; None: that of the arithmetic.
        rescale: share in [0, 1] in which the guided output gets back the standard deviation of the
            conditional one, over each sample; None: 0. See `fastcm.networks.guidance.guided`.

    Raises:
        TypeError: `cond` holds something that is no tensor.
        ValueError: `cond` has not B rows; weights without guide, cond or null_condition; a guide
            or rescale without weights; rescale out of its range.

    Source: Ho & Salimans 2022; Karras et al. 2024, "Guiding a diffusion model with a bad version of
    itself", D_guide + w (D - D_guide).
    """

    def __init__(
        self,
        net: Network,
        z: Tensor,
        *,
        cond: Any = None,
        weights: Sequence[Weight] | None = None,
        null_condition: Null = None,
        guide: Network | None = None,
        input_dtype: torch.dtype | None = None,
        rescale: float | None = None,
    ) -> None:
        count = z.shape[0]
        if cond is not None:
            check_rows(cond, count)
        if rescale is not None:
            check_rescale(rescale)
        self._net, self._guide, self._cond = net, guide, cond
        self._both: Any = None
        self._weights, self._dtype, self._rescale = weights, input_dtype, rescale
        for name, given in (("guide", guide), ("guidance_rescale", rescale)):
            if given is not None and weights is None:
                raise ValueError(f"{name} needs guidance, the weight of it, got None")
        if weights is not None and guide is None:
            self._both = _both(cond, null_condition)
        self.rows = held_rows if few(z, count) else plain_rows

    def ahead(self, x: Tensor, to: Level) -> dict[str, Any]:
        """What asks the pass that moves x ``[B, ...]`` to a level for the network's input there.

        Empty where that is x itself.
        """
        if to.c_in is None and self._dtype is None:
            return {}
        scale = None if to.c_in is None else self.rows(x, to.c_in)
        return {"input_scale": scale, "input_dtype": self._dtype or compute_dtype(x)}

    def __call__(
        self,
        x: Tensor,
        at: Level,
        i: int,
        to: Level | None = None,
        *,
        inputs: Tensor | None = None,
    ) -> Guided:
        """The output for x ``[B, ...]`` at a level, with the i-th weight.

        The network's t is float32, float64 where x is; `to` is the end of the step, for a network
        of two times; `inputs` are what `ahead` asked for.
        """
        if inputs is None:
            inputs = x if at.c_in is None else lift(self.rows(x, at.c_in), x) * x
            inputs = inputs if self._dtype is None else inputs.to(self._dtype)
        # a network may write to its t, so it is made anew each time
        t = torch.full(x.shape[:1], at.c_noise, dtype=compute_dtype(x), device=x.device)
        s = None if to is None else torch.full_like(t, to.c_noise)
        weight = 1.0 if self._weights is None else self._weights[i]
        F, F_other = _call(self._net, inputs, t, self._cond, self._both, weight, s)
        if self._guide is not None and not _is_one(weight):
            second = {} if s is None else {"s": s}
            # the network may have written to its t
            t = torch.full_like(t, at.c_noise)
            F_other = check_output("guide", self._guide(inputs, t, self._cond, **second), inputs)
        out = Guided(F, F_other, weight, self.rows)
        return out.rescaled(self._rescale) if self._rescale else out


def predict(
    net: Network,
    p: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Any = None,
    *,
    guidance: float | None = None,
    null_condition: Null = None,
) -> Tensor:
    """The network's output F at (x, t), with guidance F_u + w (F_c - F_u) if asked.

    Args:
        net, cond, null_condition: see `Evaluator`.
        p: its parameterization.
        x: ``[B, ...]``.
        t: ``[B]``, float64.
        guidance: the weight w.
    """
    check_rows(cond, len(x))
    c_in = p.c_in(t)
    inputs = x if c_in is None else lift(c_in, x) * x
    told = p.path.c_noise(t) if x.dtype == torch.float64 else p.c_noise(t)
    if guidance is None:
        return _call(net, inputs, told, cond)[0]
    both = _both(cond, null_condition)
    return Guided(*_call(net, inputs, told, cond, both, guidance), guidance).combined()


def _call(
    net: Network,
    inputs: Tensor,
    t: Tensor,
    cond: Any,
    both: Any = None,
    weight: Weight = 1.0,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output and, under guidance, that without condition."""
    second = {} if s is None else {"s": s}
    if both is None or _is_one(weight):
        return check_output("net", net(inputs, t, cond, **second), inputs), None
    inputs, second = torch.cat([inputs, inputs]), {k: v.repeat(2) for k, v in second.items()}
    F = check_output("net", net(inputs, t.repeat(2), both, **second), inputs)
    F_cond, F_uncond = F.chunk(2)
    return F_cond, F_uncond


def _is_one(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 1.0


def check_labels(cond: Any, net: nn.Module) -> None:
    """Raise ValueError for labels beyond the classes of a network that describes itself.

    Those on a GPU are not waited for.
    """
    if not isinstance(cond, Tensor) or not cond.is_cpu or cond.is_floating_point():
        return
    if cond.numel() == 0:
        return
    classes = getattr(net, "description", {}).get("num_classes")
    if classes is None:
        return
    low, high = (int(v) for v in cond.aminmax())
    if low < 0 or high > classes:
        raise ValueError(
            f"cond must hold labels in [0, {classes}), or {classes} for none, got {low}..{high}"
        )


def _both(cond: Any, null: Null) -> Any:
    if cond is None:
        raise ValueError("guidance needs cond, got None")
    return joined(cond, unconditional(cond, null))
