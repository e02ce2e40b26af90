"""Attention's tangent on a CPU, in blocks, against float64; value and gradient are torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcm import jvp
from fastcm.jvp import blocked

TANGENTS = [t for t in itertools.product((True, False), repeat=3) if any(t)]
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}


def operands(Z: int, H: int, N: int, M: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and their tangents, with heads inside of tokens as networks have them."""
    made = [torch.randn(Z, n, H, D, dtype=torch.float64) for n in (N, M, M) * 2]
    return [x.to(dtype).transpose(1, 2) for x in made]


def exact(inputs: list[Tensor | None], causal: bool, scale: float) -> Tensor:
    q, k, v, *tangents = (None if x is None else x.double() for x in inputs)
    assert q is not None and k is not None and v is not None
    tq, tk, tv = (
        torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), tangents, strict=True)
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale * q @ k.mT
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    out: Tensor = torch.func.jvp(attention, (q, k, v), (tq, tk, tv))[1]
    return out


@pytest.mark.parametrize("scores", [64, 2**9, 2**18], ids=["rows", "heads", "merged"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", TANGENTS)
def test_each_set_of_tangents_in_blocks_of_each_kind(
    given: tuple[bool, ...], causal: bool, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_SCORES", scores)
    inputs: list[Tensor | None] = [*operands(2, 3, 17, 11, 8, torch.float32)]
    inputs[3:] = [x if g else None for x, g in zip(inputs[3:], given, strict=True)]
    q, k, v = inputs[:3]
    assert q is not None and k is not None and v is not None
    o, to = jvp.attention_dual(q, k, v, *inputs[3:], is_causal=causal, scale=0.4)
    assert torch.equal(o, F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.4))
    want = exact(inputs, causal, 0.4)
    assert to.stride() == o.stride()
    assert (to - want).norm() <= LIMITS[to.dtype] * want.norm()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(2, 2, 300, 300, 16), (5, 4, 16, 16, 8), (1, 1, 1, 1, 4)])
def test_each_dtype(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = operands(*shape, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        to = jvp.attention_dual(*inputs)[1]
    want = exact([*inputs], False, shape[-1] ** -0.5)
    assert to.dtype == dtype
    assert (to - want).norm() <= LIMITS[dtype] * max(want.norm(), shape[-1] ** 0.5)


def test_large_scores_overflow_nowhere() -> None:
    inputs = operands(1, 2, 9, 9, 8, torch.float32)
    inputs[0] = 1e4 * inputs[0]
    o, to = jvp.attention_dual(*inputs)
    assert o.isfinite().all() and to.isfinite().all()


def test_the_gradient_is_that_of_plain_attention() -> None:
    inputs = operands(2, 3, 33, 33, 8, torch.float32)
    mine, theirs = ([x.clone().requires_grad_() for x in inputs[:3]] for _ in range(2))
    o, to = jvp.attention_dual(*mine, *inputs[3:])
    assert not to.requires_grad
    g = torch.randn_like(o)
    o.backward(g)
    F.scaled_dot_product_attention(*theirs).backward(g)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))  # type: ignore[arg-type]


def test_heads_that_are_shared_go_the_plain_way() -> None:
    q, k, v, tq, *_ = operands(2, 3, 5, 5, 8, torch.float64)
    k, v = k[:, :1], v[:, :1]
    to = jvp.attention_dual(q, k, v, tq)[1]
    inputs = [q, k.expand_as(q).clone(), v.expand_as(q).clone(), tq, None, None]
    torch.testing.assert_close(to, exact(inputs, False, 8**-0.5))


def test_compiled_code_calls_it_as_one_operator() -> None:
    inputs = operands(2, 2, 20, 20, 8, torch.float32)
    plain = jvp.attention_dual(*inputs)
    found = torch.compile(jvp.attention_dual, fullgraph=True)(*inputs)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    inputs = operands(2, 3, 5, 7, 8, torch.float32)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs[:3], scale=0.3)
    op = torch.ops.fastcm.cpu_attention_tangent.default
    checks = ("test_schema", "test_faketensor")
    for tangents in (inputs[3:], [inputs[3], None, None]):
        arguments = (*inputs[:3], *tangents, o, lse, False, 0.3)
        torch.library.opcheck(op, arguments, test_utils=checks)
