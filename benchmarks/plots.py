"""The plots of the documents, as SVG text that follows from the JSON alone.

Written out rather than drawn by a library: the same JSON gives the same bytes everywhere, so that a
test can hold the file against the result, and the file shows in light and dark.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, ROW = 760, 250, 40, 22
COLOURS = ("#2f6fb0", "#d07020", "#4a9a5a", "#8a8a8a")


@dataclass(frozen=True)
class Bar:
    """A row of a plot: its label, one value for each series, None for none."""

    label: str
    values: tuple[float | None, ...]


def bars(
    title: str, series: Sequence[str], rows: Sequence[Bar], *, unit: str, line: float | None = None
) -> str:
    """Horizontal bars on a logarithmic axis, with a line such as 1, where two are equal."""
    values = [v for row in rows for v in row.values if v is not None]
    low = math.floor(math.log10(min(*values, line or math.inf)) * 10 - 1) / 10
    high = math.ceil(math.log10(max(*values, line or 0.0)) * 10 + 1) / 10
    inner = WIDTH - LEFT - RIGHT

    def at(value: float) -> float:
        return LEFT + inner * (math.log10(value) - low) / (high - low)

    thick = (ROW - 6) / len(series)
    top = 46
    bottom = top + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 34}" '
        'font-family="sans-serif" font-size="12">',
        "<style>text{fill:#333}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>",
        f'<text x="0" y="14" font-weight="bold">{escape(title)}</text>',
    ]
    x = LEFT
    for name, colour in zip(series, COLOURS):
        parts.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="33">{escape(name)}</text>')
        x += 24 + 7 * len(name)
    for i, row in enumerate(rows):
        y = top + i * ROW
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row.label)}</text>'
        )
        for j, value in enumerate(row.values):
            if value is None:
                continue
            start, end = sorted((at(line or 10**low), at(value)))
            parts.append(
                f'<rect x="{start:.1f}" y="{y + 3 + j * thick:.1f}" '
                f'width="{max(end - start, 1):.1f}" height="{thick:.1f}" fill="{COLOURS[j]}">'
                f"<title>{value:.3g}</title></rect>"
            )
    for tick in ticks(10**low, 10**high):
        parts.append(upright(at(tick), top, bottom, 0.3))
        parts.append(
            f'<text x="{at(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>'
        )
    if line is not None:
        parts.append(upright(at(line), top, bottom, 1.2))
    parts.append(f'<text x="{LEFT}" y="{bottom + 30}">{escape(unit)}</text></svg>')
    return "\n".join(parts) + "\n"


def upright(x: float, top: float, bottom: float, width: float) -> str:
    place = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"'
    return f'<line {place} stroke="#888" stroke-width="{width}"/>'


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten in between; tenths where that is little."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{m}e{e}") for e in exponents for m in (1, 2, 5)]
    inside = [t for t in found if low <= t <= high]
    fine = [round(0.1 * k, 1) for k in range(1, 100) if low <= 0.1 * k <= high]
    return inside if len(inside) > 3 else fine


RATIO = "time of the other / time of fastcm: right of 1 fastcm is faster"


def ops_plot(report: dict[str, Any]) -> str:
    """Operators beside plain PyTorch."""
    rows = [
        Bar(f"{row['case']}, {row['dtype']}", (row["eager/fastcm"], row["compiled/fastcm"]))
        for row in report["rows"]
        if row.get("shape_name") == "cifar"
    ]
    return bars("Operators, 512 x 3 x 32 x 32", ("eager", "compiled"), rows, unit=RATIO, line=1.0)


def optim_plot(report: dict[str, Any]) -> str:
    """The optimizer beside torch's."""
    rows = [
        Bar(
            f"{row['network']}, {row['averages']}{' + copy' if row['shadow'] else ''}",
            (row["eager/fastcm"], row["stock/fastcm"]),
        )
        for row in report["rows"]
        if "drift" not in row
    ]
    series = ("eager", "best of torch")
    return bars("Clip, AdamW, averages", series, rows, unit=RATIO, line=1.0)


def step_plot(report: dict[str, Any]) -> str:
    """A step of training beside a plain loop."""
    rows = [
        Bar(
            f"{row['network']}, {row['method']}, {row['batch']}, {row['precision']}",
            (row["eager/fastcm"], row["best/fastcm"]),
        )
        for row in report["rows"]
    ]
    return bars("A step of training", ("eager", "best of torch"), rows, unit=RATIO, line=1.0)


def sampling_plot(report: dict[str, Any]) -> str:
    """Samplers beside a plain loop."""
    rows = [
        Bar(
            f"{row['network']}, {row['steps']} steps, batch {row['batch']}",
            (row["eager/fastcm"], row["compiled/fastcm compiled"]),
        )
        for row in report["rows"]
    ]
    return bars("Sampling", ("eager", "compiled"), rows, unit=RATIO, line=1.0)


def quality_plot(report: dict[str, Any]) -> str:
    """Distances of every method in one and four evaluations, or two."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        methods.setdefault(row["method"], []).append(row)

    def mean(runs: list[dict[str, Any]], calls: str) -> float | None:
        found = [
            run["evaluations"][calls]["frechet"] for run in runs if calls in run["evaluations"]
        ]
        return statistics.mean(found) if found else None

    rows = [
        Bar(name, tuple(mean(runs, calls) for calls in ("1", "2", "4")))
        for name, runs in methods.items()
    ]
    return bars(
        "Frechet distance to held-out digits, 25 s of training",
        ("1 evaluation", "2", "4"),
        rows,
        unit=f"less is better; other real digits: {report['floor']['frechet']:.2f} (the line)",
        line=report["floor"]["frechet"],
    )
