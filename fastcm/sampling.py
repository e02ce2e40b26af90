"""Samplers: one step, multi-step with fresh noise, and the probability-flow ODE.

Sample i is a pure function of (seed, first_sample + i, times): the same on every device, in any
batch size or order.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastcm import checkpoint, networks, ops, rng, solvers
from fastcm.description import parameterization_from
from fastcm.objectives.base import Network, check_output, unconditional
from fastcm.parameterization import Parameterization
from fastcm.paths import Path
from fastcm.reference import lift
from fastcm.rng import NoiseKey
from fastcm.schedules import Grid, UniformGrid, sampling_times

if TYPE_CHECKING:
    from collections.abc import Iterator

SOLVERS: dict[str, solvers.Solver] = {"euler": solvers.euler, "heun": solvers.heun}


def predict(
    net: Network,
    p: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Tensor | None = None,
    *,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """The network's output F at (x, t), with guidance F_u + w (F_c - F_u) if asked.

    Guidance evaluates conditional and unconditional rows in one call; denoiser and velocity are
    affine in F, so guiding F guides both.

    Args:
        net: ``net(x, t, cond) -> F``.
        p: its parameterization.
        x: ``[B, ...]``.
        t: ``[B]``, float64.
        cond: tensor of B rows, or None.
        guidance: the weight w.
        null_condition: what stands for "no condition".
    """
    c_in = p.c_in(t)
    inputs, noise_level = x if c_in is None else lift(c_in, x) * x, p.c_noise(t)
    if guidance is None:
        return check_output("net", net(inputs, noise_level, cond), x)
    if cond is None:
        raise ValueError("guidance needs cond, got None")
    inputs = torch.cat([inputs, inputs])
    cond = torch.cat([cond, unconditional(cond, null_condition)])
    F = check_output("net", net(inputs, noise_level.repeat(2), cond), inputs)
    F_cond, F_uncond = F.chunk(2)
    return torch.lerp(F_uncond, F_cond, guidance)


def _prior(p: Parameterization, z: Tensor, t: Tensor) -> Tensor:
    sigma = p.path.at(t).sigma
    return lift(sigma, z) * z


def multistep(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    key: NoiseKey,
    *,
    times: Sequence[float],
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
    first_sample: int = 0,
) -> Tensor:
    """Consistency sampling: denoise, add fresh noise down to the next time, denoise again.

    ``len(times)`` network evaluations; evaluation j > 0 follows noise of stream SAMPLE + j, and no
    noise is drawn after the last.

    Args:
        net: ``net(x, t, cond) -> F``.
        path: the path, or path and prediction type.
        z: standard normals ``[B, ...]``.
        key: for the noise between evaluations.
        times: descending, in (t_min, t_max], the first usually t_max.
        cond, guidance, null_condition: see `predict`.
        first_sample: global index of row 0.

    Returns:
        Samples ``[B, ...]``.

    Source: seed eq. 11; Song et al. 2023, algorithm 1 (noise sqrt(t^2 - t_min^2) where
    sigma(t_min) > 0).
    """
    p = as_parameterization(path)
    check_descending(p.path, times)

    def at(t: float) -> Tensor:
        return torch.full(z.shape[:1], t, dtype=torch.float64, device=z.device)

    floor = p.path.at(at(p.path.t_min)).sigma
    x = _prior(p, z, at(times[0]))
    for j, t in enumerate(times):
        F = predict(net, p, x, at(t), cond, guidance=guidance, null_condition=null_condition)
        a, b, _, _ = p.coefficients(at(t))
        if j + 1 == len(times):
            return ops.boundary(x, F, a, b)
        alpha, sigma, _, _ = p.path.at(at(times[j + 1]))
        sigma = (sigma.square() - floor.square()).clamp_min(0.0).sqrt()
        x = ops.sampler_update(
            x, F, a, b, alpha, sigma, key, stream=rng.SAMPLE + j + 1, first_sample=first_sample
        )
    raise AssertionError("times is not empty")


def one_step(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """x0 = f(sigma(t_max) z, t_max): one network evaluation. See `multistep`."""
    p = as_parameterization(path)
    key = NoiseKey(0, device=z.device)
    return multistep(
        net,
        p,
        z,
        key,
        times=[p.path.t_max],
        cond=cond,
        guidance=guidance,
        null_condition=null_condition,
    )


def ode(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    times: Sequence[float],
    solver: Literal["euler", "heun"] = "euler",
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from times[0] down to t_min.

    Args:
        net, path, z, cond, guidance, null_condition: see `multistep`.
        times: descending, in (t_min, t_max]; t_min is appended as the end.
        solver: "euler": ``len(times)`` evaluations; "heun": twice that less one.

    Returns:
        Samples ``[B, ...]``.
    """
    p = as_parameterization(path)
    check_descending(p.path, times)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)
        F = predict(net, p, x, at, cond, guidance=guidance, null_condition=null_condition)
        _, _, c, d = p.coefficients(at)
        return ops.boundary(x, F, c, d)

    first = torch.full(z.shape[:1], times[0], dtype=torch.float64, device=z.device)
    return SOLVERS[solver](velocity, _prior(p, z, first), [*times, p.path.t_min])


