"""The sampler object: batches, graphs, streams, precision; samples depend on none of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded_graphs import RecordedGraph
from torch import Tensor, nn

import fastcm
from fastcm import Sampler
from fastcm.networks import MLP
from fastcm.sampling.engine import batches, is_one_batch
from fastcm.sampling.graph_cache import CALLS_TO_DECIDE


class Pointwise(nn.Module):
    """Its rows and elements are computed alike in a batch of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        assert not self.training
        self.calls.append(tuple(x.shape))
        shift = t if cond is None else t + 0.1 * cond
        out: Tensor = (self.scale * x).sin() + shift[:, None]
        return out


def sampler(net: nn.Module | None = None, **options: Any) -> Sampler:
    options = {"shape": (6,), "null_condition": 9, "steps": 2, **options}
    return Sampler(Pointwise() if net is None else net, fastcm.Linear(), **options)


LOOPS: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "ten steps": {"steps": 10},
    "euler": {"method": "ode", "steps": 5},
    "euler, long": {"method": "ode", "steps": 20},
    "heun": {"method": "ode", "solver": "heun", "steps": 4},
    "heun, long": {"method": "ode", "solver": "heun", "steps": 6},
    "dpmpp_2m, long": {"method": "ode", "solver": "dpmpp_2m", "steps": 9},
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_replayed_samples_are_bitwise_the_launched_ones(
    loop: str, guided: bool, recorded_graphs: type[RecordedGraph]
) -> None:
    launched = sampler(**LOOPS[loop], graph="off", batch_size=8)
    replayed = sampler(**LOOPS[loop], graph="on", batch_size=8)
    for i in range(CALLS_TO_DECIDE + 3):
        call: dict[str, Any] = {"n": 11, "seed": i, "first_sample": 100 * i}
        if guided:
            call |= {"cond": torch.arange(11) % 3 + i, "guidance": 2.0}
        assert torch.equal(launched(**call), replayed(**call))
    assert recorded_graphs.made >= 1 and recorded_graphs.replays >= 3


def test_a_loop_is_one_graph_and_a_long_one_a_graph_of_each_evaluation(
    recorded_graphs: type[RecordedGraph],
) -> None:
    for steps, replays in ((8, 1), (9, 9)):
        s = sampler(steps=steps, graph="on")
        for _ in range(CALLS_TO_DECIDE):
            s(4)
        before = recorded_graphs.replays
        s(4)
        assert recorded_graphs.replays == before + replays


def test_weights_that_change_in_place_change_the_replayed_samples(
    recorded_graphs: type[RecordedGraph],
) -> None:
    net = Pointwise()
    s = sampler(net, graph="on").prepare(4)
    for _ in range(2):
        with torch.no_grad():
            net.scale.mul_(0.5)
        assert torch.equal(s(4), sampler(net)(4)) and recorded_graphs.made == 1
    net.scale = nn.Parameter(torch.tensor(0.7))  # elsewhere in memory
    assert torch.equal(s(4), sampler(net)(4)) and recorded_graphs.made == 2


def test_results_of_a_graph_are_not_overwritten_by_the_next(
    recorded_graphs: type[RecordedGraph],
) -> None:
    s = sampler(graph="on").prepare(4)
    first = s(4, seed=1)
    kept = first.clone()
    s(4, seed=2)
    assert torch.equal(first, kept)


def test_preparation_captures_the_largest_batch_first(
    recorded_graphs: type[RecordedGraph],
) -> None:
    lines: list[str] = []
    s = sampler(steps=1, graph="on", log=lines.append).prepare(3, 64, 1)
    assert recorded_graphs.made == 3 and len(lines) == 3
    s.net.calls.clear()
    for n in (1, 3, 4, 64):
        s(n)
    assert s.net.calls == []  # nothing but replays


@given(st.integers(0, 3000), st.integers(1, 600), st.booleans())
def test_batches_cover_all_samples_in_few_shapes(n: int, largest: int, few_shapes: bool) -> None:
    cuts = list(batches(n, largest, few_shapes=few_shapes))
    assert [start for start, _, _ in cuts] == [0, *(end for _, end, _ in cuts)][: len(cuts)]
    assert (cuts[-1][1] if cuts else 0) == n
    assert is_one_batch(n, largest, few_shapes=few_shapes) == (cuts == [(0, n, n)])
    for start, end, size in cuts:
        assert 0 < end - start <= size <= largest
        if few_shapes:
            assert size == largest or size.bit_count() == 1
            assert size <= max(32, 1.25 * (end - start))
        else:
            assert size == end - start


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_do_not_depend_on_batches_padding_or_order(steps: int) -> None:
    whole = sampler(steps=steps)(40, seed=5, first_sample=7)
    for size in (1, 3, 16):
        assert torch.equal(sampler(steps=steps, batch_size=size)(40, seed=5, first_sample=7), whole)
    s = sampler(steps=steps)
    s.engine.has_few_shapes = True
    assert torch.equal(s(40, seed=5, first_sample=7), whole)
    parts = {at: s(5, seed=5, first_sample=7 + at) for at in (35, 0, 15, 5, 30, 20, 25, 10)}
    assert torch.equal(torch.cat([parts[at] for at in sorted(parts)]), whole)


@pytest.mark.parametrize("few_shapes", [False, True])
def test_a_network_of_matrix_products_agrees_to_rounding(few_shapes: bool) -> None:
    net = MLP((6,), width=32, depth=2)
    nn.init.normal_(list(net.parameters())[-1])
    whole = sampler(net)(33)
    s = sampler(net, batch_size=20)
    s.engine.has_few_shapes = few_shapes
    torch.testing.assert_close(s(33), whole, rtol=1e-5, atol=1e-5)


