"""The sum of the gaps between neighbouring times bounds the error of one step, in every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcm import Sampler, ops
from fastcm.cli import runs
from fastcm.cli.recipes import Recipe
from fastcm.cli.sample_folder import sample_folder
from fastcm.cli.tables import METHODS
from fastcm.data import to_unit
from fastcm.evaluation import consistency_gap
from fastcm.rng import NoiseKey
from fastcm.schedules import KarrasGrid, UniformGrid

STEPS = 40
FAST: dict[str, Any] = {"steps": STEPS, "batch": 64, "width": 32, "compile": "off"}
FAST |= {"ema": (0.5,), "lr": 5e-3, "warmup": 5}


def trained(out: Path, **options: Any) -> Recipe:
    recipe = Recipe(**{**FAST, **options})
    recipe.trainer(out, progress=False, log=lambda line: None).fit(STEPS)
    return recipe


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the methods that start from a flow need."""
    here = tmp_path_factory.mktemp("flows")
    flow, teacher = here / "flow", here / "teacher"
    trained(flow, method="flow")
    trained(teacher, method="flow", conditional=True, condition_dropout=0.2)
    sampler = Sampler.from_run(flow, steps=4, method="ode")
    sample_folder(sampler, here / "pairs", 128, format="pairs")
    return {
        "cd": {"teacher": str(flow)},
        "lcm": {"teacher": str(teacher), "conditional": True},
        "scd": {"teacher": str(flow), "path": "linear"},
        "ect": {"init": str(flow)},
        "pairs": {"init": str(flow), "data": str(here / "pairs")},
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_gaps_of_a_trained_run_bound_its_error_in_one_step(
    method: str, starts: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """E |f(x_T, T) - x0| <= sum_k E |f(x_k, t_k) - f(x_{k-1}, t_{k-1})|, article eq. 10."""
    recipe = trained(tmp_path, method=method, **starts.get(method, {}))
    sampler, (_, held_out) = Sampler.from_run(tmp_path), recipe.datasets()
    p, x0 = sampler.parameterization, to_unit(held_out.samples[:64])
    labels = None if held_out.labels is None else held_out.labels[:64]
    cond = runs.condition(sampler, labels, None, len(x0))["cond"]
    error = one_step_error(sampler, x0, cond)
    whole, *bounds = (
        consistency_gap(sampler.net, p, x0, n=n, grid=grid, seed=3, cond=cond).sum
        for n, grid in ((1, UniformGrid()), (8, UniformGrid()), (8, KarrasGrid()))
    )
    assert error == pytest.approx(whole, rel=1e-5)
    assert 0.1 < error < min(bounds)


def one_step_error(sampler: Sampler, x0: Tensor, cond: Tensor | None) -> float:
    """E |f(x_T, T) - x_start|, from the network's output at t_max."""
    p = sampler.parameterization
    start, at = (torch.full((len(x0),), t).double() for t in (p.path.t_min, p.path.t_max))
    x_start, x = (
        ops.noising(x0, *p.path.at(t)[:2], NoiseKey(3), out_dtype=torch.float32)
        for t in (start, at)
    )
    assert isinstance(x, Tensor) and isinstance(x_start, Tensor)
    c_in, coefficients = p.c_in(at), p.coefficients(at)
    inputs = x if c_in is None else (c_in.view(-1, *[1] * (x.dim() - 1)) * x).float()
    with torch.no_grad():
        F = sampler.net(inputs, p.c_noise(at), cond)
    f = ops.boundary(x, F, coefficients.a, coefficients.b)
    return (f - x_start).flatten(1).norm(dim=1).mean().item()
