"""What a trainer refuses before any work is done."""

from __future__ import annotations

import operator
import warnings
from typing import SupportsIndex

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastcm.data import DeviceData, Source
from fastcm.data.shard_data import ShardData
from fastcm.data.sources import IterableData
from fastcm.losses import Learned
from fastcm.networks.protocol import check_signature
from fastcm.objectives.base import Objective
from fastcm.precision import check_not_double


def device_of(net: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where a network is to be trained: `device`, or where it is."""
    parameter = next(net.parameters(), None)
    if parameter is None:
        raise ValueError("net has no parameters to train")
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if parameter.is_meta else parameter.device


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, of which there is one at least."""
    found = [p for p in net.parameters() if p.requires_grad]
    if not found:
        raise ValueError(
            "net has no parameter that requires a gradient (a trainer's average has none): "
            "call net.requires_grad_(True) first"
        )
    return found


def check_arguments(
    net: nn.Module,
    objective: Objective,
    optimizer: object,
    lr_schedule: object,
    max_grad_norm: float | None,
) -> None:
    """Names and classes where objects are wanted; an optimizer of other parameters."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
    if isinstance(objective, type) or not callable(getattr(objective, "loss", None)):
        raise TypeError(
            f"objective must be an object such as fastcm.FlowMatching(), got {objective!r:.80}"
        )
    for name, needed, example in (
        ("weight", "__call__", "a function such as fastcm.losses.snr"),
        ("times", "__call__", "a function such as fastcm.schedules.UniformTime()"),
        ("metric", "__call__", "a function such as fastcm.losses.PseudoHuber()"),
        ("grid", "time", "an object such as fastcm.schedules.KarrasGrid()"),
        ("target_average", "decay", "an object such as fastcm.EMA(0.9)"),
    ):
        value = getattr(objective, name, None)
        if value is not None and (isinstance(value, type) or not hasattr(value, needed)):
            raise TypeError(f"{name} must be {example}, got {value!r:.80}")
    if not callable(lr_schedule) or hasattr(lr_schedule, "get_last_lr"):
        raise TypeError(
            "lr_schedule must be a function of the step, a factor of the learning rate, such as "
            f"fastcm.schedules.warmup_cosine(100, 1000), got {type(lr_schedule).__name__}; a "
            "scheduler of torch is stepped in a callback"
        )
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, such as "
            f"fastcm.AdamW(net.parameters(), lr=1e-3), got {optimizer!r:.80}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = trainable(net)
    missing = sum(id(p) not in held for p in wanted)
    if missing == len(wanted):
        raise ValueError(
            "the optimizer holds no parameter of net: make it of net.parameters(), after net is "
            "what is to be trained"
        )
    if missing:
        warnings.warn(
            f"the optimizer leaves {missing} of the {len(wanted)} parameters of net as they are; "
            "requires_grad_(False) on them says that this is meant",
            stacklevel=3,
        )


def check_steps(steps: object) -> None:
    """How many steps are to be taken: an int >= 0."""
    if not isinstance(steps, SupportsIndex):
        raise TypeError(f"steps must be an int, got {steps!r:.80}")
    if operator.index(steps) < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")


def check_teacher(objective: Objective, net: nn.Module, device: torch.device) -> None:
    """A teacher goes where the student is; with shared parameters it would be trained along.

    So does a metric that is a network.
    """
    teacher, metric = (getattr(objective, name, None) for name in ("teacher", "metric"))
    if isinstance(metric, nn.Module):
        metric.to(device)
    if not isinstance(teacher, nn.Module):
        return
    check_signature("teacher", teacher)
    check_not_double("teacher", teacher)
    if not any(p.is_meta for p in teacher.parameters()):
        teacher.to(device)
    if {id(p) for p in teacher.parameters()} & {id(p) for p in net.parameters()}:
        raise ValueError(
            "the teacher shares parameters with net, and would be trained along: "
            "give it a copy, copy.deepcopy(net)"
        )


_TIME = ("time", "temb", "t_emb")


def check_network(net: nn.Module, objective: Objective) -> None:
    """What a trainer and an objective need of a network."""
    if isinstance(net, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"net is wrapped in {type(net).__name__}, and its averages cannot be: give net.module, "
            "and parallel='ddp' for several processes"
        )
    check_signature("net", net, two_times=getattr(objective, "two_times", False))
    _check_dtypes(net)
    _check_times(net, objective)
    weight = getattr(objective, "weight", None)
    if isinstance(weight, Learned) and not hasattr(net, "log_variance"):
        raise ValueError(
            "the weight Learned() needs a network with a log_variance: construct it with "
            "log_variance=True, or give yours `self.log_variance = fastcm.networks.LogVariance()`"
        )
    if not getattr(objective, "derives", False):
        return
    for name, module in net.named_modules():
        half = {p.dtype for p in module.parameters(recurse=False)} & {torch.bfloat16, torch.half}
        if half and any(word in name.lower() for word in _TIME):
            warnings.warn(
                f"{name} computes with time in {half.pop()}: the derivative in t of "
                f"{type(objective).__name__} is then noise; keep the layers of time in float32",
                stacklevel=3,
            )


def _check_dtypes(net: nn.Module) -> None:
    """Weights in float32 or bfloat16 can be trained."""
    for name, parameter in net.named_parameters():
        if parameter.dtype in (torch.float16, torch.float64):
            dtype = str(parameter.dtype).removeprefix("torch.")
            why = "gradients overflow" if dtype == "float16" else "data and times are float32"
            raise ValueError(
                f"{name} is {dtype}, where {why}: train net.float(), with precision='bf16' for "
                "speed, or net.bfloat16()"
            )


def _check_times(net: nn.Module, objective: Objective) -> None:
    """An objective of two times needs a network of two times; a network of yours may be either."""
    description = getattr(net, "description", None)
    if description is None or not getattr(objective, "two_times", False):
        return
    if not description.get("two_times", False):
        raise ValueError(
            f"{type(objective).__name__} needs a network of two times: construct it with "
            "two_times=True"
        )


def check_classes(net: nn.Module, source: object, objective: Objective) -> None:
    """A label of num_classes would be the null label, one beyond it an index out of range."""
    classes = getattr(net, "description", {}).get("num_classes")
    data = source.dataset.num_classes if isinstance(source, DeviceData) else None
    if isinstance(source, ShardData):
        data = source.data.classes  # those of a split are known, others not looked for
    null = getattr(objective, "null_condition", None)
    if classes is not None and data is not None and data > classes:
        raise ValueError(f"the data has {data} classes, the network num_classes={classes}")
    if classes is not None and isinstance(null, int) and not 0 <= null <= classes:
        raise ValueError(f"null_condition must be in [0, {classes}], got {null}")


def check_parallel(net: nn.Module, source: Source) -> None:
    """What would make a training depend on how many processes share it."""
    if isinstance(source, IterableData) and not source.given.per_process:
        raise ValueError(
            "several processes need data whose rows do not depend on who reads them, got an "
            "iterable of batches: give a tensor, a Dataset, a path, a data set with rows or a "
            "Source; or, if each process has rows of its own already and it has a state_dict, "
            "fastcm.data.Batches(iterable, per_process=True)"
        )
    for name, module in net.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ValueError(
                f"{name} drops activations by torch's generator, of which every process has its "
                "own: several processes need a network without dropout"
            )
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name} normalises by the rows that one process has: several processes need "
                "another norm, such as GroupNorm, or nn.SyncBatchNorm.convert_sync_batchnorm(net)"
            )
