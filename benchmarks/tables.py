"""The tables that the documents show, each made of the JSON of one benchmark."""

from __future__ import annotations

import statistics
from typing import Any


def markdown(columns: str, rows: list[str], note: str) -> str:
    """A table, `columns` and `rows` with ``|`` between the cells, and a line below it."""
    rule = "|".join("---" for _ in columns.split("|"))
    return "\n".join([f"| {columns} |", f"|{rule}|", *(f"| {row} |" for row in rows), "", note])


def machine_of(report: dict[str, Any]) -> str:
    """The machine, in a note."""
    machine = report["machine"]
    where = f"one {machine['gpu']}" if "gpu" in machine else f"{machine['threads']} CPU threads"
    return f"{where}, torch {machine['torch']}"


def demo_table(report: dict[str, Any]) -> str:
    """The figures of `make demo`."""
    rows = [
        f"{name} | {figures['sliced_wasserstein']:.3f} | {figures['frechet']:.2f}"
        for name, figures in report["distances to held-out digits"].items()
    ]
    note = (
        f"From `make demo` on two CPU cores, {report['seconds']['total']:.0f} s in all. The first "
        "row is the floor: other real digits."
    )
    return markdown("samples | sliced Wasserstein to held-out digits | Frechet", rows, note)


def ops_table(report: dict[str, Any], *, short: bool = False) -> str:
    """Ratios of the operators' benchmark; in short, one size in float32."""
    rows = [
        f"{row['case']} | {' x '.join(map(str, row['shape']))} | {row['dtype']} "
        f"| {row['ms']['fastcm']:.2f} ms | {row['eager/fastcm']:.1f} "
        f"| {row['compiled/fastcm']:.2f} | {row['ms']['in compiled code']:.2f} ms"
        for row in report["rows"]
        if not short or (row["shape_name"] == "cifar" and row["dtype"] == "float32")
    ]
    note = (
        f"On {machine_of(report)}. Eager and compiled are plain PyTorch with `torch.randn`, whose "
        "compiled form draws number by number; the last column is the operator in compiled code."
    )
    columns = (
        "operator | samples | dtype | fastcm | eager / fastcm | compiled / fastcm "
        "| fastcm, compiled"
    )
    return markdown(columns, rows, note)


def optim_table(report: dict[str, Any], *, short: bool = False) -> str:
    """Ratios of the optimizer's benchmark; in short, of one average."""
    rows = [
        f"{row['network']} | {row['averages']}{', bfloat16 copy' if row['shadow'] else ''} "
        f"| {row['ms']['fastcm']:.1f} ms | {row['eager/fastcm']:.1f} | {row['stock/fastcm']:.1f}"
        for row in report["rows"]
        if "drift" not in row and not (short and (row["averages"] > 1 or row["shadow"]))
    ]
    note = (
        f"On {machine_of(report)}. Eager: clip, foreach AdamW, a Python loop for each average. "
        "Best of torch: clip, fused AdamW, foreach lerp."
    )
    for drift in (row["drift"] for row in report["rows"] if "drift" in row):
        note += (
            " After 1,000 steps float32 parameters are, relative to float64, off by "
            f"{drift['fastcm']:.0e}; "
            f"those of torch's AdamW {drift['torch']:.0e}, fused {drift['torch fused']:.0e}."
        )
    columns = "parameters | averages | fastcm | eager / fastcm | best of torch / fastcm"
    return markdown(columns, rows, note)


def _mark(row: dict[str, Any]) -> str:
    """Of a row whose plain loop torch did not compile."""
    failed = any(isinstance(ms, str) for ms in row["candidates_ms"]["best"].values())
    return "\\*" if failed else ""


