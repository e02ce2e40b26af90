"""Editing: constraints are projections, samplers keep to them and fill in the rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcm import ops, rng, sampling
from fastcm.networks import GaussianConsistency
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.sampling import editing

WIDE = (5, 3, 8, 8)


def case(name: str, x: Tensor):
    """(constraint, the linear map A that it holds, what is known A x)."""
    if name == "inpainting":
        mask = torch.rand(8, 8) < 0.5
        return editing.inpainting(x, mask), lambda y: torch.where(mask, y, 0.0)
    if name == "colourisation":
        return editing.colourisation(editing.luminance(x)), editing.luminance
    return editing.super_resolution(editing.shrink(x, 4), 4), lambda y: editing.shrink(y, 4)


CASES = ["inpainting", "colourisation", "super-resolution"]


@pytest.mark.parametrize("weights", [(0.3333,) * 3, (0.333,) * 3, (0.2126, 0.7152, 0.0721)])
def test_weights_that_sum_to_one_but_for_their_rounding_are_used_as_they_are(weights):
    assert sum(weights) != 1.0
    x, other = torch.randn(2, *WIDE, dtype=torch.float64).unbind()
    grey = editing.luminance(x, weights)
    plain = sum(w * c for w, c in zip(weights, x.unbind(1)))[:, None]
    torch.testing.assert_close(grey, plain, rtol=1e-12, atol=1e-12)
    constraint = editing.colourisation(grey, weights)
    kept = constraint(other)
    torch.testing.assert_close(editing.luminance(kept, weights), grey, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(constraint(kept), kept, rtol=1e-12, atol=1e-12)


def test_wrong_weights_are_refused_when_the_constraint_is_made():
    for weights in ([0.3, 0.3, 0.3], [0.5, 0.5, 0.01], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="weights must sum to 1"):
            editing.colourisation(torch.zeros(1, 1, 2, 2), weights)


@pytest.mark.parametrize("name", CASES)
def test_a_constraint_is_the_orthogonal_projection_onto_what_is_known(name):
    x, guess, other = torch.randn(3, *WIDE, dtype=torch.float64)
    constraint, known = case(name, x)
    got = constraint(guess)
    assert (known(got) - known(x)).abs().max() < 1e-12  # it holds,
    torch.testing.assert_close(constraint(got), got)  # it is a projection,
    torch.testing.assert_close(constraint(x), x)
    allowed = constraint(other)  # and the step is orthogonal to everything that is allowed
    assert abs(((guess - got) * (allowed - got)).sum().item()) < 1e-9
    assert (guess - got).abs().max() > 0.1 and (got - x).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_sampler_keeps_to_the_constraint_at_every_step(name, steps):
    x, z = torch.randn(2, *WIDE)
    constraint, known = case(name, x)
    seen = []

    def watched(x0: Tensor) -> Tensor:
        seen.append(constraint(x0))
        return seen[-1]

    got = sampling.multistep(
        lambda x, t, cond: 0.3 * x,
        Linear(),
        z,
        NoiseKey(1),
        times=[0.9, 0.6, 0.3][:steps],
        start=constraint(torch.zeros(WIDE)),
        constraint=watched,
    )
    assert len(seen) == steps and seen[-1] is got
    for x0 in seen:
        torch.testing.assert_close(known(x0), known(x), rtol=0, atol=1e-5)


def test_inpainting_draws_nothing_from_the_values_off_the_mask():
    known, guess = torch.randn(2, *WIDE)
    mask = torch.rand(WIDE) < 0.3
    poisoned = known.masked_fill(~mask, math.nan)
    assert torch.equal(
        editing.inpainting(poisoned, mask)(guess), editing.inpainting(known, mask)(guess)
    )


@pytest.mark.parametrize("path", [Linear(), VarianceExploding(t_min=0.02)], ids=str)
def test_the_unknown_half_follows_the_data(path):
    """Where the halves are independent, filling in one gives its distribution, whatever is known.

    By the exact consistency function of a Gaussian.
    """
    n, p = 20_000, Parameterization(path)
    mean, std = torch.tensor([0.4, -1.0]), torch.tensor([0.5, 0.8])
    net = GaussianConsistency(mean, std, p)
    known = torch.full((n, 2), 3.0)
    mask = torch.tensor([True, False])
    z = ops.noise((n, 2), NoiseKey(2), stream=rng.SAMPLE)
    times = [path.t_max, 0.4 * path.t_max, 0.1 * path.t_max]
    x = sampling.multistep(
        net,
        p,
        z,
        NoiseKey(2),
        times=times,
        start=known * mask,
        constraint=editing.inpainting(known, mask),
    ).double()
    assert (x[:, 0] == 3.0).all()
    assert abs(x[:, 1].mean().item() + 1.0) < 6 * 0.8 / math.sqrt(n) + 0.02
    assert abs(x[:, 1].std().item() / 0.8 - 1) < 6 / math.sqrt(2 * n) + 0.002


def test_luminance_is_the_grey_of_a_colour():
    white, red = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1.0
    assert editing.luminance(white).shape == (1, 1, 2, 2)
    torch.testing.assert_close(editing.luminance(white), torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(editing.luminance(red), torch.full((1, 1, 2, 2), 0.299))


def test_shrink_undoes_enlarge():
    low = torch.randn(2, 3, 4, 5)
    assert editing.enlarge(low, 3).shape == (2, 3, 12, 15)
    torch.testing.assert_close(editing.shrink(editing.enlarge(low, 3), 3), low)


def test_interpolation_goes_along_the_circle():
    z, other = torch.randn(2, 6, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(editing.interpolate(z, other, 0.0), z)
    torch.testing.assert_close(editing.interpolate(z, other, 1.0), other)
    flat, end = z.flatten(1), other.flatten(1)
    end = end * (flat.norm(dim=1) / end.norm(dim=1))[:, None]  # of equal norms
    for w in (0.25, torch.rand(6)):
        middle = editing.interpolate(flat, end, w)
        torch.testing.assert_close(middle.norm(dim=1), flat.norm(dim=1))

        def angle(a: Tensor, b: Tensor) -> Tensor:
            return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).acos()

        torch.testing.assert_close(angle(flat, middle), w * angle(flat, end))
    assert editing.interpolate(z.float(), other.float(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_interpolation_of_parallel_noise_is_a_line(factor):
    z = torch.randn(4, 9, dtype=torch.float64)
    got = editing.interpolate(z, factor * z, 0.25)
    torch.testing.assert_close(got, (0.75 + 0.25 * factor) * z)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: editing.inpainting(x, torch.ones(8, 8)), TypeError, "mask must be bool"),
        (lambda x: editing.colourisation(x), ValueError, "grey must be"),
        (lambda x: editing.luminance(x[:, :2]), ValueError, "x must have 3 channels"),
        (lambda x: editing.luminance(x, [1.0, 1.0, 1.0]), ValueError, "weights must sum to 1"),
        (lambda x: editing.super_resolution(x, 1), ValueError, "factor >= 2"),
        (lambda x: editing.super_resolution(x[0], 2), ValueError, r"low \[B, C, H, W\]"),
        (lambda x: editing.super_resolution(x, 2)(x), ValueError, "low must be"),
        (lambda x: editing.shrink(x, 3), ValueError, "sides divided by 3"),
        (lambda x: editing.interpolate(x, x[:2], 0.5), ValueError, "one shape"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(WIDE))
