"""Pictures of how samplers work: trajectories in the plane, the consistency gap along t.

What is drawn is computed apart from the drawing, for samples of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastcm import ops, rng
from fastcm.ema import EMA
from fastcm.evaluation.metrics import ConsistencyGap, sliced_wasserstein
from fastcm.evaluation.pictures import save_figure
from fastcm.networks import MLP, GaussianMixture
from fastcm.networks.modes import eval_mode
from fastcm.networks.protocol import Network
from fastcm.objectives import ConsistencyDistillation
from fastcm.optim import AdamW
from fastcm.parameterization import Parameterization
from fastcm.paths import Path
from fastcm.rng import NoiseKey
from fastcm.sampling import Sampler, solvers
from fastcm.sampling.functions import as_parameterization, check_descending
from fastcm.sampling.guidance import Evaluator
from fastcm.sampling.steps import ode_steps
from fastcm.training import Trainer, warmup_cosine

# Okabe and Ito's colours, told apart by every kind of colour vision
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#D5D5D5"
_MEASURED = 4000  # samples, for the background of a panel and its distance


@dataclass(frozen=True)
class Coupling:
    """How noise and samples are joined.

    Args:
        states: ``[K, N, ...]``: the lines from noise, states[0], to samples, states[-1].
        samples: ``[M, ...]``: samples made the same way, M >= N; the first N end the lines.
        evaluations: of the network, for a sample.
        distance: sliced Wasserstein distance of `samples` to held-out data.
    """

    states: Tensor
    samples: Tensor
    evaluations: int
    distance: float


@torch.no_grad()
def ode_states(
    net: Network, path: Path | Parameterization, z: Tensor, *, times: Sequence[float]
) -> Tensor:
    """The states that `fastcm.sampling.ode` passes with Euler's steps.

    Args:
        net: ``net(x, t, cond) -> F``.
        path: the path, or path and prediction type.
        z: standard normals ``[B, ...]``.
        times: descending, in (t_min, t_max].

    Returns:
        ``[len(times) + 1, B, ...]``, from sigma(times[0]) z to the sample.

    Raises:
        ValueError: times that do not descend or leave the path.
    """
    p = as_parameterization(path)
    check_descending(p.path, times, fresh_noise=False)
    steps = ode_steps(p, times, "euler")
    evaluate = Evaluator(net, z)
    states = [steps[0].at.sigma * z]
    for step in steps:
        states.append(solvers.euler(evaluate, states[-1], step))
    return torch.stack(states)


def couplings(
    flow: Sampler,
    distilled: Sampler,
    data: Tensor,
    held_out: Tensor,
    *,
    n: int = 64,
    seed: int = 0,
) -> tuple[Coupling, Coupling, Coupling]:
    """Three ways to join the same noise to samples: training pairs, the flow's ODE, one step.

    Args:
        flow: a sampler of a rectified flow, method "ode", solver "euler".
        distilled: a sampler of the consistency model.
        data: what the flow was trained on, ``[M, ...]``, M >= n.
        held_out: data ``[M', ...]`` to measure distances to.
        n: number of lines, >= 1.
        seed: of the samplers' noise.

    Returns:
        Pairs (z, x0) of training, which are drawn independently; the states of the ODE from z;
        z and the sample that `distilled` makes of it. z is the samplers' own noise of `seed`.

    Raises:
        ValueError: n out of range, a flow sampled otherwise.
    """
    if not 1 <= n <= len(data):
        raise ValueError(f"n must be in [1, {len(data)}], the number of training data, got {n}")
    if (flow.method, flow.solver) != ("ode", "euler"):
        raise ValueError(
            f"flow must be a Sampler with method='ode', solver='euler', "
            f"got {flow.method!r}, {flow.solver!r}"
        )
    key = NoiseKey(seed, device=flow.device)
    z = ops.noise((n, *data.shape[1:]), key, stream=rng.SAMPLE)
    with eval_mode(flow.net):
        states = ode_states(flow.net, flow.parameterization, z, times=flow.times).cpu()
    shape = (min(max(_MEASURED, n), len(data)), *data.shape[1:])
    flowed, stepped = (sampler(shape, seed=seed).cpu() for sampler in (flow, distilled))
    z, data = z.cpu(), data[: len(flowed)].cpu()

    def coupling(states: Tensor, samples: Tensor, evaluations: int) -> Coupling:
        return Coupling(states, samples, evaluations, sliced_wasserstein(samples, held_out))

    return (
        coupling(torch.stack([z, data[:n]]), data, 0),
        coupling(states, flowed, len(flow.times)),
        coupling(torch.stack([z, stepped[:n]]), stepped, len(distilled.times)),
    )


def crescent() -> GaussianMixture:
    """A crescent of Gaussians in the plane, beside the noise, as an exact network on `Linear`."""
    angle = torch.linspace(-2, 2, 24)
    return GaussianMixture(torch.stack([3.2 + 2.6 * angle.cos(), 3 * angle.sin()], dim=1), 0.2)


def distil(
    teacher: GaussianMixture, data: Tensor, *, steps: int = 3000, seed: int = 0
) -> nn.Module:
    """A small MLP distilled from an exact mixture on `Linear`, for one-step samples.

    Args:
        teacher: of samples ``[2]`` or so; its parameterization is the student's.
        data: ``[N, ...]`` of the mixture.
        steps: of training, 256 samples each; the default takes about a quarter of a minute.
        seed: of weights, noise and order of the data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(teacher.shape, width=64, depth=3)
    trainer = Trainer(
        net,
        ConsistencyDistillation(teacher, teacher.parameterization),
        AdamW(net.parameters(), 4e-3, weight_decay=0.0),
        data=data,
        batch_size=256,
        seed=seed,
        averages=(EMA(0.995, warmup=True),),
        lr_schedule=warmup_cosine(50, steps, 0.02),
        compile=False,
    )
    return trainer.fit(steps).ema_network(0)


def save_trajectories(
    panels: tuple[Coupling, Coupling, Coupling], data: Tensor, path: str | FilePath
) -> FilePath:
    """Draw `couplings` in the plane, side by side, as a PNG of 1800 x 630 pixels.

    Args:
        panels: of samples ``[2]``.
        data: ``[M, 2]``, for the background.
        path: of the PNG; its folder must exist.

    Raises:
        ValueError: samples that are not points in the plane.
    """
    if data.dim() != 2 or data.shape[1] != 2:
        raise ValueError(f"data must be points [M, 2] to be drawn in the plane, got {data.shape}")
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2))
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.08, top=0.88, wspace=0.03)
    ranks = panels[0].states[0, :, 1].argsort().argsort().numpy()
    colours = ListedColormap(colormaps["viridis"](range(230)))  # its yellow is pale on white
    dots: dict[str, Any] = {"c": ranks, "cmap": colours, "edgecolors": "black", "linewidths": 0.5}
    for axis, name, panel in zip(axes, ("Training pairs", "ReFlow ODE", "Distilled"), panels):
        axis.scatter(*data[:2000].T.numpy(), s=8, color=_GREY, linewidths=0, label="data")
        if panel.evaluations:  # elsewhere they are data
            name += f", {evaluations(panel.evaluations)}"
            more = panel.samples[:1000].T.numpy()
            axis.scatter(*more, s=2, color="#606060", linewidths=0, label="further samples")
        lines = panel.states.transpose(0, 1).numpy()
        axis.add_collection(LineCollection(list(lines), array=ranks, cmap=colours, linewidths=0.9))
        axis.scatter(*lines[:, 0].T, **dots, s=14, zorder=3, label="noise z, coloured by height")
        axis.scatter(*lines[:, -1].T, **dots, s=14, zorder=4, marker="s", label="where it ends")
        distance = f"sliced Wasserstein distance to data {panel.distance:.2g}"
        axis.set_title(f"{name}\n{distance}", fontsize=11)
        axis.set_aspect("equal")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(_GREY)
    handles, texts = axes[-1].get_legend_handles_labels()
    figure.legend(handles, texts, loc="lower center", ncols=4, frameon=False, markerscale=1.5)
    return save_figure(figure, path, colours=256)


def save_gaps(gaps: Mapping[str, ConsistencyGap], path: str | FilePath) -> FilePath:
    """Draw the gap of each name along t, its sum in the legend, as a PNG of 1050 x 675 pixels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis: Any = figure.subplots()
    for i, (name, gap) in enumerate(gaps.items()):
        colour, style = _COLOURS[i % len(_COLOURS)], ("-", "--", ":", "-.")[i % 4]
        label = f"{name}: sum {gap.sum:.3g}"
        axis.plot(gap.times, gap.gaps, color=colour, linestyle=style, linewidth=2, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("$t$")
    axis.set_ylabel("consistency gap  $E\\,|f(x_t, t) - f(x_s, s)|$,  $s$ next below $t$")
    axis.grid(color=_GREY, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return save_figure(figure, path, colours=256)


def evaluations(n: int) -> str:
    """How the pictures name a number of network evaluations."""
    return f"{n} evaluation" if n == 1 else f"{n} evaluations"
