"""The optimizer that updates parameters, averages and low-precision copies in one sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcm.ema import Average
from fastcm.optim.averages import Live
from fastcm.optim.backends import Backend, choose, is_capturing
from fastcm.optim.layout import Layout
from fastcm.optim.state import (
    IMPLEMENTATION,
    check,
    check_copies,
    check_options,
    check_parameters,
    fill,
)
from fastcm.optim.tables import Tables
from fastcm.optim.views import Views
from fastcm.sharding import dtensors
from fastcm.tracing import part

Closure = Callable[[], Any]


class OneSweep(Views, Optimizer):
    """What `AdamW` and `RAdam` share: everything but the scalars of the step."""

    _radam = False
    _never_loaded: tuple[str, ...] = IMPLEMENTATION

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        ema: Average | Sequence[Average],
        shadow_dtype: torch.dtype | None,
        shadow_ema: Sequence[int],
    ) -> None:
        self.averages = tuple(ema) if isinstance(ema, Sequence) else (ema,)
        self.shadow_dtype, self.shadow_ema = shadow_dtype, tuple(shadow_ema)
        check_copies(max_grad_norm, self.averages, shadow_dtype, self.shadow_ema)
        self.max_grad_norm = max_grad_norm
        self._reset()
        super().__init__(params, defaults)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("the parameter groups have no parameters")

    def _reset(self) -> None:
        """No state: it is made when first needed."""
        self._layout: Layout | None = None
        self._tables: Tables | None = None
        self._backend: Backend | None = None
        self._counts: Tensor | None = None
        self._live: list[Live] = []
        self._swapped = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with options of its own; its averages start at the parameters.

        Raises:
            ValueError: options out of range; parameters that are there already, not float, or on
                another device. The optimizer is unchanged.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group, len(self.param_groups) - 1)
            check_parameters(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        if self._layout is not None:
            self._build()

    def step(self, closure: Closure | None = None) -> Any:
        """One update. Nothing waits for the device.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            ValueError: a sparse gradient.
            RuntimeError: inside `averaged`.
        """
        if self._swapped:
            raise RuntimeError("step() inside `averaged`: the averages would be trained")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step(self) -> None:
        layout, tables, backend = self._prepare(upload=not is_capturing())
        for slot in tables.staged:
            layout.follow(slot)
        for buffer, gradient in tables.copied:
            buffer.copy_(gradient)
        tables.rates(self.averages, ramps=not backend.ramps)
        measured = self.max_grad_norm is not None
        if measured:
            with part("norm"):
                backend.grad_norm(tables)
                dtensors.all_reduce(tables.sums, tables.meshes)
        backend.tick(tables, radam=self._radam, measured=measured)
        backend.sweep(tables)
        for slot in tables.staged:
            assert layout.masters is not None
            dtensors.local(slot.parameter).copy_(slot.view(layout.masters))
        if not backend.shadows:
            layout.copy_shadows()
        tables.release()
        self._live = [live for live in self._live if live.copy_buffers()]

    @torch.no_grad()
    def prepare(self) -> bool:
        """Send to the device what changed on the host: options such as lr, moved gradients.

        `step` does it, except while a CUDA graph is captured: call it after the capture, and
        before a replay.

        Returns:
            Whether parameters, gradients or state moved since the last step or call, so that a
            graph captured before is void.
        """
        before = self._tables and (self._tables, self._tables.version)
        _, tables, _ = self._prepare(upload=True)
        return before != (tables, tables.version)

    def _prepare(self, *, upload: bool) -> tuple[Layout, Tables, Backend]:
        layout = self._layout
        if layout is None or not layout.holds(self.param_groups):
            check_parameters(self.param_groups)
            self._build()
        elif len(self.state) != len(layout.slots):
            self._build()  # some state was removed, to start anew
        assert self._tables is not None and self._layout is not None and self._backend is not None
        if not self._tables.refresh(upload=upload):
            self._build()  # a parameter has another dtype, shape or strides than before
            self._tables.refresh(upload=upload)
        self._tables.options(self.param_groups, self.max_grad_norm, upload=upload)
        return self._layout, self._tables, self._backend

    @torch.no_grad()
    def _build(self) -> None:
        """Lay out the state, with what `self.state` holds copied into it."""
        parameters = [(p, i) for i, g in enumerate(self.param_groups) for p in g["params"]]
        layout = Layout(parameters, len(self.averages), self.shadow_dtype, self.shadow_ema)
        layout.take(self.state)
        fresh = torch.zeros(3, dtype=torch.int64, device=layout.device)
        self._counts = fresh if self._counts is None else self._counts.to(layout.device)
        self._backend = choose(layout.device, layout.dtype)
        direct = self._backend.direct(layout)
        self._tables = Tables(layout, len(self.param_groups), direct, self._counts)
        self._tables.average(self.averages)
        self._layout = layout
        self._attach()

    def _attach(self) -> None:
        """Let `self.state` and the live modules hold views of the flat state."""
        assert self._layout is not None
        self.state.clear()
        for index, slot in enumerate(self._layout.slots):
            self.state[slot.parameter] = {
                name: view if name == "step" else dtensors.like(slot.parameter, view)
                for name, view in self._layout.entries(index)
            }
        self._layout.copy_shadows()
        for live in self._live:
            live.attach()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, which loads it, plus the averages: "ema_0", ... of each parameter.

        The tensors are the live state, as with torch: copy or save them before the next step.
        "counts" are the steps attempted, skipped, and skipped in a row.
        """
        found = super().state_dict()
        if self._counts is not None:
            found["counts"] = self._counts
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of torch's optimizer of the same name.

        What a state from torch lacks starts anew: averages at the parameters. Addresses of the
        state stay, so captured graphs remain valid.

        Raises:
            ValueError: another number of groups or parameters, a tensor of another shape, a
                missing or unsupported entry. The optimizer is unchanged.
        """
        taken: dict[str, Any] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check(given, self.param_groups, len(self.averages))
            taken.update(given)
            return {**given, "state": {}}

        # the last of the hooks, so that it sees what those of the user made of the state
        handle = self.register_load_state_dict_pre_hook(take)
        before = [dict(group) for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, mine in zip(self.param_groups, before):
            for name in self.defaults:
                if name in self._never_loaded or name not in group:
                    group[name] = mine[name]
        if self._layout is None:
            self._counts = None
            if not taken["state"]:  # of a fresh optimizer: still made at the first step
                return
            self._build()
        elif not self._layout.holds(self.param_groups):
            self._build()
        assert self._layout is not None and self._counts is not None
        fill(self._layout, self._counts, taken)
        self._attach()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: options and state, each tensor with memory of its own."""
        state = {
            parameter: {name: value.detach().clone() for name, value in entries.items()}
            for parameter, entries in self.state.items()
        }
        own = ("averages", "shadow_dtype", "shadow_ema", "max_grad_norm", "_counts")
        return {
            "defaults": self.defaults,
            "state": state,
            "param_groups": self.param_groups,
            **{name: getattr(self, name) for name in own},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "averages" in state:  # a copy or a pickle; load_state_dict comes here too
            self._reset()
            state = {**state, "state": defaultdict(dict, state["state"])}
        super().__setstate__(state)

    def add_ema(self, average: Average) -> int:
        """Keep another average, which starts at the parameters; returns its index."""
        self.averages += (average,)
        if self._layout is not None:
            self._build()
        return len(self.averages) - 1

    def keep_shadows(self, dtype: torch.dtype, averages: Sequence[int] = ()) -> None:
        """Keep low-precision copies of the parameters, and of these averages, from now on.

        Raises:
            ValueError: there are copies of another dtype; no such average.
        """
        if self.shadow_dtype not in (None, dtype):
            raise ValueError(f"the optimizer keeps {self.shadow_dtype} copies, not {dtype}")
        wanted = tuple(sorted({*self.shadow_ema, *averages}))
        check_copies(self.max_grad_norm, self.averages, dtype, wanted)
        self.shadow_dtype, self.shadow_ema = dtype, wanted
        if self._layout is not None:
            self._build()

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the gradient before clipping in the last step, a 0-d device tensor.

        NaN where it was not measured: max_grad_norm=None. The next step overwrites it.
        """
        if self._tables is None:
            self._build()
        assert self._tables is not None
        return self._tables.norm[0]

    @property
    def counts(self) -> Tensor:
        """int64 ``[3]`` on the device: steps attempted, skipped, skipped in a row."""
        if self._counts is None:
            self._build()
        assert self._counts is not None
        return self._counts
