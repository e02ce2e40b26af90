"""Native code touches the memory that it was given, and no other."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcm
from fastcm.kernels import native as library

KEY = fastcm.NoiseKey(3, 5)

pytestmark = pytest.mark.skipif(
    library.pointwise("noise") is None, reason="there is no C++ compiler"
)


def called(name: str, packed: bytes) -> None:
    function = library.pointwise(name)
    assert function is not None
    if error := function(packed):
        library.refuse(name, error)


def test_a_tensor_of_another_dtype_or_size_is_refused_before_memory_is_touched() -> None:
    key, out = KEY.tensor, torch.zeros(6)

    def noise(out: Tensor | None, dtype: int, numel: int, key_dtype: int = 6) -> None:
        at = 0 if out is None else out.data_ptr()
        packed = struct.pack("11q", 2, 3, 1, key.data_ptr(), key_dtype, 3, 0, 0, at, dtype, numel)
        called("noise", packed)

    noise(out, 1, 6)
    assert out.abs().min() > 0
    kept = out.clone()
    for what, *wrong in (("size", 1, 5), ("dtype", 5, 6), ("dtype", 1, 6, 1)):
        with pytest.raises(library.Refused, match=f"noise: a tensor of the wrong {what}"):
            noise(out, *wrong)
    with pytest.raises(library.Refused, match="noise: a tensor without memory"):
        noise(None, 1, 6)
    assert torch.equal(out, kept)


def test_noise_is_shared_by_closed_forms_only() -> None:
    def loss(shared: int) -> None:
        F, x, y, values, gradient = (torch.zeros(2, 3) for _ in range(5))
        c = torch.ones(2)
        float32 = [(t.data_ptr(), 1, t.numel()) for t in (F, x, c, y, gradient)]
        stored, nothing = (0,) * 11, (0,) * 3  # no alpha, sigma, key, stream, first sample
        packed = [2, 3, 1, *float32[0], *float32[1], *stored, *float32[2], *float32[2]]
        packed += [*float32[3], *stored, shared, *nothing * 4, 0]
        tail = [values.data_ptr(), 1, 2, *float32[4]]
        called("consistency_loss", struct.pack(f"{len(packed)}q2d6q", *packed, 0.0, 1.0, *tail))

    loss(0)
    with pytest.raises(library.Refused, match="noise that two tensors share is in closed form"):
        loss(1)


SCRIPT = """
import os, sys, torch
torch.manual_seed(0)
net = __import__("fastcm").networks.MLP(shape=(3,), width=16, depth=1)
data = torch.linspace(-1, 1, 48).reshape(16, 3)
for default in sys.argv[2:]:
    if os.fork() == 0:
        break  # a process for each, which has made nothing under another
    assert os.wait()[1] == 0, default
else:
    sys.exit()
if default == "meta":
    torch.set_default_device(default)
else:
    torch.set_default_dtype(getattr(torch, default))
import fastcm
from fastcm import ops
z = ops.noise((3, 4097), fastcm.NoiseKey(3), stream=2)
objective = fastcm.ConsistencyTraining()
t = fastcm.Trainer(net, objective, data=data, batch_size=8, compile=False).fit(5)
x = fastcm.Sampler(t.ema_network(0), fastcm.Linear(), shape=(3,), steps=2)(7)
weights = torch.cat([p.detach().flatten() for p in net.parameters()])
results = z, x, weights, t.optimizer.state_dict()["state"][0]["step"]
assert all(v.device.type == "cpu" and v.dtype == torch.float32 for v in results[:3])
torch.save(results, f"{sys.argv[1]}/{default}.pt")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forks of one")
def test_torchs_defaults_change_no_bit(tmp_path: Path) -> None:
    """Buffers of the default dtype that native code writes float32 into overflow, or are wrong;
    and what is made without a device is somewhere else."""
    defaults = ("float32", "float64", "bfloat16", "meta")
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), *defaults], check=True)
    results = [torch.load(tmp_path / f"{default}.pt") for default in defaults]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(torch.as_tensor(a).float(), torch.as_tensor(b).float())


def test_no_entry_leaves_its_buffers_under_the_sanitizers(tmp_path: Path) -> None:
    kernels, driver = Path(library.__file__).parent, Path(__file__).with_name("native_driver.cpp")
    sources = [str(driver), str(kernels / "adam_ema.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", f"-I{kernels}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    program = tmp_path / "driver"
    for isa in ([], ["-mavx2", "-mfma"]):
        command = [compiler, *flags, *checks, *isa, *sources, "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode and "sanitize" in built.stderr + built.stdout:
            pytest.skip("the compiler has no sanitizers")
        assert built.returncode == 0, built.stderr
        if isa and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            continue
        # the pool of OpenMP is never given back
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        ran = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
        assert ran.stdout == "clean\n" and ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
