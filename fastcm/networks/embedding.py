"""What the networks share: time and class conditioning in float32, and checks of their input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.networks.conditions import split_weight

_SINUSOID_DIM = 256
_MAX_PERIOD = 10000.0
_LEVELS = 64


def sinusoid(t: Tensor, dim: int, time_scale: float = 1.0) -> Tensor:
    """Sines and cosines of ``time_scale * t`` at log-spaced frequencies from 1 down to 1e-4.

    Args:
        t: times ``[B]``.
        dim: width of the embedding, even.
        time_scale: factor on t, such that differences of ``time_scale * t`` near 1 matter.

    Returns:
        float32 ``[B, dim]``.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    half = dim // 2
    position = torch.arange(half, device=t.device, dtype=torch.float32)
    frequency = torch.exp(position * (-math.log(_MAX_PERIOD) / half))
    angle = (time_scale * t.float())[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class Conditioning(nn.Module):
    """Time and class label to one vector per sample, computed in float32 whatever surrounds it.

    Neighbouring times of a consistency pair differ by less than bfloat16 resolves, so autocast
    is off in here and the weights are read as float32 even where the network was cast down.

    Args:
        dim: width of the output.
        num_classes: labels are 0 .. num_classes - 1, and num_classes is the null label; None for
            an unconditional network.
        time_scale: factor on t before the sinusoid.
        two_times: whether there is a second time s <= t; at the start it changes nothing.
        guided: whether the weight of guidance is an input: `cond` is then what
            `fastcm.networks.protocol.append_weight` makes of labels; at the start it changes
            nothing.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int | None,
        time_scale: float,
        two_times: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        require_positive(dim=dim)
        if not (math.isfinite(time_scale) and time_scale > 0):
            raise ValueError(f"time_scale must be positive and finite, got {time_scale}")
        self.time_scale = float(time_scale)
        self.fc1 = nn.Linear(_SINUSOID_DIM, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.gap: nn.Linear | None = None
        if two_times:
            self.gap = ZeroLinear(_SINUSOID_DIM, dim)
        self.weight: nn.Linear | None = None
        if guided:
            self.weight = ZeroLinear(_SINUSOID_DIM, dim)
        self.classes: nn.Embedding | None = None
        if num_classes is not None:
            require_positive(num_classes=num_classes)
            self.classes = nn.Embedding(num_classes + 1, dim)

    def forward(self, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """``[B, dim]`` for times t and s ``[B]`` (default t) and labels cond ``[B]``."""
        if self.gap is None and s is not None:
            raise ValueError(
                "s was given to a network of one time: construct it with two_times=True"
            )
        w: Tensor | None = None
        if self.weight is not None:
            cond, w = _unpacked(cond, len(t), self.classes is not None)
        with _in_float32(t.device.type):
            h = sinusoid(t, _SINUSOID_DIM, self.time_scale)
            h = F.silu(F.linear(h, self.fc1.weight.float(), self.fc1.bias.float()))
            h = F.linear(h, self.fc2.weight.float(), self.fc2.bias.float())
            if self.gap is not None:
                gap = torch.zeros_like(t) if s is None else t - s
                wave = sinusoid(gap, _SINUSOID_DIM, self.time_scale)
                h = h + F.linear(wave, self.gap.weight.float(), self.gap.bias.float())
            if self.weight is not None and w is not None:
                wave = sinusoid(w, _SINUSOID_DIM)
                h = h + F.linear(wave, self.weight.weight.float(), self.weight.bias.float())
            if self.classes is None:
                if cond is not None:
                    raise ValueError(
                        "cond was given to a network without classes: pass cond=None (train on "
                        "data without labels), or construct the network with num_classes"
                    )
            else:
                table = self.classes.weight.float()
                h = h + (table[-1] if cond is None else _looked_up(_labels(cond, t, table), table))
            return F.silu(h)


def _in_float32(device_type: str) -> AbstractContextManager[Any]:
    """Inside, autocast is off; the meta device has none."""
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


class LogVariance(nn.Module):
    """The log-variance u of the loss as a function of the noise level, 0 at the start.

    As ``net.log_variance`` it serves the weight `fastcm.losses.Learned`; it is trained and saved
    with the network, and sampling does without.

    Source: Karras et al. 2024 (EDM2), section 2.2 of the appendix.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = ZeroLinear(_LEVELS, 1)

    def forward(self, angle: Tensor) -> Tensor:
        """u, float32 ``[B]``, at the angle atan2(sigma, alpha) ``[B]``, in [0, pi / 2]."""
        with _in_float32(angle.device.type):
            level = angle.clamp(1e-4, math.pi / 2 - 1e-4).tan().log() / 4.0
            return F.linear(
                sinusoid(level, _LEVELS, time_scale=4.0),
                self.fc.weight.float(),
                self.fc.bias.float(),
            )[:, 0]


def _unpacked(cond: Tensor | None, n: int, labelled: bool) -> tuple[Tensor | None, Tensor]:
    """Labels and the weight of guidance."""
    columns = 1 + labelled
    if cond is None or cond.shape != (n, columns) or not cond.is_floating_point():
        got = "None" if cond is None else f"{cond.dtype} {list(cond.shape)}"
        raise ValueError(
            f"a guided network needs cond of shape [{n}, {columns}], the weight of guidance in the "
            f"last column: fastcm.sampling.append_weight(labels, weight); got {got}"
        )
    features, w = split_weight(cond)
    return (features[:, 0].long() if labelled else None), w


def _looked_up(labels: Tensor, table: Tensor) -> Tensor:
    """Rows of a table, by a product: the gradient of F.embedding adds in no fixed order."""
    rows = torch.arange(len(table), device=labels.device)
    return (labels[:, None] == rows).to(table.dtype) @ table


def _labels(cond: Tensor, t: Tensor, table: Tensor) -> Tensor:
    if cond.dtype != torch.int64 or cond.shape != t.shape:
        raise ValueError(
            f"cond must be int64 labels of shape {tuple(t.shape)}, "
            f"got {cond.dtype} {tuple(cond.shape)}"
        )
    if cond.is_cpu and not torch.compiler.is_compiling() and cond.numel():  # a GPU is not asked
        low, high = int(cond.min()), int(cond.max())
        if low < 0 or high >= len(table):
            raise ValueError(f"cond must be labels in [0, {len(table)}), got {low} .. {high}")
    return cond


def check_input(x: Tensor, t: Tensor, sample_shape: Sequence[int | None]) -> None:
    """Raise ValueError unless x is ``[B, *sample_shape]`` (None fits any size) and t is ``[B]``."""
    wrong = x.ndim != len(sample_shape) + 1 or any(
        want is not None and got != want for got, want in zip(x.shape[1:], sample_shape)
    )
    if wrong:
        wanted = ", ".join(["B", *("any" if n is None else str(n) for n in sample_shape)])
        raise ValueError(f"x must have shape [{wanted}], got {list(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape [{x.shape[0]}] to go with x, got {list(t.shape)}")


def require_positive(**values: int) -> None:
    """Raise ValueError for an argument that is not an int >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")


class _Zero(nn.Module):
    """A layer that starts at zero, wherever its values are drawn."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # what is drawn after it does not depend on it
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class ZeroLinear(_Zero, nn.Linear):
    """A linear layer that starts at zero."""


class ZeroConv2d(_Zero, nn.Conv2d):
    """A convolution that starts at zero."""
