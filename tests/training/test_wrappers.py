"""The examples of other training frameworks, in two processes under wrappers of their own."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in ("accelerate", "lightning") if importlib.util.find_spec(name)]


def ran(name: str) -> tuple[str, dict[str, Tensor]]:
    """What a script is wrapped by, and the weights of student and average after a few steps."""
    script = str(ROOT / "examples" / f"with_{name}.py")
    sys.argv = [script, "8"]
    left: dict[str, Any] = runpy.run_path(script)
    if name == "lightning":
        net, target, wrapper = left["model"].net, left["model"].target[0], left["trainer"].strategy
    else:
        net, target, wrapper = left["net"], left["target"], left["wrapped"]
    networks = {"net": net, "average": target}
    return type(wrapper).__name__, {
        f"{which}.{key}": value.detach().clone()
        for which, module in networks.items()
        for key, value in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what two processes ended with, for each framework that is installed."""
    if not NAMES:
        pytest.skip("neither accelerate nor lightning is installed")
    folder = tmp_path_factory.mktemp("ended")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", __file__, str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_two_processes_train_one_network(
    name: str, ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in NAMES:
        pytest.skip(f"{name} is not installed")
    (wrapper, first), (_, second) = (
        torch.load(ended / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert wrapper == {"accelerate": "DistributedDataParallel", "lightning": "DDPStrategy"}[name]
    assert all(torch.equal(first[key], value) for key, value in second.items())
    assert first["net.output.weight"].any() and first["average.output.weight"].any()  # 0 before
    if name == "accelerate":  # which has one process read the same rows in the same order
        monkeypatch.setattr(sys, "argv", sys.argv)
        _, alone = ran(name)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    place = sys.argv[1]
    for framework in NAMES:
        torch.save(ran(framework), f"{place}/{framework}-{os.environ['RANK']}.pt")
