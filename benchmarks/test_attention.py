"""Attention with its tangent: ``python -m pytest -s benchmarks/test_attention.py``.

Forward passes: `eager`, torch.func.jvp of attention written out, which is what torch offers;
`compiled`, the same; `fastcm`, `fastcm.jvp.attention_dual`; and `plain`, attention without a
tangent, for scale: a third of the products. Rows go to results/attention_{cpu,gpu}.json.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastcm
from benchmarks.harness import Case, Report, measure

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = (
    [(1, 24, 4096, 128), (1, 32, 8192, 64), (256, 16, 256, 72), (4, 16, 4096, 64)]
    if CUDA
    else [(1, 4, 2048, 64), (16, 6, 256, 64)]
)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.softmax(-1) @ v


def derived(operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, tangent = torch.func.jvp(written_out, tuple(operands[:3]), tuple(operands[3:]))[:2]
    return out, tangent


@functools.cache
def compiled() -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    return torch.compile(derived, fullgraph=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention(shape: tuple[int, ...], report: Report) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float32
    generator = torch.Generator(DEVICE).manual_seed(0)
    operands = [
        torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for _ in range(6)
    ]
    few = [x[:1, :2] for x in operands]  # float64 scores of all would not fit
    fn = compiled()
    with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        case = Case(
            "attention and tangent",
            shape,
            dtype,
            columns={
                "eager": lambda: derived(operands),
                "compiled": lambda: fn(operands),
                "fastcm": lambda: fastcm.jvp.attention_dual(*operands),
                "plain": lambda: F.scaled_dot_product_attention(*operands[:3]),
            },
            check={
                "eager": lambda: derived(few),
                "fastcm": lambda: fastcm.jvp.attention_dual(*few),
            },
            reference=derived([x.double() for x in few]),
            bytes=8 * operands[0].nbytes,
        )
        row = measure(case)
    flops = 12 * math.prod(shape) * shape[2]
    row["tflops"] = flops / (1e9 * row["ms"]["fastcm"])
    report.add(row)
    print(f"\n{row}")
