"""What the step's benchmark trains: networks, settings, and the columns that train them."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastcm
from benchmarks.reference_loop import Given, Loop, Variant
from benchmarks.reference_methods import Consistency, Easy, Flow, Mean, Method
from fastcm import rng
from fastcm.data import as_source
from fastcm.networks import MLP, DiT, UNet
from fastcm.objectives import Batch
from fastcm.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
Precision = Literal["fp32", "bf16"]
CHECKED_STEPS = 5


@dataclass(frozen=True)
class Subject:
    """A network, its data and the batches it is trained with."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    samples: int
    batches: tuple[int, ...]
    pixels: bool = True

    def data(self) -> Tensor:
        """Random: the time of a step does not depend on what is in a picture."""
        shape = (self.samples, *self.shape)
        if self.pixels:
            return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
        return torch.randn(shape, device=DEVICE)


LAUNCH_BOUND, SATURATED = 32, 256
GPU_BATCHES = (LAUNCH_BOUND, SATURATED)
IMAGES, LATENTS = (3, 32, 32), (4, 32, 32)

SUBJECTS = {
    "MLP": Subject(partial(MLP, (1, 8, 8)), (1, 8, 8), 1797, GPU_BATCHES if CUDA else (256,)),
    "UNet-S": Subject(
        partial(UNet, 3, 32, (1, 2), num_res_blocks=1),
        IMAGES,
        8192,
        GPU_BATCHES if CUDA else (16,),
    ),
}
if CUDA:
    SUBJECTS |= {
        "UNet-L": Subject(
            partial(UNet, 3, 128, (1, 2, 2), num_res_blocks=2), IMAGES, 50_000, GPU_BATCHES
        ),
        "DiT-S/2": Subject(partial(DiT, 4, 32), LATENTS, 8192, GPU_BATCHES, pixels=False),
        "DiT-B/2": Subject(
            partial(DiT, 4, 32, width=768, num_heads=12), LATENTS, 8192, GPU_BATCHES, pixels=False
        ),
    }
else:
    SUBJECTS["DiT-tiny"] = Subject(
        partial(DiT, 4, 32, width=128, depth=4, num_heads=4), LATENTS, 2048, (16,), pixels=False
    )
LARGE = "DiT-S/2" if CUDA else "DiT-M"
STEPPED = dict(SUBJECTS)
"""What is trained here; the other benchmarks do without the large one of a CPU."""
if not CUDA:
    STEPPED[LARGE] = Subject(
        partial(DiT, 4, 32, width=256, depth=8, num_heads=4), LATENTS, 2048, (8,), pixels=False
    )

METHODS: dict[str, tuple[Callable[..., Any], Method]] = {
    "CT": (fastcm.ConsistencyTraining, Consistency()),
    "CD": (fastcm.ConsistencyDistillation, Consistency()),
    "ECT": (fastcm.EasyConsistency, Easy()),
    "flow": (fastcm.FlowMatching, Flow()),
    "MeanFlow": (fastcm.MeanFlow, Mean()),
}
"""The same in fastcm and plain torch, by its defaults."""


@dataclass(frozen=True)
class Setting:
    """One row of the report."""

    network: str
    method: str
    batch: int
    precision: Precision

    @property
    def id(self) -> str:
        return f"{self.network}-{self.method}-{self.batch}-{self.precision}"


def settings() -> list[Setting]:
    """The rows; few, since each is compiled twice: on a CPU two in bf16, if it has that.

    Every method on a small and a large network. On a GPU small networks are launch-bound, and large
    ones run in bf16, first the small batch.
    """
    others = [method for method in METHODS if method not in ("CT", "CD")]
    if CUDA:
        chosen: list[tuple[str, str, int, Precision]] = [
            *((n, m, LAUNCH_BOUND, "fp32") for n in ("MLP", "UNet-S") for m in ("CT", "CD")),
            *(("DiT-S/2", m, b, "bf16") for m in ("CT", "CD") for b in GPU_BATCHES),
            *(("UNet-L", "CT", b, "bf16") for b in GPU_BATCHES),
            ("DiT-B/2", "CT", SATURATED, "bf16"),
            ("UNet-S", "CT", SATURATED, "fp32"),
            ("UNet-S", "CT", LAUNCH_BOUND, "bf16"),
            *(("UNet-S", m, LAUNCH_BOUND, "fp32") for m in others),
            *((LARGE, m, LAUNCH_BOUND, "bf16") for m in others),
        ]
        return [Setting(*each) for each in chosen]
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rows = [
        Setting(network, method, batch, "fp32")
        for network, subject in SUBJECTS.items()
        for method in ("CT", "CD")
        for batch in subject.batches
    ]
    low = [Setting("MLP", method, 256, "bf16") for method in ("CT", "CD")]
    rows += low if native else []
    rows += [Setting("MLP", method, 256, "fp32") for method in others]
    return [*rows, *(Setting(LARGE, method, 8, "fp32") for method in METHODS)]


