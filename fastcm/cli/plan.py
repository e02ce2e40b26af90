"""The command ``fastcm plan``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

from fastcm import planning
from fastcm.cli.recipes import Recipe
from fastcm.cli.tables import DISTILLATIONS, METHODS, TWO_TIMES
from fastcm.objectives import Objective
from fastcm.planning import Ceilings, sizes

_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
_CLASSES_OF_IMAGENET = 1000


def plan(
    net: Annotated[
        str, typer.Option(help=f"{', '.join(sizes.NAMES)}, or module:function of your own")
    ] = "dit-s",
    method: Annotated[str, typer.Option(help="as in fastcm train")] = "ct",
    batch: Annotated[int, typer.Option(help="samples a step, of all devices")] = 256,
    shape: Annotated[
        str | None, typer.Option(help="of a sample: C,H,W; 4,32,32 for a DiT if absent")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="of labels; 0: none; 1000 for published sizes if absent")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the data: uint8, or float32, which latents are")
    ] = None,
    gpus: Annotated[int, typer.Option(help="devices that share a step")] = 1,
    parallel: Annotated[
        str | None, typer.Option(help="ddp or fsdp; of several devices ddp if absent")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="micro-batches of a device")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="compute blocks again in the backward pass")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    averages: Annotated[int, typer.Option(help="of the weights, beside the method's own")] = 1,
    tflops: Annotated[
        float | None, typer.Option(help="1e12 FLOP/s of matrix products that a device reaches")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of a device's memory")] = None,
    interconnect: Annotated[
        float | None, typer.Option(help="Gbit/s from a device to the others, each way")
    ] = None,
    upload: Annotated[float | None, typer.Option(help="GB/s from the host to a device")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure products and memory of this machine")
    ] = False,
) -> None:
    """What a training step takes: FLOPs, bytes, time of its parts and memory, without a GPU.

    Times are those of the ceilings that are given or measured; without one they are not known.
    """
    title, student, objective, labels = _subject(net, method, shape, classes)
    pixels = net in ("mlp", "unet") and method != "pairs"
    kind = dtype or ("uint8" if pixels else "float32")
    if kind not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if averages < 0:
        raise ValueError(f"--averages must be >= 0, got {averages}")
    ceilings = Ceilings(tflops, bandwidth, interconnect, upload)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if measure:
        ceilings = ceilings.completed(planning.measure(here, cast(Any, precision)))
    made = planning.plan(
        student,
        objective,
        shape=_shape(net, shape),
        batch=batch,
        gpus=gpus,
        parallel=cast(Any, parallel or ("ddp" if gpus > 1 else None)),
        accumulate=accumulate,
        precision=cast(Any, precision),
        checkpointing=checkpointing,
        data_dtype=_DTYPES[kind],
        labels=labels,
        averages=averages,
        ceilings=ceilings,
        device_type=here if measure else "cuda",
    )
    print(planning.markdown(made, title))


def _subject(
    name: str, method: str, shape: str | None, classes: int | None
) -> tuple[str, nn.Module, Objective, bool]:
    """Title, student, method with its teacher, and whether there are labels."""
    if method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if classes is not None and classes < 0:
        raise ValueError(f"--classes must be >= 0, got {classes}")
    published = name in sizes.NAMES and name.startswith("dit-") and name != "dit-tiny"
    if classes is None:
        classes = _CLASSES_OF_IMAGENET if published else 0
    if method == "lcm" and not classes:
        raise ValueError("--method lcm needs --classes: it distils guidance")
    more: dict[str, object] = {"two_times": True} if method in TWO_TIMES else {}
    if method == "lcm":
        more["guided"] = True
    if method in ("sct", "scd"):
        more["log_variance"] = True
    number, of = classes or None, _shape(name, shape)
    student = sizes.network(name, of, number, more)
    recipe = Recipe(
        method=method,
        conditional=classes > 0,
        teacher="-" if method in DISTILLATIONS else None,
    )
    teacher: Any = None
    if method in DISTILLATIONS:
        teacher = SimpleNamespace(
            net=sizes.network(name, of, number, {}), parameterization=recipe.parameterization
        )
    objective = recipe.objective(cast(Any, SimpleNamespace(num_classes=number)), teacher)
    title = f"{name} at {'x'.join(map(str, of))}"
    return title, student, objective, classes > 0


def _shape(name: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return sizes.default_shape(name)
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--shape must be numbers like 4,32,32, got {text!r}")
    return shape
