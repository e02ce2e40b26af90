"""The pictures: what they show is what the samplers do, and the commands write them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcm import Linear, Parameterization, Sampler, VarianceExploding, cli, ops, rng
from fastcm.cli.recipes import Recipe
from fastcm.cli.runs import open_run
from fastcm.evaluation import ConsistencyGap, plots, sliced_wasserstein
from fastcm.networks import GaussianConsistency, GaussianMixture
from fastcm.rng import NoiseKey
from fastcm.sampling import ode

MEAN, STD = torch.tensor([1.0, -2.0]), 0.5


def one_gaussian() -> plots.Coupling:
    """Couplings of data whose exact one-step map is known."""
    mixture = GaussianMixture(MEAN[None], STD)
    data, _ = mixture.sample(600)
    return plots.couplings(
        Sampler(mixture, Linear(), steps=100, method="ode", shape=(2,)),
        Sampler(GaussianConsistency(MEAN, STD), Linear(), steps=1, shape=(2,)),
        data[:500],
        data[500:],
        n=40,
        seed=3,
    )


@pytest.mark.parametrize("path", [Linear(), VarianceExploding()], ids=str)
def test_the_states_of_the_ode_end_where_the_sampler_ends(path) -> None:
    p = Parameterization(path)
    net = GaussianMixture(torch.randn(3, 2), 0.3, parameterization=p)
    z, times = torch.randn(10, 2), [path.t_max, 0.7 * path.t_max, 0.2 * path.t_max]
    states = plots.ode_states(net, p, z, times=times)
    assert states.shape == (4, 10, 2)
    assert torch.equal(states[-1], ode(net, p, z, times=times))
    assert torch.equal(states[0], path.t_max * z)
    with pytest.raises(ValueError, match="descend"):
        plots.ode_states(net, p, z, times=times[::-1])


def test_paths_of_the_ode_do_not_cross_where_training_pairs_do() -> None:
    """On a line, not to cross is to keep the order at every time.

    Euler's step is a convex combination of x and the posterior mean, which grows with x.
    """
    mixture = GaussianMixture(torch.tensor([[-2.0], [0.5], [3.0]]), 0.2)
    data, _ = mixture.sample(200)
    flow = Sampler(mixture, Linear(), steps=50, method="ode", shape=(1,))
    pairs, paths, _ = plots.couplings(flow, flow, data, data, n=60, seed=1)

    def keeps_order(states: Tensor) -> bool:
        ordered = states[:, states[0, :, 0].argsort(), 0]
        return bool((ordered.diff(dim=1) > 0).all())

    assert paths.states.shape == (51, 60, 1) and keeps_order(paths.states)
    assert not keeps_order(pairs.states)


def test_the_same_noise_starts_every_line_and_the_samplers_end_them() -> None:
    pairs, paths, step = one_gaussian()
    z = ops.noise((40, 2), NoiseKey(3), stream=rng.SAMPLE)
    for coupling in (pairs, paths, step):
        assert torch.equal(coupling.states[0], z)
    assert torch.equal(paths.states[-1], paths.samples[:40])
    assert torch.equal(step.states[-1], step.samples[:40])
    assert torch.equal(pairs.states[-1], pairs.samples[:40])
    data, _ = GaussianMixture(MEAN[None], STD).sample(600)
    assert torch.equal(pairs.samples, data[:500])
    assert step.distance == sliced_wasserstein(step.samples, data[500:])
    assert [c.evaluations for c in (pairs, paths, step)] == [0, 100, 1]
    # the exact one-step map: the chord of each of the ODE's paths
    assert torch.allclose(step.states[-1], MEAN + STD * z, atol=1e-5)
    assert (paths.states[-1] - step.states[-1]).abs().max() < 0.05


def test_a_short_distillation_moves_one_step_samples_towards_the_data() -> None:
    mixture = plots.crescent()
    data, _ = mixture.sample(2000)
    distances = [
        sliced_wasserstein(
            Sampler(plots.distil(mixture, data, steps=k), Linear(), shape=(2,))(500), data
        )
        for k in (1, 300)
    ]
    assert distances[1] < 0.5 * distances[0]


def size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_trajectories_and_gaps_are_drawn(tmp_path: Path) -> None:
    panels = one_gaussian()
    backend = sys.modules.get("matplotlib.pyplot")
    plots.save_trajectories(panels, panels[0].samples, tmp_path / "t.png")
    assert size(tmp_path / "t.png") == (1800, 630)
    gap = ConsistencyGap([0.5, 1.0], [0.1, 0.0])  # an exact zero has no logarithm
    plots.save_gaps({"a": gap, "b": ConsistencyGap([1.0], [2.0])}, tmp_path / "gap.png")
    assert size(tmp_path / "gap.png") == (1050, 675)
    assert sys.modules.get("matplotlib.pyplot") is backend
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gap.png", "t.png"]


def test_couplings_that_cannot_be_computed_or_drawn_are_refused(tmp_path: Path) -> None:
    mixture = GaussianMixture(torch.zeros(1, 3), 1.0)
    data, _ = mixture.sample(8)
    flow = Sampler(mixture, Linear(), steps=2, method="ode", shape=(3,))
    for n in (0, 9):
        with pytest.raises(ValueError, match=rf"n must be in \[1, 8\].*got {n}"):
            plots.couplings(flow, flow, data, data, n=n)
    for options in ({}, {"method": "ode", "solver": "heun"}):
        other = Sampler(mixture, Linear(), steps=2, shape=(3,), **options)
        with pytest.raises(ValueError, match="flow must be a Sampler with method='ode'"):
            plots.couplings(other, flow, data, data, n=2)
    panels = plots.couplings(flow, flow, data, data, n=2)
    with pytest.raises(ValueError, match=r"points \[M, 2\]"):
        plots.save_trajectories(panels, data, tmp_path / "t.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny runs: on points in the plane, and on digits."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    for name in ("points", "others"):
        x = generator.standard_normal((60, 2)).astype(np.float32)
        np.save(folder / f"{name}.npy", x)
    np.savez(folder / "labelled.npz", x=x, labels=np.arange(60, dtype=np.uint8) % 2)
    points, others = str(folder / "points.npy"), str(folder / "others.npy")
    teacher = str(folder / "flow")
    recipes = {
        "flow": Recipe(points, "flow"),
        "cd": Recipe(points, "cd", teacher=teacher),
        "elsewhere": Recipe(others, "cd", teacher=teacher),
        "trig": Recipe(points, "flow", path="trig"),
        "digits": Recipe("digits", "flow"),
        "labelled": Recipe("digits", "flow", conditional=True),
        "halves": Recipe(str(folder / "labelled.npz"), "flow", conditional=True),
    }
    for name, recipe in recipes.items():
        settings = {**asdict(recipe), "steps": 2, "batch": 8, "width": 16, "compile": "off"}
        open_run(folder / name, settings, resume=False)
        recipe = Recipe(**{**settings, "ema": tuple(settings["ema"])})
        recipe.trainer(folder / name, progress=False).fit(2)
    return folder


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run ``fastcm plot``; returns exit code and what was printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastcm", "plot", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        code = stop.value.code
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out

    return run


def test_the_commands_draw_runs(plot, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    pair = ["--flow", runs / "flow", "--distilled", runs / "cd", "--samples", 5]
    assert plot("trajectories", *pair, "--out", out)[0] == 0 and size(out) == (1800, 630)
    assert plot("gap", runs / "flow", runs / "digits", "--out", out)[0] == 0
    assert size(out) == (1050, 675)
    for run in ("digits", "labelled"):
        options = ["--steps", 1, "--steps", 3, "--ode", 2, "--n", 4]
        assert plot("steps", runs / run, *options, "--out", out)[0] == 0
        assert size(out) == (1500, 351)  # three rows


def test_rows_of_steps_are_the_samplers_images(
    plot, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr("fastcm.cli.plot.save_rows", lambda rows, *a, **k: seen.update(rows))
    run = runs / "digits"
    plot("steps", run, "--n", 3, "--seed", 5, "--ode", 7, "--out", tmp_path / "x.png")
    names = ["1 evaluation", "2 evaluations", "4 evaluations", "ODE, 7 evaluations"]
    assert list(seen) == names
    assert torch.equal(seen[names[1]], Sampler.from_run(run, steps=2)(3, seed=5))
    assert torch.equal(seen[names[3]], Sampler.from_run(run, steps=7, method="ode")(3, seed=5))


def test_runs_of_one_name_are_told_apart(
    plot, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, ConsistencyGap] = {}
    monkeypatch.setattr(plots, "save_gaps", lambda gaps, path: seen.update(gaps))
    (tmp_path / "flow").symlink_to(runs / "flow")
    plot("gap", runs / "flow", runs / "cd", "--out", tmp_path / "x.png")
    assert list(seen) == ["flow", "cd"] and seen["flow"].times[-1] == 1.0
    plot("gap", runs / "flow", tmp_path / "flow", "--out", tmp_path / "x.png")
    assert list(seen)[2:] == [str(runs / "flow"), str(tmp_path / "flow")]


def test_without_runs_an_exact_flow_is_distilled(
    plot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "distil", partial(plots.distil, steps=3))
    code, said = plot("trajectories", "--out", tmp_path / "x.png", "--samples", 8)
    assert code == 0 and "distilled in" in said and size(tmp_path / "x.png") == (1800, 630)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trajectories --flow RUNS/flow", "give both --flow and --distilled"),
        ("trajectories --samples 0", "--samples must be in [1, 20000]"),
        ("trajectories --seed -1", "seed must be"),
        ("trajectories --flow RUNS/cd --distilled RUNS/cd", "--flow needs a run of --method flow"),
        ("trajectories --flow RUNS/flow --distilled RUNS/flow", "--distilled needs a run of"),
        ("trajectories --flow RUNS/digits --distilled RUNS/cd", "digits makes [1, 8, 8]"),
        ("trajectories --flow RUNS/trig --distilled RUNS/cd", "a run on the linear path"),
        ("trajectories --flow RUNS/halves --distilled RUNS/cd", "halves has a flow per label"),
        ("trajectories --flow RUNS/flow --distilled RUNS/elsewhere", "trained on other data than"),
        ("trajectories --flow RUNS/flow --distilled RUNS/cd --samples 99", "in [1, 48]"),
        ("trajectories --flow RUNS --distilled RUNS/cd", "no checkpoint in"),
        ("steps RUNS/flow", "needs a run on images"),
        ("steps RUNS/digits --n 0", "--n must be >= 1"),
        ("steps RUNS/digits --steps 0", "steps must be >= 1"),
        ("gap RUNS/flow RUNS", "no checkpoint in"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    plot, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("work was begun")

    for module, name in ((plots, "distil"), (plots, "couplings"), (Sampler, "__call__")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr("fastcm.cli.plot.consistency_gap", work)
    command = arguments.replace("RUNS", str(runs)).split()
    code, error = plot(*command, "--out", tmp_path / "x.png")
    assert code == 2 and error.startswith("fastcm: ") and said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["trajectories", "steps nowhere", "gap nowhere"])
def test_a_picture_that_cannot_be_written_is_refused_first(
    plot, tmp_path: Path, command: str
) -> None:
    code, error = plot(*command.split(), "--out", tmp_path / "x.jpg")
    assert code == 2 and "--out must end in .png" in error
    code, error = plot(*command.split(), "--out", tmp_path / "folder" / "x.png")
    assert code == 2 and f"there is no folder {tmp_path / 'folder'}" in error
