"""Four ways to a tangent of attention in four contexts: ours is right in all of them.

And a way that is wrong is seen to be: a bare operator has no tangent, which nobody is told.
"""

from __future__ import annotations

import multiprocessing

import pytest
from ways import CONTEXTS, WAYS, main

CASES = [(way, context) for way in WAYS for context in CONTEXTS]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], str]:
    """Each case in a process of its own, forked from one that has imported torch."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "torch._dynamo", "fastcm"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(CASES, pool.starmap(main, CASES, chunksize=1)))


@pytest.mark.parametrize("way", ["torch", "ours"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_tangent_is_right_in_every_context(
    verdicts: dict[tuple[str, str], str], way: str, context: str
) -> None:
    assert verdicts[way, context] == "right"


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_bare_operator_is_found_out(verdicts: dict[tuple[str, str], str], context: str) -> None:
    assert verdicts["operator", context] != "right"


def test_a_function_with_a_jvp_is_right_where_torch_calls_it(
    verdicts: dict[tuple[str, str], str],
) -> None:
    """In eager code; what compiled code makes of it has depended on torch's version."""
    assert verdicts["function", "jvp"] == verdicts["function", "level"] == "right"
