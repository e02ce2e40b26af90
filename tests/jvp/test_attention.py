"""Attention with its tangent: the kernel through the interpreter, the operator and its gradient."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_mode import exact_tangent, relative
from tolerances import assert_close
from torch import Tensor

from fastcm import jvp
from fastcm.jvp.registered import attention_dual_op

pytest.importorskip("triton")
from fastcm.kernels import attention_jvp
from fastcm.kernels.attention_jvp import AttentionConfig, configure, launch_attention_jvp, pieces

module = importlib.import_module("fastcm.jvp.attention")  # the package names the function so
SMALL = AttentionConfig(16, 16, 4, 1)
TANGENTS = [t for t in itertools.product((True, False), repeat=3) if any(t)]


def operands(
    N: int, M: int, D: int, dtype: torch.dtype, device: torch.device, shift: float = 0.0
) -> list[Tensor]:
    """q, k, v and their tangents, with heads inside of tokens as networks have them."""
    sizes = (N, M, M) * 2
    made = [torch.randn(2, n, 3, D, device=device) for n in sizes]
    made[2] += shift
    return [x.to(dtype).transpose(1, 2) for x in made]


def reference(
    q: Tensor, k: Tensor, v: Tensor, tq: Any, tk: Any, tv: Any, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the operands: o, its tangent, and log sum exp."""
    zero = torch.zeros_like
    tq, tk, tv = (zero(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    S, tS = scale * q @ k.mT, scale * (tq @ k.mT + q @ tk.mT)
    if causal:
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), -torch.inf)
    P = S.softmax(-1)
    H = P * tS
    o = P @ v
    return o, H @ v + P @ tv - H.sum(-1, keepdim=True) * o, S.logsumexp(-1)


def sensitivity(
    wide: list[Any], exact: tuple[Tensor, ...], eps: float, causal: bool, scale: float
) -> list[Tensor]:
    """How far the exact results move, as a maximum each, when q and its tangent move by eps.

    Sums of products in float32 move the scores so. Where scores are large and two keys near a
    tie, results move by far more than eps, and plain torch's error, one draw, does not bound it.
    """
    moves = [x.new_zeros(()) for x in exact]
    for _ in range(8):
        moved = list(wide)
        for i in (0, 3):
            if wide[i] is not None:
                moved[i] = wide[i] * (1 + eps * torch.randn_like(wide[i]).sign())
        there = reference(*moved, causal, scale)
        moves = [
            torch.maximum(m, (a - b).abs().amax())
            for m, a, b in zip(moves, there, exact, strict=True)
        ]
    return moves


def check(
    inputs: list[Any], causal: bool = False, config: AttentionConfig | None = SMALL, pad: int = 0
) -> None:
    q = inputs[0]
    scale = 0.7 * q.shape[-1] ** -0.5
    o, to = (torch.full_like(q, torch.nan) for _ in range(2))
    Z, H, N, _ = q.shape
    lse = torch.full((Z, H, N + pad), torch.nan, dtype=torch.float32, device=q.device)
    launch_attention_jvp(*inputs, o, to, lse, causal=causal, scale=scale, config=config)
    wide = [None if x is None else x.double() for x in inputs]
    exact = reference(*wide, causal, scale)
    same = reference(*inputs, causal, scale)
    slack = sensitivity(wide, exact, 4 * torch.finfo(torch.float32).eps, causal, scale)
    for mine, want, theirs, s in zip((o, to, lse[..., :N]), exact, same, slack, strict=True):
        assert_close(mine, want, theirs.to(mine.dtype), s)
    assert (lse[..., N:] == torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", TANGENTS)
def test_each_set_of_tangents(given: tuple[bool, ...], causal: bool, device: torch.device) -> None:
    inputs = operands(33, 50, 16, torch.float32, device)
    check(inputs[:3] + [x if g else None for x, g in zip(inputs[3:], given)], causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [8, 16, 40, 64, 72, 80, 96, 128])
def test_each_head_size(D: int, dtype: torch.dtype, device: torch.device) -> None:
    check(operands(20, 37, D, dtype, device))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 33), (33, 1), (16, 16), (32, 48), (47, 31)])
@pytest.mark.parametrize("causal", [False, True])
def test_each_length(N: int, M: int, causal: bool, device: torch.device) -> None:
    check(operands(N, M, 16, torch.float32, device), causal)


def test_the_tile_that_a_device_is_given(device: torch.device) -> None:
    check(operands(130, 70, 32, torch.float16, device), config=None)


def test_strides_that_are_no_vectors_and_tangents_that_are_expanded(device: torch.device) -> None:
    inputs = [torch.randn(2, 3, 20, 17, device=device)[..., 1:] for _ in range(5)]
    check([*inputs, torch.randn(16, device=device).expand(2, 3, 20, 16)], pad=12)


def test_scores_of_any_size_and_rows_that_see_one_key(device: torch.device) -> None:
    inputs = operands(17, 17, 16, torch.float32, device)
    inputs[0] = 300.0 * inputs[0]
    check(inputs, causal=True)