def step_table(report: dict[str, Any], *, short: bool = False) -> str:
    """Ratios of the training step's benchmark; in short, of one method."""
    rows = [
        f"{row['network']} | {row['parameters'] / 1e6:.1f} M | {row['method']} | {row['batch']} "
        f"| {row['precision']} | {row['ms']['fastcm']:.0f} ms | {row['eager/fastcm']:.2f} "
        f"| {row['best/fastcm']:.2f}{_mark(row)} | {row['eager/fastcm eager']:.2f}"
        for row in report["rows"]
        if not short or row["method"] == "CD"
    ]
    note = (
        f"A step of training on {machine_of(report)}. Eager: a plain PyTorch loop. Best of torch: "
        "the faster of that loop compiled and not, with fused AdamW and foreach averages."
    )
    if any(map(_mark, report["rows"])):
        note += " \\* It could not be compiled."
    columns = (
        "network | parameters | method | batch | precision | fastcm | eager / fastcm "
        "| best of torch / fastcm | eager / fastcm eager"
    )
    return markdown(columns, rows, note)


def jvp_table(report: dict[str, Any]) -> str:
    """Ratios of steps with a derivative along the trajectory."""
    rows = [
        f"{row['network']} | {row['parameters'] / 1e6:.1f} M | {row['method']} | {row['batch']} "
        f"| {row['ms']['fastcm']:.0f} ms | {row['two passes/fastcm']:.2f} "
        f"| {row['one jvp/fastcm']:.2f} | {row['fastcm/flow']:.2f}"
        for row in report["rows"]
    ]
    note = (
        f"A step of training on {machine_of(report)}. Two passes: torch.func.jvp without gradient, "
        "and a second forward pass. One jvp: torch.func.jvp inside the loss. Flow: a step of flow "
        "matching. Each compiled where that is faster and torch can."
    )
    columns = (
        "network | parameters | method | batch | fastcm | two passes / fastcm "
        "| one jvp / fastcm | fastcm / flow"
    )
    return markdown(columns, rows, note)


def sampling_table(report: dict[str, Any], *, short: bool = False) -> str:
    """Ratios of the samplers' benchmark; in short, the least and the most work of each network."""
    rows = [
        f"{row['network']} | {row['steps']} | {row['batch']} | {row['ms']['fastcm']:.1f} ms "
        f"| {100 * (row['fastcm/bare'] - 1):+.1f} % | {row['eager/fastcm']:.2f} "
        f"| {row['compiled/fastcm compiled']:.2f}"
        for row in report["rows"]
        if not short or (row["steps"], row["batch"]) in ((1, 1), (4, 64))
    ]
    note = (
        f"On {machine_of(report)}. Eager and compiled: a plain PyTorch loop with `torch.randn`; "
        "compiled means the network. The Python of a call shows where network and batch are small."
    )
    columns = (
        "network | steps | batch | fastcm | over the bare network calls | eager / fastcm "
        "| compiled / fastcm compiled"
    )
    return markdown(columns, rows, note)


FROM_A_FLOW = ("ect", "cd", "scd", "pairs")


def _by_method(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        methods.setdefault(row["method"], []).append(row)
    return methods


def quality_table(report: dict[str, Any]) -> str:
    """Distances of every method's samples by the number of evaluations, over the seeds."""
    methods = _by_method(report)
    calls = sorted({int(k) for row in report["rows"] for k in row["evaluations"]})

    def cell(rows: list[dict[str, Any]], k: int) -> str:
        found = [row["evaluations"].get(str(k)) for row in rows]
        values = [f["frechet"] for f in found if f is not None]
        if not values:
            return "-"
        spread = f" ± {statistics.pstdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    rows = [
        f"{name} | {round(statistics.mean(row['steps'] for row in rows)):,} | "
        + " | ".join(cell(rows, k) for k in calls)
        for name, rows in methods.items()
    ]
    seeds = len(next(iter(methods.values())))
    over = f"mean and spread over {seeds} seeds" if seeds > 1 else "one run each"
    things = {"digits": "digits", "photographs": "crops"}[report["data"]]
    *some, last = (name for name in FROM_A_FLOW if name in methods)
    note = (
        f"Frechet distance to held-out {things} by the number of network evaluations, {over}; of "
        f"other real {things} {report['floor']['frechet']:.2f}. {report['seconds']:.0f} s of "
        f"training on {machine_of(report)}; {', '.join(some)} and {last} spend half of it on their "
        "flow. Sliced Wasserstein distances are in the JSON."
    )
    return markdown("method | steps | " + " | ".join(map(str, calls)), rows, note)


