"""What numbers were measured on: the machine, its load and clocks, versions, and the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import nvml

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("fastcm", "kernels", "benchmarks", ":!benchmarks/results")
"""What of the repository a number depends on."""


def machine() -> dict[str, Any]:
    """A record that goes into every JSON; what cannot be found out is None."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "dirty": dirty(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastcm": _version("fastcm"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "compiler": _first_line(os.environ.get("CXX") or "c++", "--version"),
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "cpu": _of_cpu("model name") or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": _mhz(),
        "memory_gib": _memory(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            **nvml.static(),
        }
    return found


def dirty(root: Path = ROOT) -> bool | None:
    """Whether what is measured differs from the commit; None where there is no git."""
    changed = _git("status", "--porcelain", "--", *MEASURED, root=root)
    return None if changed is None else bool(changed)


def _git(*arguments: str, root: Path = ROOT) -> str | None:
    return _output("git", "-C", str(root), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _first_line(*command: str) -> str | None:
    return (_output(*command) or "").partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int | None:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _of_cpu(field: str) -> str | None:
    """The first such line of /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def _mhz() -> float | None:
    value = _of_cpu("cpu MHz")
    return None if value is None else round(float(value))


def _memory() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
