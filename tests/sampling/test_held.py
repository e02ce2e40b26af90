"""Few samples on a CPU: what is held from call to call gives the bits of the operators."""

from __future__ import annotations

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import profile

from fastcm import NoiseKey, ops, rng, sampling
from fastcm.kernels import native
from fastcm.networks import MLP
from fastcm.networks.modes import to_eval, to_training
from fastcm.ops import dispatch
from fastcm.paths import Linear
from fastcm.sampling import Sampler, held

pytestmark = pytest.mark.skipif(
    native.pointwise("noise") is None, reason="there is no C++ compiler"
)

SHAPES = [(1, 1), (1, 64), (3, 5), (7, 3, 16, 16), (64, 1023)]


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_the_bits_of_the_operator(shape: tuple[int, ...]) -> None:
    assert held.few_of_cpu(shape[0])
    for seed, first in ((0, 0), (2**62 + 1, 2**32 - 9)):
        wanted = ops.noise(shape, NoiseKey(seed, first_sample=first), stream=rng.SAMPLE)
        assert torch.equal(held.held_noise(shape, seed, first), wanted)


def test_nothing_is_held_where_somebody_looks_on() -> None:
    x, seen = torch.zeros(2, 3), []

    def look(x: Tensor) -> Tensor:
        seen.append(held.few_of_cpu(2) or held.few(x, 2))
        return x

    with profile():
        look(x)
    with FakeTensorMode():
        look(torch.zeros(2, 3))
    torch.func.jvp(look, (x,), (x,))
    torch.compile(look, backend="eager")(x)
    assert not any(seen) and len(seen) == 4
    sampler = Sampler(MLP((3,), width=16, depth=1), Linear(), steps=2, shape=(3,))
    with profile() as records:
        sampler(2)
    recorded = {event.key for event in records.key_averages()}
    assert {f"fastcm: {name}" for name in ("noise", "sampler_update", "boundary")} <= recorded
    assert held.few_of_cpu(held.SMALL) and held.few(x, 2)
    assert not held.few_of_cpu(held.SMALL + 1) and not held.few(x, held.SMALL + 1)
    assert not held.few(x.to("meta"), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_boundary_map_has_the_bits_of_the_operator(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for a, b in itertools.product((1.0, 0.3, -2.7), (-1.0, 1e-3)):
        x, F = torch.randn(shape), torch.randn(shape).to(dtype)
        for _ in range(2):
            found = held.held_boundary(x, F, a, b)
            gc.collect()  # the coefficients live on
            assert found is not None
            wanted = ops.boundary(x, F, held.plain_rows(x, a), held.plain_rows(x, b))
            assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_the_bits_of_the_operator(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for key, first in ((NoiseKey(0), 0), (NoiseKey(2**62 + 1, 2**33 + 7, 9), 2**31)):
        for numbers in ((1.0, -0.7, 0.4, 0.6), (0.3, 2.5, 1.0, 80.0)):
            x, F = torch.randn(shape), torch.randn(shape).to(dtype)
            for stream in (rng.SAMPLE + 1, rng.SAMPLE + 7):
                found = held.held_update(x, F, numbers, key, stream, first)
                rows = [held.plain_rows(x, v) for v in numbers]
                wanted = ops.sampler_update(x, F, *rows, key, stream=stream, first_sample=first)
                assert found is not None and torch.equal(found, wanted)
    left = torch.randn(2, 6).requires_grad_()
    assert held.held_update(left, left, (1.0, 1.0, 1.0, 1.0), NoiseKey(0), 17, 0) is None
    assert (
        held.held_update(torch.randn(2, 6), left, (0.0, 1.0, 1.0, 1.0), NoiseKey(0), 17, 0) is None
    )


class Sub(Tensor):
    """Somebody else's."""


def test_what_the_operator_alone_can_do_is_left_to_it() -> None:
    x, F = torch.randn(2, 6), torch.randn(2, 6)
    assert held.held_boundary(x, F, 1.0, -1.0) is not None
    for left in (
        (x, F, 0.0, 1.0),  # equal to -0.0, of which another was made
        (x, F, 1.0, -0.0),
        (x.double(), F, 1.0, -1.0),
        (x, F.double(), 1.0, -1.0),
        (x, F.long(), 1.0, -1.0),
        (x, F.to("meta"), 1.0, -1.0),
        (x, F.as_subclass(Sub), 1.0, -1.0),
        (x.t().contiguous().t(), F, 1.0, -1.0),
        (x, F.t().contiguous().t(), 1.0, -1.0),
        (x, F.clone().requires_grad_(), 1.0, -1.0),
        (x.clone().requires_grad_(), F, 1.0, -1.0),
    ):
        assert held.held_boundary(*left) is None
    with torch.no_grad():
        assert held.held_boundary(x.clone().requires_grad_(), F, 1.0, -1.0) is not None


def test_a_wrong_key_is_named_by_a_call_that_holds_its_operators() -> None:
    z, options = torch.randn(2, 3), {"times": [1.0, 0.5]}
    for key, first, message in (
        (NoiseKey(0), -1, "first_sample must be in"),
        (NoiseKey(0, device="meta"), 0, "key must be on cpu"),
        (3, 0, "key must be a NoiseKey"),
    ):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
            sampling.multistep(
                MLP((3,), width=16, depth=1), Linear(), z, key, first_sample=first, **options
            )


def test_samples_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    net = MLP((2, 3), width=16, depth=1).eval()
    nn.init.normal_(net.output.weight)
    options: list[dict[str, Any]] = [{}, {"method": "ode"}, {"method": "ode", "solver": "heun"}]
    runs: list[list[Tensor]] = []
    for small in (held.SMALL, 0):
        monkeypatch.setattr(held, "SMALL", small)
        runs.append(
            [
                Sampler(net, Linear(), steps=steps, shape=(2, 3), **more)(n, seed=3)
                for steps, n, more in itertools.product((1, 3), (1, 5), options)
            ]
        )
    for few, plain in zip(*runs):
        assert torch.equal(few, plain)


def test_few_samples_are_differentiated_and_traced_like_many() -> None:
    net = MLP((3,), width=16, depth=1)
    nn.init.normal_(net.output.weight)
    z, key = torch.randn(2, 3), NoiseKey(0)
    out = sampling.multistep(net, Linear(), z, key, times=[1.0])
    out.sum().backward()
    assert all(p.grad is not None for p in net.output.parameters())
    times = [1.0, 0.5]
    traced = torch.compile(
        lambda z: sampling.multistep(net, Linear(), z, key, times=times), backend="eager"
    )
    with torch.no_grad():
        wanted = sampling.multistep(net, Linear(), z, key, times=times)
        torch.testing.assert_close(traced(z), wanted)


def test_without_native_code_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_native", lambda: False)
    assert not held.few(torch.zeros(2, 3), 2) and not held.few_of_cpu(2)


def test_threads_share_what_is_held() -> None:
    net = MLP((3,), width=16, depth=1).eval()
    sampler = Sampler(net, Linear(), steps=2, shape=(3,))
    wanted = [sampler(2, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: sampler(2, seed=seed), range(40)))
    assert all(map(torch.equal, found, wanted))


def test_a_call_leaves_gradients_as_they_were() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            assert not torch.is_grad_enabled()
            raise RuntimeError("the network's")

    sampler = Sampler(Failing(), Linear(), shape=(3,), device="cpu")
    for tracked in (True, False):
        with torch.set_grad_enabled(tracked):
            with pytest.raises(RuntimeError, match="the network's"):
                sampler(1)
            assert torch.is_grad_enabled() == tracked


def test_every_kind_of_module_is_put_in_eval_mode_and_back() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Dropout(0.5)
            self.scripted = torch.jit.script(nn.Dropout(0.5))

    net = Both()
    modules = list(net.modules())
    before = to_eval(net)
    assert len(before) == len(modules) and not any(m.training for m in modules)
    x = torch.ones(64)
    assert torch.equal(net.plain(x), x) and torch.equal(net.scripted(x), x)
    to_training(before)
    assert all(m.training for m in modules)
    assert (net.plain(x) == 0).any() and (net.scripted(x) == 0).any()
