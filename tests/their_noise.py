"""Our noise in the schedulers of diffusers, so that their samples can be held against ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import fastcm
from fastcm import ops, rng

SEED = 11


def noise(shape: tuple[int, ...], j: int = 0) -> Tensor:
    return ops.noise(shape, fastcm.NoiseKey(SEED), stream=rng.SAMPLE + j)


def close(got: Tensor, wanted: Tensor, most: float = 1e-4) -> None:
    difference = (got - wanted).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert wanted.std() > 0.1 and difference <= most


@pytest.fixture
def our_noise(monkeypatch):
    """Each draw of a scheduler is the noise of our next evaluation, after the first state."""

    def install(scheduler: Any, made: Callable[..., Tensor] = noise) -> list[int]:
        drawn: list[int] = []

        def randn_tensor(shape, **settings) -> Tensor:
            drawn.append(len(drawn) + 1)
            return made(tuple(shape), drawn[-1])

        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        return drawn

    return install
