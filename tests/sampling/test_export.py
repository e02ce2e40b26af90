"""Exported samplers: equal to the sampler for any key, of plain torch, and free of fastcm."""

from __future__ import annotations

import math
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import NoiseKey, Sampler, export_sampler, ops, rng, sampling
from fastcm.networks import MLP, GaussianMixture, UNet
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving

SHAPE, CLASSES = (2, 4, 4), 3
FAR = (2**62 + 1, 2**32 - 7)
"""A seed beyond 32 bits, and the first of the last seven samples."""


def spread(net: nn.Module) -> nn.Module:
    """The network with weights that leave nothing at zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def mlp(classes: int | None = None) -> nn.Module:
    return spread(MLP(SHAPE, width=16, depth=1, num_classes=classes))


def unet(classes: int | None = None) -> nn.Module:
    net = UNet(
        2,
        base_channels=4,
        channel_mults=(1, 1),
        num_res_blocks=1,
        num_heads=1,
        num_classes=classes,
        dropout=0.5,
    )
    return spread(net)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return {t.namespace for t in called if t is not operator.getitem}  # type: ignore[union-attr]


EULER, HEUN, DDIM, SECOND = (
    {"method": "ode", "solver": name} for name in ("euler", "heun", "ddim", "dpmpp_2m")
)


@pytest.mark.parametrize(
    ("network", "path", "settings", "guidance"),
    [
        (mlp, Linear(), {"steps": 1}, None),
        (mlp, VarianceExploding(), {"steps": 3}, (1.0, 2.5, 0.5)),
        (mlp, TrigFlow(), {"steps": 2}, None),
        (mlp, VarianceExploding(), {"steps": 2, **EULER}, 1.5),
        (mlp, Linear(), {"steps": 2, **HEUN}, 1.5),
        (mlp, VariancePreserving(), {"steps": 2, **DDIM}, None),
        (mlp, Linear(), {"steps": 4, **SECOND}, None),
        (unet, Linear(), {"steps": 2}, lambda t: 1.0 + t),
        (unet, VarianceExploding(), {"steps": 2, **SECOND}, 1.5),
        (mlp, VarianceExploding(), {"steps": 2, "precision": "bf16"}, 1.5),
        (mlp, Linear(), {"steps": 2, "guidance_rescale": 0.7}, 3.0),
        (mlp, VarianceExploding(), {"steps": 2, "guidance_rescale": 0.7, **HEUN}, 3.0),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_a_program_draws_what_the_sampler_does(
    network: Callable[[int | None], nn.Module], path: Any, settings: Any, guidance: Any
) -> None:
    net = network(None if guidance is None else CLASSES)
    sampler = Sampler(net, path, shape=SHAPE, null_condition=CLASSES, **settings)
    labels = None if guidance is None else torch.arange(7) % CLASSES
    program = export_sampler(sampler, 7, cond=labels, guidance=guidance)
    assert namespaces(program) == {"aten"}
    draw = program.module()
    for seed, first in ((3, 20), FAR):
        cond = None if labels is None else labels.roll(seed)
        x = draw(NoiseKey(seed, 0, first).tensor, *([] if cond is None else [cond]))
        expected = sampler(7, seed=seed, first_sample=first, cond=cond, guidance=guidance)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_program_has_the_bits_of_the_arithmetic_at_any_step(no_native_code: None) -> None:
    net, times = mlp(), [1.0, 0.6, 0.2]
    draw = export_sampler(Sampler(net, Linear(), times=times, shape=SHAPE), 5).module()
    for step in (0, 1, 2**33 + 1):
        key = NoiseKey(4, step, 6)
        with torch.no_grad():
            z = ops.noise((5, *SHAPE), key, stream=rng.SAMPLE)
            expected = sampling.multistep(net, Linear(), z, key, times=times)
        assert torch.equal(draw(key.tensor), expected)


def test_tensors_stand_for_conditions_and_for_none() -> None:
    """Features as cond, a tensor as null condition, and a network whose buffers are float64."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture = GaussianMixture(torch.randn(4, *SHAPE), 0.3)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            F: Tensor = self.mixture(x, t) + cond[:, :, None, None]
            return F

    null = torch.randn(SHAPE[0])
    sampler = Sampler(Shifted(), Linear(), steps=2, shape=SHAPE, null_condition=null)
    cond, other = torch.randn(2, 3, SHAPE[0])
    draw = export_sampler(sampler, 3, cond=cond, guidance=2.0).module()
    expected = sampler(3, seed=1, cond=other, guidance=2.0)
    torch.testing.assert_close(draw(NoiseKey(1).tensor, other), expected, rtol=1e-4, atol=1e-4)


