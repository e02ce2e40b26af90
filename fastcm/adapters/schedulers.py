"""Schedulers of diffusers: what their configs say of a model, and which one samples as we do.

Index i of a DDPM schedule is time i + 1 of `VariancePreserving`; sigma of a flow is the time of
`Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from fastcm.parameterization import Parameterization, Prediction
from fastcm.paths import Linear, VarianceExploding, VariancePreserving
from fastcm.sampling import Sampler
from fastcm.sampling.levels import levels

Config = Mapping[str, Any]

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""By diffusers' name."""
NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}

FLOWS = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
)  # fmt: skip
EITHER = (
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Of a flow where `use_flow_sigmas` is set."""
DDPMS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", *EITHER,
)  # fmt: skip
CONSISTENCY = "CMStochasticIterativeScheduler"
EDMS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")


def parameterization_of(config: Config, prediction: Prediction | None = None) -> Parameterization:
    """Path and prediction type of the model that a scheduler samples from.

    Args:
        config: its scheduler_config.json.
        prediction: what the config is silent about; an older one often is.

    Raises:
        ValueError: an unknown scheduler, or one of a path that is not here; no prediction type, or
            another one than `prediction`; keys that are missing.
    """
    name = config.get("_class_name")
    if name == CONSISTENCY:
        low, high, data = _read(config, "sigma_min", "sigma_max", "sigma_data")
        return _agreed(Parameterization(VarianceExploding(low, high, data), "cm"), prediction)
    if name in EDMS:
        low, high, data, found = _read(
            config, "sigma_min", "sigma_max", "sigma_data", "prediction_type"
        )
        if found != "epsilon":  # its F is that of "edm", negative
            raise _other_path("prediction_type", found)
        return _agreed(
            Parameterization(VarianceExploding(low, high, data, 0.25), "edm"), prediction
        )
    if is_flow(config):
        if config.get("invert_sigmas"):
            raise _other_path("invert_sigmas", True)
        if name not in FLOWS:
            theirs = config.get("prediction_type")
            if theirs != "flow_prediction" and not (theirs is None and prediction):
                raise _no_prediction(theirs, "'flow_prediction', as use_flow_sigmas is set")
        return _agreed(Parameterization(Linear(), "v"), prediction)
    if name not in DDPMS:
        raise ValueError(
            f"scheduler {name!r} is not known here, known are "
            f"{sorted({*FLOWS, *DDPMS, *EDMS, CONSISTENCY})}: give parameterization="
        )
    found = config.get("prediction_type")
    if found is None and prediction is None:
        raise ValueError(
            f"the config of {name} has no prediction_type: give prediction='eps', which diffusers "
            "takes then, 'v' or 'x0', whichever the model was trained for"
        )
    if found is not None and found not in PREDICTIONS:
        raise _no_prediction(found, f"one of {sorted(PREDICTIONS)}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise _other_path(key, "set" if key == "trained_betas" else True)
    if config.get("timestep_type") == "continuous":  # of sigma, as in video diffusion
        raise _other_path("timestep_type", "continuous")
    n, start, end, kind = _read(
        config, "num_train_timesteps", "beta_start", "beta_end", "beta_schedule"
    )
    if kind not in ("linear", "scaled_linear"):
        raise _other_path("beta_schedule", kind)
    path = VariancePreserving(n, start, end, scaled=kind == "scaled_linear")
    told = prediction if found is None else PREDICTIONS[found]
    return _agreed(Parameterization(path, told), prediction)


def is_flow(config: Config) -> bool:
    """Whether a scheduler is of a flow, with sigma in [0, 1]."""
    name = config.get("_class_name")
    return name in FLOWS or (name in EITHER and bool(config.get("use_flow_sigmas")))


def _read(config: Config, *keys: str) -> tuple[Any, ...]:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(
            f"the config of {config.get('_class_name')} lacks {missing}: give parameterization="
        )
    return tuple(config[key] for key in keys)


def _agreed(p: Parameterization, prediction: Prediction | None) -> Parameterization:
    if prediction is not None and prediction != p.prediction:
        raise ValueError(
            f"prediction is {p.prediction!r} by the scheduler's config, and {prediction!r} was "
            "given: leave it out, or give parameterization="
        )
    return p


def _other_path(key: str, value: object) -> ValueError:
    return ValueError(
        f"the scheduler's {key} is {value!r}, a schedule that no path here has: give "
        "parameterization="
    )


def _no_prediction(found: object, wanted: str) -> ValueError:
    return ValueError(
        f"the scheduler's prediction_type is {found!r} instead of {wanted}: give prediction=, "
        "where it is missing, or parameterization="
    )


class Plan(NamedTuple):
    """A scheduler, and how to call its pipeline.

    call: arguments of the pipeline (of `set_timesteps`) that make the times of the sampler.
    noise_scale: factor of standard normals to be given as the pipeline's `latents`, which it
        multiplies by the scheduler's init_noise_sigma.
    """

    name: str
    config: dict[str, Any]
    call: dict[str, Any]
    noise_scale: float = 1.0


def plan_of(sampler: Sampler, *, timesteps: int, name: str | None = None) -> Plan:
    """The scheduler whose samples are those of the sampler, of the same noise.

    Args:
        sampler: of any number of steps.
        timesteps: of the unit of time of a flow; 1,000 everywhere but in odd cases.
        name: of the scheduler; None takes the usual one for what the sampler does.

    Raises:
        ValueError: no scheduler does that, or not this one.
    """
    p, method = sampler.parameterization, sampler.method
    what = method if method != "ode" else sampler.solver
    if sampler.churn is not None:
        raise ValueError("churn: no scheduler adds noise where fastcm.sampling.Churn does")
    found = MAKERS.get((type(p.path), what), {})
    if not found:
        raise ValueError(
            f"no scheduler of diffusers samples on {type(p.path).__name__} by {what!r} as "
            "fastcm.Sampler does; there is one for "
            f"{sorted({f'{path.__name__}: {way}' for path, way in MAKERS})}"
        )
    name = next(iter(found)) if name is None else name
    if name == "TCDScheduler":
        raise ValueError(
            "TCDScheduler ends at index 0 of its schedule, and fastcm.Sampler at data: take "
            "'LCMScheduler' (its eta = 1) or solver 'ddim' (its eta = 0)"
        )
    if name not in found:
        raise ValueError(f"scheduler must be one of {list(found)} for this sampler, got {name!r}")
    return found[name](name, p, sampler.times, timesteps)


Maker = Callable[[str, Parameterization, Sequence[float], int], Plan]


def _flow(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    if p.prediction != "v":
        raise ValueError(f"{name} is of velocities: the network predicts {p.prediction!r}, not 'v'")
    return _flow_plan(name, times, {"num_train_timesteps": timesteps})


def _noisy_flow(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    plan = _flow(name, p, times, timesteps)
    return plan._replace(config={**plan.config, "stochastic_sampling": True})


def _flow_plan(name: str, times: Sequence[float], config: dict[str, Any]) -> Plan:
    n = len(times)
    shift = _shift_of(times)
    if shift is None:  # as they are
        return Plan(name, {**config, "shift": 1.0}, {"sigmas": list(times)}, times[0])
    if abs(shift - 1.0) < 1e-9:
        # the scheduler's own times, stretched to end at 1 / n
        terminal = {"shift_terminal": 1.0 / n} if n > 1 else {}
        return Plan(name, {**config, "shift": 1.0, **terminal}, {"num_inference_steps": n})
    even = [(n - j) / n for j in range(n)]  # what it shifts
    return Plan(name, {**config, "shift": shift}, {"sigmas": even})


def _shift_of(times: Sequence[float]) -> float | None:
    """The shift of the times of a `ShiftedGrid`, 1 for a `UniformGrid`; None for others."""
    n = len(times)
    even = [(n - j) / n for j in range(1, n)]
    shifts = [t * (1.0 - u) / (u * (1.0 - t)) for t, u in zip(times[1:], even)] or [1.0]
    same = max(shifts) - min(shifts) < 1e-6 * shifts[0]
    return shifts[0] if times[0] == 1.0 and same else None


def _ddpm(
    name: str,
    p: Parameterization,
    times: Sequence[float],
    config: dict[str, Any],
    *,
    evenly: bool = False,
    least: int = 0,
) -> Plan:
    """On indices >= least: those that a scheduler takes of itself, and others unless `evenly`."""
    path = cast(VariancePreserving, p.path)
    N, n = path.num_steps, len(times)
    index = [round(t) - 1 for t in times]
    if any(abs(t - i - 1) > 1e-9 for t, i in zip(times, index)) or index[-1] < least:
        raise ValueError(
            f"{name} evaluates at whole times >= {least + 1} of VariancePreserving alone: give "
            f"steps that divide {N}, or times; got {list(times)}"
        )
    if N % n == 0 and index == [N - j * (N // n) - 1 for j in range(n)]:
        call: dict[str, Any] = {"num_inference_steps": n}
    elif evenly:
        raise ValueError(
            f"{name} takes steps of one length from t = {N} on: give steps that divide {N}, got "
            f"times {list(times)}"
        )
    else:
        call = {"timesteps": index}
    schedule = {
        "num_train_timesteps": N,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": "scaled_linear" if path.scaled else "linear",
        "prediction_type": NAMES[cast(Prediction, p.prediction)],
        "steps_offset": 1,  # without effect here, but pipelines of Stable Diffusion insist
    }
    (start, *_) = levels(p, times)
    return Plan(name, {**schedule, **config}, call, start.sigma)


def _lcm(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    config = {
        "original_inference_steps": int(p.path.t_max),
        # its own boundary condition mixes x in at small times, unless those are scaled up
        "timestep_scaling": 1e6,
        "clip_sample": False,
    }
    return _ddpm(name, p, times, config, least=1)


def _ddim(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    config = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    return _ddpm(name, p, times, config, evenly=True)


def _dpm(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    config = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    return _ddpm(name, p, times, config)


def _consistency(name: str, p: Parameterization, times: Sequence[float], timesteps: int) -> Plan:
    path, n = cast(VarianceExploding, p.path), len(times)
    if p.prediction != "cm" or path.c_noise_scale != 250.0:
        raise ValueError(
            f"{name} is of the prediction 'cm' with c_noise_scale = 250, got {p.prediction!r} on "
            f"{path}"
        )
    for rho in (7.0, 1.0):  # KarrasGrid() and UniformGrid()
        low, high = path.t_min ** (1 / rho), path.t_max ** (1 / rho)
        wanted = [(high + j / n * (low - high)) ** rho for j in range(n)]
        if all(math.isclose(t, w, rel_tol=1e-9) for t, w in zip(times, wanted)):
            break
    else:
        raise ValueError(
            f"{name} takes the times of KarrasGrid() or UniformGrid() alone, got {list(times)}"
        )
    config = {
        # of n + 1 points the first n are ours
        "num_train_timesteps": n + 1, "rho": rho, "clip_denoised": False,
        "sigma_min": path.t_min, "sigma_max": path.t_max, "sigma_data": path.sigma_data,
    }  # fmt: skip
    return Plan(name, config, {"num_inference_steps": n})


_EULER, _FLOW_LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
MAKERS: dict[tuple[type, str], dict[str, Maker]] = {
    (Linear, "multistep"): {_EULER: _noisy_flow, _FLOW_LCM: _flow},
    (Linear, "euler"): {_EULER: _flow},
    (Linear, "ddim"): {_EULER: _flow},
    (VariancePreserving, "multistep"): {"LCMScheduler": _lcm},
    (VariancePreserving, "ddim"): {"DDIMScheduler": _ddim},
    (VariancePreserving, "dpmpp_2m"): {"DPMSolverMultistepScheduler": _dpm},
    (VarianceExploding, "multistep"): {CONSISTENCY: _consistency},
}
"""By path and method or solver; the first is the usual one."""
