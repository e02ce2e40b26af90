"""Exact networks of known data: Gaussian mixtures, and one Gaussian's consistency function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcm import rng
from fastcm.networks.embedding import check_input
from fastcm.ops import reference
from fastcm.ops.reference import lift
from fastcm.parameterization import Parameterization
from fastcm.paths import Point

# streams of the data's own, so that it shares no noise with a training of the same seed
_COMPONENT, _VALUE = rng.SAMPLE - 2, rng.SAMPLE - 1


class GaussianMixture(nn.Module):
    """The exact network of data sum_k w_k N(mean_k, diag(std_k^2)): a teacher without training.

    With gain_k = (x - alpha mean_k) / (alpha^2 std_k^2 + sigma^2) and responsibilities r_k(x), the
    posterior means are x0 = sum_k r_k (mean_k + alpha std_k^2 gain_k) and z = sum_k r_k sigma
    gain_k; every prediction is a combination p x0 + q z. Evaluated in float64, whatever x is.

    As a network, ``cond`` is a component label ``[B]``, int64, for the data of that component
    alone; K, like None, is the null label of the whole mixture.

    Args:
        means: ``[K, *shape]``.
        stds: > 0, a number or a tensor that broadcasts to `means`: ``[K, 1, ...]`` for isotropic
            components.
        weights: ``[K]``, > 0, normalised here; default equal.
        parameterization: what the network predicts, and on which path.

    Raises:
        ValueError: an argument of the wrong shape or range.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor,
        stds: float | Tensor,
        weights: Sequence[float] | Tensor | None = None,
        parameterization: Parameterization = Parameterization(),
    ) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.dim() < 2 or means.numel() == 0:
            raise ValueError(f"means must be [K, *shape], not empty, got shape {list(means.shape)}")
        stds = torch.as_tensor(stds, dtype=torch.float64, device=means.device)
        try:
            stds = stds.expand_as(means)
        except RuntimeError:
            raise ValueError(
                f"stds must be a number or broadcast to means, {list(means.shape)}, got shape "
                f"{list(stds.shape)}"
            ) from None
        if not bool((stds > 0).all()):
            raise ValueError(f"stds must be > 0, got {stds.min().item()}")
        w = [1.0] * len(means) if weights is None else weights
        w = torch.as_tensor(w, dtype=torch.float64, device=means.device)
        if w.shape != means.shape[:1] or not bool((w > 0).all()):
            raise ValueError(f"weights must be {len(means)} numbers > 0, got {w.tolist()}")
        self.parameterization = parameterization
        self.shape = tuple(means.shape[1:])
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds.flatten(1).contiguous())
        self.register_buffer("weights", w / w.sum())

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """F of the shape of x ``[B, *shape]``, at network times t ``[B]``.

        0 where the parameterization leaves F undetermined ("cm" at t_min).
        """
        check_input(x, t, self.shape)
        p = self.parameterization
        x64, t = _path_state(p, x, t)
        x0, z = self._posterior(x64, p.path.at(t), cond)
        q0, qz = (lift(c.masked_fill(~c.isfinite(), 0.0), x64) for c in p.target(t))
        return (q0 * x0 + qz * z).to(x.dtype)

    def denoiser(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t = x] for x ``[B, *shape]`` at path times t ``[B]``, in the dtype of x."""
        x0, _ = self._posterior(x.double(), self.parameterization.path.at(t), cond)
        return x0.to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """dx/dt of the probability-flow ODE, alpha' E[x0 | x] + sigma' E[z | x]."""
        at = self.parameterization.path.at(t)
        x0, z = self._posterior(x.double(), at, cond)
        return (lift(at.alpha_dot, x0) * x0 + lift(at.sigma_dot, x0) * z).to(x.dtype)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_sample: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Data of the mixture.

        Args:
            n: >= 0.
            seed: 0 <= seed < 2**63; the data shares no noise with a training or sampler of it.
            first_sample: index of the first: sample i depends on (seed, first_sample + i) alone.
            dtype: float dtype of the data.

        Returns:
            (x ``[n, *shape]``, component ``[n]`` int64).

        Raises:
            ValueError: n < 0, seed or first_sample out of range.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        key = rng.NoiseKey(seed, first_sample=first_sample, device=self.means.device)
        u = rng.uniform(n, key, stream=_COMPONENT)
        component = torch.searchsorted(self.weights.double().cumsum(0), u, right=True)
        z = reference.noise((n, self.means.shape[1]), key, stream=_VALUE, dtype=torch.float64)
        x = self.means[component] + self.stds[component] * z
        return x.to(dtype).reshape(n, *self.shape), component

    def _posterior(self, x: Tensor, at: Point, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[z | x]) for float64 x, written without a division by sigma."""
        means, var = self.means.double(), self.stds.double().square()
        alpha, sigma = at.alpha[:, None, None], at.sigma[:, None, None]
        centred = x.flatten(1)[:, None] - alpha * means
        total = alpha.square() * var + sigma.square()
        gain = centred / total
        log_r = self._log_weights(x, cond) - 0.5 * (centred * gain + total.log()).sum(2)
        r = log_r.softmax(1)[:, :, None]
        x0 = (r * (means + alpha * var * gain)).sum(1)
        z = (r * sigma * gain).sum(1)
        return x0.reshape(x.shape), z.reshape(x.shape)

    def _log_weights(self, x: Tensor, cond: Tensor | None) -> Tensor:
        log_weights = self.weights.double().log()
        if cond is None:
            return log_weights
        K = len(log_weights)
        if cond.dtype != torch.int64 or cond.shape != x.shape[:1]:
            raise ValueError(
                f"cond must be int64 labels in 0..{K} of shape [{len(x)}], "
                f"got {cond.dtype} {list(cond.shape)}"
            )
        if cond.device.type == "cpu" and bool(((cond < 0) | (cond > K)).any()):
            raise ValueError(f"cond must be labels in 0..{K}, got {cond.tolist()}")
        label = cond[:, None]
        chosen = (label == torch.arange(K, device=x.device)) | (label == K)
        return log_weights.masked_fill(~chosen, -math.inf)


