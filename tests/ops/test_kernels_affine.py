"""Boundary, its backward, Euler step and sampler update against the float64 reference."""

from __future__ import annotations

import pytest
import tolerances
import torch
from torch import Tensor

from fastcm import rng
from fastcm.kernels.affine import launch_boundary, launch_euler, launch_sampler_update, launch_scale
from fastcm.kernels.launch import LaunchConfig
from fastcm.kernels.noising import State
from fastcm.ops import reference
from fastcm.ops.reference import Noised

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 8), (2, 0), (3, 1), (1, 3), (3, 1023), (1, 1024), (3, 3072), (1, 4097)]


def coefficients(count: int, B: int, device: torch.device) -> list[Tensor]:
    return [torch.rand(B, device=device) + 0.5 for _ in range(count)]


def make_state(form: str, B: int, D: int, device: torch.device):
    """An operand for the reference and for the kernels, and the allowance for its noise."""
    if form == "tensor":
        x = torch.randn(B, D, device=device)
        return x, State(x), 0.0
    key = rng.NoiseKey(2**40, 2**33 + 5, 2**32 - 2, device=device)
    x0 = torch.randn(B, D, device=device)
    if form == "noised uint8":
        x0 = torch.randint(0, 256, (B, D), dtype=torch.uint8, device=device)
    alpha, sigma = coefficients(2, B, device)
    slack = tolerances.noise_slack(x0.shape, key, 4, 3) * sigma[:, None]
    return Noised(x0, alpha, sigma, key, 4, 3), State(x0, alpha, sigma, key.tensor, 4, 3), slack


def exactly(x):
    return x if isinstance(x, Noised) else x.double()


