"""The registered operators: their contracts under autograd, compile, export and vmap, and the
kernel branch behind them, run on the CPU through the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operator_cases import KEY, NAMES, F, cases, flat, operands
from tolerances import assert_close, rounding_slack
from torch import Tensor

import fastcm
from fastcm import losses, ops, rng
from fastcm.ops import Denoised, Noised, reference, registered
from fastcm.ops.operands import layout, restored


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    operator, arguments = cases()[name]
    # the fourth, of compiled code, needs a kernel that is compiled: tests/test_gpu.py
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


def gradient_inputs(name: str) -> tuple[Callable[..., Any], list[Tensor]]:
    operator, arguments = cases(torch.float64)[name]
    where = [
        i
        for i, v in enumerate(arguments)
        if isinstance(v, Tensor)
        and v.dtype == torch.float64
        and v.dim() == 3
        # the loss is differentiated in F alone
        and (operator is not F.consistency_loss or i == 0)
    ]
    tensors = [arguments[i].detach().requires_grad_() for i in where]

    def call(*values: Tensor) -> Any:
        filled = list(arguments)
        for i, value in zip(where, values):
            filled[i] = value
        out = operator(*filled)
        return out[0] if operator is F.consistency_loss else out

    return call, tensors


NOT_CHECKED = (
    *("noise", "uniform", "integers", "noising, uint8", "scale"),
    *("euler, guided", "sampler_update, with the network's input"),  # which is bfloat16
)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_CHECKED])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    call, tensors = gradient_inputs(name)
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("update", [False, True])
def test_the_gradient_of_a_guided_step_reaches_both_outputs(update: bool) -> None:
    """Also as registered, where the operator's own backward pass is taken."""
    x, v, u, a, b, c, d = operands(dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, v, u)]
    both = {"input_scale": d, "input_dtype": torch.float64}

    def call(x: Tensor, v: Tensor, u: Tensor) -> Any:
        if update:
            where = {"stream": rng.SAMPLE, "F_uncond": u, "guidance": b}
            return ops.sampler_update(x, v, a, b, c, d, KEY, **where, **both)
        return ops.euler_step(x, v, a, v_uncond=u, guidance=b, scale=c, **both)

    def registered(x: Tensor, v: Tensor, u: Tensor) -> Any:
        end = d, torch.float64
        if update:
            return F.sampler_update(x, v, a, b, c, d, KEY.tensor, rng.SAMPLE, 0, u, b, *end)
        return F.euler_step(x, None, None, None, 0, 0, v, a, u, b, c, *end)

    for way in (call, registered):
        assert torch.autograd.gradcheck(way, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_whole_step_compiles_without_a_break(dynamic: bool) -> None:
    def step(x0: Tensor, F: Tensor, key: Tensor, a: Tensor, b: Tensor) -> Tensor:
        k = fastcm.NoiseKey.wrap(key)
        pair = ops.noising(x0, torch.stack([a, b]), torch.stack([b, a]), k)
        target = Denoised(Noised(x0, b, a, k), pair[1] + F, a, b)
        loss, _ = ops.consistency_loss(F * pair[0], Noised(x0, a, b, k), a, b, target)
        moved = ops.euler_step(pair[0], F.detach(), a)
        return loss + ops.sampler_update(moved, pair[1], a, b, b, a, k, stream=20).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for B in (3, 4):
        x, v, _, a, b, _, _ = operands(B)
        results = []
        for function in (step, compiled):
            leaf = v.clone().requires_grad_()
            out = function(x, leaf, KEY.tensor, a, b)
            out.backward()
            results.append((out.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_noising_and_the_sampler_update_export(no_native_code: None) -> None:
    class Both(torch.nn.Module):
        def forward(self, x: Tensor, a: Tensor, b: Tensor, key: Tensor) -> Tensor:
            k = fastcm.NoiseKey.wrap(key)
            noisy = ops.noising(x, a, b, k)
            assert isinstance(noisy, Tensor)
            return ops.sampler_update(noisy, x, a, b, b, a, k, stream=rng.SAMPLE)

    x, _, _, a, b, _, _ = operands()
    exported = torch.export.export(Both(), (x, a, b, KEY.tensor))
    other = fastcm.NoiseKey(9, 9)
    assert torch.equal(exported.module()(x, a, b, other.tensor), Both()(x, a, b, other.tensor))


def test_vmap_is_refused_with_the_reason() -> None:
    x, v, _, a, b, c, d = operands()
    for call in (
        lambda x: ops.noising(x, a, b, KEY),
        lambda x: ops.boundary(x, v, a, b),
        lambda x: ops.euler_step(x, v, a),
        lambda x: ops.sampler_update(x, v, a, b, c, d, KEY, stream=20),
        lambda x: ops.consistency_loss(x, v, a, b, v)[1],
    ):
        with pytest.raises(RuntimeError, match="cannot be mapped by vmap"):
            torch.vmap(call)(x[None])


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_launched_on_the_device_of_their_operands(
    name: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    operator, arguments = cases()[name]
    inside: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            assert inside
            return self.kernel[grid]

    monkeypatch.setattr(registered.launch, "device_of", device_of)
    monkeypatch.setattr(registered, "wrap_triton", Watched)
    with torch.no_grad():
        operator(*[v.detach() if isinstance(v, Tensor) else v for v in arguments])
    assert not inside


def test_the_device_of_a_tensor_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index, guarded in ((0, False), (1, True)):
        there = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        assert isinstance(registered.launch.device_of(there), torch.cuda.device) == guarded


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_branch_agrees_with_the_reference_branch(name: str, request: Any) -> None:
    operator, arguments = cases()[name]
    arguments = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    with torch.no_grad():
        expected = flat(operator(*arguments))
        request.getfixturevalue("kernels")
        found = flat(operator(*arguments))
    for one, other in zip(found, expected):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.stride() == other.stride()
        if not one.is_floating_point():
            assert torch.equal(one, other)
            continue
        assert_close(
            one,
            other.double(),
            other,
            slack=2e-5 * (1 + other.double().abs()) + rounding_slack(other, one.dtype),
        )


def test_noise_alone_is_a_kernel_too(kernels: None) -> None:
    for dtype in (torch.float32, torch.float16):
        made = ops.noise((3, 2, 5), KEY, stream=rng.SAMPLE, first_sample=4, dtype=dtype)
        exact = reference.noise((3, 2, 5), KEY, stream=rng.SAMPLE, first_sample=4)
        assert made.dtype == dtype
        torch.testing.assert_close(made, exact.to(dtype), rtol=1e-3, atol=4e-6)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "mixed"])
def test_other_layouts_give_the_same_numbers(layout: str, kernels: None) -> None:
    x, v, u, a, b, c, d = operands(3, (4, 6, 5))
    dense = x, v, u
    if layout == "channels_last":
        other = tuple(t.to(memory_format=torch.channels_last) for t in dense)
    elif layout == "strided":
        other = tuple(torch.stack([t, t], dim=-1)[..., 0] for t in dense)
    else:
        other = x, v.to(memory_format=torch.channels_last), u.transpose(2, 3).contiguous().mT
    for x_, v_, u_ in (dense, other):
        results = [
            ops.boundary(x_, v_, a, b),
            ops.euler_step(x_, v_, a, v_uncond=u_, guidance=c),
            ops.noising(x_, a, b, KEY),
            ops.sampler_update(x_, v_, a, b, c, d, KEY, stream=rng.SAMPLE),
            ops.consistency_loss(v_, x_, a, b, u_)[1],
            F.scale(x_, a, torch.float32),
        ]
        if x_ is dense[0] and v_ is dense[1]:
            first = results
    assert all(torch.equal(one, two) for one, two in zip(first, results))


def test_channels_last_is_not_copied_where_no_noise_is_made(kernels: None) -> None:
    x, v, _, a, b, _, _ = operands(3, (4, 6, 5))
    x, v = (t.to(memory_format=torch.channels_last) for t in (x, v))
    views, back = layout(x, v)
    assert [t.data_ptr() for t in views if t is not None] == [x.data_ptr(), v.data_ptr()]
    assert views[0] is not None and torch.equal(restored(views[0], back), x)
    assert ops.boundary(x, v, a, b).is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_gradient_is_the_references(kernels: None) -> None:
    """Autograd through the kernel branch against float64 autograd through the specification."""
    x, v, u, a, b, c, d = operands(3, (7, 11))
    x0 = torch.randint(256, x.shape, dtype=torch.uint8)
    for metric in (losses.SquaredL2(), losses.L2(), losses.L1(), losses.PseudoHuber()):
        gradients = []
        for dtype in (torch.float32, torch.float64):
            leaf = v.detach().to(dtype, copy=True).requires_grad_()
            target = Denoised(Noised(x0, d, c, KEY), u.to(dtype), b, a)
            door = ops if dtype == torch.float32 else reference
            mean, _ = door.consistency_loss(
                leaf, Noised(x0, c, d, KEY), a, b, target, metric=metric, weight=d
            )
            mean.backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad.double())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_metric_without_a_kernel_is_evaluated_on_the_boundary_map(kernels: None) -> None:
    class Cauchy(losses.SampleMetric):
        def value(self, r: Tensor) -> Tensor:
            return r.square().flatten(1).sum(1).log1p()

        def gradient(self, r: Tensor) -> Tensor:
            raise AssertionError("only the kernels' own metrics need it")

    x, v, u, a, b, c, d = operands()
    x0 = torch.randint(256, x.shape, dtype=torch.uint8)
    target = Denoised(Noised(x0, d, c, KEY), u, b, a)
    for metric in (Cauchy(), lambda f, y: (f - y).abs().flatten(1).amax(1)):
        leaf = v.clone().requires_grad_()
        mean, _ = ops.consistency_loss(leaf, x, a, b, target, metric=metric, weight=c)
        other = v.clone().requires_grad_()
        exact, _ = reference.consistency_loss(other, x, a, b, target, metric=metric, weight=c)
        gradients = [torch.autograd.grad(m, t)[0] for m, t in ((mean, leaf), (exact, other))]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5)


def test_training_through_the_kernels_gives_the_same_run(request: pytest.FixtureRequest) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        net = fastcm.networks.MLP(shape=(3,), width=8, depth=1)
        data = torch.linspace(-1, 1, 48).reshape(16, 3)
        objective = fastcm.ConsistencyTraining()
        t = fastcm.Trainer(net, objective, data=data, batch_size=4, compile=False).fit(5)
        return torch.cat([p.flatten() for p in t.net.parameters()]).detach()

    plain = run()
    request.getfixturevalue("kernels")
    torch.testing.assert_close(run(), plain, rtol=1e-3, atol=1e-4)
