"""Few samples on a CPU: what is held from call to call gives the bits of the operators."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from fastcm.ops import dispatch, prepared
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.sampling import Churn, Sampler, held

pytestmark = pytest.mark.skipif(
    native.pointwise("noise") is None, reason="there is no C++ compiler"
)

SHAPES = [(1, 1), (1, 64), (3, 5), (7, 3, 16, 16), (64, 1023)]
KEYS = [(0, 0), (2**62 + 1, 2**32 - 65)]


def rows(shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full(shape[:1], value)


def outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """In a row, and as a network may leave them."""
    F = torch.randn(shape).to(dtype)
    return [F, F.mT.contiguous().mT]


def made(step: prepared.Step, *arguments: Any) -> prepared.Moved:
    moved = step(*arguments)
    assert moved is not None
    return moved


def pair(results: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return results if isinstance(results, tuple) else (results, None)


@contextmanager
def ops_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the operators of samplers that are called inside."""
    called: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("noise", "boundary", "euler_step", "sampler_update", "noising"):
            patch.setattr(ops, name, recorded(name, getattr(ops, name)))
        yield called


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_the_bits_of_the_operator(shape: tuple[int, ...]) -> None:
    noise = prepared.noise(shape, rng.SAMPLE)
    for seed, first in KEYS:
        wanted = ops.noise(shape, NoiseKey(seed, first_sample=first), stream=rng.SAMPLE)
        assert torch.equal(noise(seed, first), wanted)


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
    for a, b in itertools.product((1.0, 0.3, -2.7), (-1.0, 0.0)):
        step = prepared.boundary(shape, rows(shape, a), rows(shape, b))
        gc.collect()  # the coefficients live on
        for F in outputs(shape, dtype):
            x = torch.randn(shape)
            found, second = made(step, x, F, 0, 0)
            wanted = ops.boundary(x, F, rows(shape, a), rows(shape, b))
            assert found.dtype == torch.float32 and torch.equal(found, wanted) and second is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_the_bits_of_the_operator(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scales = (None, rows(shape, 0.7))
    for numbers, scale in itertools.product(((1.0, -0.7, 0.4, 0.6), (0.3, 2.5, 1.0, 80.0)), scales):
        stream = rng.SAMPLE + 7
        a, b, alpha, sigma = (rows(shape, v) for v in numbers)
        step = prepared.sampler_update(shape, a, b, alpha, sigma, stream, input_scale=scale)
        more = {} if scale is None else {"input_scale": scale, "input_dtype": torch.float32}
        for (seed, first), F in itertools.product(KEYS, outputs(shape, dtype)):
            x, key = torch.randn(shape), NoiseKey(seed, first_sample=first)
            wanted = ops.sampler_update(x, F, a, b, alpha, sigma, key, stream=stream, **more)
            for found, want in zip(made(step, x, F, seed, first), pair(wanted)):
                assert (found is None) == (want is None)
                assert found is None or (found.dtype == want.dtype and torch.equal(found, want))


class Sub(Tensor):
    """Somebody else's."""


def test_what_native_code_cannot_read_is_left_to_the_operators() -> None:
    shape = (2, 6)
    x, one = torch.randn(shape), rows(shape, 1.0)
    steps = [
        prepared.boundary(shape, one, one),
        prepared.sampler_update(shape, one, one, one, one, rng.SAMPLE + 1),
    ]
    for step, F in itertools.product(
        steps, (x.double(), x.long(), x.to("meta"), x.as_subclass(Sub), x.to(torch.complex64))
    ):
        assert step(x, F, 0, 0) is None
    assert all(step(x, x, 0, 0) is not None for step in steps)


def test_a_held_boundary_map_leaves_to_the_operator_what_it_alone_can_do() -> None:
    x, F = torch.randn(2, 6), torch.randn(2, 6)
    assert held.held_boundary(x, F, 1.0, -1.0) is None  # gradients may be asked for
    with torch.no_grad():
        found = held.held_boundary(x, F, 1.0, -1.0)
        assert found is not None and torch.equal(found, x - F)
        for left in (
            (x, F, 0.0, 1.0),  # equal to -0.0, of which another was made
            (x, F, 1.0, -0.0),
            (x.double(), F, 1.0, -1.0),
            (x.as_subclass(Sub), F, 1.0, -1.0),
            (x.t().contiguous().t(), F, 1.0, -1.0),
            (x, F.double(), 1.0, -1.0),
        ):
            assert held.held_boundary(*left) is None


@pytest.mark.parametrize("steps", [1, 3])
def test_another_output_is_sampled_by_the_operators(steps: int) -> None:
    """One evaluation is in vain, once: what a network returns is not known before."""
    calls = 0

    class Double(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            nonlocal calls
            calls += 1
            return x.double().sin()

    sampler = Sampler(Double(), Linear(), steps=steps, shape=(3,), device="cpu")
    found = [sampler(2, seed=seed) for seed in (0, 1, 0)]
    assert calls == 3 * steps + 1
    times = [float(t) for t in sampler.times]
    z = ops.noise((2, 3), NoiseKey(0), stream=rng.SAMPLE)
    wanted = sampling.multistep(Double(), Linear(), z, NoiseKey(0), times=times)
    assert torch.equal(found[0], wanted) and torch.equal(found[2], wanted)


def test_a_wrong_key_of_few_samples_is_named() -> None:
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


class Conditional(nn.Module):
    """Spoils its times, and returns what is not contiguous."""

    def __init__(self, two_times: bool) -> None:
        super().__init__()
        self.net = MLP((2, 3), width=16, depth=1, num_classes=4, two_times=two_times)
        nn.init.normal_(self.net.output.weight)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.inputs += [x, t.clone()]
        F = self.net(x, t, cond) if s is None else self.net(x, t, cond, s=s)
        for time in (t, s):
            if time is not None:
                time.fill_(torch.nan)
        return F.mT.contiguous().mT


CASES: list[tuple[Path | Parameterization, dict[str, Any]]] = [
    (Linear(), {}),
    (VariancePreserving(), {}),
    (TrigFlow(), {}),
    (Parameterization(VarianceExploding(), "cm"), {}),
    (Parameterization(VarianceExploding(), "edm"), {"precision": "bf16"}),
    (Linear(), {"precision": "bf16"}),
    (Linear(), {"compile": True}),
    (Linear(), {"method": "flow-map"}),
    (Linear(), {"method": "flow-map", "precision": "bf16"}),
    (Linear(), {"method": "ode"}),
    (Parameterization(VarianceExploding(), "edm"), {"method": "ode", "precision": "bf16"}),
    (VariancePreserving(), {"method": "ode", "solver": "ddim"}),
]
LOOPS: list[tuple[Path | Parameterization, dict[str, Any]]] = [
    (Linear(), {"method": "ode", "churn": Churn(1.0)}),
    (Linear(), {"method": "ode", "solver": "heun"}),
    (VarianceExploding(), {"method": "ode", "solver": "dpmpp_2m"}),
]
"""More than one map of (x, F) after each evaluation: their maps alone are held."""


@pytest.mark.parametrize(("path", "options"), CASES + LOOPS)
def test_samples_are_those_of_the_operators(
    path: Path | Parameterization, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Conditional(two_times=options.get("method") == "flow-map").eval()
    runs: list[list[Tensor]] = []
    for small in (held.SMALL, 0):
        monkeypatch.setattr(held, "SMALL", small)
        with ops_counted(monkeypatch) as counted:
            runs.append([])
            net.inputs = runs[-1]
            for steps in (1, 3):
                sampler = Sampler(net, path, steps=steps, shape=(2, 3), **options)
                with torch.inference_mode():  # what is held serves calls in either mode
                    runs[-1].append(sampler(5, cond=torch.arange(5) % 4))
                for n, seed in ((1, 3), (5, 2**62 + 1), (5, 3)):
                    cond = torch.arange(n) % 4
                    runs[-1].append(sampler(n, seed=seed, first_sample=9, cond=cond))
        assert bool(counted) == (small == 0 or (path, options) in LOOPS)
    assert len(runs[0]) == len(runs[1])
    for few, plain in zip(*runs):
        assert few.dtype == plain.dtype and torch.equal(few, plain)
    assert runs[0][-1].dtype == torch.float32 and not runs[0][-1].is_inference()


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
