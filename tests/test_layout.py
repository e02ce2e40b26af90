"""The house itself: who imports whom, what import touches, what the package exports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import fastcm

ROOT = Path(__file__).resolve().parent.parent

MATHS = {"rng", "paths", "parameterization", "schedules", "losses", "ema", "reference"}
BASE = {"checkpoint", "description", "files", "networks"}
CARRY = {"graphs", "precision", "progress"}
ALLOWED = {
    "kernels": set(),
    **{name: MATHS for name in MATHS},
    "files": set(),
    "checkpoint": {"files"},
    "description": {"checkpoint", "paths", "parameterization"},
    "networks": {"parameterization", "paths", "reference", "rng"},
    "datasets": set(),
    "data": {"datasets", "rng", "checkpoint"},
    "dispatch": MATHS | {"kernels"},
    "operators": MATHS | {"kernels", "dispatch"},
    "gradients": MATHS | {"operators"},
    "validation": MATHS,
    "noise_ops": MATHS | {"dispatch", "operators", "validation"},
    "ops": MATHS | {"dispatch", "operators", "gradients", "noise_ops", "validation"},
    "objectives": MATHS | {"ops"},
    "posthoc": MATHS | {"checkpoint"},
    "optim": MATHS | {"kernels"},
    "guidance": MATHS | {"ops", "objectives"},
    "solvers": MATHS | {"ops", "guidance"},
    "sampling": MATHS | {"ops", "guidance", "solvers", "objectives"},
    "editing": {"sampling", "validation"},
    "graphs": set(),
    "precision": {"objectives"},
    "progress": set(),
    "adapters": {"objectives"},
    "sampling_loop": MATHS | CARRY | {"objectives", "ops", "sampling", "solvers"},
    "sampler": MATHS | BASE | CARRY | {"guidance", "ops", "sampling", "sampling_loop"},
    "export": MATHS | {"dispatch", "guidance", "sampler", "sampling_loop"},
    "evaluation": MATHS | {"ops", "data", "sampling", "sampling_loop"},
    "pictures": {"checkpoint"},
    "training": MATHS | BASE | CARRY | {"ops", "data", "objectives", "optim"},
    "recipes": MATHS | BASE | {"data", "objectives", "optim", "sampler", "training", "pictures"},
    "sample_folder": MATHS | BASE | CARRY | {"sampler", "training", "pictures", "runs"},
    "demo": {"checkpoint", "evaluation", "pictures", "recipes", "sampler", "training"},
    "runs": {"checkpoint", "data", "description", "recipes", "sampler"},
    "cli_sample": {"checkpoint", "pictures", "runs", "sample_folder", "sampler"},
    "plots": MATHS
    | {"ops", "guidance", "solvers", "sampling", "sampling_loop", "sampler", "evaluation"}
    | {"pictures"}
    | {"networks", "objectives", "optim", "training"},
    "cli_plot": MATHS
    | {"evaluation", "networks", "pictures", "plots", "recipes", "runs", "sampler"},
    "cli": {
        "cli_plot",
        "cli_sample",
        "demo",
        "evaluation",
        "recipes",
        "runs",
        "sampler",
        "training",
    },
    "__main__": {"cli"},
}
NAMES = {
    "AdamW", "Batch", "CheckpointError", "ConsistencyDistillation", "ConsistencyTraining",
    "CurriculumEMA", "Dataset", "EMA", "FlowMatching", "Linear", "Loss", "NoiseKey",
    "NonFiniteError", "Parameterization", "PowerEMA", "RAdam", "Rescaled", "Sampler", "Trainer",
    "TrigFlow", "VarianceExploding", "VariancePreserving", "editing", "evaluation",
    "export_sampler", "losses", "networks", "ops", "rng", "sampling", "schedules", "warmup_cosine",
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    files = [*(ROOT / "fastcm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = []
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "fastcm":
            parts = parts[1:]
        if parts[0] != "__init__":
            found.append((parts[0], file))
    return found


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions and type checks."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("unit", "file"), modules(), ids=lambda v: str(v.relative_to(ROOT)) if v != str(v) else None
)
def test_imports_point_down(unit: str, file: Path) -> None:
    for name in imports(file):
        top, *rest = name.split(".")
        if top == "fastcm" and rest[0] != "__version__":
            assert rest[0] == unit or rest[0] in ALLOWED[unit], f"{file} imports {name}"
        assert top not in ("tests", "benchmarks"), f"{file} imports {name}"
        if unit == "kernels":
            allowed = {"torch", "triton", "fastcm", "__future__", *sys.stdlib_module_names}
            assert top in allowed, f"{file} imports {name}"


def test_the_layers_have_no_cycle() -> None:
    below: dict[str, set[str]] = {}
    for unit, file in modules():
        used = {n.split(".")[1] for n in imports(file) if n.startswith("fastcm.")}
        below.setdefault(unit, set()).update(used - {unit, "__version__"})
    order: list[str] = []
    while len(order) < len(below):
        ready = [u for u in below if u not in order and below[u] <= set(order)]
        assert ready, f"a cycle among {sorted(set(below) - set(order))}"
        order += ready


def test_public_names_are_pinned() -> None:
    submodules = {name for name, _ in modules()} | {"objectives", "training"}
    public = {name for name in vars(fastcm) if not name.startswith("_")}
    offered = {n for n in NAMES if n in submodules}
    assert public - submodules | (public & offered) == NAMES
    exported = {
        alias.asname
        for node in ast.walk(ast.parse((ROOT / "fastcm" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported == NAMES


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_no_device_environment_or_global_state() -> None:
    run(
        "import os, torch, pkgutil, importlib\n"
        "def refuse(*a, **k): raise AssertionError('device touched at import')\n"
        "torch.cuda.current_device = torch.cuda._lazy_init = refuse\n"
        "torch.cuda.is_available = torch.cuda.device_count = refuse\n"
        "before = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()\n"
        "state = torch.get_rng_state()\n"
        "import fastcm\n"
        "for m in pkgutil.walk_packages(fastcm.__path__, 'fastcm.'):\n"
        "    if m.name != 'fastcm.__main__': importlib.import_module(m.name)\n"
        "assert before == (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads())\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
    )


def test_runs_without_triton() -> None:
    out = run(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch, fastcm\n"
        "net = fastcm.networks.MLP(shape=(2,), width=8, depth=1)\n"
        "data = torch.randn(32, 2)\n"
        "t = fastcm.Trainer(net, fastcm.ConsistencyTraining(), data=data, batch_size=8)\n"
        "t.fit(2)\n"
        "x = fastcm.Sampler(t.ema_network(0), fastcm.Linear(), shape=(2,))(3)\n"
        "print(tuple(x.shape), 'triton' in sys.modules)"
    )
    assert out.strip() == "(3, 2) False"


def test_wheel_built_from_the_sdist_imports_in_a_fresh_environment(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    home = tmp_path / "fresh"
    venv.create(home, with_pip=True, symlinks=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-I", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    (site,) = home.glob("lib/python*/site-packages")
    # dependencies come from this environment: its own .pth files, an editable install, do not
    dependencies = Path(next(p for p in sys.path if p.endswith("site-packages")))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    code = (
        "import fastcm, fastcm.kernels.launch as launch, pathlib, fastcm.training\n"
        "root = pathlib.Path(fastcm.__file__).parent\n"
        "assert (root / 'py.typed').exists()\n"
        "print(root.parent, pathlib.Path(launch.__file__).parent.parent.parent)"
    )
    out = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert out.split() == [str(site), str(site)]
