"""The sampler object: a network, its path and times, called with a number and a seed."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path as FilePath
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from fastcm import checkpoint, networks, ops, rng
from fastcm.description import parameterization_from
from fastcm.parameterization import Parameterization
from fastcm.paths import Path
from fastcm.rng import NoiseKey
from fastcm.sampling import (
    SOLVERS,
    Guidance,
    SolverName,
    as_parameterization,
    check_descending,
    multistep,
    ode,
)
from fastcm.schedules import Grid, UniformGrid, sampling_times


class Sampler:
    """Draws samples from a trained network.

    Args:
        net: ``net(x, t, cond) -> F``; evaluated in eval mode, without gradient.
        path: the path, or path and prediction type.
        steps: number of network evaluations of the multi-step sampler, or of Euler steps.
        times: the descending evaluation times, instead of steps.
        method: "multistep" (one step with steps=1) or "ode".
        solver: of the ODE: "euler", "heun", "ddim" or "dpmpp_2m"; see `fastcm.sampling.ode`.
        grid: where the times of `steps` lie.
        shape: of one sample; needed to call the sampler with a number.
        null_condition: what stands for "no condition" under guidance.
        batch_size: samples that are computed at once.
        device: default that of the network's parameters or buffers.

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
        solver: SolverName = "euler",
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
        check_descending(self.parameterization.path, self.times, fresh_noise=method == "multistep")
        if device is None:
            held = chain(net.parameters(), net.buffers())
            device = next((q.device for q in held), torch.device("cpu"))
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
        found, damaged = checkpoint.load_newest(
            FilePath(directory), only={group}, requires=checkpoint.RUN_STATE
        )
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
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            n: how many, or the whole shape ``[n, ...]``.
            seed: 0 <= seed < 2**63.
            first_sample: index of the first; samples do not depend on how they are batched.
            cond: n rows of conditioning, or None.
            guidance: weight of classifier-free guidance, one per time, or a function w(t).

        Returns:
            ``[n, ...]`` float32, in the scale of the data (images: -1..1, not clamped).

        Raises:
            ValueError: n < 0, unknown sample shape, cond of another length.
        """
        shape = self._full_shape(n)
        if cond is not None and not isinstance(cond, Tensor):
            raise TypeError(f"cond must be a tensor of n rows, got {type(cond).__name__}")
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
        if isinstance(n, SupportsIndex):
            n = operator.index(n)
        if not isinstance(n, int):
            if not isinstance(n, Sequence):
                raise TypeError(f"n must be an int or a shape (n, ...), got {n!r}")
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
        guidance: Guidance | None,
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
