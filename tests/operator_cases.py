"""Every registered operator with arguments that reach each of its forms.

The operators launch kernels. Here they get plain torch as their implementation on a CPU, so that
what autograd, fake tensors and the schema make of them can be tested without a GPU; with that one
disabled, the kernels run on the CPU through the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

import fastcm
from fastcm import rng
from fastcm.ops import registered
from fastcm.ops.decompositions import REFERENCES

KEY = fastcm.NoiseKey(3, 5)
F = torch.ops.fastcm
OPERATORS = [v for v in vars(registered).values() if isinstance(v, CustomOpDef)]
for _operator in OPERATORS:
    _operator.register_kernel("cpu")(REFERENCES[_operator._opoverload])
    if not torch.cuda.is_available():  # interpreted kernels know no fake tensors
        _operator.register_fake(REFERENCES[_operator._opoverload])


Sample = tuple[Any, ...]


def operands(
    B: int = 3, shape: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float32
) -> Any:
    x, v, u = (torch.randn(B, *shape, dtype=dtype) for _ in range(3))
    a, b, c, d = (torch.rand(B, dtype=torch.float64) + 0.1 for _ in range(4))
    return x, v, u, a, b, c, d


def cases(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, Sample]]:
    """Every operator with arguments that reach each of its forms."""
    x, v, u, a, b, c, d = operands(dtype=dtype)
    uint8 = torch.randint(256, x.shape, dtype=torch.uint8)
    plain = (x, None, None, None, 0, 0)
    noised = (uint8, c, d, KEY.tensor, rng.NOISE, 2)
    v.requires_grad_(True)
    none = (None, None, None)
    return {
        "noise": (F.noise, ((3, 2, 6), KEY.tensor, 4, 1, dtype)),
        "uniform": (F.uniform, (5, KEY.tensor, 1, 2)),
        "integers": (F.integers, (5, KEY.tensor, 1, 2)),
        "noising": (F.noising, (x, a, b, KEY.tensor, 0, 1, dtype)),
        "noising, uint8": (F.noising, (uint8, a, b, KEY.tensor, 0, 1, torch.bfloat16)),
        "noising_pair": (F.noising_pair, (x, a, c, b, d, KEY.tensor, 0, 0, dtype)),
        "boundary": (F.boundary, (*plain, v, a, b)),
        "boundary, noised": (F.boundary, (*noised, v, a, b)),
        "scale": (F.scale, (x, a, dtype)),
        "euler": (F.euler_step, (*plain, v, a, None, None, None, None, None)),
        "euler, guided": (F.euler_step, (*plain, v, a, u, b, c, d, torch.bfloat16)),
        "euler, noised": (F.euler_step, (*noised, v, a, None, None, c, None, dtype)),
        "sampler_update": (F.sampler_update, (x, v, a, b, c, d, KEY.tensor, rng.SAMPLE, 0)),
        "sampler_update, guided": (
            F.sampler_update,
            (x, v, a, b, c, d, KEY.tensor, rng.SAMPLE, 0, u, a),
        ),
        "sampler_update, with the network's input": (
            F.sampler_update,
            (x, v, a, b, c, d, KEY.tensor, rng.SAMPLE, 0, u, a, c, torch.bfloat16),
        ),
        **{
            f"loss, metric {m}": (
                F.consistency_loss,
                (v, *noised, a, b, None, d, c, KEY.tensor, rng.NOISE, 2, u, b, a, c, m, 0.1),
            )
            for m in range(4)
        },
        "loss, plain": (F.consistency_loss, (v, *plain, a, b, *plain, *none, None, 3, 0.1)),
    }


NAMES = list(cases())


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
