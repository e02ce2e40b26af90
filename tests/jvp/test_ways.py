"""Four ways to a tangent of attention in four contexts: ours is right in all of them.

And a way that is wrong is seen to be: a bare operator has no tangent, which nobody is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ways import CONTEXTS, WAYS

CASES = [(way, context) for way in WAYS for context in CONTEXTS]


def run(case: tuple[str, str]) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "ways.py"), *case],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], str]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES)))


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
