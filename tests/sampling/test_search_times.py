"""The search for a sampler's times: against brute force, and on scores with known minima."""

from __future__ import annotations

import math

import pytest
import torch

from fastcm import ops, rng, sampling
from fastcm.networks import GaussianMixture
from fastcm.paths import Linear, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.schedules import KarrasGrid, UniformGrid, sampling_times


def test_search_finds_the_best_time_of_a_two_step_sampler():
    """Against every candidate; the score is the distance of quantiles from the data's.

    The network is the denoiser E[x0 | x_t], as a poor consistency function.
    """
    net, path, n = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.2), Linear(), 24
    data = net.sample(4000, seed=1)[0].sort(0).values
    z, key, tried = ops.noise((4000, 1), NoiseKey(0), stream=rng.SAMPLE), NoiseKey(0), []

    def score(times: list[float]) -> float:
        tried.append(times)
        x = sampling.multistep(net, path, z, key, times=times)
        return (x.sort(0).values - data).square().mean().item()

    assert sampling.search_times(score, path, steps=1, n=n) == [1.0] and tried == []
    found = sampling.search_times(score, path, steps=2, n=n)
    assert len(tried) < n / 2  # each candidate once, and few of them
    best = min(([1.0, k / n] for k in range(1, n)), key=score)
    assert found == pytest.approx(best)
    assert score(found) < 0.9 * score([1.0, 0.5])


def test_search_is_greedy_and_leaves_room_for_the_times_to_come():
    """A score that has its minima at 0.6, 0.3 and 0.2, whichever times come before them."""
    goals = {2: 0.6, 3: 0.3, 4: 0.2}
    found = sampling.search_times(
        lambda times: abs(times[-1] - goals[len(times)]), Linear(), steps=4, n=10
    )
    assert found == pytest.approx([1.0, 0.6, 0.3, 0.2])
    # always as low as it can: the last of the grid, in order
    lowest = sampling.search_times(lambda times: times[-1], Linear(), steps=4, n=10)
    assert lowest == pytest.approx([1.0, 0.3, 0.2, 0.1])
    every = sampling.search_times(lambda times: -times[-1], Linear(), steps=10, n=10)
    assert every == pytest.approx([k / 10 for k in range(10, 0, -1)])
    path = VarianceExploding()
    (_, t) = sampling.search_times(
        lambda times: abs(times[-1] - 3.0), path, steps=2, grid=KarrasGrid(), n=40
    )
    grid = KarrasGrid().time(torch.arange(41), 40, path).tolist()
    assert t == min(grid, key=lambda k: abs(k - 3.0))


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_search_refuses_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match="steps must be >= 1"):
        sampling.search_times(lambda times: 0.0, Linear(), steps=steps, n=10)
    with pytest.raises(ValueError, match="score must return a number"):
        sampling.search_times(lambda times: math.nan, Linear(), steps=2, n=10)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        sampling_times(UniformGrid(), min(steps, 0), Linear())
