"""Networks that hold the averages and low-precision copies of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastcm.ema import Average
from fastcm.optim.averages import Live, alive, swapped
from fastcm.optim.layout import Layout


class Views(ABC):
    """What `OneSweep` shows of its state."""

    averages: tuple[Average, ...]
    _layout: Layout | None
    _live: list[Live]
    _swapped: bool

    @abstractmethod
    def _build(self) -> None:
        """Have a layout."""

    @contextmanager
    def averaged(self, i: int, module: nn.Module) -> Iterator[nn.Module]:
        """Inside, the parameters of `module` hold average `i`.

        They are copied in and put back at the end; parameters that the optimizer does not have
        stay as they are.

        Raises:
            ValueError: no such average, or no parameter of the optimizer in `module`.
        """
        with torch.no_grad():
            find = self._finder(self._average(i))
            context = swapped(module, find)
            context.__enter__()
        outer, self._swapped = self._swapped, True
        try:
            yield module
        finally:
            self._swapped = outer
            with torch.no_grad():
                context.__exit__(None, None, None)

    def ema_module(self, i: int, module: nn.Module) -> nn.Module:
        """A copy of `module`, in eval mode, whose parameters are average `i`: live, not copied.

        `step` updates it, its buffers too. It takes no memory of its own for parameters.

        Raises:
            ValueError: no such average, a sharded module, or none of the optimizer's parameters.
        """
        return self._live_module(module, self._average(i))

    def shadow_module(self, module: nn.Module, i: int | None = None) -> nn.Module:
        """As `ema_module` with the low-precision copies of the parameters, or of average `i`.

        Raises:
            ValueError: as `ema_module`, or there is no such copy.
        """
        wanted = -1 if i is None else i

        def flat(layout: Layout) -> Tensor:
            if wanted not in layout.shadow_sources:
                raise ValueError(
                    f"there is no low-precision copy of {'parameters' if i is None else i}: give "
                    "the optimizer shadow_dtype, and shadow_ema for averages"
                )
            return layout.shadows[layout.shadow_sources.index(wanted)]

        return self._live_module(module, flat)

    def _average(self, i: int) -> Callable[[Layout], Tensor]:
        if not -len(self.averages) <= i < len(self.averages):
            raise ValueError(f"there is no average {i}: the optimizer has {len(self.averages)}")
        return lambda layout: layout.averages[i]

    def _finder(self, flat: Callable[[Layout], Tensor]) -> Callable[[Tensor], Tensor | None]:
        if self._layout is None:
            self._build()

        def find(parameter: Tensor) -> Tensor | None:
            assert self._layout is not None
            slot = self._layout.find(parameter)
            return None if slot is None else slot.view(flat(self._layout))

        return find

    def _live_module(self, module: nn.Module, flat: Callable[[Layout], Tensor]) -> nn.Module:
        network, live = alive(module, self._finder(flat))
        self._live.append(live)
        return network
