"""Memory by kind against real tensors, bytes against recorded ones, and how a plan scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastcm
from fastcm import ConsistencyDistillation, ConsistencyTraining, FlowMatching
from fastcm.networks import MLP, UNet
from fastcm.objectives.base import Objective
from fastcm.optim.one_sweep import OneSweep
from fastcm.planning import Ceilings, Plan, formulae, measure, plan, sizes
from fastcm.planning.counting import units

CEILINGS = Ceilings(tflops=100.0, bandwidth=1000.0, interconnect=400.0, upload=20.0)


def planned(net: nn.Module | None = None, objective: Objective | None = None, **more: Any) -> Plan:
    options: dict[str, Any] = {"shape": (4, 32, 32), "batch": 64, "ceilings": CEILINGS}
    net = net or sizes.network("dit-tiny", (4, 32, 32), None, {})
    return plan(net, objective or ConsistencyTraining(), **{**options, **more})


def part(made: Plan, name: str) -> Any:
    (found,) = [p for p in made.parts if p.name == name]
    return found


@pytest.mark.parametrize("averages", [1, 2])
def test_memory_of_the_state_is_that_of_real_tensors(averages: int) -> None:
    teacher = UNet(3, 8, (1, 2), num_res_blocks=1)
    net = UNet(3, 8, (1, 2), num_res_blocks=1)
    objective = ConsistencyDistillation(teacher)
    trainer = fastcm.Trainer(
        net,
        objective,
        data=torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8),
        batch_size=8,
        averages=tuple(fastcm.EMA(0.99 + 0.001 * i) for i in range(averages)),
        compile=False,
        progress=False,
        log=lambda line: None,
    ).fit(1)
    made = planned(net, objective, shape=(3, 8, 8), batch=8, averages=averages)
    found = made.memory["whole"][False]
    optimizer = trainer.optimizer
    assert isinstance(optimizer, OneSweep)
    parameters = list(net.parameters())
    assert found["parameters"] == sum(p.nbytes for p in parameters)
    assert found["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert found["moments"] == sum(
        optimizer.state[p][name].nbytes for p in parameters for name in ("exp_avg", "exp_avg_sq")
    )
    networks = [trainer.ema_network(i) for i in range(len(trainer.averages))]
    assert found["averages"] == sum(p.nbytes for n in networks for p in n.parameters())
    assert found["teacher"] == sum(p.nbytes for p in teacher.parameters())
    assert made.parameters == sum(p.numel() for p in parameters)


def test_published_sizes_are_those_of_the_paper() -> None:
    """Table 1 of Peebles & Xie 2023, in millions, with 1,000 classes and patches of 2."""
    for name, millions in (("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675)):
        net = sizes.network(name, sizes.LATENTS, 1000, {})
        assert all(p.is_meta for p in net.parameters())
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_flops_of_the_largest_are_those_of_the_paper() -> None:
    """118.64 G multiply-adds for a sample of 32 x 32 x 4, table 1 of Peebles & Xie 2023."""
    net = sizes.network("dit-xl", sizes.LATENTS, 1000, {})
    made = planned(net, FlowMatching(), batch=2, labels=True)
    assert part(made, "student, forward").flops / 2 / 2 == pytest.approx(118.64e9, rel=0.01)


def test_bytes_of_the_sweep() -> None:
    """Gradient for the norm; gradient, parameter, two moments and an average, four written back."""
    assert formulae.sweep(1, 1) == 4 + 5 * 4 + 4 * 4
    assert formulae.sweep(1, 1, clipped=False) == 36
    assert formulae.sweep(3, 2) == 3 * 48
    assert formulae.sweep(1, 1, copies=1) == 42 and formulae.sweep(1, 1, refreshed=1) == 48


def test_what_travels() -> None:
    def sent(parallel: str | None, gpus: int) -> tuple[int, int]:
        return formulae.traffic(parallel, gpus, 800, 4800)

    assert sent(None, 1) == sent("ddp", 1) == sent("fsdp", 1) == (0, 0)
    assert sent("ddp", 2) == (800, 0) and sent("ddp", 8) == (1400, 0)
    assert sent("fsdp", 8) == (700, 4200)


def test_a_plan_scales_with_the_batch_and_the_devices() -> None:
    one, twice = planned(), planned(batch=128)
    for name in ("student, forward", "student, backward", "around the networks", "data"):
        a, b = part(one, name), part(twice, name)
        assert b.flops == 2 * a.flops and b.seconds <= 2 * a.seconds
    assert part(twice, "data").bytes == 2 * part(one, "data").bytes == 2 * 64 * 4 * 32 * 32 * 4
    assert part(twice, "clip, Adam, averages") == part(one, "clip, Adam, averages")
    activations = [made.memory["whole"][False]["activations"] for made in (one, twice)]
    assert activations[1] == pytest.approx(2 * activations[0], rel=1e-3)

    for parallel in ("ddp", "fsdp"):
        shared = planned(batch=128, gpus=2, parallel=parallel)
        assert part(shared, "student, forward") == part(one, "student, forward")
        assert shared.memory["whole"] == one.memory["whole"]
    ddp, fsdp = (planned(gpus=8, parallel=parallel) for parallel in ("ddp", "fsdp"))
    gradients = ddp.memory["whole"][False]["gradients"]
    assert part(ddp, "all-reduce of gradients").bytes == 2 * gradients * 7 // 8
    assert part(fsdp, "reduce-scatter of gradients").bytes == gradients * 7 // 8
    # forward and backward of the student, and the target
    weights = fsdp.memory["whole"][False]["parameters"]
    assert part(fsdp, "all-gather of weights").bytes == 3 * weights * 7 // 8
    sweeps = [part(made, "clip, Adam, averages").bytes for made in (ddp, fsdp)]
    # and the shards of the target's network are copied
    assert sweeps[1] == pytest.approx(sweeps[0] / 8 * (48 + 8) / 48, rel=1e-3)
    for kind in ("parameters", "gradients", "moments", "averages"):
        whole, sharded = (fsdp.memory[state][False][kind] for state in ("whole", "sharded"))
        copied = 1.5 if kind == "averages" else 1.0
        assert 8 * sharded == pytest.approx(copied * whole, rel=1e-4)
    cut = planned(batch=128, gpus=8, parallel="fsdp", accumulate=2)
    for name in ("reduce-scatter of gradients", "all-gather of weights"):
        assert part(cut, name).bytes == pytest.approx(2 * part(fsdp, name).bytes, abs=8)
    assert fsdp.peak < ddp.peak


def test_micro_batches_save_activations_and_nothing_else() -> None:
    whole, cut = planned(), planned(accumulate=4)
    assert part(cut, "student, backward").flops == part(whole, "student, backward").flops
    a, b = (made.memory["whole"][False] for made in (cut, whole))
    assert 4 * a["activations"] == pytest.approx(b["activations"], rel=1e-3)
    assert {k: v for k, v in a.items() if k not in ("activations", "batch")} == {
        k: v for k, v in b.items() if k not in ("activations", "batch")
    }


def test_checkpointing_trades_a_forward_pass_of_the_blocks_for_memory() -> None:
    plain, again = planned(), planned(checkpointing=True)
    forward = part(plain, "student, forward")
    assert 0.9 * forward.flops < part(again, "blocks again").flops < forward.flops
    assert again.seconds > plain.seconds and again.peak < plain.peak
    assert plain.memory["whole"][True]["activations"] < plain.memory["whole"][False]["activations"]


def test_times_follow_from_the_ceilings_and_no_others() -> None:
    made = planned(gpus=2, parallel="ddp")
    sweep = part(made, "clip, Adam, averages")
    assert sweep.seconds == pytest.approx(sweep.bytes / 1000e9)
    reduce = part(made, "all-reduce of gradients")
    assert reduce.seconds == pytest.approx(reduce.bytes / 50e9)
    forward = part(made, "student, forward")
    products, copies = forward.flops / 100e12, forward.bytes / 1000e9
    assert 0.999 * max(products, copies) <= forward.seconds < products + copies
    assert sum(made.share(p) or 0.0 for p in made.parts) == pytest.approx(1.0)
    none = planned(gpus=2, parallel="ddp", ceilings=None)
    assert all(p.seconds is None for p in none.parts) and len(none.unknown) == len(none.parts)
    assert [(p.flops, p.bytes) for p in none.parts] == [(p.flops, p.bytes) for p in made.parts]
    products = planned(ceilings=Ceilings(tflops=100.0))
    forward = part(products, "student, forward")
    assert forward.seconds == pytest.approx(forward.flops / 100e12)
    assert part(products, "clip, Adam, averages").seconds is None


def test_the_units_of_sharding_are_the_blocks() -> None:
    net = MLP((4,), 16, 3)
    block = 4 * sum(p.numel() for p in net.blocks[0].parameters())
    whole = 4 * sum(p.numel() for p in net.parameters())
    assert units(net) == (whole - 3 * block, block)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 10, "gpus": 4, "parallel": "ddp"}, "batch 10 is not a multiple of 4 devices"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"gpus": 2}, '2 devices need parallel="ddp" or "fsdp"'),
        ({"gpus": 2, "parallel": "tp"}, "parallel must be None"),
        ({"precision": "fp8"}, "precision must be 'fp32' or 'bf16'"),
    ],
)
def test_what_cannot_be_planned_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**options)
    with pytest.raises(ValueError, match="bandwidth must be > 0 GB/s, got -1"):
        Ceilings(bandwidth=-1)
    with pytest.raises(ValueError, match="multiple of 8 rows, got 4"):
        planned(objective=fastcm.Shortcut(), batch=4)


class Asks(nn.Module):
    """Looks at a value."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return x if bool(t.max() > 1.0) else 2.0 * x


def test_a_network_that_needs_values_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Asks cannot be planned, .* not run on meta tensors"):
        planned(Asks())


def test_measured_ceilings_complete_those_that_were_given() -> None:
    found = measure("cpu")
    assert found.tflops is not None and found.tflops > 0 and found.interconnect is None
    both = Ceilings(bandwidth=5.0).completed(found)
    assert both.bandwidth == 5.0 and both.tflops == found.tflops and both.measured == ("tflops",)
    assert "bandwidth 5 GB/s given" in both.described()
    assert "TFLOP/s measured" in both.described() and "upload not known" in both.described()
