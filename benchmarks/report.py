"""Render the tables of README.md from the JSON under benchmarks/results/.

python -m benchmarks.report            rewrite the tables in README.md
python -m benchmarks.report --check    exit 1 if they are not what the JSON says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(report: dict[str, Any]) -> str:
    """The figures of `make demo`."""
    lines = [
        "| samples | sliced Wasserstein to held-out digits | Frechet |",
        "|---|---|---|",
    ]
    for name, figures in report["distances to held-out digits"].items():
        lines.append(f"| {name} | {figures['sliced_wasserstein']:.3f} | {figures['frechet']:.2f} |")
    seconds = report["seconds"]
    lines.append("")
    lines.append(
        f"From `make demo` on two CPU cores, {seconds['total']:.0f} s in all. The first row is the "
        "floor: other real digits."
    )
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo_table}


def render(text: str) -> str:
    """`text` with every section between its markers made anew."""
    for name, table in SECTIONS.items():
        body = table(json.loads((RESULTS / f"{name}.json").read_text()))
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(
            pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"README.md must hold the markers of {name!r} once, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if check and new != old:
        sys.exit("README.md differs from benchmarks/results: run python -m benchmarks.report")
    if not check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
