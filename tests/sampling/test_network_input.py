"""The network's input at the next time, which the sampler's update writes along with the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import sampling
from fastcm.paths import Linear, Path, TrigFlow, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.sampling import Sampler, guidance, held

MANY = held.SMALL + 1
"""Samples that `fastcm.sampling.few` leaves to the loops."""

PATHS = [Linear(), TrigFlow(sigma_data=0.5), VarianceExploding()]


class Seen(nn.Module):
    """F of a linear layer, recording what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.inputs.append(x)
        out: Tensor = self.inner(x)
        return out if cond is None else out + cond[:, None]


@pytest.mark.parametrize("guided", [None, "null", "guide"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_it_has_the_bits_of_a_pass_of_its_own(
    path: Path, precision: Any, guided: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, options = Seen(), {}
    if guided == "guide":
        options["guide"] = Seen()
    elif guided == "null":
        options["null_condition"] = 0.0
    sampler = Sampler(net, path, steps=3, shape=(6,), precision=precision, **options)
    call = {} if guided is None else {"cond": torch.randn(MANY), "guidance": 1.5}
    found = sampler(MANY, **call)
    dtypes = {x.dtype for x in net.inputs}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    given, net.inputs = net.inputs, []
    monkeypatch.setattr(guidance.Evaluator, "ahead", lambda *_: {})
    assert torch.equal(sampler(MANY, **call), found)
    assert len(given) == 3 and all(map(torch.equal, given, net.inputs))


@pytest.mark.parametrize(("path", "dtype"), [(VarianceExploding(), None), (Linear(), "bf16")])
def test_only_the_first_input_is_made_in_a_pass_of_its_own(
    path: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    ahead = guidance.Evaluator.ahead
    monkeypatch.setattr(
        guidance.Evaluator,
        "ahead",
        lambda self, x, to: asked.append(ahead(self, x, to)) or asked[-1],
    )
    scaled: list[Tensor] = []
    lift = guidance.lift
    monkeypatch.setattr(guidance, "lift", lambda c, x: scaled.append(c) or lift(c, x))
    net = Seen()
    Sampler(net, path, steps=4, shape=(6,), precision=dtype or "fp32")(MANY)
    assert len(asked) == 3 and all(asked)
    assert len(scaled) == (path != Linear())
    asked.clear()
    Sampler(net, Linear(), steps=4, shape=(6,))(MANY)
    assert asked == [{}] * 3  # the state itself is the input


def test_a_state_in_float64_has_an_input_in_float64() -> None:
    net, z = Seen().double(), torch.randn(4, 6, dtype=torch.float64)
    x = sampling.multistep(net, VarianceExploding(), z, NoiseKey(0), times=[80.0, 2.0, 0.5])
    assert x.dtype == torch.float64 and {y.dtype for y in net.inputs} == {torch.float64}


def test_networks_of_other_precisions_get_the_state_in_full() -> None:
    """A guide in float32 is not given the half precision of the network that it guides."""
    net, guide = Seen().to(torch.bfloat16), Seen()
    sampler = Sampler(net, Linear(), steps=2, shape=(6,), guide=guide)
    sampler(3, cond=torch.randn(3), guidance=2.0)
    assert {x.dtype for x in net.inputs} == {torch.bfloat16}
    assert {x.dtype for x in guide.inputs} == {torch.float32}
