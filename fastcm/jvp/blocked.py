"""The tangent of attention on a CPU, a block of scores at a time, in the caches.

``torch.ops.fastcm.cpu_attention_tangent`` is an operator of its own: compiled code calls it and
does not look into the loop.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

_SCORES = 2**18
"""Scores of a block: two matrices of them stay near the cores."""


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """to of `fastcm.jvp.attention_dual`, ``[Z, H, N, D]`` as o; computed in float32 or wider.

    Args:
        q, k, v, tq, tk, tv: ``[Z, H, N or M, D]``, one tangent at least.
        o, lse: what attention gave, and log sum exp of its scores ``[Z, H, N]``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    operands = [None if x is None else x.detach() for x in (q, k, v, tq, tk, tv, o, lse)]
    (Z, H, N, _), M = q.shape, k.shape[-2]
    whole = torch.empty_like(o)
    merged = Z > 1 and 2 * H * N * M <= _SCORES  # few scores of each: all heads are of one sample
    if merged:
        operands = [None if x is None else x.reshape(1, Z * H, *x.shape[2:]) for x in operands]
        Z, H = 1, Z * H
    out = torch.empty((Z, H, *o.shape[2:]), dtype=o.dtype, device=o.device) if merged else whole
    heads = max(1, min(H, _SCORES // (N * M)))
    rows = max(1, min(N, _SCORES // (heads * M)))
    with torch.autocast("cpu", enabled=False):
        for z, h in itertools.product(range(Z), range(0, H, heads)):
            some: list[Any] = [
                None if x is None else x[z, h : h + heads].to(wide) for x in operands
            ]
            for i in range(0, N, rows):
                at = slice(i, i + rows)
                block = _block(*some, rows=at, is_causal=is_causal, scale=scale)
                out[z, h : h + heads, at] = block
    return whole.copy_(out.view(whole.shape)) if merged else whole


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    lse: Tensor,
    *,
    rows: slice,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """These rows of it, for heads ``[h, N, D]``."""
    q, o = scale * q[:, rows], o[:, rows]
    scores = torch.baddbmm(lse[:, rows, None], q, k.mT, beta=-1)
    if is_causal:
        i = torch.arange(rows.start, rows.start + q.shape[1])[:, None]
        scores.masked_fill_(torch.arange(k.shape[1]) > i, -torch.inf)
    P = scores.exp_()
    out = None if tv is None else torch.bmm(P, tv)
    if tq is None and tk is None:
        assert out is not None
        return out
    H = None if tk is None else torch.bmm(q, tk.mT)
    if tq is not None:
        tq = scale * tq[:, rows]
        H = torch.bmm(tq, k.mT) if H is None else torch.baddbmm(H, tq, k.mT, out=H)
    assert H is not None
    H.mul_(P)
    out = torch.bmm(H, v) if out is None else torch.baddbmm(out, H, v, out=out)
    return out.addcmul_(H.sum(-1, keepdim=True), o, value=-1)


_library = torch.library.Library("fastcm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "cpu_attention_tangent(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, "
    "Tensor o, Tensor lse, bool is_causal, float scale) -> Tensor"
)
_library.impl("cpu_attention_tangent", attention_tangent, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("fastcm::cpu_attention_tangent", lambda *x: torch.empty_like(x[6]))
