"""Where the time of a step goes: it adds up, nothing is disturbed, and what is told apart."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcm
from fastcm import ConsistencyDistillation, ConsistencyTraining, MeanFlow, Trainer
from fastcm.networks import MLP
from fastcm.tracing import part
from fastcm.training import Profiler, shares
from fastcm.training.shares import KERNELS

DATA = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def teacher() -> MLP:
    torch.manual_seed(3)
    return MLP(shape=(6,), width=16, depth=1)


def trained(objective: Any, *callbacks: Any, steps: int = 9, **options: Any) -> Trainer:
    torch.manual_seed(0)
    two_times = isinstance(objective, MeanFlow)
    net = options.pop("net", None) or MLP(shape=(6,), width=16, depth=1, two_times=two_times)
    if options.pop("stock", False):
        options["optimizer"] = torch.optim.AdamW(net.parameters())
    given = {"data": DATA, "batch_size": 16, "compile": False, "progress": False, **options}
    return Trainer(net, objective, callbacks=callbacks, log=lambda _: None, **given).fit(steps)


class Clock:
    """A callback that remembers when it was called, for a step each."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, trainer: Trainer, event: str) -> None:
        if event == "step":
            self.at.append(time.perf_counter())


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (ConsistencyTraining, {}),
        (ConsistencyTraining, {"accumulate": 2, "stock": True}),
        (lambda: ConsistencyDistillation(teacher()), {"precision": "bf16"}),
        (MeanFlow, {}),
        (ConsistencyTraining, {"compile": True}),
    ],
    ids=["CT", "accumulated", "CD", "MeanFlow", "compiled"],
)
def test_a_training_that_is_watched_takes_the_same_steps_and_its_parts_add_up(
    objective: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    profiler = Profiler(tmp_path / "profile", after=3, steps=3)
    before, after = Clock(), Clock()
    watched = trained(objective(), before, profiler, after, **options)
    plain = trained(objective(), **options)
    for a, b in zip(watched.ema_network().parameters(), plain.ema_network().parameters()):
        assert torch.equal(a, b)
    assert not watched.net._forward_hooks and not watched.net._forward_pre_hooks

    found = profiler.shares
    assert found is not None and found.steps == 3
    assert 3 * found.total >= 1e3 * (before.at[8] - after.at[5])
    compiled = bool(options.get("compile"))
    expected = {"data", "network, forward", "network, backward", "norm to clip", "host"}
    # torch 2.11 records nothing inside of compiled code
    assert found.ms.keys() >= expected | ({"noising"} if not compiled else set()) and all(
        ms > 0 for ms in found.ms.values()
    )
    assert ("around them" in found.ms) is not compiled and bool(found.notes) is compiled
    assert "other" not in found.ms

    said = (tmp_path / "profile" / "table.txt").read_text()
    assert said == f"{found}\n" and "steps 7 to 9 on cpu" in said and "100.0 %" in said
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert shares(trace["traceEvents"]).ms == found.ms


def test_the_parts_add_up_to_the_wall_time_of_the_steps(tmp_path: Path) -> None:
    class Slow(MLP):
        def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            time.sleep(0.05)
            return super().forward(x, t)

    profiler, before, after = Profiler(tmp_path, after=1, steps=4), Clock(), Clock()
    net = Slow(shape=(6,), width=16, depth=1)
    trained(fastcm.FlowMatching(), before, profiler, after, net=net)
    found = profiler.shares
    assert found is not None
    # from the end of the fifth step, where the trace begins, to that of the ninth
    assert 4e-3 * found.total == pytest.approx(before.at[8] - after.at[4], rel=0.05)
    assert sum(found.ms.values()) == pytest.approx(found.total)
    assert found.ms["network, forward"] > 50


def test_a_slow_source_shows_as_data(tmp_path: Path) -> None:
    class Slow:
        def __iter__(self) -> Iterator[Tensor]:
            while True:
                time.sleep(0.03)
                yield DATA[:16]

    profiler = Profiler(tmp_path, after=1, steps=2)
    trained(fastcm.FlowMatching(), profiler, data=Slow(), steps=5)
    assert profiler.shares is not None
    assert profiler.shares.ms["data"] > 25
    assert max(profiler.shares.ms, key=lambda name: profiler.shares.ms[name]) == "data"


def test_a_run_that_is_stopped_leaves_no_profiler_behind(
    tmp_path: Path, default_handlers: None
) -> None:
    def stop(trainer: Trainer, event: str) -> None:
        if trainer.step == 5:
            signal.raise_signal(signal.SIGTERM)

    profiler = Profiler(tmp_path / "profile", after=1, steps=3)
    trainer = trained(ConsistencyTraining(), stop, profiler)
    assert trainer.interrupted is not None and profiler.shares is None
    assert not torch.autograd._profiler_enabled() and not trainer.net._forward_hooks
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("given", [{"after": 0}, {"steps": 0}])
def test_what_makes_no_profile_is_refused(given: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="after and steps must be >= 1"):
        Profiler(tmp_path, **given)


def test_without_a_profiler_a_part_is_nothing() -> None:
    assert part("one") is part("another")


def test_a_trace_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no step of a fastcm training"):
        shares([{"ph": "X", "name": "aten::add", "cat": "cpu_op", "ts": 0.0, "dur": 1.0, "tid": 1}])


def event(name: str, cat: str, start: float, stop: float, launch: int | None = None) -> Any:
    return {
        **{"ph": "X", "name": name, "cat": cat, "ts": start, "dur": stop - start},
        **{"tid": 7, "args": {} if launch is None else {"correlation": launch}},
    }


def mark(name: str, start: float, stop: float) -> Any:
    return event(f"fastcm: {name}", "user_annotation", start, stop)


def launched(i: int, at: float, name: str, start: float, stop: float, cat: str = "kernel") -> Any:
    """A launch by the host, and its kernel."""
    call = event("cudaLaunchKernel", "cuda_runtime", at, at + 1, i)
    return [call, event(name, cat, start, stop, i)]


def test_on_a_gpu_the_parts_are_those_of_the_kernels_by_what_launched_them() -> None:
    """As torch's profiler writes it of an eager step; the autograd thread launches, too."""
    backward = launched(7, 62, "gemm_grad", 100, 150)
    backward[0]["tid"] = 99
    events = [
        *(mark("step", 0, 200), mark("data", 1, 10), mark("loss", 10, 60)),
        *(mark("network", 20, 40), mark("backward", 60, 70), mark("sweep", 70, 90)),
        mark("norm", 71, 75),
        event("fastcm: network", "gpu_user_annotation", 30, 60),
        *launched(1, 2, "Memcpy HtoD", 5, 10, "gpu_memcpy"),
        *launched(2, 12, "elementwise", 15, 16),
        *launched(3, 13, "noising_kernel", 16, 20),
        *launched(4, 21, "gemm", 30, 60),
        *launched(5, 41, "loss_kernel", 60, 65),
        *launched(6, 61, "gemm_grad", 70, 100),
        *backward,
        *launched(8, 72, "grad_norm_kernel", 150, 152),
        *launched(9, 76, "sweep_kernel", 152, 160),
        *launched(10, 95, "mystery", 155, 161),  # beside another: it counts from where that ends
    ]
    found = shares(events)
    assert {name: round(1e3 * ms, 6) for name, ms in found.ms.items()} == {
        **{"data": 5, "network, forward": 30, "network, backward": 80, "noising": 4},
        **{"boundary and loss": 5, "around them": 1, "norm to clip": 2, "Adam and averages": 8},
        **{"other": 1, "host": 64},
    }
    assert math.isclose(found.total, 0.2) and not found.notes


def test_kernels_of_a_graph_are_told_apart_by_their_names_and_order() -> None:
    names = (
        *("gather", "uniform_kernel", "elementwise", "noising_kernel", "gemm", "boundary_kernel"),
        *("gemm", "loss_partial_kernel", "loss_finish_kernel", "gemm_grad", "scale_kernel"),
        *("gemm_grad", "grad_norm_kernel", "tick_kernel", "sweep_kernel_0", "elementwise"),
    )
    events: list[Any] = []
    for step in range(2):
        begin = 100.0 * step
        call = event("cudaGraphLaunch", "cuda_runtime", begin + 5, begin + 6, step)
        events += [mark("step", begin, begin + 100), mark("data", begin, begin + 4), call]
        events += [
            event(name, "kernel", begin + 10 + 2 * i, begin + 12 + 2 * i, step)
            for i, name in enumerate(names)
        ]
    found = shares(events)
    assert {name: round(1e3 * ms, 6) for name, ms in found.ms.items()} == {
        **{"network, forward": 4, "network, backward": 4, "noising": 4, "boundary and loss": 8},
        **{"norm to clip": 2, "Adam and averages": 4, "other": 6, "host": 68},
    }
    assert found.steps == 2 and "CUDA graph" in found.notes[0]


def test_a_graph_without_our_loss_is_not_told_apart_further_than_it_can_be() -> None:
    events = [
        mark("step", 0, 50),
        event("cudaGraphLaunch", "cuda_runtime", 1, 2, 3),
        event("gemm", "kernel", 10, 30, 3),
        event("sweep_kernel", "kernel", 30, 40, 3),
    ]
    found = shares(events)
    assert {n: round(1e3 * ms) for n, ms in found.ms.items()} == {
        **{"Adam and averages": 10, "other": 20, "host": 20}
    }


def test_every_kernel_of_a_step_has_its_part() -> None:
    found = {
        name
        for file in (Path(fastcm.__file__).parent / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), flags=re.M)
    }
    of_a_network, of_a_sampler = "attention_jvp_kernel", "sampler_update_kernel"
    assert found - {of_a_network, of_a_sampler} == KERNELS.keys()