def attention_table(report: dict[str, Any]) -> str:
    """Ratios of attention with its tangent."""
    rows = [
        f"{' x '.join(map(str, row['shape']))} | {row['dtype']} | {row['ms']['fastcm']:.1f} ms "
        f"| {row['eager/fastcm']:.2f} | {row['compiled/fastcm']:.2f} "
        f"| {row['ms']['fastcm'] / row['ms']['plain']:.2f}"
        for row in report["rows"]
    ]
    note = (
        f"A forward pass on {machine_of(report)}. Eager and compiled: torch.func.jvp of attention "
        "written out. Plain: attention without a tangent, a third of the products."
    )
    columns = (
        "batch x heads x length x channels | dtype | fastcm | eager / fastcm | compiled / fastcm "
        "| fastcm / plain"
    )
    return markdown(columns, rows, note)


def choose_table(report: dict[str, Any]) -> str:
    """What a method reaches and costs: distances, steps a second, and what it needs to begin."""
    rows, methods = [], _by_method(report)
    for name, runs in methods.items():
        best = {
            k: statistics.mean(run["evaluations"][k]["frechet"] for run in runs)
            for k in runs[0]["evaluations"]
        }
        few = min((k for k in best if int(k) <= 4), key=lambda k: best[k], default="1")
        begins = "a flow" if name in FROM_A_FLOW else "-"
        speed = statistics.mean(run["steps_per_second"] for run in runs)
        rows.append(
            f"`{name}` | {begins} | {speed:.0f} | {best['1']:.2f} | {best[few]:.2f} in {few}"
        )
    note = (
        f"Frechet distance to held-out digits, mean of {len(next(iter(methods.values())))} seeds; "
        f"of other real digits {report['floor']['frechet']:.2f}. All have "
        f"{report['seconds']:.0f} s of training on {machine_of(report)}, those that begin with a "
        "flow half of it for that."
    )
    columns = "method | begins with | steps a second | one evaluation | best of at most four"
    return markdown(columns, rows, note)


def parallel_table(report: dict[str, Any]) -> str:
    """What a process group of one costs a step."""
    rows = [
        f"{row['network']} | {row['parameters'] / 1e6:.1f} M | {row['batch']} "
        f"| {row['ms']['alone']:.1f} ms | {row['ms']['ddp']:.1f} ms "
        f"| {100 * (row['ddp/alone'] - 1):+.1f} %"
        for row in report["rows"]
        if "ddp/alone" in row
    ]
    note = (
        f"A step of CT in one process, without and in a process group, on {machine_of(report)}; "
        "both end in the same bits."
    )
    return markdown("network | parameters | batch | alone | ddp | more", rows, note)


def _notes(report: dict[str, Any]) -> str:
    """What was noted of rows when they were measured."""
    notes = sorted({row["note"] for row in report["rows"] if "note" in row})
    return "".join(f" {note}" for note in notes)


def scaling_table(report: dict[str, Any]) -> str:
    """A step in one process and in two."""
    rows = [
        f"{row['network']} | {row['parameters'] / 1e6:.1f} M | {row['batch']} "
        f"| {row['ms']['one']:.1f} ms | {row['ms']['two']:.1f} ms | {row['one/two']:.2f}"
        for row in report["rows"]
        if "one/two" in row
    ]
    note = (
        "A step of CT on the same batch in one process and in two, of one thread each, on the two "
        f"cores of one machine, torch {report['machine']['torch']}; the weights agree to rounding."
        + _notes(report)
    )
    columns = "network | parameters | batch | 1 process | 2 processes | times as fast"
    return markdown(columns, rows, note)


def plan_table(report: dict[str, Any]) -> str:
    """What `fastcm plan` predicted, and what was measured."""
    rows = [
        f"{row['network']} | {row['parameters'] / 1e6:.1f} M | {row['batch']} | {row['processes']} "
        f"| {row['predicted ms']:.0f} ms | {row['measured ms']:.0f} ms "
        f"| {100 * (row['predicted/measured ms'] - 1):+.0f} % "
        f"| {100 * (row['predicted/measured sweep ms'] - 1):+.0f} % "
        f"| {row['predicted bytes'] / 1e6:.0f} MB | {row['measured bytes'] / 1e6:.0f} MB "
        f"| {100 * (row['predicted/measured bytes'] - 1):+.0f} %"
        for row in report["rows"]
    ]
    note = (
        "A step of CT as planned by ceilings that the same processes measured between the steps, "
        f"and as measured, the best round of each; one thread each, torch "
        f"{report['machine']['torch']}. Errors of the step, of its sweep alone, and of the most "
        "memory of a process beside data and libraries." + _notes(report)
    )
    columns = (
        "network | parameters | batch | processes | step, planned | measured | error "
        "| of the sweep | memory, planned | measured | error"
    )
    return markdown(columns, rows, note)