def test_a_stream_yields_the_samples_of_one_call() -> None:
    s, cond = sampler(), torch.arange(25) % 4
    whole = s(25, seed=3, first_sample=50, cond=cond, guidance=1.5)
    options: dict[str, Any] = {"seed": 3, "first_sample": 50, "guidance": 1.5}
    for given_cond in (cond, lambda index, count: cond[index - 50 : index - 50 + count]):
        parts = list(s.stream(25, batch=10, cond=given_cond, **options))
        assert [len(part) for part in parts] == [10, 10, 5]
        assert torch.equal(torch.cat(parts), whole)
    assert list(s.stream(0)) == []


def test_a_stream_computes_a_batch_when_it_is_asked_for() -> None:
    s = sampler(steps=1)
    stream = s.stream(20, batch=8)
    assert s.net.calls == []
    next(stream)
    assert s.net.calls == [(8, 6)]


def test_threads_share_a_sampler() -> None:
    s = sampler(MLP((6,), width=32, depth=2).train(), steps=3)
    expected = [s(16, seed=i) for i in range(8)]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = s(16, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))
    assert all(module.training for module in s.net.modules())


def test_bf16_is_what_the_network_sees_and_nothing_else() -> None:
    seen: list[tuple[Any, ...]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            out: Tensor = self.inner(x)
            seen.append((x.dtype, t.dtype, out.dtype))
            return out

    net = Spy()
    x = sampler(net, precision="bf16", steps=3)(10)
    assert seen == 3 * [(torch.bfloat16, torch.float32, torch.bfloat16)]
    assert x.dtype == torch.float32
    full = sampler(net, steps=3)(10)
    assert 0 < (x - full).abs().max() < 0.05 * full.abs().max()


def test_a_compiled_network_samples_alike() -> None:
    net = MLP((6,), width=16, depth=1)
    nn.init.normal_(list(net.parameters())[-1])
    compiled = sampler(net, compile=True)
    for n in (3, 4, 10):
        torch.testing.assert_close(compiled(n), sampler(net)(n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": "on"}, "graph='on' needs a GPU"),
        ({"graph": "loop"}, "graph must be one of auto, on, off, got 'loop'"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16', got 'fp16'"),
        ({"method": "sde"}, "method must be one of multistep, ode, flow-map, got 'sde'"),
        (
            {"solver": "rk45"},
            "solver must be one of euler, heun, midpoint, rk4, ddim, dpmpp_2m, got 'rk45'",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(device="cpu", **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be >= 0, got -1"),
        ({"n": 2, "seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"n": 2, "seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"n": 2, "first_sample": -3}, ValueError, "first_sample must be in"),
        ({"n": 2, "first_sample": 2**32 - 1}, ValueError, r"first_sample \+ n must be <= 2\*\*32"),
        ({"n": 2, "cond": torch.zeros(3)}, ValueError, "one row per sample, 2, got shape"),
        ({"n": 2, "cond": [0, 1]}, TypeError, r"cond\[0\] must be a tensor"),
        ({"n": 2, "guidance": 2.0}, ValueError, "guidance needs cond"),
        ({"n": 2, "guidance": [2.0]}, ValueError, "one weight for each of the 2 times"),
    ],
)
def test_calls_out_of_range_are_refused(
    call: dict[str, Any], error: type[Exception], message: str
) -> None:
    s = sampler()
    with pytest.raises(error, match=message):
        s(**call)
    assert s.net.calls == []


@pytest.mark.parametrize("number", [1.5, 2.0, "2"])
def test_numbers_of_steps_are_ints(number: Any) -> None:
    for name in ("steps", "batch_size"):
        with pytest.raises(TypeError, match=rf"{name} must be an int, got {number!r}"):
            sampler(**{name: number})


def test_options_of_the_ode_are_refused_elsewhere() -> None:
    for method in ("multistep", "flow-map"):
        with pytest.raises(ValueError, match=f"solver has a meaning only .* got '{method}'"):
            sampler(method=method, solver="heun")
    assert sampler(method="ode").solver == "euler"


def test_a_path_by_its_name_is_refused() -> None:
    with pytest.raises(TypeError, match="path must be a Path or a Parameterization, got 'linear'"):
        Sampler(Pointwise(), "linear")  # type: ignore[arg-type]


def test_labels_beyond_the_classes_are_named() -> None:
    s = Sampler(MLP((6,), width=8, num_classes=3), fastcm.Linear(), shape=(6,))
    assert s(2, cond=torch.tensor([0, 3])).shape == (2, 6)  # 3 stands for none
    for cond in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 3\), or 3 for none"):
            s(2, cond=torch.tensor(cond))


def test_a_stream_refuses_at_once() -> None:
    s = sampler()
    for options, message in (
        ({"total": -1}, "n must be >= 0"),
        ({"total": 3, "batch": 0}, "batch must be >= 1, got 0"),
        ({"total": 3, "cond": torch.zeros(2)}, "one row per sample, 3"),
        ({"total": 3, "seed": -1}, "seed must be in"),
        ({"total": 3, "guidance": [1.0]}, "one weight for each of the 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            s.stream(**options)  # type: ignore[arg-type]


def test_no_samples_need_no_call() -> None:
    s = sampler()
    assert s(0).shape == (0, 6) and s.net.calls == []


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