def test_the_program_shares_the_parameters_and_leaves_the_network_as_it_was() -> None:
    net = unet()
    sampler = Sampler(net, Linear(), shape=SHAPE)
    net.train()
    frozen = next(m for m in net.modules() if isinstance(m, nn.Dropout)).eval()
    program = export_sampler(sampler, 2)
    assert net.training and not frozen.training
    assert all(p.requires_grad for p in net.parameters())
    draw, key = program.module(), NoiseKey(0).tensor
    before = draw(key)
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(draw(key), before)
    torch.testing.assert_close(draw(key), sampler(2), rtol=1e-4, atol=1e-4)


ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'fastcm': raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import torch
inputs = torch.load('inputs.pt')
draw = torch.export.load('sampler.pt2').module()
x = draw(*inputs)
assert not x.requires_grad and 'fastcm' not in sys.modules
torch.save(x, 'x.pt')
"""


def test_a_saved_program_runs_where_fastcm_cannot_be_imported(tmp_path: Path) -> None:
    sampler = Sampler(
        mlp(CLASSES), VarianceExploding(), steps=2, shape=SHAPE, null_condition=CLASSES
    )
    cond = torch.arange(4) % CLASSES
    program = export_sampler(sampler, 4, cond=cond, guidance=1.5)
    torch.export.save(program, tmp_path / "sampler.pt2")
    torch.save([NoiseKey(FAR[0], 0, FAR[1]).tensor, cond.flip(0)], tmp_path / "inputs.pt")
    alone = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    expected = sampler(4, seed=FAR[0], first_sample=FAR[1], cond=cond.flip(0), guidance=1.5)
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), expected, rtol=1e-4, atol=1e-4)


def test_compiled_ahead_of_time_a_program_draws_the_same(tmp_path: Path) -> None:
    """The counters do not overflow in vectors of the compiler, whole or in part."""
    net = spread(MLP((5,), width=8, depth=1))
    program = export_sampler(Sampler(net, Linear(), steps=2, shape=(5,)), 13)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "sampler.pt2")
    )
    compiled, eager = torch._inductor.aoti_load_package(package), program.module()
    for seed in (0, 7, 2**32 - 1, 2**62 + 1, 2**63 - 1):
        for step in (0, 5, 2**33 + 1, 2**56 - 1):
            for first in (0, 9, 2**31 - 3, 2**32 - 5):
                key = NoiseKey(seed, step, first).tensor
                torch.testing.assert_close(compiled(key), eager(key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "settings", "arguments", "error", "message"),
    [
        (0, {}, {}, ValueError, "n must be an int >= 1, got 0"),
        (2.5, {}, {}, ValueError, "n must be an int >= 1, got 2.5"),
        (4, {"shape": None}, {}, ValueError, "shape"),
        (4, {}, {"cond": torch.zeros(3)}, ValueError, "cond must have one row per sample, 4"),
        (4, {}, {"cond": [0] * 4}, TypeError, r"cond\[0\] must be a tensor"),
        (4, {}, {"guidance": 2.0}, ValueError, "guidance needs cond"),
        (4, {}, {"cond": torch.zeros(4), "guidance": 2.0}, ValueError, "null_condition"),
        (4, {}, {"cond": torch.zeros(4), "guidance": [2.0, 2.0]}, ValueError, "2 weights"),
        (4, {}, {"cond": torch.zeros(4), "guidance": math.nan}, ValueError, "finite"),
    ],
    ids=range(9),
)
def test_bad_arguments_are_refused_before_anything_is_traced(
    n: Any, settings: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            raise AssertionError("called")

    sampler = Sampler(Unused(), Linear(), **{"shape": SHAPE, **settings})
    with pytest.raises(error, match=message):
        export_sampler(sampler, n, **arguments)
