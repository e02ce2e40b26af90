"""A plan as text: two Markdown tables, which read well in a terminal, too."""

from __future__ import annotations

from fastcm.planning.step import Plan

NOT_KNOWN = "not known"
_SHARED = {None: "", "ddp": ", ddp", "fsdp": ", fsdp"}


def markdown(plan: Plan, title: str) -> str:
    """The step by its parts, and the memory by its kinds, under a line that says of what."""
    return "\n\n".join([heading(plan, title), _parts(plan), _below(plan), _memory(plan)])


def heading(plan: Plan, title: str) -> str:
    """What the plan is of, and which ceilings it was given."""
    s = plan.settings
    devices = "1 device" if s["gpus"] == 1 else f"{s['gpus']} devices{_SHARED[s['parallel']]}"
    cut = f" x {s['accumulate']} micro-batches" if s["accumulate"] > 1 else ""
    calls: dict[str, int] = {}
    for call in plan.counts.evaluations:
        what = call.network if call.differentiated else f"{call.network} without gradient"
        calls[what] = calls.get(what, 0) + call.rows
    rows = ", ".join(f"{what} {n}" for what, n in calls.items())
    again = ", blocks checkpointed" if s["checkpointing"] else ""
    return (
        f"{title}, {plan.parameters / 1e6:.1f} M parameters, {s['method']}, batch {s['batch']} on "
        f"{devices}{again}, {s['precision']}: {plan.rows} rows{cut} a device. Rows that the "
        f"networks see in a micro-batch: {rows}. Ceilings: {plan.ceilings.described()}."
    )


def _parts(plan: Plan) -> str:
    rows = []
    for part in plan.parts:
        share = plan.share(part)
        rows.append(
            [
                part.name,
                f"{part.flops / 1e12:.3g}" if part.flops else "-",
                size(part.bytes),
                NOT_KNOWN if part.seconds is None else duration(part.seconds),
                NOT_KNOWN if share is None else f"{100 * share:.1f} %",
            ]
        )
    known = duration(plan.seconds) if plan.seconds else NOT_KNOWN
    rows.append(["all that is known" if plan.unknown else "all", "", "", known, ""])
    return table(["part of a step", "TFLOP", "bytes", "time at the ceilings", "share"], rows)


def _below(plan: Plan) -> str:
    text = (
        "Per device, one part after the other. Bytes are counted operator by operator, as they are "
        "launched without compiling, which moves fewer"
    )
    if plan.ceilings.tflops is not None and plan.ceilings.bandwidth is None:
        text += ", and timed by their products alone, since the bandwidth is not known"
    talk = [part for part in plan.parts if part.name.startswith(("all-", "reduce-"))]
    if talk and all(part.seconds is not None for part in talk):
        seconds = sum(part.seconds or 0.0 for part in talk)
        text += f". {duration(seconds)} of communication can hide behind them, or some of it"
    return text + "."


def _memory(plan: Plan) -> str:
    kinds = ["whole"] if plan.settings["gpus"] == 1 else ["whole", "sharded"]
    columns = [plan.memory[kind][again] for kind in kinds for again in (False, True)]
    header = [
        f"{kind}{', checkpointed' if again else ''}" for kind in kinds for again in (False, True)
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(size(column.get(name, 0)) for column in columns)] for name in names]
    rows = [row for row, name in zip(rows, names) if any(c.get(name) for c in columns)]
    rows.append(["all", *(size(sum(column.values())) for column in columns)])
    return table(["memory of a device", *header], rows)


def size(count: int) -> str:
    """Bytes in a unit that suits them."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.4g} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
