"""The memory of a step of distillation, of a whole network and of LoRA layers on it.

``python -m pytest -s benchmarks/test_lora.py``: on a CPU, each in a process of its own. State must
have the planned sizes to the byte, or there is no row. Rows go to results/lora_cpu.json.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastcm
from benchmarks.harness import Report
from benchmarks.memory import forget, give_back, memory, state_bytes
from benchmarks.processes import together
from benchmarks.step_cases import LATENTS
from fastcm import planning
from fastcm.adapters import lora
from fastcm.networks import MLP, DiT
from fastcm.runs.checkpoint import list_checkpoints

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is of CPU processes")

RANK, BATCH = 16, 8
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DiT 256x4": lambda: DiT(4, 32, width=256, depth=4, num_heads=4),
    "DiT 384x12": lambda: DiT(4, 32),
}
LAYERS = ["qkv", "proj", "fc1", "fc2"]


def trainer(net: nn.Module, objective: Any, data: torch.Tensor, **options: Any) -> fastcm.Trainer:
    return fastcm.Trainer(
        net, objective, data=data, batch_size=BATCH, compile=False, progress=False,
        log=lambda line: None, **options,
    )  # fmt: skip


def work(rank: int, world: int, name: str, layers: bool) -> dict[str, Any]:
    """Bytes of one training, in a process of its own."""
    give_back()
    small = MLP((4,), 8, 1)  # what a first step loads is nobody's
    small_teacher = fastcm.ConsistencyDistillation(copy.deepcopy(small))
    trainer(small, small_teacher, torch.randn(8, 4)).fit(1)
    peft: Any = importlib.import_module("peft")
    torch.manual_seed(0)
    data = torch.randn(64, *LATENTS)
    before = memory("VmRSS")
    net = NETWORKS[name]()
    numbers = sum(p.numel() for p in net.parameters())
    if layers:
        net = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=LAYERS), net)
        teacher: nn.Module = lora.WithoutAdapters(net)
    else:
        teacher = copy.deepcopy(net)
    objective = fastcm.ConsistencyDistillation(teacher)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(net, objective, data, directory=folder, save_frozen=not layers)
        forget()
        for _ in range(3):
            run.train_step()
        most = memory("VmHWM") - before
        saved = [f.stat().st_size for f in run.save().iterdir()]
        assert list_checkpoints(Path(folder))
    made = planning.plan(net, objective, shape=LATENTS, batch=BATCH, device_type="cpu")
    planned = made.memory["whole"][False]
    state = state_bytes(run)
    assert state == {kind: planned[kind] for kind in state}, (state, planned)
    return {
        "parameters": numbers,
        "trained": made.trained,
        "state": {**state, "gradients": planned["gradients"]},
        "activations, planned": planned["activations"],
        "planned bytes": made.peak,
        "measured bytes": most,
        "checkpoint bytes": sum(saved),
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_lora(network: str, report: Report) -> None:
    whole, layers = (together(work, 1, network, kind) for kind in (False, True))
    row: dict[str, Any] = {"network": network, "batch": BATCH, "rank": RANK}
    row |= {"parameters": whole["parameters"], "whole": whole, "layers": layers}
    for what in ("measured bytes", "checkpoint bytes"):
        row[f"layers/whole {what}"] = layers[what] / whole[what]
    print(row)
    report.add(row)