def as_parameterization(path: Path | Parameterization) -> Parameterization:
    """The path with its own prediction type, or what was given."""
    return path if isinstance(path, Parameterization) else Parameterization(path)


def check_descending(path: Path, times: Sequence[float]) -> None:
    """Raise ValueError unless `times` descend within (t_min, t_max] and number at least one."""
    if not times:
        raise ValueError("times must name at least one evaluation, got none")
    if len(times) > rng.NUM_STREAMS - rng.SAMPLE:
        raise ValueError(
            f"times may name at most {rng.NUM_STREAMS - rng.SAMPLE} evaluations, got {len(times)}"
        )
    path.check_times(times)
    if any(t <= s for t, s in zip(times, [*times[1:], path.t_min])):
        raise ValueError(f"times must descend and end above {path.t_min}, got {list(times)}")


class Sampler:
    """Draws samples from a trained network.

    Args:
        net: ``net(x, t, cond) -> F``; evaluated in eval mode, without gradient.
        path: the path, or path and prediction type.
        steps: number of network evaluations of the multi-step sampler, or of Euler steps.
        times: the descending evaluation times, instead of steps.
        method: "multistep" (one step with steps=1) or "ode".
        solver: of the ODE: "euler" or "heun".
        grid: where the times of `steps` lie.
        shape: of one sample; needed to call the sampler with a number.
        null_condition: what stands for "no condition" under guidance.
        batch_size: samples that are computed at once.
        device: default that of the network's parameters.

    Raises:
        ValueError: steps < 1, times not descending or outside the path, unknown method or solver.
    """

    def __init__(
        self,
        net: nn.Module,
        path: Path | Parameterization,
        *,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        method: Literal["multistep", "ode"] = "multistep",
        solver: Literal["euler", "heun"] = "euler",
        grid: Grid = UniformGrid(),
        shape: Sequence[int] | None = None,
        null_condition: Tensor | int | None = None,
        batch_size: int = 512,
        device: torch.device | str | None = None,
    ) -> None:
        if steps is not None and times is not None:
            raise ValueError("give steps or times, not both")
        if method not in ("multistep", "ode"):
            raise ValueError(f"method must be 'multistep' or 'ode', got {method!r}")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.parameterization = as_parameterization(path)
        self.times = (
            sampling_times(grid, 1 if steps is None else steps, self.parameterization.path)
            if times is None
            else [float(t) for t in times]
        )
        check_descending(self.parameterization.path, self.times)
        if device is None:
            device = next((q.device for q in net.parameters()), torch.device("cpu"))
        self.device = torch.device(device)
        self.net = net.to(self.device)
        self.method = method
        self.solver = solver
        self.shape = None if shape is None else tuple(shape)
        self.null_condition = null_condition
        self.batch_size = batch_size

    @classmethod
    def from_run(
        cls,
        directory: str | FilePath,
        *,
        ema: int = 0,
        net: nn.Module | None = None,
        device: torch.device | str = "cpu",
        **options: object,
    ) -> Sampler:
        """The sampler of a run directory's last good checkpoint.

        Args:
            directory: written by `Trainer` or ``fastcm train``.
            ema: which average of the weights; -1 takes the raw weights.
            net: a network of the run's architecture, if it is not one of `fastcm.networks`.
            device: where to sample.
            **options: steps, times, method, ... of the constructor.

        Raises:
            FileNotFoundError, ValueError: no run there; no network description and no net given.
        """
        group = "model" if ema == -1 else f"average_{ema}"
        found, damaged = checkpoint.load_newest(FilePath(directory), only={group})
        for error in damaged:
            warnings.warn(f"{error}; falling back to {found.path}", stacklevel=2)
        state = found.state
        if group not in found.groups:
            raise ValueError(
                f"ema must be in [-1, {state['num_averages']}) for {directory}, got {ema}"
            )
        if net is None:
            if state["network"] is None:
                raise ValueError(
                    f"{directory} does not describe its network: give from_run(..., net=...) one "
                    "of the same architecture"
                )
            net = networks.build(state["network"])
        checkpoint.check_tensors(f"{found.path.name}", found.groups[group], net.state_dict())
        net.load_state_dict(found.groups[group])
        options = {"shape": state["shape"], "null_condition": state["null_condition"], **options}
        p = parameterization_from(state["parameterization"])
        return cls(net, p, device=device, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(
        self,
        n: int | Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        cond: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            n: how many, or the whole shape ``[n, ...]``.
            seed: 0 <= seed < 2**63.
            first_sample: index of the first; samples do not depend on how they are batched.
            cond: n rows of conditioning, or None.
            guidance: weight of classifier-free guidance.

        Returns:
            ``[n, ...]`` float32, in the scale of the data (images: -1..1, not clamped).

        Raises:
            ValueError: n < 0, unknown sample shape, cond of another length.
        """
        shape = self._full_shape(n)
        if cond is not None and len(cond) != shape[0]:
            raise ValueError(f"cond must have one row per sample, {shape[0]}, got {len(cond)}")
        key = NoiseKey(seed, device=self.device)
        with eval_mode(self.net):
            parts = [
                self._batch(
                    (min(self.batch_size, shape[0] - i), *shape[1:]),
                    key,
                    first_sample + i,
                    None if cond is None else cond[i : i + self.batch_size].to(self.device),
                    guidance,
                )
                for i in range(0, shape[0], self.batch_size)
            ]
        return torch.cat(parts) if parts else torch.empty(shape, device=self.device)

    def _full_shape(self, n: int | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(n, int):
            shape = tuple(n)
            if len(shape) < 2 or min(shape) < 0:
                raise ValueError(f"shape must be [n, ...] of rank >= 2, got {shape}")
            return shape
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        if self.shape is None:
            raise ValueError("give Sampler(shape=...) or call it with the whole shape (n, ...)")
        return (n, *self.shape)

    def _batch(
        self,
        shape: tuple[int, ...],
        key: NoiseKey,
        first_sample: int,
        cond: Tensor | None,
        guidance: float | None,
    ) -> Tensor:
        z = ops.noise(shape, key, stream=rng.SAMPLE, first_sample=first_sample)
        p, null = self.parameterization, self.null_condition
        if self.method == "ode":
            return ode(
                self.net,
                p,
                z,
                times=self.times,
                solver=self.solver,
                cond=cond,
                guidance=guidance,
                null_condition=null,
            )
        return multistep(
            self.net,
            p,
            z,
            key,
            times=self.times,
            cond=cond,
            guidance=guidance,
            null_condition=null,
            first_sample=first_sample,
        )


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards every submodule is in the mode it was in."""
    before = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
