"""Samplers of networks whose condition is a dict: as of one tensor that holds it all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraph
from structured import FEATURES, NULL, Structured, network, structured
from test_sampler import LOOPS

import fastcm
from fastcm import Sampler
from fastcm.networks.conditions import rows_of

CONDS = structured(FEATURES)


def samplers(**options: Any) -> tuple[Sampler, Sampler]:
    """Of a dict, and of a tensor."""
    return tuple(
        Sampler(network(kind), fastcm.Linear(), shape=(2,), null_condition=null, **options)
        for kind, null in ((Structured, NULL), (Structured.__base__, torch.zeros(5)))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("loop", [*LOOPS, "flow-map"])
def test_every_loop(loop: str, guidance: float | None) -> None:
    options = {"method": "flow-map", "steps": 3} if loop == "flow-map" else LOOPS[loop]
    a, b = samplers(batch_size=10, **options)
    x = a(24, cond=CONDS, guidance=guidance)
    assert torch.equal(x, b(24, cond=FEATURES, guidance=guidance))
    stream = torch.cat(list(a.stream(24, batch=7, cond=CONDS, guidance=guidance, progress=False)))
    torch.testing.assert_close(stream, x)


def test_a_stream_of_conditions_that_are_made() -> None:
    a, _ = samplers(steps=2)
    x = a(24, cond=CONDS)
    made = a.stream(24, batch=9, cond=lambda i, n: rows_of(CONDS, slice(i, i + n)), progress=False)
    torch.testing.assert_close(torch.cat(list(made)), x)


@pytest.mark.parametrize("loop", ["three steps", "ten steps"])
def test_graphs(loop: str, recorded_graphs: type[RecordedGraph]) -> None:
    """Other values of the tensors reach a graph; other containers are another graph."""
    launched = samplers(graph="off", **LOOPS[loop])[0]
    replayed = samplers(graph="on", **LOOPS[loop])[0].prepare(8, cond=CONDS, guidance=2.0)
    for start in (0, 8, 16):
        cond = rows_of(CONDS, slice(start, start + 8))
        for guidance in (2.0, 3.0):
            want = launched(8, cond=cond, guidance=guidance)
            assert torch.equal(replayed(8, cond=cond, guidance=guidance), want)
    assert recorded_graphs.made > 0


def test_compiled() -> None:
    a, b = samplers(steps=2, compile=True), samplers(steps=2)
    torch.testing.assert_close(
        a[0](5, cond=rows_of(CONDS, slice(5)), guidance=2.0),
        b[0](5, cond=rows_of(CONDS, slice(5)), guidance=2.0),
    )


def test_export() -> None:
    a, _ = samplers(steps=2)
    cond = rows_of(CONDS, slice(4))
    program = fastcm.export_sampler(a, 4, cond=cond, guidance=2.0)
    other = rows_of(CONDS, slice(4, 8))
    found = program.module()(torch.tensor([3, 0, 0]), other)
    torch.testing.assert_close(found, a(4, seed=3, cond=other, guidance=2.0))


def test_what_does_not_fit_is_named() -> None:
    a, _ = samplers(steps=2)
    with pytest.raises(ValueError, match=r"cond\['style'\] must have one row per sample, 5"):
        a(5, cond=CONDS)
    with pytest.raises(TypeError, match=r"cond\['prompt'\]\[0\] must be a tensor .* got str"):
        a(24, cond={**CONDS, "prompt": ("a cat", torch.ones(24))})
    a, _ = samplers(steps=2)
    a.engine._null = {"style": 0.0}
    with pytest.raises(ValueError, match="same containers"):
        a(24, cond=CONDS, guidance=2.0)