@pytest.mark.parametrize(("shift", "bias"), [(4.0, 0.0), (0.0, 8.0), (4.0, 8.0)])
def test_what_is_constant_cancels(shift: float, bias: float, device: torch.device) -> None:
    """A mean of v, and a tangent that all keys have in common, leave the rounding of the output."""
    inputs = operands(64, 128, 32, torch.float16, device, shift)
    inputs[4] = (inputs[4] + bias).contiguous()
    q = inputs[0]
    o, to = torch.empty_like(q), torch.empty_like(q)
    lse = torch.empty(2, 3, 64, device=device)
    launch_attention_jvp(*inputs, o, to, lse, causal=False, scale=32**-0.5, config=SMALL)
    _, want, _ = reference(*(x.double() for x in inputs), False, 32**-0.5)
    assert relative(to, want) < 4 * 2**-11


def test_nothing_is_asked_of_an_empty_batch(device: torch.device) -> None:
    inputs = [torch.empty(0, 3, 4, 16, device=device)] * 6
    launch_attention_jvp(
        *inputs, *inputs[:2], torch.empty(0, 3, 4, device=device), causal=False, scale=1.0
    )


def test_heads_are_covered_by_two_powers_of_two() -> None:
    assert {D: pieces(D) for D in (8, 16, 40, 48, 64, 72, 80, 96, 112, 128)} == {
        8: (16, 0), 16: (16, 0), 40: (32, 16), 48: (32, 16), 64: (64, 0), 72: (64, 16),
        80: (64, 16), 96: (64, 32), 112: (128, 0), 128: (128, 0),
    }  # fmt: skip


@pytest.mark.parametrize(("major", "shared"), [(8, 99), (8, 163), (9, 227), (10, 227), (12, 99)])
@pytest.mark.parametrize("D", [16, 64, 72, 80, 96, 128])
def test_a_tile_fits_into_shared_memory(D: int, major: int, shared: int) -> None:
    config = configure(D, major, shared * 1024, 32)
    # what every iteration reads; q and its tangent may stay in registers
    operands = 4 * config.num_stages * config.BLOCK_N * sum(pieces(D)) * 2
    assert operands <= shared * 1024


# The operator, with the kernel interpreted on the CPU


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from fastcm.jvp import registered

    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter, which the presence of a GPU turns off")
    monkeypatch.setattr(registered, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(attention_jvp, "configure", lambda *sizes: SMALL)
    monkeypatch.setattr(module, "_has_kernel", lambda *operands: True)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_come_from_torch_s_backward_pass(kernel: None, causal: bool) -> None:
    inputs = operands(20, 20, 16, torch.float32, torch.device("cpu"))
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    o, to = jvp.attention_dual(*leaves, *inputs[3:], is_causal=causal, scale=0.3)
    plain = F.scaled_dot_product_attention(*inputs[:3], is_causal=causal, scale=0.3)
    assert not to.requires_grad and relative(o, plain) < 1e-6
    exact = exact_tangent(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3),
        tuple(inputs[:3]),
        tuple(inputs[3:]),
    )
    assert relative(to, exact) < 1e-5
    others = [x.clone().requires_grad_() for x in inputs[:3]]
    g = torch.randn_like(plain)
    F.scaled_dot_product_attention(*others, is_causal=causal, scale=0.3).backward(g)
    o.backward(g)
    for mine, theirs in zip(leaves, others, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_dimensions(kernel: None, leading: tuple[int, ...]) -> None:
    q, k, v, tq = (torch.randn(*leading, 7, 16) for _ in range(4))
    o, to = jvp.attention_dual(q, k, v, tq)
    assert o.shape == to.shape == q.shape
    assert relative(o, F.scaled_dot_product_attention(q, k, v)) < 1e-6


def test_networks_go_through_the_kernel(kernel: None) -> None:
    from test_mode import Case

    case = Case("dit")
    case.t.mul_(0.1)
    out, tangent = jvp.jvp(case, case.primals, case.tangents)
    assert relative(out, case(*case.primals)) < 1e-5
    assert relative(tangent, exact_tangent(case, case.primals, case.tangents)) < 1e-5
    out.square().mean().backward()


def test_attention_under_autocast_sees_half_precision(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def spy(*operands: Any, **options: Any) -> Any:
        seen.extend(x.dtype for x in operands)
        return original(*operands, **options)

    original = module.attention_dual
    monkeypatch.setattr(module, "attention_dual", spy)
    inputs = operands(5, 5, 16, torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.float16):
        jvp.jvp(F.scaled_dot_product_attention, tuple(inputs[:3]), tuple(inputs[3:]))
    assert seen == [torch.float16] * 6


def test_opcheck(kernel: None) -> None:
    inputs = operands(5, 7, 16, torch.float32, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in inputs[:3]]
    checks = ("test_schema", "test_autograd_registration")
    for tangents in (inputs[3:], [inputs[3], None, None]):
        torch.library.opcheck(
            attention_dual_op, (*leaves, *tangents, False, 0.3), test_utils=checks
        )
