"""What a network predicts, as affine maps: denoiser f = a x + b F and velocity v = c x + d F.

Three prediction types are a target p x0 + q z ("v", "eps", "x0"); with x = alpha x0 + sigma z that
is a 2 x 2 linear system whose solution gives all four coefficients. EDM's preconditioning ("edm")
and its consistency variant with the boundary shift ("cm") give a and b directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from fastcm.paths import Linear, Path, Point, VarianceExploding, rescale

Prediction = Literal["v", "eps", "x0", "edm", "cm"]


class Coefficients(NamedTuple):
    """f = a x + b F and v = c x + d F, float64 ``[B]`` each."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


class Moment(NamedTuple):
    """All that a step wants to know of times: float64 ``[B]`` each, but c_noise float32."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    coefficients: Coefficients
    c_in: Tensor | None
    c_noise: Tensor


@dataclass(frozen=True)
class Parameterization:
    """A path and what the network predicts on it.

    Args:
        path: the path; default `Linear`.
        prediction: "v" | "eps" | "x0" | "edm" | "cm"; None takes the path's own (v on `Linear` and
            `TrigFlow`, eps on `VariancePreserving`, cm on `VarianceExploding`).

    At t = t_min the denoiser is the identity, bit for bit (a = 1, b = 0): the boundary condition
    of consistency models. The exception is "edm", a teacher's plain preconditioning.

    Raises:
        TypeError: path is a name or a class.
        ValueError: unknown prediction, or one that the path cannot carry.
    """

    path: Path = Linear()
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, Path):
            raise TypeError(
                "path must be an object such as fastcm.Linear() or fastcm.VarianceExploding(), got "
                f"{self.path!r:.80}"
            )
        if self.prediction is None:
            object.__setattr__(self, "prediction", cast(Prediction, self.path.default_prediction))
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction must be one of {get_args(Prediction)}, got {self.prediction!r}"
            )
        if self.prediction in ("edm", "cm") and not isinstance(self.path, VarianceExploding):
            raise ValueError(
                f"prediction {self.prediction!r} is EDM's preconditioning, defined on "
                f"VarianceExploding, got {self.path}; wrap the network with Rescaled to serve "
                "another path"
            )
        end = torch.tensor([self.path.t_max], dtype=torch.float64, device="cpu")
        if self.prediction == "eps" and self.path._at(end).alpha.item() < 1e-9:
            raise ValueError(
                f"prediction 'eps' cannot recover data at t = {self.path.t_max} of {self.path}, "
                "where alpha = 0; use 'v' or 'x0'"
            )

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q), float64 ``[B]``: the network's regression target is p x0 + q z."""
        if self.prediction == "v":
            p, q = self.path.velocity_target(t.double())
            return p, q
        if self.prediction == "eps":
            return torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        if self.prediction == "x0":
            return torch.ones_like(t, dtype=torch.float64), torch.zeros_like(t, dtype=torch.float64)
        at = self.path.at(t)
        a, b = self._preconditioning(at)
        return (1.0 - a * at.alpha) / b, -a * at.sigma / b

    def coefficients(self, t: Tensor) -> Coefficients:
        """Denoiser and velocity coefficients at times ``t`` ``[B]``.

        The velocity is singular where sigma or alpha is 0, except of "v" on `Linear`,
        `VarianceExploding` and `TrigFlow`.
        """
        return self._coefficients(t, self.path.at(t))

    def _coefficients(self, t: Tensor, at: Point) -> Coefficients:
        # in the dtype of t: a float32 t_min is not the float64 one
        start = t <= torch.full((), self.path.t_min, dtype=t.dtype, device=t.device)
        if self.prediction in ("edm", "cm"):
            a, b = self._preconditioning(at)
            slope = at.alpha_dot - at.alpha * at.sigma_dot / at.sigma
            c, d = at.sigma_dot / at.sigma + slope * a, slope * b
            if self.prediction == "cm":
                a, b = a.masked_fill(start, 1.0), b.masked_fill(start, 0.0)
            return Coefficients(a, b, c, d)
        p, q = self.target(t)
        det = at.alpha * q - at.sigma * p
        a, b = q / det, -at.sigma / det
        c = (at.alpha_dot * q - at.sigma_dot * p) / det
        d = (at.sigma_dot * at.alpha - at.alpha_dot * at.sigma) / det
        return Coefficients(a.masked_fill(start, 1.0), b.masked_fill(start, 0.0), c, d)

    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(g, h), float64 ``[B]``: the noise estimate is z = g x + h F."""
        at = self.path.at(t)
        if self.prediction in ("edm", "cm"):
            a, b = self._preconditioning(at)
            return (1.0 - at.alpha * a) / at.sigma, -at.alpha * b / at.sigma
        p, q = self.target(t)
        det = at.alpha * q - at.sigma * p
        return -p / det, at.alpha / det

    def c_in(self, t: Tensor) -> Tensor | None:
        """Factor on the network's input, float64 ``[B]``, or None where it is 1."""
        return self.path.c_in(t)

    def c_noise(self, t: Tensor) -> Tensor:
        """The network's time argument, float32 ``[B]``."""
        return self.path.c_noise(t.double()).float()

    def moment(self, t: Tensor) -> Moment:
        """The path at times ``t`` ``[B]`` and everything above."""
        at = self.path.at(t)
        coefficients = self._coefficients(t, at)
        return Moment(t, at.alpha, at.sigma, coefficients, self.c_in(t), self.c_noise(t))

    def _preconditioning(self, at: Point) -> tuple[Tensor, Tensor]:
        path = cast(VarianceExploding, self.path)
        sd = path.sigma_data
        t = at.sigma
        shifted = t - path.t_min if self.prediction == "cm" else t
        a = sd**2 / (shifted.square() + sd**2)
        b = sd * shifted / (t.square() + sd**2).sqrt()
        return a, b


def check_velocity(p: Parameterization) -> None:
    """Raise ValueError unless the network's output is the velocity dx/dt itself."""
    if not isinstance(p.path, Linear) or p.prediction != "v":
        raise ValueError(
            f"the network must predict 'v' on Linear, got {p.prediction!r} on {p.path}"
        )


class Rescaled(nn.Module):
    """Serves a network trained under one parameterization as one of another path.

    Args:
        net: network of the protocol ``net(x, t, cond=None) -> F``.
        trained: the parameterization it was trained under.
        serves: the parameterization it shall be used under: its inputs and outputs.
    """

    def __init__(self, net: nn.Module, trained: Parameterization, serves: Parameterization) -> None:
        super().__init__()
        self.net = net
        self.trained = trained
        self.serves = serves

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The served prediction for network input `x` and network time `t` of ``serves``."""
        return rescaled(self.net, self.trained, self.serves, x, t, cond)


def rescaled(
    net: Callable[..., Tensor],
    trained: Parameterization,
    serves: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Any = None,
) -> Tensor:
    """What `Rescaled` computes."""

    def lift(coefficient: Tensor) -> Tensor:
        return coefficient.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    path = serves.path
    t = path.time_of(t.double()).clamp(path.t_min, path.t_max)
    there, scale = rescale(path, trained.path, t)
    c_in = serves.c_in(t)
    x = x * lift(scale if c_in is None else scale / c_in)
    c_in = trained.c_in(there)
    F = net(x if c_in is None else lift(c_in) * x, trained.c_noise(there), cond)
    a, b, _, _ = trained.coefficients(there)
    g, h = trained.noise_coefficients(there)
    p, q = serves.target(t)
    return lift(p * a + q * g) * x + lift(p * b + q * h) * F
