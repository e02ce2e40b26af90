"""The mean of all processes' gradients, by DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class _Calls(nn.Module):
    """Calls a function that computes with these parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)


class MeanGradients:
    """Calls of a loss whose backward leaves the mean of all processes' gradients.

    The whole loss is one call of DistributedDataParallel, however often the objective calls its
    networks, and the gradients travel while backward still computes earlier ones. On a GPU make it
    on the stream of the steps: a CUDA graph of one holds these calls, all but the first ten.

    Args:
        parameters: that are trained.
        idle: whether some of them receive no gradient, which has to be looked for in every step.
    """

    def __init__(self, parameters: list[nn.Parameter], *, idle: bool) -> None:
        self._ddp = nn.parallel.DistributedDataParallel(
            _Calls(parameters), find_unused_parameters=idle, gradient_as_bucket_view=True
        )
        # it times some steps with events, which are not to be looked at in a graph
        self._ddp._set_ddp_runtime_logging_sample_rate(  # type: ignore[no-untyped-call]
            2**31 - 1
        )

    def __call__(self, loss: Callable[..., T], *arguments: Any, last: bool = True) -> T:
        """loss(*arguments).

        Args:
            last: whether this is the last backward of the step, after which gradients are averaged.
        """
        with nullcontext() if last else self._ddp.no_sync():
            value: T = self._ddp(loss, *arguments)
        return value
