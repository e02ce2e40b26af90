"""Shared by all tests: interpreted kernels without a GPU, fresh seeds, poisoned memory."""

from __future__ import annotations

import contextlib
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# tiny tensors: threads cost more than they give, several times so where cores are shared
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

# read when a kernel is defined, so before anything imports one
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from operator_cases import OPERATORS
from recorded_graphs import recorded_graphs as recorded_graphs
from their_noise import our_noise as our_noise

from fastcm.kernels import native
from fastcm.objectives import base
from fastcm.ops import dispatch, functions, loss, normals, registered
from fastcm.ops.dispatch import Door
from fastcm.optim import backends, one_sweep


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of random inputs; default: fresh in each run")
    parser.addoption("--kills", type=int, default=20, help="of the run in test_faults")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m gpu, do not import what has no such test: a GPU's image may lack what it needs."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "pytest.mark.gpu" not in collection_path.read_text() or None
    return None


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")


LONGEST = (
    *("training/test_parallel.py", "sampling/test_export.py", "ops/test_codegen.py"),
    *("cli/test_cli.py", "cli/test_matrix.py", "cli/test_options.py", "test_readme.py"),
    *("objectives/test_continuous.py", "jvp/test_attention.py", "test_docs.py"),
    *("optim/test_optim.py", "jvp/test_mode.py", "jvp/test_ways.py", "test_benchmarks.py"),
)
"""Files that take long. They start first, lest one process ends with them: ``--dist loadfile``
with ``--no-loadscope-reorder`` begins files in the order of collection."""


def _rank(item: pytest.Item) -> int:
    path = item.path.as_posix()
    return next((i for i, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda is not available"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run and test, set in torch; the run's is printed if the test fails."""
    run = request.config.option.seed
    value = zlib.crc32(f"{run} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    print(f"random inputs: repeat with --seed {run}")
    return value


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = [signal.signal(number, handler) for number, handler in defaults.items()]
    yield
    for number, handler in zip(defaults, before):
        signal.signal(number, handler)


BACKENDS: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "native": lambda device, dtype: backends.Native(native.load(dtype)),
    "plain": lambda device, dtype: backends.Plain(),
    "triton": lambda device, dtype: backends.Triton(),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The optimizers by each implementation that runs without a GPU."""
    if request.param == "native" and native.load(torch.float32) is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(one_sweep, "choose", BACKENDS[request.param])
    return str(request.param)


@pytest.fixture
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators as where there is no C++ compiler."""
    monkeypatch.setattr(dispatch, "_has_native", lambda: False)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send CPU tensors to the kernels: what a GPU runs, through the interpreter."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter, which the presence of a GPU turns off")

    def door(*tensors: Tensor | None, **_: bool) -> Door:
        exact = any(t.dtype == torch.float64 for t in tensors if t is not None)
        return Door.REFERENCE if exact else Door.KERNEL

    for module in (functions, loss, normals, base):
        monkeypatch.setattr(module, "door", door)
    monkeypatch.setattr(registered, "wrap_triton", lambda kernel: kernel)
    with contextlib.ExitStack() as stack:
        for operator in OPERATORS:
            stack.enter_context(operator.set_kernel_enabled("cpu", False))
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(99)

    return poisoned


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN: what a kernel does not write, or reads too early, shows."""
    monkeypatch.setattr(torch, "empty", _poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", _poison(Tensor.new_empty))


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, by gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