@dataclass
class Column:
    """Something that trains: `fit` runs that many steps and ends with the last loss read.

    Args:
        networks: the student, and its average that one would sample from.
        fit, loss: take steps; the loss of the last.
        stamps: times at which the steps were issued.
        errors: see `Case.outcome`.
        peak_bytes: of memory on a GPU.
    """

    networks: dict[str, nn.Module]
    fit: Callable[[int], object]
    loss: Callable[[], float]
    stamps: list[float]
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def seconds(self, steps: int) -> float:
        """Of one step, the mean over `steps`."""
        self.stamps.clear()
        synchronize()
        start = time.perf_counter()
        self.fit(steps)
        synchronize()
        return (time.perf_counter() - start) / steps

    def host_seconds(self) -> float:
        """To issue one step without waiting: the second, while the device has the first."""
        self.seconds(2)
        return self.stamps[1] - self.stamps[0]


@dataclass(frozen=True)
class Case:
    """What all columns of a row start from."""

    setting: Setting
    net: nn.Module
    teacher: nn.Module | None
    data: Tensor
    given: tuple[Given, ...]

    def loop(
        self,
        variant: Variant,
        *,
        dtype: torch.dtype = torch.float32,
        micro_batch: int | None = None,
    ) -> Column:
        """The plain PyTorch loop."""
        stamps: list[float] = []
        loop = Loop(
            copy.deepcopy(self.net).to(dtype),
            self.data,
            self.setting.batch,
            METHODS[self.setting.method][1],
            variant,
            teacher=self.teacher and copy.deepcopy(self.teacher).to(dtype),
            bf16=self.setting.precision == "bf16" and dtype == torch.float32,
            given=self.given,
            micro_batch=micro_batch,
            on_step=lambda: stamps.append(time.perf_counter()),
        )
        networks = {"parameters": loop.net, "average": loop.average}
        return Column(networks, loop.fit, lambda: loop.last_loss, stamps)

    def trainer(
        self, *, compile: bool, callbacks: Sequence[Callable[[fastcm.Trainer, str], None]] = ()
    ) -> fastcm.Trainer:
        """With its default optimizer, averages and clipping."""
        teacher = [] if self.teacher is None else [copy.deepcopy(self.teacher)]
        objective = METHODS[self.setting.method][0](*teacher)
        return fastcm.Trainer(
            copy.deepcopy(self.net),
            objective,
            data=self.data,
            batch_size=self.setting.batch,
            precision=self.setting.precision,
            compile=compile,
            log_every=2**31,
            progress=False,
            callbacks=callbacks,
        )

    def fastcm(self, *, compile: bool) -> Column:
        """A trainer's `fit`, as its user calls it."""
        stamps: list[float] = []

        def stamp(_: fastcm.Trainer, event: str) -> None:
            if event == "step":
                stamps.append(time.perf_counter())

        trainer = self.trainer(compile=compile, callbacks=[stamp])
        networks = {"parameters": trainer.net, "average": trainer.ema_network()}
        return Column(networks, trainer.fit, lambda: trainer.metrics["loss"], stamps)

    def outcome(self, column: Column) -> dict[str, Tensor]:
        """Losses of the first steps, and how far they moved parameters and average; float64."""
        losses = []
        for _ in range(CHECKED_STEPS):
            column.fit(1)
            losses.append(column.loss())
        found = {"loss": torch.tensor(losses, dtype=torch.float64)}
        for name, network in column.networks.items():
            pairs = zip(network.parameters(), self.net.parameters(), strict=True)
            ways = [(p.detach().double() - q.detach().double()).flatten() for p, q in pairs]
            found[name] = torch.cat(ways)
        return found


def build(setting: Setting) -> Case:
    torch.manual_seed(0)
    subject = STEPPED[setting.network]
    two_times = {"two_times": True} if setting.method == "MeanFlow" else {}
    net = subject.make(**two_times).to(DEVICE)
    for p in net.parameters():
        if not p.any():  # layers that start at zero would hide the others from the check
            nn.init.normal_(p, std=0.02)
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if setting.method == "CD" else None
    data = subject.data()
    # CD draws as CT does, and would want a teacher
    drawn = METHODS["CT" if setting.method == "CD" else setting.method][0]()
    source, given = as_source(data, seed=0, device=DEVICE), []
    for step in range(CHECKED_STEPS):
        x0, _ = source.draw(step, setting.batch)
        key = rng.NoiseKey(0, step, device=DEVICE)
        batch = Batch(x0, key)
        if setting.method == "flow":
            t = s = drawn.times(batch.uniform(rng.TIME), 0.0, 1.0)
        else:
            t, s = drawn.draw(batch)
        given.append((x0, reference.noise(x0.shape, key, stream=rng.NOISE), t, s))
    return Case(setting, net, teacher, data, tuple(given))


def forget_failure() -> None:
    """Collect what a compilation that failed left behind, and keep torch's state as it is.

    torch.func.jvp leaves a guard (torch 2.13) that puts back the state of its time whenever it is
    collected, and no derivative works any more.
    """
    state = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*state):
        gc.collect()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()