def lora_table(report: dict[str, Any]) -> str:
    """What a step of distillation holds: of a whole network, and of LoRA layers on it."""
    rows, errors = [], []
    for row in report["rows"]:
        whole, layers = row["whole"], row["layers"]
        cells = [
            row["network"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{layers['trained'] / 1e6:.1f} M",
        ]
        cells += [f"{sum(kind['state'].values()) / 1e6:,.0f} MB" for kind in (whole, layers)]
        for what in ("measured bytes", "checkpoint bytes"):
            cells += [f"{kind[what] / 1e6:,.0f} MB" for kind in (whole, layers)]
        rows.append(" | ".join(cells))
        errors += [100 * (k["planned bytes"] / k["measured bytes"] - 1) for k in (whole, layers)]
    note = (
        f"Distillation on {report['rows'][0]['batch']} rows on a CPU: a whole student beside its "
        f"teacher, and LoRA layers of rank {report['rows'][0]['rank']} on one that is both. "
        "State: parameters, gradients, moments, averages and teacher, counted. Step: the most "
        "memory of a process beside data and libraries, measured; `fastcm plan` differs by "
        f"{min(errors):+.0f} to {max(errors):+.0f} %."
    )
    columns = "network | parameters | in layers | state, whole | layers | step, whole | layers"
    return markdown(f"{columns} | checkpoint, whole | layers", rows, note)


def data_table(report: dict[str, Any]) -> str:
    """Rows a second of each source, and what of a step they take."""
    drawn = [row for row in report["rows"] if "rows_s" in row]
    (step,) = (row for row in report["rows"] if "draw/step" in row)
    names = list(drawn[0]["rows_s"])
    rows = [
        f"{row['batch']} | " + " | ".join(f"{row['rows_s'][name]:,.0f}" for name in names)
        for row in drawn
    ]
    first = drawn[0]
    note = (
        f"Rows of uint8 {first['shape']} a second, of {first['rows']:,}, in shards of "
        f"{first['shard']:,} with a window of {first['window']} on a local disk whose pages may be "
        "in memory; `rows` are those of a tensor in a data set of torch, without workers. Drawing "
        f"a batch of {step['batch']} from shards takes {100 * step['draw/step']:.3f} % of a step "
        f"of CT of {step['network']}. On {machine_of(report)}, of {first['cores']} that had other "
        f"work, too: the load was {min(r['load'] for r in report['rows']):.0f} to "
        f"{max(r['load'] for r in report['rows']):.0f}."
    )
    return markdown("batch | " + " | ".join(names), rows, note)


def codegen_summary(report: dict[str, Any]) -> str:
    """What the kernels compile to, in one paragraph."""
    rows = report["rows"]
    hopper = [row for row in rows if row["target"] == "sm_90"]
    targets = sorted({row["target"] for row in rows})
    noising = [row for row in hopper if row["kernel"] == "noising_kernel"]
    normals = max(row["instructions_per_normal"] for row in noising)
    moving = [row for row in hopper if row["ridge"]]
    bound = [row for row in moving if row["ridge"] == "memory"]
    return (
        f"{len(hopper)} launches compiled by triton {report['triton']} for {', '.join(targets)}: "
        f"{sum(row['spills'] for row in rows)} spills, {sum(row['stack'] for row in rows)} bytes "
        f"of stack. On sm_90 at most {max(row['registers'] for row in hopper)} registers, and "
        f"{normals:.0f} instructions per normal in noising (static counts of the whole kernel); "
        f"by bytes against instructions {len(bound)} of the {len(moving)} that move samples or "
        "parameters are bound by an H200's memory."
    )
