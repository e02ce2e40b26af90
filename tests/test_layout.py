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

ORDER = (
    ("kernels", "tracing"),
    ("rng", "paths", "parameterization", "schedules", "losses", "ema"),
    ("ops",),
    ("jvp", "networks"),
    ("graphs", "precision", "progress"),
    ("objectives",),
    ("runs",),
    ("sharding",),
    ("data", "optim"),
    ("planning",),
    ("sampling", "training"),
    ("adapters", "evaluation"),
    ("hub",),
    ("cli",),
    ("__main__",),
)
"""The wings, from the ground up: each imports what is below it, the maths each other."""
FLOOR = {wing: floor for floor, wings in enumerate(ORDER) for wing in wings}
MATHS = ORDER[1]
NAMES = {
    "AdamW", "Batch", "CheckpointError", "ConsistencyDistillation", "ConsistencyFlowMatching",
    "ConsistencyTraining", "ContinuousConsistency", "CurriculumEMA", "Dataset", "DelayedEMA",
    "EMA", "EasyConsistency", "FlowMatching", "HalfLifeEMA", "LastPhase", "Linear", "Loss",
    "MeanFlow", "NoiseKey", "NonFiniteError", "PairDistillation", "Parameterization",
    "PowerEMA", "RAdam", "Rescaled", "Sampler", "Shortcut", "Stepwise", "Trainer", "TrigFlow",
    "VarianceExploding", "VariancePreserving", "WarmupEMA", "editing", "evaluation",
    "export_sampler", "from_pretrained", "jvp", "losses", "networks", "ops", "pictures", "posthoc",
    "push_to_hub", "rng", "sampling", "save_pretrained", "schedules", "warmup_cosine",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module by its name."""
    files = [*(ROOT / "fastcm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "fastcm" else ("fastcm", *parts)
        found[".".join(p for p in parts if p != "__init__")] = file
    return found


MODULES = modules()


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions and type checks."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file} uses a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"fastcm"}))
def test_imports_point_down(module: str) -> None:
    wing = module.split(".")[1]
    for name in imports(MODULES[module]) - {"fastcm"}:
        top, *rest = name.split(".")
        assert top not in ("tests", "benchmarks"), f"{module} imports {name}"
        if top == "fastcm" and rest[0] != wing and not {rest[0], wing} <= {*MATHS}:
            assert FLOOR[rest[0]] < FLOOR[wing], f"{module} imports {name}"
        if wing == "kernels":
            allowed = {"torch", "triton", "fastcm", "__future__", *sys.stdlib_module_names}
            assert top in allowed, f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    below = {module: imports(file) & MODULES.keys() for module, file in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(below):
        # a wing's own page is imported along with any of its modules, and is no part of a circle
        ready = {m for m in below if all(n in done or m.startswith(f"{n}.") for n in below[m])}
        assert ready > done, f"a circle among {sorted(below.keys() - done)}"
        done = ready


def test_public_names_are_pinned() -> None:
    submodules = {module.split(".")[1] for module in MODULES if module != "fastcm"} | {"sys"}
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


def test_what_runs_on_a_gpu_is_found_where_only_torch_and_pytest_are() -> None:
    """`make gpu` on the image of a machine: one file that fails to import would end it all."""
    absent = (
        "xdist hypothesis diffusers accelerate typer rich matplotlib PIL sklearn tomli pynvml "
        "tensorboard pytest_benchmark"
    )
    code = (
        "import sys, pytest\n"
        f"sys.modules.update(dict.fromkeys({absent.split()}))\n"
        "sys.exit(pytest.main(['--setup-plan', '-q', *sys.argv[1:]]))"
    )
    environment = os.environ | {"PYTHONPATH": ".", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for what in (["-m", "gpu", "tests"], [*map(str, sorted(ROOT.glob("benchmarks/test_*.py")))]):
        run = subprocess.run(
            [sys.executable, "-c", code, *what],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout


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
