"""The optimizer's half of a step: clip, update, averages, low-precision copies.

Columns: `eager` as the field's code bases write it (clip, foreach AdamW, a Python loop over each
average); `stock`, the best of torch (clip, fused AdamW, one foreach call for each average);
`fastcm`. Gradients stay the same tensors, as under a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from benchmarks.harness import Case, Report, measure
from fastcm import EMA

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DECAYS = (0.999, 0.9999)
LIMIT = 1.0
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.01}
CHECKED_STEPS = 3

Shapes = list[tuple[int, ...]]


def shapes_of(make: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return [tuple(p.shape) for p in make().parameters()]


def unet() -> Shapes:
    return shapes_of(lambda: fastcm.networks.UNet(3, 144, (1, 2, 2), num_res_blocks=4))


def dit_xl() -> Shapes:
    make = fastcm.networks.DiT
    return shapes_of(lambda: make(4, 32, width=1152, depth=28, num_heads=16))


NETWORKS: dict[str, Callable[[], Shapes]] = {
    "10 M in 200 tensors": lambda: [(256, 206)] * 200,
    "UNet, 61 M": unet,
    "4,000 tensors of 256": lambda: [(16, 16)] * 4000,
}
if DEVICE.type == "cuda":
    NETWORKS["DiT-XL/2, 675 M"] = dit_xl

Column = Callable[[], None]
State = tuple[list[nn.Parameter], list[list[Tensor]]]


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[nn.Parameter]:
    """The same numbers in every column."""
    g = torch.Generator(DEVICE).manual_seed(0)
    made = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=g, device=DEVICE).to(dtype))
        p.grad = torch.randn(shape, generator=g, device=DEVICE).to(dtype)
        made.append(p)
    return made


def by_torch(
    shapes: Shapes, averages: int, shadow: bool, *, stock: bool, dtype: torch.dtype = torch.float32
) -> tuple[Column, State]:
    """torch's own AdamW, with clipping and averages around it."""
    p = parameters(shapes, dtype)
    e = [[x.detach().clone() for x in p] for _ in range(averages)]
    copies = [x.detach().bfloat16() for x in p] if shadow else []
    capturable = DEVICE.type == "cuda"
    which: dict[str, Any] = {"fused": True} if stock else {"foreach": True}
    optimizer = torch.optim.AdamW(p, capturable=capturable, **which, **OPTIONS)

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(p, LIMIT, foreach=True)
        optimizer.step()
        weights = [x.detach() for x in p]
        for average, decay in zip(e, DECAYS):
            if stock:
                torch._foreach_lerp_(average, weights, 1 - decay)
            else:
                for mine, theirs in zip(average, weights):
                    mine.mul_(decay).add_(theirs, alpha=1 - decay)
        if shadow:
            if stock:
                torch._foreach_copy_(copies, weights)
            else:
                for low, theirs in zip(copies, weights):
                    low.copy_(theirs)

    return step, (p, e)


def by_fastcm(shapes: Shapes, averages: int, shadow: bool) -> tuple[Column, State]:
    p = parameters(shapes, torch.float32)
    optimizer = fastcm.AdamW(
        p,
        max_grad_norm=LIMIT,
        ema=[EMA(decay) for decay in DECAYS[:averages]],
        shadow_dtype=torch.bfloat16 if shadow else None,
        **OPTIONS,
    )
    optimizer.step()  # makes the state, which the check below resets
    with torch.no_grad():
        for x, initial in zip(p, parameters(shapes, torch.float32)):
            x.copy_(initial)
    fresh = copy.deepcopy(optimizer.state_dict())
    fresh["state"] = {}
    optimizer.load_state_dict(fresh)
    e = [[optimizer.state[x][f"ema_{j}"] for x in p] for j in range(averages)]
    return optimizer.step, (p, e)


def outcome(made: tuple[Column, State]) -> tuple[Tensor, ...]:
    """Parameters and averages after a few steps, each as one vector."""
    step, (p, e) = made
    for _ in range(CHECKED_STEPS):
        step()
    lists: Sequence[Sequence[Tensor]] = [p, *e]
    return tuple(torch.cat([x.detach().flatten() for x in list_]) for list_ in lists)


def build(name: str, averages: int, shadow: bool) -> Case:
    shapes = NETWORKS[name]()
    n = sum(torch.Size(s).numel() for s in shapes)
    makers: dict[str, Callable[[], tuple[Column, State]]] = {
        "eager": lambda: by_torch(shapes, averages, shadow, stock=False),
        "stock": lambda: by_torch(shapes, averages, shadow, stock=True),
        "fastcm": lambda: by_fastcm(shapes, averages, shadow),
    }
    exact = outcome(by_torch(shapes, averages, False, stock=False, dtype=torch.float64))
    return Case(
        f"AdamW, {name}",
        (n,),
        torch.float32,
        {column: make()[0] for column, make in makers.items()},
        {column: (lambda make=make: outcome(make())) for column, make in makers.items()},
        exact,
        n * (32 + 8 * averages + 2 * shadow),
    )


@pytest.mark.parametrize(("averages", "shadow"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_optim(name: str, averages: int, shadow: bool, report: Report, benchmark: Any) -> None:
    case = build(name, averages, shadow)
    row = measure(case)
    row |= {"averages": averages, "shadow": shadow, "network": name}
    benchmark.pedantic(case.columns["fastcm"], rounds=3, warmup_rounds=1)
    report.add(row)
    ratios = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k.endswith("/fastcm"))
    what = f"{averages} averages{', bfloat16 copy' if shadow else ''}"
    print(f"\n{name}, {what}: {row['ms']['fastcm']:.3f} ms  {ratios}")


def drift(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], exact: list[Tensor]
) -> float:
    """Distance of float32 parameters from float64 after 1,000 steps, relative."""
    found = trained(make, torch.float32)
    distance = sum((p.double() - q).square().sum() for p, q in zip(found, exact))
    return (distance / sum(q.square().sum() for q in exact)).sqrt().item()


def trained(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype
) -> list[Tensor]:
    p = parameters([(64, 33), (33,)], dtype)
    optimizer = make(p)
    g = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(1000):
        for x in p:
            x.grad = torch.randn(x.shape, generator=g, device=DEVICE).to(dtype)
        optimizer.step()
    return [x.detach() for x in p]


def test_drift(report: Report) -> None:
    """The same gradients for all; no clipping, whose norm would differ."""
    options = {"lr": 1e-3, "weight_decay": 0.01}
    exact = trained(lambda p: torch.optim.AdamW(p, foreach=True, **options), torch.float64)
    row = {
        "torch": drift(lambda p: torch.optim.AdamW(p, foreach=True, **options), exact),
        "torch fused": drift(lambda p: torch.optim.AdamW(p, fused=True, **options), exact),
        "fastcm": drift(lambda p: fastcm.AdamW(p, **options), exact),
    }
    assert row["fastcm"] < 1e-6
    report.add({"drift": row})
    print(f"\nrelative distance from float64 after 1,000 steps: {row}")
