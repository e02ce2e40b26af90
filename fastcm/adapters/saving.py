"""Networks back into folders of diffusers, with a scheduler that samples as `fastcm.Sampler`."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastcm.adapters.loading import (
    INDEX,
    SCHEDULER,
    class_of,
    component_of,
    library,
    read_json,
    scheduler_config,
    time_scale_of,
)
from fastcm.adapters.network import DiffusersNetwork
from fastcm.adapters.schedulers import Plan, is_flow, plan_of
from fastcm.paths import Linear
from fastcm.runs import checkpoint
from fastcm.sampling import Sampler

NOTE = "fastcm.json"
"""What a saved folder says of how to call it."""


@dataclass(frozen=True)
class Saved:
    """A folder of a pipeline, and how to call it to get the samples of `fastcm.Sampler`.

    Args:
        path: of the folder.
        scheduler: name of its scheduler.
        call: arguments of the pipeline, or of the scheduler's `set_timesteps`: num_inference_steps,
            sigmas or timesteps; of the pipeline alone guidance_rescale, where the sampler has it.
        noise_scale: factor of standard normals to be given as `latents`; a pipeline that draws them
            itself takes 1.
    """

    path: Path
    scheduler: str
    call: dict[str, Any]
    noise_scale: float


def save(
    source: str | Path | Sampler | nn.Module,
    out: str | Path,
    *,
    like: str | Path,
    ema: int = 0,
    net: nn.Module | None = None,
    scheduler: str | None = None,
    component: str | None = None,
    **sampling: Any,
) -> Saved:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads.

    It is `like` with the network's config and weights, in safetensors and the dtype that they have,
    and another scheduler; the rest is copied. The scheduler is configured such that the pipeline's
    samples are those of a `Sampler` with the same settings, for the same noise.

    Args:
        source: a run directory, a `Sampler`, or a network, which needs `path` among the settings.
        out: the folder; it must not exist.
        like: the folder of the pipeline that the network came from.
        ema: of a run directory, which average of the weights; -1 takes the raw weights.
        net: of a run directory, a `DiffusersNetwork` of the run's architecture where that is not
            the one of `like`, such as one that embeds the guidance.
        scheduler: name of the scheduler's class; default the usual one for the sampler.
        component: which of the pipeline's networks, where it has several.
        **sampling: steps, times, grid, method, solver, ... of `Sampler`.

    Raises:
        ValueError: a sampler that no scheduler of diffusers can be configured to, named; settings
            given along with a `Sampler`; a network that is not a `DiffusersNetwork`.
        FileExistsError: out exists.
        FileNotFoundError: like is not the folder of a pipeline; no run at `source`.
    """
    like, out = Path(like), Path(out)
    if not (like / INDEX).is_file():
        raise FileNotFoundError(f"like must be the folder of a pipeline: {like} has no {INDEX}")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or remove it")
    index = read_json(like / INDEX)
    component = component_of(index, component)
    sampler = _sampler(source, ema, net, like / component, sampling)
    network = checkpoint.plain(sampler.net)
    if not isinstance(network, DiffusersNetwork):
        raise ValueError(
            f"the network must be a DiffusersNetwork, got {type(network).__name__}: diffusers has "
            "no class for another"
        )
    diffusers = library()
    plan = plan_of(sampler, timesteps=_timesteps(network, sampler), name=scheduler)
    made = _scheduler(diffusers, plan)
    name = str(index.get("_class_name"))
    _check_call(diffusers, name, plan)
    if sampler.guidance_rescale:
        _check_rescales(diffusers, name)
        plan = plan._replace(call={**plan.call, "guidance_rescale": sampler.guidance_rescale})
    partial = out.with_name(f".{out.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    others = shutil.ignore_patterns(component, "scheduler", INDEX, NOTE)
    # of this folder alone: those of the components may hold files of the same names
    shutil.copytree(
        like, partial, ignore=lambda at, names: others(at, names) if Path(at) == like else set()
    )
    network.model.save_pretrained(partial / component, safe_serialization=True)  # type: ignore[operator]
    made.save_pretrained(partial / "scheduler")
    index[component] = ["diffusers", network.name]
    index["scheduler"] = ["diffusers", plan.name]
    _write(partial / INDEX, index)
    _write(partial / NOTE, _note(sampler, plan))
    partial.rename(out)
    return Saved(out, plan.name, plan.call, plan.noise_scale)


def _sampler(
    source: str | Path | Sampler | nn.Module,
    ema: int,
    net: nn.Module | None,
    like: Path,
    sampling: dict[str, Any],
) -> Sampler:
    if isinstance(source, Sampler):
        if sampling:
            raise ValueError(f"a Sampler has its settings: leave out {sorted(sampling)}")
        return source
    if isinstance(source, nn.Module):
        if "path" not in sampling:
            raise ValueError("a network needs path=, its path or Parameterization, to be sampled")
        return Sampler(source, **sampling)
    if net is None:
        kind, config = class_of(like)
        net = DiffusersNetwork(kind.from_config(config))
        sampler = Sampler.from_run(source, ema=ema, net=net, **sampling)
        # of the run's path, and so known only now
        net.time_scale = _taught_scale(net, sampler, like.parent / "scheduler")
        return sampler
    return Sampler.from_run(source, ema=ema, net=net, **sampling)


def _taught_scale(network: DiffusersNetwork, sampler: Sampler, scheduler: Path) -> float:
    """The time_scale of a student of the pipeline's network, on the same kind of path."""
    p = sampler.parameterization
    config = scheduler_config(scheduler) if (scheduler / SCHEDULER).is_file() else {}
    if isinstance(p.path, Linear) != is_flow(config):
        raise ValueError(
            f"the run is on {type(p.path).__name__}, and the scheduler of like, "
            f"{config.get('_class_name')}, is not: give net=, with the time_scale of the run's"
        )
    return time_scale_of(network, p, config)


def _scheduler(diffusers: Any, plan: Plan) -> Any:
    kind = getattr(diffusers, plan.name, None)
    takes = {} if kind is None else inspect.signature(kind.__init__).parameters
    unknown = [key for key in plan.config if key not in takes]
    if kind is None or unknown:
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {plan.name} that takes {unknown}: update it"
        )
    return kind(**plan.config)


