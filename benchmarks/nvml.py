"""Clocks, power, energy and throttling of the GPU that torch uses, where NVML answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# NVML_FI_DEV_CLOCKS_EVENT_REASON_*: nanoseconds, accumulated
_COUNTERS = {"sw_thermal_ns": 269, "hw_thermal_ns": 270, "power_brake_ns": 271}


def _handle() -> tuple[Any, Any] | None:
    """(pynvml, device), matched by UUID since CUDA_VISIBLE_DEVICES renumbers; or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except Exception:  # not installed, no driver, or a GPU it does not know
        return None


def static() -> dict[str, Any]:
    """Driver version, power limits, and the clocks that it can reach."""
    found = _handle()
    if found is None:
        return {"driver": None}
    nvml, device = found
    return {
        "driver": _asked(nvml.nvmlSystemGetDriverVersion),
        "power_limit_mw": _asked(nvml.nvmlDeviceGetEnforcedPowerLimit, device),
        "default_power_limit_mw": _asked(nvml.nvmlDeviceGetPowerManagementDefaultLimit, device),
        "max_sm_mhz": _asked(nvml.nvmlDeviceGetMaxClockInfo, device, nvml.NVML_CLOCK_SM),
        "max_memory_mhz": _asked(nvml.nvmlDeviceGetMaxClockInfo, device, nvml.NVML_CLOCK_MEM),
    }


def _asked(call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, or None: what one GPU or its owner does not support, another does."""
    try:
        return call(*arguments)
    except Exception:
        return None


def snapshot() -> dict[str, Any] | None:
    """Clocks now, and the counters that `difference` subtracts; None without NVML."""
    found = _handle() if torch.cuda.is_available() else None
    if found is None:
        return None
    nvml, device = found
    state: dict[str, Any] = {
        "time": time.monotonic(),
        "sm_mhz": _asked(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
        "memory_mhz": _asked(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_MEM),
        "temperature_c": _asked(nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU),
        "energy_mj": _asked(nvml.nvmlDeviceGetTotalEnergyConsumption, device),
    }
    values = _asked(nvml.nvmlDeviceGetFieldValues, device, list(_COUNTERS.values()))
    for (name, _), value in zip(_COUNTERS.items(), values or ()):
        if value.nvmlReturn == nvml.NVML_SUCCESS:
            state[name] = value.value.ullVal
    return state


def difference(before: dict[str, Any] | None) -> dict[str, Any] | None:
    """What happened since `before`: mean power, clocks, and whether the run counts.

    A run during which a thermal or power-brake counter moved is marked invalid. Power is given for
    windows of at least 2 s, since the energy counter advances in coarse steps.
    """
    after = snapshot()
    if before is None or after is None:
        return None
    window = after["time"] - before["time"]
    throttled = {k: after[k] - before[k] for k in _COUNTERS if k in after and k in before}
    energy = [state["energy_mj"] for state in (before, after)]
    joules = None if None in energy else (energy[1] - energy[0]) / 1e3
    return {
        "window_s": window,
        "mean_power_w": joules / window if joules is not None and window >= 2 else None,
        "sm_mhz": [before["sm_mhz"], after["sm_mhz"]],
        "memory_mhz": [before["memory_mhz"], after["memory_mhz"]],
        "temperature_c": [before["temperature_c"], after["temperature_c"]],
        **throttled,
        "valid": not any(throttled.values()),
    }
