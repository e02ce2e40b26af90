"""From option values to a trainer: the defaults of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from fastcm import data, networks, schedules
from fastcm.cli.tables import (
    DISTILLATIONS,
    GRIDS,
    LCM,
    METHODS,
    METHODS_WITH,
    METRIC_NAMES,
    METRICS,
    MORE_INPUTS,
    PATHS,
    TIMES,
    TWO_TIMES,
    WEIGHTS,
    discretization,
)
from fastcm.data import Dataset, Shards
from fastcm.ema import EMA
from fastcm.objectives import (
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    ContinuousConsistency,
    EasyConsistency,
    FlowMatching,
    MeanFlow,
    Objective,
    PairDistillation,
    Shortcut,
    Stepwise,
)
from fastcm.optim import AdamW, RAdam
from fastcm.parameterization import Parameterization
from fastcm.sampling import Sampler
from fastcm.training import Trainer, warmup_cosine
from fastcm.training.lr import restarted

IN_MEMORY = 10_000
"""Rows that commands which compare samples with data read of shards."""


@dataclass(frozen=True)
class Recipe:
    """The options of ``fastcm train``; None is the method's default.

    An option that the method does not have is refused, never ignored.
    """

    data: str = "digits"
    method: str = "ct"
    net: str = "mlp"
    steps: int = 1000
    batch: int = 256
    size: int | None = None
    channels: int | None = None
    held_out: float = 0.2
    conditional: bool = False
    condition_dropout: float | None = None
    path: str | None = None
    prediction: str | None = None
    times: str | None = None
    metric: str | None = None
    lpips_weights: str | None = None
    weight: str | None = None
    grid: str | None = None
    intervals: str | None = None
    target_ema: float | None = None
    segments: int | None = None
    init: str | None = None
    teacher: str | None = None
    guidance: float | None = None
    guidance_range: str | None = None
    solver: str | None = None
    skip: int | None = None
    shift: float | None = None
    width: int | None = None
    lr: float | None = None
    warmup: int = 50
    lr_floor: float = 0.1
    ema: tuple[float, ...] = (0.995,)
    clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    compile: str = "auto"

    def __post_init__(self) -> None:
        if self.path is None:
            object.__setattr__(
                self, "path", {"ict": "ve", "sct": "trig", "scd": "trig"}.get(self.method, "linear")
            )
        for name, table in (
            ("method", METHODS),
            ("path", PATHS),
            ("times", TIMES),
            ("metric", METRIC_NAMES),
            ("weight", WEIGHTS),
            ("grid", GRIDS),
        ):
            value = getattr(self, name)
            if value is not None and value not in table:
                raise ValueError(f"--{name} must be one of {', '.join(table)}, got {value!r}")
        if self.steps < 1:
            raise ValueError(f"--steps must be >= 1, got {self.steps}")
        if not self.lr_rate > 0:
            raise ValueError(f"--lr must be > 0, got {self.lr}")
        if self.clip < 0:
            raise ValueError(f"--clip must be >= 0 (0 does not clip), got {self.clip}")
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"--compile must be auto, on or off, got {self.compile!r}")
        for name, methods in METHODS_WITH.items():
            if getattr(self, name) is not None and self.method not in methods:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no meaning for --method {self.method}")
        if self.shift is not None and (self.grid is not None or self.times is not None):
            raise ValueError("--shift says where the times lie: leave out --grid and --times")
        if self.method == "lcm" and not self.conditional:
            raise ValueError("--method lcm needs --conditional: it distils guidance")
        for name in ("condition_dropout", "guidance"):
            if getattr(self, name) is not None and not self.conditional:
                raise ValueError(f"--{name.replace('_', '-')} needs --conditional")
        if (self.metric == "lpips") != (self.lpips_weights is not None):
            raise ValueError(
                "--metric lpips and --lpips-weights FILE[,FILE] go together: the weights of VGG16 "
                "and of the heads"
            )
        if self.method in DISTILLATIONS and self.teacher is None:
            raise ValueError(
                f"--method {self.method} needs --teacher RUN, the directory of a trained flow"
            )

    @property
    def lr_rate(self) -> float:
        """The learning rate, 1e-3 unless given."""
        return 1e-3 if self.lr is None else self.lr

    def datasets(self) -> tuple[Dataset | Shards, Dataset]:
        """Training and held-out data; of shards some of those that are held out."""
        whole = data.load(self.data, size=self.size, channels=self.channels)
        if self.conditional and whole.labels is None:
            raise ValueError(f"--conditional needs labels, and {self.data} has none")
        if not self.conditional:
            whole = whole.without_labels()
        if self.method == "pairs" and not whole.paired:
            raise ValueError(f"--method pairs needs the folder of `fastcm pairs`, got {self.data}")
        train, held = whole.split(self.held_out)
        return train, held.to_memory(IN_MEMORY) if isinstance(held, Shards) else held

    def network(self, dataset: Dataset | Shards) -> nn.Module:
        """The network for data of this shape, initialised from the seed."""
        shape = dataset.shape
        description: dict[str, object] = {"name": self.net, "num_classes": dataset.num_classes}
        if self.net == "mlp":
            description["shape"] = shape
        elif len(shape) != 3:
            raise ValueError(f"--net {self.net} needs images [C, H, W], got samples {list(shape)}")
        else:
            description["in_channels"] = shape[0]
            if self.net == "dit":
                description["size"] = list(shape[1:])
        if self.method in TWO_TIMES:
            description["two_times"] = True
        if self.method == "lcm":
            description["guided"] = True
        if self.weight == "learned" or (self.method in ("sct", "scd") and self.weight is None):
            description["log_variance"] = True
        if self.width is not None:
            description["base_channels" if self.net == "unet" else "width"] = self.width
        if self.method == "meanflow" and self.init is None:
            description["time_scale"] = 100.0  # at 1,000 its derivative in t is rough
        # told 250 ln t or an index; on trig t itself, for derivatives in it
        if self.path in ("ve", "vp", "trig"):
            description["time_scale"] = 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return networks.build(description)

    def objective(self, dataset: Dataset | Shards, teacher: Sampler | None) -> Objective:
        """The training method with its options."""
        p = self.parameterization
        options: dict[str, Any] = {"parameterization": p}
        if self.times is not None:
            options["times"] = TIMES[self.times]
        if self.shift is not None:
            schedules.ShiftedGrid(self.shift)  # raises
            if self.method == "flow":
                options["times"] = schedules.LogitNormal(mean=math.log(self.shift))
            else:
                options["grid"] = schedules.ShiftedGrid(self.shift)
        if self.metric == "lpips":
            options["metric"] = networks.LPIPS(cast(str, self.lpips_weights).split(","))
        elif self.metric is not None:
            options["metric"] = METRICS[self.metric]
        if self.weight is not None:
            options["weight"] = WEIGHTS[self.weight]
        if self.method in ("flow", "meanflow"):
            if self.condition_dropout is not None:
                options["condition_dropout"] = self.condition_dropout
                options["null_condition"] = dataset.num_classes
            if self.method == "flow":
                return FlowMatching(**options)
        if self.guidance is not None:
            options["guidance"] = self.guidance
            options["null_condition"] = dataset.num_classes
        if self.method == "meanflow":
            # short runs want more rows with a step than the paper's quarter
            return MeanFlow(instant=0.5, **options)
        if self.method in ("sct", "scd"):
            if teacher is not None and self.teacher is not None:
                options["teacher"] = teacher.net
            # of long runs the paper's
            return ContinuousConsistency(warmup=min(10_000, self.steps // 4), **options)
        if self.grid is not None:
            options["grid"] = GRIDS[self.grid]
        if self.segments is not None:
            options["segments"] = self.segments
        if self.target_ema is not None:
            options["target_average"] = EMA(self.target_ema)
        if self.method == "stepwise":
            return Stepwise(self.steps_per_phase, self.phases, **options)
        if self.method == "ict":
            return ConsistencyTraining.improved(self.steps, path=p.path, **options)
        if self.method == "pairs":
            return PairDistillation(**options)
        if self.method == "shortcut":
            return Shortcut(**options)
        if self.method == "cfm":
            # the paper's steps of 1e-3 pay only over some 100,000 steps of training
            return ConsistencyFlowMatching(delta=0.02, velocity_weight=1e-3, **options)
        if self.method == "ect":
            return EasyConsistency(double_every=max(self.steps // 8, 1), **options)
        if self.intervals is not None:
            options["discretization"] = discretization(self.intervals, self.steps)
        if self.method == "ct":
            return ConsistencyTraining(**options)
        for name in ("solver", "skip"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.method == "lcm":
            options = {**LCM, "guidance": self.weights, **options}
            options["null_condition"] = dataset.num_classes
        assert teacher is not None
        options["teacher_parameterization"] = teacher.parameterization
        return ConsistencyDistillation(teacher.net, **options)

    @property
    def parameterization(self) -> Parameterization:
        """Of the network that is trained."""
        return Parameterization(PATHS[cast(str, self.path)], cast(Any, self.prediction))

    @property
    def weights(self) -> tuple[float, float]:
        """The range of guidance that a student is distilled for."""
        text = self.guidance_range or "1,4"
        try:
            low, high = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"--guidance-range must be LOW,HIGH, got {text!r}") from None
        return low, high

    @property
    def phases(self) -> int:
        """Of stepwise training."""
        try:
            return int(self.intervals or 8)
        except ValueError:
            raise ValueError(
                f"--intervals must be a number for --method stepwise, got {self.intervals!r}"
            ) from None

    @property
    def steps_per_phase(self) -> int:
        """Of stepwise training; the last phase takes what is left."""
        return max(self.steps // max(self.phases, 1), 1)

    def trainer(self, directory: Path, **options: Any) -> Trainer:
        """The trainer of this recipe; CD starts from the teacher's weights, others from --init."""
        dataset, _ = self.datasets()
        net = self.network(dataset)
        teacher = None
        for option, run in (("teacher", self.teacher), ("init", self.init)):
            if run is not None:
                teacher = self._load(option, run, dataset, net)
        schedule = warmup_cosine(self.warmup, self.steps, self.lr_floor)
        if self.method == "stepwise":
            every = self.steps_per_phase
            schedule = restarted(
                warmup_cosine(min(self.warmup, every // 4), every, self.lr_floor), every
            )
            options["keep_every"] = options.get("keep_every") or every
        on = "regional" if options.get("parallel") == "fsdp" else True  # blocks are gathered alone
        # iCT and ECT are defined with RAdam
        optimizer: Optimizer = (RAdam if self.method in ("ict", "ect") else AdamW)(
            net.parameters(), self.lr_rate, weight_decay=0.0
        )
        return Trainer(
            net,
            self.objective(dataset, teacher),
            optimizer,
            data=dataset,
            batch_size=self.batch,
            seed=self.seed,
            averages=tuple(EMA(decay) for decay in self.ema),
            lr_schedule=schedule,
            max_grad_norm=self.clip or None,
            precision=cast(Any, self.precision),
            compile=cast(Any, {"auto": "auto", "on": on, "off": False}[self.compile]),
            directory=directory,
            **options,
        )

    def _load(self, option: str, run: str, dataset: Dataset | Shards, net: nn.Module) -> Sampler:
        """The network of a run, whose weights `net` takes over."""
        sampler = Sampler.from_run(run)
        theirs = sampler.parameterization
        ours = self.parameterization
        if sampler.shape != dataset.shape:
            raise ValueError(
                f"--{option} {run} makes samples {list(sampler.shape or ())}, "
                f"the data has {list(dataset.shape)}"
            )
        # "cm" is EDM's preconditioning with the boundary shift: the weights carry over
        same = theirs.prediction in (ours.prediction, "edm" if ours.prediction == "cm" else None)
        if theirs.path != ours.path or not same:
            raise ValueError(
                f"--{option} {run} was trained under {theirs}, the student under {ours}: "
                "give --path and --prediction that agree"
            )
        mine, wanted = (getattr(n, "description", None) for n in (net, sampler.net))
        more = {k: v for k, v in (mine or {}).items() if k in MORE_INPUTS}
        if mine != {**(wanted or {}), **more}:
            raise ValueError(
                f"--{option} {run} is {wanted}, the student {mine}: give the options that "
                "make them equal, since the student starts from the teacher's weights"
            )
        # further inputs change nothing at first
        net.load_state_dict(sampler.net.state_dict(), strict=not more)
        return sampler