def _timesteps(network: DiffusersNetwork, sampler: Sampler) -> int:
    """num_train_timesteps of the scheduler that tells the network of the time as we do."""
    told = network.time_scale / network.call.unit
    linear = isinstance(sampler.parameterization.path, Linear)
    if abs(told - round(told)) > 1e-6 * told or round(told) < 1 or not (linear or round(told) == 1):
        wanted = "a whole multiple of " if linear else ""
        raise ValueError(
            f"the network's time_scale is {network.time_scale:g}, and its pipelines give it "
            f"{wanted}{network.call.unit:g} times the time: no scheduler can be configured to that"
        )
    return round(told)


def _arguments(diffusers: Any, name: str) -> Mapping[str, Any] | None:
    """Of a pipeline's call, None where they are not seen."""
    call = getattr(getattr(diffusers, name, None), "__call__", None)  # noqa: B004
    return inspect.signature(call).parameters if inspect.isfunction(call) else None


def _check_rescales(diffusers: Any, name: str) -> None:
    """Raise ValueError unless the pipeline rescales what it has guided."""
    if "guidance_rescale" not in (_arguments(diffusers, name) or {}):
        raise ValueError(
            f"{name} takes no guidance_rescale: leave it out of the Sampler, and of its samples"
        )


def _check_call(diffusers: Any, name: str, plan: Plan) -> None:
    """Raise ValueError if the pipeline has no argument for the times, as far as that is seen."""
    takes = _arguments(diffusers, name)
    missing = [argument for argument in plan.call if takes is not None and argument not in takes]
    if missing:
        raise ValueError(
            f"{name} takes no {missing[0]}, only a number of steps, for which {plan.name} has "
            "other times: give steps=, with the UniformGrid"
        )


def _note(sampler: Sampler, plan: Plan) -> dict[str, Any]:
    return {
        "call": plan.call,
        "noise_scale": plan.noise_scale,
        "times": sampler.times,
        "method": sampler.method if sampler.method != "ode" else sampler.solver,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
