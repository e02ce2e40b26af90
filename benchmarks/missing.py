"""Which parts of a GPU's benchmarks are still missing: ``python -m benchmarks.missing``.

Reads $OUT, or benchmarks/results; ends with 1 if something is missing.
"""

from __future__ import annotations

import json
import sys

from benchmarks.harness import folder

PARTS = ("ops", "optim", "step", "sampling", "jvp", "attention")


def main() -> None:
    complete = True
    for part in PARTS:
        path = folder() / f"{part}_gpu.json"
        if not path.exists():
            print(f"gpu-{part}: nothing yet")
            complete = False
            continue
        report = json.loads(path.read_text())
        measured = {row["id"] for row in report["rows"]}
        rest = [name for name in report["expected"] if name not in measured]
        print(f"gpu-{part}: {len(measured)} rows" + "".join(f"\n  missing {n}" for n in rest))
        complete = complete and not rest
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
