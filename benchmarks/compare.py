"""Do two results of a benchmark differ by more than their noise?

python -m benchmarks.compare BEFORE.json AFTER.json [--least 0.02]

Compared are the ratios of each row, a baseline's time over fastcm's, since both were measured in
turn: a slower clock or a busier machine moves both. A ratio has changed where its rounds, from the
tenth to the ninetieth percentile, lie apart in the two files, and its median by more than --least.

Ends with 1 if a row became slower, 2 if nothing can be compared, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LEAST = 0.02
Verdict = Literal["faster", "slower", "same", "unknown", "only before", "only after"]
SAME = ("cpu", "gpu", "threads", "torch", "triton")
"""Of the machines: where these differ, so may the baselines."""


@dataclass(frozen=True)
class Change:
    """One ratio of one row, before and after; None where a file lacks it."""

    row: str
    ratio: str
    before: float | None
    after: float | None
    verdict: Verdict


def verdict(ratio: str, before: dict[str, Any], after: dict[str, Any], least: float) -> Verdict:
    """Of two rows that both have the ratio."""
    spreads = [row.get("spread", {}).get(ratio) for row in (before, after)]
    if None in spreads:
        return "unknown"
    (low, high), (low_after, high_after) = spreads
    change = after[ratio] / before[ratio] - 1
    apart = low_after > high or high_after < low
    if not apart or abs(change) <= least:
        return "same"
    # what is measured stands below the line, but where an overhead is: fastcm/bare, ddp/alone
    _, below = ratio.split("/")
    better = change > 0 if below.startswith("fastcm") else change < 0
    return "faster" if better else "slower"


def changes(before: dict[str, Any], after: dict[str, Any], *, least: float = LEAST) -> list[Change]:
    """Every ratio of every row of two reports, in the order of the first."""
    first, second = (_rows(report) for report in (before, after))
    found = []
    for name in [*first, *(n for n in second if n not in first)]:
        a, b = first.get(name, {}), second.get(name, {})
        for ratio in dict.fromkeys([*_ratios(a), *_ratios(b)]):
            if ratio not in a or ratio not in b:
                missing: Verdict = "only after" if ratio not in a else "only before"
                found.append(Change(name, ratio, a.get(ratio), b.get(ratio), missing))
            else:
                judged = verdict(ratio, a, b, least)
                found.append(Change(name, ratio, a[ratio], b[ratio], judged))
    return found


def _rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in report["rows"] if "id" in row}


def _ratios(row: dict[str, Any]) -> list[str]:
    return [k for k, v in row.items() if "/" in k and isinstance(v, float)]


def table(found: Sequence[Change]) -> str:
    """In columns, all of one verdict together, those that matter first."""
    order = ("slower", "faster", "only before", "only after", "unknown", "same")
    lines = []
    for change in sorted(found, key=lambda c: order.index(c.verdict)):
        numbers = [
            f"{x:8.3f}" if x is not None else "       -" for x in (change.before, change.after)
        ]
        lines.append(f"{change.verdict:12}{'  '.join(numbers)}  {change.row}  {change.ratio}")
    return "\n".join(lines)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of the machines, as far as a baseline may depend on them."""
    a, b = before.get("machine", {}), after.get("machine", {})
    found = [f"{k}: {a.get(k)} and {b.get(k)}" for k in SAME if a.get(k) != b.get(k)]
    for which, machine in (("first", a), ("second", b)):
        if machine.get("dirty"):
            found.append(f"the {which} was measured on sources that were not committed")
    return found


def status(found: Sequence[Change]) -> int:
    """The exit code."""
    judged = [change.verdict for change in found]
    if not {"faster", "slower", "same"} & {*judged}:
        return 2
    return 1 if "slower" in judged else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=LEAST, help="change that counts [0.02]")
    given = parser.parse_args(arguments)
    reports = []
    for path in (given.before, given.after):
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
            parser.error(f"{path} is not the result of a benchmark: it has no rows")
        reports.append(report)
    before, after = reports
    for line in differences(before, after):
        print(f"note: {line}")
    found = changes(before, after, least=given.least)
    print(table(found))
    counts = {
        v: sum(c.verdict == v for c in found) for v in dict.fromkeys(c.verdict for c in found)
    }
    print(", ".join(f"{n} {v}" for v, n in counts.items()) or "no rows with an id")
    if "unknown" in counts:
        print("unknown: a file does not say how the rounds spread; measure it anew")
    return status(found)


if __name__ == "__main__":
    sys.exit(main())
