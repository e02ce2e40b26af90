"""AdamW and RAdam, drop-in for torch's, with clipping and averages in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcm.ema import Average
from fastcm.optim.one_sweep import OneSweep


class AdamW(OneSweep):
    """`torch.optim.AdamW` that clips, averages and casts in the same pass over the parameters.

    State is float32 for parameters of float32, bfloat16 and float16 (whose float32 masters are
    kept), float64 for float64. It is made at the first step; averages start at the parameters.
    `state_dict` and `load_state_dict` take and give torch's. Works on the shards of DTensor
    parameters (FSDP2).

    Args:
        params: parameters, or groups of them with options of their own.
        lr: >= 0; a float, or a tensor of 1 element, read on its device.
        betas: two floats in [0, 1).
        eps: >= 0.
        weight_decay: >= 0, decoupled.
        max_grad_norm: > 0: clip the norm of all gradients; a step whose norm is not finite changes
            nothing but `counts`. math.inf measures without clipping. None does neither.
        ema: one average or several, `EMA(0.999)`, `PowerEMA(0.05)`, ...; see `averaged` and
            `ema_module`.
        shadow_dtype: bfloat16 or float16: keep low-precision copies of the parameters, see
            `shadow_module`.
        shadow_ema: indices of averages to keep such copies of, too.
        foreach, fused, capturable: accepted as torch's. They change nothing: there is one
            implementation for each device, and it can be captured in a CUDA graph.
        amsgrad, maximize, differentiable: not supported; must be False.

    Raises:
        ValueError: an option out of range, no parameters, or such as are complex, integers,
            expanded, given twice, or on several devices.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    _never_loaded = (*OneSweep._never_loaded, "decoupled_weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_grad_norm: float | None = None,
        ema: Average | Sequence[Average] = (),
        shadow_dtype: torch.dtype | None = None,
        shadow_ema: Sequence[int] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            ema=ema,
            shadow_dtype=shadow_dtype,
            shadow_ema=shadow_ema,
        )


class RAdam(OneSweep):
    """`torch.optim.RAdam` in one sweep; everything else as `AdamW`.

    Args:
        weight_decay: >= 0; added to the gradient (L2), as in torch.
        decoupled_weight_decay: shrink the parameters instead, as AdamW does.

    Source: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond"; used by
    consistency models, iCT and ECT.
    """

    _radam = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        max_grad_norm: float | None = None,
        ema: Average | Sequence[Average] = (),
        shadow_dtype: torch.dtype | None = None,
        shadow_ema: Sequence[int] = (),
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            ema=ema,
            shadow_dtype=shadow_dtype,
            shadow_ema=shadow_ema,
        )
