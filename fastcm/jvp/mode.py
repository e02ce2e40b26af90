"""Value, gradient and tangent of a function in one pass."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastcm.jvp.rules import DIFFERENTIABLE, RULES, NotCovered, dual, is_dual, unpack

_log = logging.getLogger("fastcm.jvp")


class JVPMode(TorchFunctionMode):
    """Runs operators on duals with their tangents stopped: by `RULES`, else by forward AD."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None and any(is_dual(x) for x in (*args, *kwargs.values())):
            try:
                return rule(*args, **kwargs)
            except NotCovered as reason:
                if self.strict:
                    raise
                if not torch.compiler.is_compiling():
                    _log.info("%s by plain forward AD: %s", func.__name__, reason)
                func = DIFFERENTIABLE.get(func, func)
        if getattr(func, "__name__", "") == "unflatten":
            func = torch.unflatten  # the method cannot be compiled under a mode (torch 2.13)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            return _stopped(out)
        if type(out) in (tuple, list):
            return type(out)(_stopped(x) if isinstance(x, Tensor) else x for x in out)
        return out


def _stopped(x: Tensor) -> Tensor:
    """The same dual, its tangent without history."""
    if not x.is_floating_point():
        return x
    value, tangent = unpack(x)
    if tangent is None or not tangent.requires_grad:
        return x
    return dual(value, tangent)


def jvp(
    fn: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    tangent_grad: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """fn(*primals) with its gradient, and its derivative along `tangents`, which has none.

    A drop-in for `torch.func.jvp` where the tangent is a constant of the loss, as it is in
    continuous-time objectives. The tangent of every operator is detached at once: a linear layer
    costs two products forward instead of three, and the backward pass and what is kept for it are
    those of a plain call of `fn`. Put it *inside* the function that is compiled.

    Args:
        fn: any function of tensors; a network needs no change.
        primals: its arguments, a tuple of tensors or of nested containers of tensors.
        tangents: of the same structure, shapes and dtypes.
        tangent_grad: keep the tangent differentiable; this is `torch.func.jvp`.
        strict: raise where an operator is left to plain forward AD for a reason, such as
            attention with a mask; else the logger "fastcm.jvp" is told.

    Returns:
        (out, tangent) of the structure of what `fn` returns. A gradient that is sent into the
        tangent raises RuntimeError: ``tangent.detach()`` says that none is wanted.

    Raises:
        TypeError: primals or tangents are no tuples.
        ValueError: they do not agree; `fn` is compiled already.
        RuntimeError: inside ``torch.inference_mode()``, where there are no tangents.
        NotCovered: see `strict`.
    """
    flat, structure = _agreed(primals, tangents)
    _check_callable(fn)
    if tangent_grad:
        out, tangent = torch.func.jvp(fn, primals, tangents)[:2]
        return out, tangent
    with forward_ad.dual_level():
        duals = [dual(*_alike(x, tx)) for x, tx in flat]
        with JVPMode(strict):
            result = fn(*pytree.tree_unflatten(duals, structure))
        leaves, shape = pytree.tree_flatten(result)
        pairs = [unpack(x) for x in leaves]
    values = [value for value, _ in pairs]
    found = [
        torch.zeros_like(value) if tangent is None else _guarded(tangent.detach(), value)
        for value, tangent in pairs
    ]
    return pytree.tree_unflatten(values, shape), pytree.tree_unflatten(found, shape)


class _Guard(torch.autograd.Function):
    """Hands a stopped tangent on, and refuses its gradient."""

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, value: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a gradient was sent into a stopped tangent: use tangent.detach() in the loss, or "
            "jvp(..., tangent_grad=True) for a loss that differentiates through the tangent"
        )


def _guarded(tangent: Tensor, value: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not (value.requires_grad and torch.is_grad_enabled()):
        return tangent
    guarded: Tensor = _Guard.apply(tangent, value)  # type: ignore[no-untyped-call]
    return guarded


def _agreed(primals: Any, tangents: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Pairs of (primal, tangent), and the structure they came in."""
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a tuple of tensors, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError("jvp needs tangents, which inference_mode has not: use torch.no_grad()")
    (flat, structure), (flat_t, structure_t) = map(pytree.tree_flatten, (primals, tangents))
    if structure != structure_t:
        raise ValueError(f"tangents must be nested as primals, {structure}, got {structure_t}")
    for i, (x, tx) in enumerate(zip(flat, flat_t)):
        if not (isinstance(x, Tensor) and isinstance(tx, Tensor)):
            raise TypeError(
                f"primal {i} and its tangent must be tensors, got {x!r:.80}, {tx!r:.80}"
            )
        if x.shape != tx.shape or x.dtype != tx.dtype or not x.is_floating_point():
            raise ValueError(
                f"primal {i} and its tangent must be of one shape and floating dtype, got "
                f"{x.dtype} {list(x.shape)} and {tx.dtype} {list(tx.shape)}"
            )
    return list(zip(flat, flat_t)), structure


def _alike(x: Tensor, tx: Tensor) -> tuple[Tensor, Tensor]:
    """In one dense layout: compiled code makes no view of duals whose parts differ in theirs."""
    if x.is_contiguous() and tx.is_contiguous():
        return x, tx
    return x.contiguous(), tx.contiguous()


def _check_callable(fn: Callable[..., Any]) -> None:
    """Compiled code knows nothing of tangents that come from outside."""
    if torch.compiler.is_compiling():
        return
    for part in _parts(fn):
        if _is_compiled(part):
            raise ValueError(
                f"jvp of {type(part).__name__}, which is compiled already and would lose the "
                "tangents: compile the function that calls jvp instead"
            )


def _parts(fn: Any) -> Iterator[Any]:
    """What a function calls, as far as can be seen: itself, its owner, what it closes over."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    yield fn
    yield getattr(fn, "__self__", None)
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _is_compiled(part: Any) -> bool:
    if isinstance(part, nn.Module):
        return any(
            hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in part.modules()
        )
    return hasattr(part, "_torchdynamo_orig_callable")
