"""Softmax attention and its tangent, in memory that does not grow with the square of the length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastcm.jvp import blocked as blocked  # the operators exist
from fastcm.jvp import registered as registered
from fastcm.ops.dispatch import on_gpu

_SCORES = 2**22
"""Scores held at once; four such tensors live in a block of rows."""


def attention_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention o, with its gradient, and its tangent along (tq, tk, tv), without.

    With P = softmax(S), tS the tangent of S = scale q k^T and H = P tS:
    to = H v + P tv - rowsum(H) o. A tangent that is None costs nothing.

    Args:
        q: ``[..., N, D]``.
        k, v: ``[..., M, D]`` and ``[..., M, E]``, the leading dimensions those of q.
        tq, tk, tv: of the shapes and dtypes of q, k and v; at least one is given.
        is_causal: row i sees columns up to i.
        scale: of the scores; default 1 / sqrt(D).

    Returns:
        (o, to) ``[..., N, E]``; to is stopped.

    Raises:
        ValueError: no tangent, or one of another shape or dtype than what it belongs to.
    """
    named = (("q", q, tq), ("k", k, tk), ("v", v, tv))
    for name, x, tx in named:
        if tx is not None and (tx.shape != x.shape or tx.dtype != x.dtype):
            raise ValueError(
                f"t{name} must be {x.dtype} {list(x.shape)} as {name} is, got {tx.dtype} "
                f"{list(tx.shape)}"
            )
    if tq is None and tk is None and tv is None:
        raise ValueError("attention_dual needs one of tq, tk and tv at least")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    has_kernel = _has_kernel(q, k, v)
    if has_kernel or _is_blocked(q, k, v):
        given = [x if x is None else _four(x) for x in (q, k, v, tq, tk, tv)]
        if has_kernel:
            o, to, _ = torch.ops.fastcm.attention_dual(*given, is_causal, scale)
        else:
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *given[:3], 0.0, is_causal, scale=scale
            )
            with torch.no_grad():
                to = torch.ops.fastcm.cpu_attention_tangent(*given, o, lse, is_causal, scale)
        return o.reshape(q.shape), to.reshape(q.shape)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    rows = max(1, _SCORES // max(k.shape[-2] * q.shape[:-2].numel(), 1))
    with torch.no_grad():
        blocks = [
            _tangent(
                slice(start, min(start + rows, q.shape[-2])),
                q,
                k,
                v,
                tq,
                tk,
                tv,
                o,
                is_causal,
                scale,
            )
            for start in range(0, q.shape[-2], rows)
        ]
        return o, blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Half precision on a GPU, heads of whole 16 bytes up to 128; else torch's own products.

    In float32 the kernel spills its registers at a head of 128, in every tile that was compiled.
    """
    D = q.shape[-1]
    return (
        on_gpu(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and D % 8 == 0
        and D <= 128
        and v.shape[-1] == D
        and q.numel() > 0
        and k.numel() > 0
    )


def _is_blocked(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What torch's fused attention of CPUs takes; its result and gradient stay what they were."""
    return (
        q.is_cpu
        and q.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        and v.shape[-1] == q.shape[-1]
        and all(x.stride(-1) == 1 and x.numel() > 0 for x in (q, k, v))
    )


def _four(x: Tensor) -> Tensor:
    """``[Z, H, N, D]``, without a copy."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _tangent(
    rows: slice,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The tangent of these rows of o; softmax in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    o, q = o[..., rows, :], scale * q[..., rows, :]
    scores = (q @ k.mT).to(wide)
    if is_causal:
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        hidden = torch.arange(k.shape[-2], device=q.device) > i
        scores = scores.masked_fill(hidden, -torch.inf)
    P = scores.softmax(-1)
    out: Tensor | None = None if tv is None else P.to(v.dtype) @ tv
    if tq is not None or tk is not None:
        left = None if tq is None else scale * tq[..., rows, :] @ k.mT
        right = None if tk is None else q @ tk.mT
        tS = right if left is None else left if right is None else left + right
        assert tS is not None
        # rounded before its sum is taken: constants in v then cancel to the last bit
        H = (P * tS).to(v.dtype)
        moved = H @ v - H.sum(-1, keepdim=True, dtype=wide).to(o.dtype) * o
        out = moved if out is None else out + moved
    assert out is not None
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, of tensors and of duals.

    Args: see `attention_dual`; where q, k or v has a tangent, so has the result.
    """
    duals = [forward_ad.unpack_dual(x) for x in (q, k, v)]  # type: ignore[no-untyped-call]
    (q, tq), (k, tk), (v, tv) = duals
    if tq is None and tk is None and tv is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    q, k, v, tq, tk, tv = (_autocast(x) for x in (q, k, v, tq, tk, tv))
    o, to = attention_dual(q, k, v, tq, tk, tv, is_causal=is_causal, scale=scale)
    out: Tensor = forward_ad.make_dual(o, to)  # type: ignore[no-untyped-call]
    return out


def _autocast(x: Any) -> Any:
    """As autocast would hand it to attention; it does not know operators that are registered."""
    if x is None or x.dtype == torch.float64 or x.is_meta:  # meta knows no autocast
        return x
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
