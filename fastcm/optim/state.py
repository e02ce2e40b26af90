"""What an optimizer accepts: options, parameters, and saved states, which it takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcm.optim.layout import Layout
from fastcm.sharding import dtensors

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad")
"""Options of torch's optimizers that choose how a step is computed; never loaded."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_copies(
    max_grad_norm: float | None,
    averages: Sequence[object],
    shadow_dtype: torch.dtype | None,
    shadow_ema: Sequence[int],
) -> None:
    """Raise ValueError or TypeError unless clipping, averages and shadows are well defined."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
    for average in averages:
        if not callable(getattr(average, "decay", None)):
            raise TypeError(f"ema takes averages such as EMA(0.999), got {average!r}")
    if shadow_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"shadow_dtype must be bfloat16, float16 or None, got {shadow_dtype}")
    if shadow_ema and shadow_dtype is None:
        raise ValueError("shadow_ema needs shadow_dtype")
    for i in shadow_ema:
        if not 0 <= i < len(averages):
            raise ValueError(f"shadow_ema {i} is not one of the {len(averages)} averages")


def check_parameters(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the parameters of all groups can share one flat state."""
    device = None
    for index, group in enumerate(groups):
        if len({id(p) for p in group["params"]}) < len(group["params"]):
            raise ValueError(f"parameter group {index} has a parameter twice")
        for i, parameter in enumerate(group["params"]):
            if parameter.dtype not in FLOATS:
                raise ValueError(
                    f"parameter {i} of group {index} is {parameter.dtype}: "
                    "float32, float64, bfloat16 and float16 are supported"
                )
            if parameter.layout != torch.strided:
                raise ValueError(f"parameter {i} of group {index} is {parameter.layout}, not dense")
            if any(n > 1 and s == 0 for n, s in zip(parameter.shape, parameter.stride())):
                raise ValueError(
                    f"parameter {i} of group {index} is expanded, several of its elements are one "
                    "in memory: give the optimizer what it was expanded from, or a clone"
                )
            device = device or parameter.device
            if parameter.device != device:
                raise ValueError(
                    f"parameters on several devices, {device} and {parameter.device}: "
                    "use one optimizer for each device"
                )


def check_options(group: Mapping[str, Any], index: int) -> None:
    """Raise ValueError if an option of a parameter group is missing or out of range."""
    where = f"parameter group {index}"
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in group:
            raise ValueError(f"{where} has no {name}")
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr must have 1 element, got {list(lr.shape)}")
    if len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), got {betas}")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        # a learning rate on the device is not waited for
        if not (isinstance(value, Tensor) and value.device.type != "cpu") and not value >= 0:
            raise ValueError(f"{where}: {name} must be >= 0, got {value}")
    for name in ("amsgrad", "maximize", "differentiable"):
        if group.get(name):
            raise ValueError(f"{where}: {name} is not supported")


def check(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], averages: int
) -> None:
    """Raise ValueError unless a state fits parameter groups and a number of averages."""
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"the state of an optimizer has {name!r}, this one {list(state_dict)}")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the state has {len(saved)} parameter groups, the optimizer {len(groups)}"
        )
    for index, (theirs, ours) in enumerate(zip(saved, groups)):
        check_options(theirs, index)
        if "params" not in theirs:
            raise ValueError(f"parameter group {index} of the state has no params")
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"parameter group {index} of the state has {len(theirs['params'])} parameters, "
                f"that of the optimizer {len(ours['params'])}"
            )
        for key, parameter in zip(theirs["params"], ours["params"]):
            entries = state_dict["state"].get(key)
            if entries is not None:
                _check_entries(f"the state of parameter {key}", entries, parameter, averages)
    if "counts" in state_dict and len(state_dict["counts"]) != 3:
        raise ValueError(f"counts of the state must be 3 numbers, got {state_dict['counts']}")


def _check_entries(
    where: str, entries: Mapping[str, Any], parameter: Tensor, averages: int
) -> None:
    names = [f"ema_{j}" for j in range(averages)]
    present = [name for name in names if name in entries]
    missing = [name for name in MOMENTS if name not in entries]
    if present:  # all of them, or none: a state from torch
        missing += [name for name in names if name not in entries]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: it has {sorted(entries)}")
    for name in (*MOMENTS[1:], *present, *(["master"] if "master" in entries else [])):
        value = entries[name]
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            found = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{where}: {name} is {found}, the parameter {list(parameter.shape)}")
    step = entries["step"]
    if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"{where}: step must have 1 element")


def fill(layout: Layout, counts: Tensor, state_dict: Mapping[str, Any]) -> None:
    """Copy a state that was checked into the flat memory; what it lacks starts anew."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for index, (key, slot) in enumerate(zip(keys, layout.slots)):
        entries = state_dict["state"].get(key, {})
        for name, view in layout.entries(index):
            if name in entries:  # perhaps this view itself: nothing was written to it before
                like = view if name == "step" else slot.parameter
                view.copy_(dtensors.local_of(like, torch.as_tensor(entries[name])))
            elif name in MOMENTS:
                view.zero_()
            else:  # averages and masters
                view.copy_(dtensors.local(slot.parameter))
    if "counts" in state_dict:
        counts.copy_(torch.as_tensor(state_dict["counts"]))
    else:  # from torch: no step was skipped
        counts.zero_()
        counts[0] = layout.steps.max()
