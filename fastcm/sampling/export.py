"""Samplers as programs of plain torch, to be saved and run where fastcm is not installed.

`torch.export` traces network and sampler; the operators of `fastcm.ops.registered` are then
replaced by their reference, and what remains is aten. The device is that of the network. On a GPU
the program is the same plain torch, without the Triton kernels; none has been run there yet.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastcm import rng
from fastcm.networks.conditions import each
from fastcm.networks.modes import eval_mode
from fastcm.ops import reference
from fastcm.ops.decompositions import REFERENCES
from fastcm.rng import NoiseKey
from fastcm.sampling.guidance import Evaluator, Guidance, Weight, guidance_weights
from fastcm.sampling.sampler import Sampler


def export_sampler(
    sampler: Sampler,
    n: int,
    *,
    cond: Any = None,
    guidance: Guidance | None = None,
) -> ExportedProgram:
    """A sampler as a program of aten operators: for `torch.export.save` or AOTInductor.

    ``program.module()(key)``, or ``(key, cond)``, is ``sampler(n, seed=..., first_sample=...,
    cond=cond, guidance=guidance)`` for key = (seed, 0, first_sample), in the sampler's precision,
    as one batch and without gradient. Saved and loaded, it needs torch alone.

    Args:
        sampler: with a `shape`. Its network is traced in eval mode and left in the mode it was in;
            the program holds the network's parameters, not copies.
        n: number of samples, >= 1, fixed in the program.
        cond: n rows of conditioning as an example: an input of the program of this shape and
            dtype. None: the program takes the key alone.
        guidance: see `Sampler`; the weights are fixed in the program.

    Returns:
        The program: key int64 ``[3]`` (seed, step, first sample: the tensor of a `NoiseKey`) on the
        sampler's device, and cond, to x float32 ``[n, ...]``. Nothing checks the numbers in key.

    Raises:
        ValueError, TypeError: n < 1, a sampler without a shape, cond or guidance that does not fit;
            what torch.export raises for a network that it cannot trace.
    """
    if not isinstance(n, SupportsIndex) or operator.index(n) < 1:
        raise ValueError(f"n must be an int >= 1, got {n!r}")
    if sampler.shape is None:
        raise ValueError("the sampler must know the shape of a sample: give Sampler(shape=...)")
    shape = (operator.index(n), *sampler.shape)
    like = torch.empty(shape[:1], device=sampler.device).reshape(-1, *[1] * len(shape[1:]))
    weights = None if guidance is None else guidance_weights(guidance, sampler.times, like)
    # refuses what does not fit, before anything is traced
    Evaluator(
        sampler.net,
        like,
        cond=cond,
        weights=weights,
        null_condition=sampler.null_condition,
        guide=None if weights is None else sampler.guide,
    )
    key = NoiseKey(0, device=sampler.device).tensor
    inputs = (key,) if cond is None else (key, each(lambda x: x.to(sampler.device), cond))
    program = _Program(sampler, shape, weights)
    with torch.no_grad(), eval_mode(program):
        traced = torch.export.export(program, inputs)
        exported: ExportedProgram = traced.run_decompositions(REFERENCES)
    for name, value in exported.state_dict.items():
        if isinstance(value, nn.Parameter):
            exported.state_dict[name] = nn.Parameter(value.detach(), requires_grad=False)
    return exported


class _Program(nn.Module):
    """The sampler as a function of tensors."""

    def __init__(
        self, sampler: Sampler, shape: tuple[int, ...], weights: Sequence[Weight] | None
    ) -> None:
        super().__init__()
        self.net, self.guide = sampler.net, sampler.guide
        self.engine = sampler.engine
        self.shape = shape
        self.weights = weights

    def forward(self, key: Tensor, cond: Any = None) -> Tensor:
        noise_key = NoiseKey.wrap(key)
        z = reference.noise(self.shape, noise_key, stream=rng.SAMPLE)
        engine = self.engine
        return engine.solve(engine.eager, engine.eager_guide, z, noise_key, cond, self.weights)