class GaussianConsistency(nn.Module):
    """The exact consistency network of data N(mean, diag(std^2)): f(x, t) is where the ODE ends.

    f = alpha_e mean + sqrt((alpha_e^2 std^2 + sigma_e^2) / (alpha^2 std^2 + sigma^2))
    (x - alpha mean) with alpha_e, sigma_e the path at t_min. Evaluated in float64, whatever x is.

    Args:
        mean: ``[*shape]``.
        std: > 0, a number or a tensor that broadcasts to `mean`.
        parameterization: path and prediction type of the network.

    Raises:
        ValueError: std of the wrong shape or range.
    """

    def __init__(
        self,
        mean: Tensor,
        std: float | Tensor,
        parameterization: Parameterization = Parameterization(),
    ) -> None:
        super().__init__()
        std = torch.as_tensor(std, dtype=torch.float64)
        self.gaussian = GaussianMixture(
            torch.as_tensor(mean)[None], std[None] if std.dim() else std, None, parameterization
        )
        self.parameterization = parameterization

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) for x ``[B, *shape]`` at path times t ``[B]``, in the dtype of x."""
        path = self.parameterization.path
        at, end = path.at(t), path.at(torch.full_like(t, path.t_min))
        mean, var = self.gaussian.means.double(), self.gaussian.stds.double().square()
        alpha, sigma, alpha_e, sigma_e = (
            c[:, None] for c in (at.alpha, at.sigma, end.alpha, end.sigma)
        )
        ratio = (alpha_e**2 * var + sigma_e**2) / (alpha**2 * var + sigma**2)
        f = alpha_e * mean + ratio.sqrt() * (x.double().flatten(1) - alpha * mean)
        return f.reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """F with a x + b F = f, of the shape of x, at network times t ``[B]``; 0 where b is 0."""
        check_input(x, t, self.gaussian.shape)
        x64, t = _path_state(self.parameterization, x, t)
        a, b, _, _ = (lift(c, x64) for c in self.parameterization.coefficients(t))
        F = (self.solution(x64, t) - a * x64) / b
        return F.masked_fill(b == 0.0, 0.0).to(x.dtype)


def _path_state(p: Parameterization, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 state and time on the path that the network's input and time stand for."""
    t = p.path.time_of(t.double()).clamp(p.path.t_min, p.path.t_max)
    c_in = p.c_in(t)
    return x.double() if c_in is None else x.double() / lift(c_in, x.double()), t
