"""Render the tables and plots of README.md and docs/ from the JSON under benchmarks/results/.

python -m benchmarks.report            rewrite them
python -m benchmarks.report --check    exit 1 if they are not what the JSON says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import plots, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo", tables.demo_table),
    "ops": ("ops_cpu", tables.ops_table),
    "optim": ("optim_cpu", tables.optim_table),
    "step": ("step_cpu", tables.step_table),
    "sampling": ("sampling_cpu", tables.sampling_table),
    "jvp": ("jvp_cpu", tables.jvp_table),
    "attention": ("attention_cpu", tables.attention_table),
    "codegen": ("codegen", tables.codegen_summary),
    "quality": ("quality_cpu", tables.quality_table),
    "choose": ("quality_cpu", tables.choose_table),
    "parallel": ("parallel_cpu", tables.parallel_table),
    "scaling": ("parallel_cpu", tables.scaling_table),
    "plan": ("plan_cpu", tables.plan_table),
    "lora": ("lora_cpu", tables.lora_table),
    "photographs": ("quality_photographs_cpu", tables.quality_table),
    "data": ("data_cpu", tables.data_table),
    "ops-short": ("ops_cpu", partial(tables.ops_table, short=True)),
    "optim-short": ("optim_cpu", partial(tables.optim_table, short=True)),
    "step-short": ("step_cpu", partial(tables.step_table, short=True)),
    "sampling-short": ("sampling_cpu", partial(tables.sampling_table, short=True)),
    "ops-gpu": ("ops_gpu", tables.ops_table),
    "optim-gpu": ("optim_gpu", tables.optim_table),
    "step-gpu": ("step_gpu", tables.step_table),
    "sampling-gpu": ("sampling_gpu", tables.sampling_table),
    "jvp-gpu": ("jvp_gpu", tables.jvp_table),
    "attention-gpu": ("attention_gpu", tables.attention_table),
}
"""By the name of its markers: the JSON without its ending, and what makes the text of it."""
PAGES = {
    "README.md": ("demo", "ops-short", "optim-short", "step-short", "sampling-short", "jvp"),
    "docs/index.md": ("demo",),
    "docs/methods.md": ("quality", "photographs"),
    "docs/choose.md": ("choose",),
    "docs/scale.md": ("parallel", "scaling", "plan"),
    "docs/data.md": ("data",),
    "docs/networks.md": ("lora",),
    "docs/benchmarks.md": (
        *("ops", "optim", "step", "sampling", "jvp", "attention", "codegen", "ops-gpu"),
        *("optim-gpu", "step-gpu", "sampling-gpu", "jvp-gpu", "attention-gpu"),
    ),
}
PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "docs/plots/ops.svg": ("ops_cpu", plots.ops_plot),
    "docs/plots/optim.svg": ("optim_cpu", plots.optim_plot),
    "docs/plots/step.svg": ("step_cpu", plots.step_plot),
    "docs/plots/sampling.svg": ("sampling_cpu", plots.sampling_plot),
    "docs/plots/quality.svg": ("quality_cpu", plots.quality_plot),
}
ABSENT = "Unmeasured: no result of this is there."


def result(name: str) -> dict[str, Any] | None:
    """A JSON of benchmarks/results, or None where there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def render(text: str, page: str = "README.md") -> str:
    """The text of a page with every section between its markers made anew."""
    for name in PAGES[page]:
        file, table = SECTIONS[name]
        report = result(file)
        body = ABSENT if report is None else table(report)
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(
            pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{page} must hold the markers of {name!r} once, found {count}")
    return text


def rendered() -> dict[str, str]:
    """Every page and plot as the JSON has it, by its path in the repository."""
    pages = {page: render((ROOT / page).read_text(), page) for page in PAGES}
    for path, (file, plot) in PLOTS.items():
        report = result(file)
        if report is not None:
            pages[path] = plot(report)
    return pages


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(arguments).check
    aged = []
    for name, new in rendered().items():
        path = ROOT / name
        if not path.exists() or path.read_text() != new:
            aged.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(new)
    if check and aged:
        print(f"{', '.join(aged)} differ from benchmarks/results: run python -m benchmarks.report")
    return 1 if check and aged else 0


if __name__ == "__main__":
    sys.exit(main())