@pytest.mark.parametrize("form", ["tensor", "noised", "noised uint8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_the_boundary_map_agrees_with_the_reference(B, D, dtype, form, device):
    x, state, slack = make_state(form, B, D, device)
    F = torch.randn(B, D, device=device).to(dtype)
    a, b = coefficients(2, B, device)
    out = torch.empty(B, D, device=device)
    launch_boundary(state, F, a, b, out)
    exact, plain = (reference.boundary(x, f, a, b) for f in (F.double(), F))
    tolerances.assert_close(out, exact, plain, slack * 1.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_boundary_map_is_the_identity_where_a_is_1_and_b_is_0(dtype, device):
    x = torch.randn(3, 100, device=device).to(dtype)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    out = torch.empty_like(x)
    launch_boundary(x, torch.randn_like(x), one, zero, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("B", "D"), [(0, 8), (3, 1), (3, 1023), (1, 4097)])
def test_scale_gives_both_gradients_of_the_boundary_map(B, D, dtype, device):
    g = torch.randn(B, D, device=device)
    a, b = coefficients(2, B, device)
    for_F = torch.empty(B, D, dtype=dtype, device=device)
    for_x = torch.empty(B, D, device=device)
    launch_scale(g, b, for_F, a, for_x)
    for grad, c in ((for_F, b), (for_x, a)):
        exact = g.double() * c.double()[:, None]
        tolerances.assert_close(grad, exact, (g * c[:, None]).to(grad.dtype))
    alone = torch.empty_like(for_F)
    launch_scale(g, b, alone)
    assert torch.equal(alone, for_F)


@pytest.mark.parametrize("form", ["tensor", "noised", "noised uint8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_a_guided_euler_step_agrees_with_the_reference(B, D, dtype, form, device):
    x, state, slack = make_state(form, B, D, device)
    v, v_uncond = torch.randn(2 * B, D, device=device).to(dtype).chunk(2)
    dt, guidance, scale, out_scale = coefficients(4, B, device)
    out = torch.empty(B, D, device=device)
    scaled = torch.empty(B, D, dtype=dtype, device=device)
    launch_euler(
        state, v, dt, out, v_uncond=v_uncond, guidance=guidance, scale=scale,
        scaled_out=scaled, out_scale=out_scale,
    )  # fmt: skip
    extra = {"guidance": guidance, "scale": scale}
    exact = reference.euler_step(exactly(x), v.double(), dt, v_uncond=v_uncond.double(), **extra)
    plain = reference.euler_step(x, v, dt, v_uncond=v_uncond, **extra)
    tolerances.assert_close(out, exact, plain, slack * 1.5)
    lifted = out_scale[:, None]
    tolerances.assert_close(scaled, exact * lifted, (plain * lifted).to(dtype), slack * 2.25)


@pytest.mark.parametrize("form", ["tensor", "noised"])
def test_a_plain_euler_step_agrees_with_the_reference(form, device):
    x, state, slack = make_state(form, 3, 1000, device)
    v = torch.randn(3, 1000, device=device)
    (dt,) = coefficients(1, 3, device)
    out = torch.empty_like(v)
    launch_euler(state, v, dt, out)
    exact, plain = reference.euler_step(exactly(x), v.double(), dt), reference.euler_step(x, v, dt)
    tolerances.assert_close(out, exact, plain, slack)


def test_the_network_input_of_an_euler_step_is_its_result_where_it_has_no_factor(device):
    x, v = torch.randn(2, 3, 1000, device=device)
    out, scaled = torch.empty(2, 3, 1000, device=device)
    launch_euler(x, v, *coefficients(1, 3, device), out, scaled_out=scaled)
    assert torch.equal(scaled, out)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_a_sampler_update_agrees_with_the_reference(B, D, dtype, guided, device):
    key = rng.NoiseKey(9, 2**34, device=device)
    x = torch.randn(B, D, device=device)
    F, F_uncond = torch.randn(2 * B, D, device=device).to(dtype).chunk(2)
    a, b, alpha, sigma, guidance = coefficients(5, B, device)
    out = torch.empty_like(x)
    where = {"stream": rng.SAMPLE + 2, "first_sample": 4}
    more = {"F_uncond": F_uncond, "guidance": guidance} if guided else {}
    launch_sampler_update(x, F, a, b, alpha, sigma, key.tensor, out, **where, **more)
    again, scaled = torch.empty_like(out), torch.empty_like(F)
    pair = {"scaled_out": scaled, "out_scale": a}
    launch_sampler_update(x, F, a, b, alpha, sigma, key.tensor, again, **where, **more, **pair)
    assert torch.equal(again, out)
    torch.testing.assert_close(
        scaled, (a[:, None] * out).to(dtype), rtol=torch.finfo(dtype).eps, atol=0.0
    )
    plain = reference.sampler_update(x, F, a, b, alpha, sigma, key, **where, **more)
    F, more = F.double(), {name: value.double() for name, value in more.items()}
    exact = reference.sampler_update(x, F, a, b, alpha, sigma, key, **where, **more)
    slack = tolerances.noise_slack(x.shape, key, rng.SAMPLE + 2, 4) * 1.5
    tolerances.assert_close(out, exact, plain, slack)


def test_float64_coefficients_are_rounded_as_they_are_read(device):
    x, F, u = torch.randn(3, 5, 100, device=device)
    wide = [c.double() / 3 for c in coefficients(5, 5, device)]
    outs = []
    for a, b, alpha, sigma, guidance in (wide, [c.float() for c in wide]):
        key, stream = rng.NoiseKey(9, device=device).tensor, rng.SAMPLE
        made = torch.empty(5, *x.shape, device=device)
        launch_boundary(State(x, alpha, sigma, key), F, a, b, made[0])
        launch_scale(x, a, made[1])
        launch_euler(
            x, F, a, made[2], v_uncond=u, guidance=guidance, scale=b,
            scaled_out=made[3], out_scale=alpha,
        )  # fmt: skip
        launch_sampler_update(
            x, F, a, b, alpha, sigma, key, made[4], stream=stream, F_uncond=u, guidance=guidance
        )
        outs.append(made)
    assert torch.equal(*outs)


def test_images_and_videos_are_samples_too(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    F = torch.randn_like(x)
    a, b = coefficients(2, 2, device)
    out = torch.empty_like(x)
    launch_boundary(x, F, a, b, out)
    exact = reference.boundary(x.double(), F.double(), a, b)
    tolerances.assert_close(out, exact, reference.boundary(x, F, a, b))


def test_views_at_any_offset_give_the_same_values_and_nothing_outside(device):
    a, b, dt = coefficients(3, 2, device)
    x, F = torch.randn(2, 2, 33, device=device)
    expected = torch.empty_like(x)
    launch_euler(x, F, dt, expected, scale=a, scaled_out=torch.empty_like(x), out_scale=b)
    for offset in range(41):
        views = [torch.cat((t.new_zeros(offset), t.flatten()))[offset:] for t in (x, F)]
        memory = torch.full((3, 160), 7.0, device=device)
        out, scaled = (memory[i, offset : offset + 66].view(2, 33) for i in (0, 2))
        x_view, F_view = (view.view(2, 33) for view in views)
        launch_euler(x_view, F_view, dt, out, scale=a, scaled_out=scaled, out_scale=b)
        assert torch.equal(out, expected)
        assert (memory == 7).sum() == memory.numel() - 132


@pytest.mark.parametrize("vector", [4, 8])
def test_the_launch_configuration_does_not_change_the_bits(vector, device):
    _, state, _ = make_state("noised", 2, 1000, device)
    F = torch.randn(2, 1000, device=device)
    a, b = coefficients(2, 2, device)
    first, second = torch.empty_like(F), torch.empty_like(F)
    launch_boundary(state, F, a, b, first)
    launch_boundary(state, F, a, b, second, config=LaunchConfig(256, 1, vector))
    assert torch.equal(first, second)
