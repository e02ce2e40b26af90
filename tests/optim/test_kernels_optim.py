"""Norm, tick and sweep of the optimizer against the formulas in float64, and torch.optim."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby

import pytest
import tolerances
import torch
from torch import Tensor

from fastcm import EMA, PowerEMA
from fastcm.kernels.adam_ema import launch_sweep
from fastcm.kernels.grad_norm import launch_grad_norm, launch_grad_norm_finish
from fastcm.kernels.tables import CHUNK, SEGMENT_ALIGN, Segment
from fastcm.kernels.tick import launch_tick

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = [1, 3, 1023, 1024, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
GUARD = 42.0
DECAYS = [0.9, 0.999, 0.0]
HYPER = [[0.02, 0.9, 0.999, 1e-8, 0.004, 0.0], [0.01, 0.0, 0.99, 1e-4, 0.0, 0.3]]
"""lr, beta1, beta2, eps, decoupled decay, L2 decay of two groups."""


def guarded(values: Tensor, offset: int = 0) -> Tensor:
    """The same values with guards around them; `offset` elements off their alignment."""
    memory = torch.full((values.numel() + 128,), GUARD, dtype=values.dtype, device=values.device)
    view = memory[64 + offset : 64 + offset + values.numel()]
    return view.copy_(values)


def assert_guarded(view: Tensor) -> None:
    memory = view.new_empty(0).set_(view.untyped_storage())
    start = view.storage_offset()
    memory[start : start + view.numel()] = GUARD
    assert (memory == GUARD).all(), "written outside its elements"


@dataclass
class Leaf:
    """One parameter tensor with its state, as the formulas see it."""

    parameter: Tensor
    gradient: Tensor | None
    step: int
    group: int
    master: Tensor
    m: Tensor
    v: Tensor
    averages: list[Tensor] = field(default_factory=list)

    @classmethod
    def draw(
        cls, size: int, i: int, device: torch.device, parameter=FP32, gradient=FP32, averages=1,
        offset=0,
    ) -> Leaf:  # fmt: skip
        acc = FP64 if parameter == FP64 else FP32
        x, g, m, v, *e = torch.randn(4 + averages, size, dtype=acc, device=device)
        x = x.to(parameter)
        # an eighth of an ulp away: rounds back to x to nearest and towards zero
        master = x.to(acc) * (1 + (torch.finfo(parameter).eps / 8 if acc != parameter else 0))
        g = g.to(gradient)
        # steps on both sides of the rectification of RAdam
        return cls(guarded(x, offset), guarded(g, offset), 500 * (i % 2), i // 2 % 2,
                   master, m, v.square(), list(e))  # fmt: skip

    def updated(self, radam: bool, clip: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x, m, v, averages after one step, in `dtype`."""
        lr, beta1, beta2, eps, decay, l2 = HYPER[self.group]
        x, m, v = self.master.to(dtype), self.m.to(dtype), self.v.to(dtype)
        if self.gradient is not None:
            k = self.step + 1
            d = clip * self.gradient.to(dtype) + l2 * x
            m = beta1 * m + (1 - beta1) * d
            v = beta2 * v + (1 - beta2) * d * d
            m_hat, v_hat = m / (1 - beta1**k), v / (1 - beta2**k)
            change = m_hat / (v_hat.sqrt() + eps)
            if radam:
                end = 2 / (1 - beta2) - 1
                rho = end - 2 * k * beta2**k / (1 - beta2**k)
                change = m_hat
                if rho > 5:
                    r = (rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)
                    root = v.sqrt() + eps
                    change = math.sqrt(r) * m_hat * math.sqrt(1 - beta2**k) / root
            x = x - lr * decay * x - lr * change
        averages = [
            decay * e.to(dtype) + (1 - decay) * x for e, decay in zip(self.averages, DECAYS)
        ]
        return x, m, v, *averages


class Problem:
    """Leaves with the tables, state and scalars that the kernels take."""

    def __init__(self, leaves: list[Leaf], radam=False, shadow=None, mask=0) -> None:
        self.leaves, self.radam, self.mask = leaves, radam, mask
        device = leaves[0].parameter.device
        acc = leaves[0].m.dtype
        self.k = len(leaves[0].averages)
        self.master = any(leaf.parameter.dtype in (BF16, FP16) for leaf in leaves)
        offsets, total, chunks, kinds = [], 0, [], []
        for i, leaf in enumerate(leaves):
            offsets.append(total)
            numel = leaf.parameter.numel()
            total += -(-numel // SEGMENT_ALIGN) * SEGMENT_ALIGN
            g = leaf.parameter if leaf.gradient is None else leaf.gradient
            aligned = leaf.parameter.data_ptr() % 16 == g.data_ptr() % 16 == 0
            for index in range(-(-numel // CHUNK)):
                chunks.append((i, index))
                kinds.append((leaf.parameter.dtype, g.dtype, aligned))
        self.segments, first = [], 0
        for kind, run in groupby(kinds):
            count = len(list(run))
            self.segments.append(Segment(first, count, *kind))
            first += count
        columns = [
            (leaf.parameter.data_ptr(), 0 if leaf.gradient is None else leaf.gradient.data_ptr(),
             offset, leaf.parameter.numel(), leaf.group)
            for leaf, offset in zip(leaves, offsets)
        ]  # fmt: skip
        self.tensors = torch.tensor(columns, device=device).t().contiguous()
        self.chunks = torch.tensor(chunks, dtype=torch.int32, device=device).t().contiguous()
        rows = 2 + self.k + self.master
        self.state = guarded(torch.full((rows * total,), GUARD, dtype=acc, device=device))
        self.state = self.state.view(rows, total)
        copies = self.state.new_full(((1 + mask.bit_count()) * total,), GUARD)
        self.shadow = shadow and guarded(copies.to(shadow)).view(-1, total)
        self.columns = [slice(o, o + x.parameter.numel()) for o, x in zip(offsets, leaves)]
        for leaf, cols in zip(leaves, self.columns):
            parts = [leaf.m, leaf.v, *leaf.averages, *([leaf.master] if self.master else [])]
            self.state[:, cols] = torch.stack(parts)
        self.steps = torch.tensor([leaf.step for leaf in leaves], dtype=FP32, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.norm = self.state.new_full((1,), GUARD)

    def launch(self, limit: float = math.inf, norm: bool = True) -> None:
        """One step of all kernels, with fresh and poisoned scratch."""
        new, f64 = self.state.new_empty, {"dtype": FP64, "device": self.state.device}
        sums, rows, shared = torch.empty(1, **f64), new(len(self.leaves), 8), new(2 + self.k)
        shared[2:] = 1 - torch.tensor(DECAYS[: self.k], **f64)
        if norm:
            partial = torch.empty(self.chunks.shape[1], **f64)
            bounds = torch.tensor([0, partial.numel()], device=self.state.device)
            launch_grad_norm(self.tensors, self.chunks, self.segments, partial)
            launch_grad_norm_finish(partial, bounds, sums)
        launch_tick(
            self.tensors, torch.tensor(HYPER, **f64), torch.tensor([limit], **f64),
            sums if norm else None, self.steps, rows, shared, self.norm, self.counts,
            radam=self.radam,
        )  # fmt: skip
        averages, shadows = (
            torch.tensor([row.data_ptr() for row in rows_], dtype=torch.int64, device=rows.device)
            for rows_ in (self.state[2 : 2 + self.k], [] if self.shadow is None else self.shadow)
        )
        for segment in self.segments:
            launch_sweep(
                self.tensors, self.chunks, segment, self.state[:2], averages, rows, shared,
                masters=self.state[-1] if segment.parameter in (BF16, FP16) else None,
                shadows=shadows, shadow_dtype=getattr(self.shadow, "dtype", None), mask=self.mask,
            )  # fmt: skip

    def check(self, limit: float = math.inf, norm: bool = True) -> None:
        """Launch, and compare every buffer with the formulas."""
        gradients = [leaf.gradient.double() for leaf in self.leaves if leaf.gradient is not None]
        length = math.sqrt(sum(g.square().sum().item() for g in gradients))
        clip = min(1.0, limit / (length + 1e-6)) if norm else 1.0
        assert math.isinf(limit) or clip < 1
        acc = self.state.dtype
        expected = [
            [leaf.updated(self.radam, clip, dtype) for leaf in self.leaves] for dtype in (FP64, acc)
        ]
        before = [leaf.parameter.clone() for leaf in self.leaves]
        self.launch(limit, norm)
        assert self.norm.item() == (pytest.approx(length, rel=1e-6) if norm else GUARD)
        assert self.counts.tolist() == [1, 0, 0]
        for i, (leaf, exact, plain) in enumerate(zip(self.leaves, *expected)):
            moved = leaf.gradient is not None
            assert self.steps[i] == leaf.step + moved
            state = self.state[:, self.columns[i]]
            if not moved:
                assert torch.equal(leaf.parameter, before[i])
                assert torch.equal(state[:2], torch.stack([leaf.m, leaf.v]))
            for row, e, p in zip(state, exact[1:], plain[1:]):
                tolerances.assert_close(row, e, p)
            dtype = leaf.parameter.dtype
            if dtype in (BF16, FP16):
                tolerances.assert_close(state[-1], exact[0], plain[0])
            tolerances.assert_close(leaf.parameter, exact[0], plain[0].to(dtype))
            if self.shadow is not None:
                chosen = [0, *(3 + j for j in range(self.k) if self.mask >> j & 1)]
                for row, j in zip(self.shadow[:, self.columns[i]], chosen):
                    tolerances.assert_close(row, exact[j], plain[j].to(row.dtype))
        self.check_guards()

    def check_guards(self) -> None:
        for leaf in self.leaves:
            assert_guarded(leaf.parameter)
            if leaf.gradient is not None:
                assert_guarded(leaf.gradient)
        for rows in (self.state, self.shadow):
            if rows is not None:
                for cols in self.columns:
                    rows[:, cols] = GUARD
                assert_guarded(rows.view(-1)[:0])

    def bits(self) -> list[Tensor]:
        shadow = [] if self.shadow is None else [self.shadow]
        parameters = [leaf.parameter for leaf in self.leaves]
        return [t.clone() for t in (self.state, self.steps, *shadow, *parameters)]


@pytest.mark.parametrize("averages", [0, 1, 2, 3])
@pytest.mark.parametrize("norm", ["clipped", "measured", "none"])
@pytest.mark.parametrize("radam", [False, True], ids=["adamw", "radam"])
def test_sweep_follows_the_formulas(radam, norm, averages, device):
    sizes = SIZES if averages == 1 else [3, CHUNK + 1, CHUNK, 70]
    leaves = [Leaf.draw(size, i, device, averages=averages) for i, size in enumerate(sizes)]
    limit = 1.5 if norm == "clipped" else math.inf
    Problem(leaves, radam).check(limit, norm=norm != "none")


@pytest.mark.parametrize("shadow", [BF16, FP16])
@pytest.mark.parametrize(("averages", "mask"), [(0, 0), (1, 1), (3, 0), (3, 0b101), (2, 0b10)])
def test_shadows_are_rounded_copies_of_the_chosen_rows(averages, mask, shadow, device):
    leaves = [Leaf.draw(s, i, device, averages=averages) for i, s in enumerate([5, CHUNK + 3])]
    Problem(leaves, shadow=shadow, mask=mask).check()


def test_a_tensor_without_gradient_moves_its_averages_and_shadows_only(device):
    leaves = [Leaf.draw(size, i, device, averages=2) for i, size in enumerate([7, CHUNK + 9, 30])]
    leaves[1].gradient = None
    Problem(leaves, shadow=BF16, mask=1).check(1.0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_misaligned_storage(dtype, device):
    leaves = [Leaf.draw(s, i, device, dtype, dtype, offset=i) for i, s in enumerate(SIZES[-4:])]
    problem = Problem(leaves)
    assert [segment.aligned for segment in problem.segments] == [True, False]
    problem.check(2.0)


@pytest.mark.parametrize(
    ("parameter", "gradient"), [(FP32, BF16), (FP32, FP16), (BF16, FP32), (FP64, FP64)]
)
def test_other_dtypes(parameter, gradient, device):
    leaves = [Leaf.draw(s, i, device, parameter, gradient, 2) for i, s in enumerate(SIZES[1:6:2])]
    Problem(leaves).check(1.0)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_parameter_follows_its_master_unless_written_from_outside(dtype, has_gradient, device):
    leaves = [Leaf.draw(s, i, device, dtype, dtype) for i, s in enumerate([100, CHUNK + 100])]
    leaves.append(Leaf.draw(50, 2, device, FP32, dtype))
    if not has_gradient:
        leaves[1].gradient = None
    problem = Problem(leaves, shadow=BF16)
    for leaf in leaves[:2]:
        leaf.parameter[::3] *= 2
        leaf.master[::3] = leaf.parameter[::3].float()
    problem.check()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_touches_nothing_but_the_counts(bad, device):
    leaves = [Leaf.draw(s, i, device, averages=2) for i, s in enumerate([10, CHUNK + 10])]
    problem = Problem(leaves, shadow=BF16, mask=0b11)
    good = leaves[1].gradient[CHUNK + 3].item()
    history = []
    for value in (good, bad, bad, good, bad):
        leaves[1].gradient[CHUNK + 3] = value
        before = problem.bits()
        problem.launch(1.0)
        same = [torch.equal(a, b) for a, b in zip(before, problem.bits())]
        assert all(same) if value != good else not any(same)
        history.append(problem.counts.tolist())
        assert math.isfinite(problem.norm.item()) == (value == good)
    assert history == [[1, 0, 0], [2, 1, 1], [3, 2, 2], [4, 2, 0], [5, 3, 1]]


@pytest.mark.parametrize("radam", [False, True], ids=["adamw", "radam"])
def test_ten_steps_in_float64_are_those_of_torch(radam, device):
    leaves = [Leaf.draw(s, 0, device, FP64, FP64, 0) for s in (5, 70)]
    for leaf in leaves:
        leaf.m.zero_()
        leaf.v.zero_()
    twins = [torch.nn.Parameter(leaf.parameter.clone()) for leaf in leaves]
    lr, *betas, eps, decay, _ = HYPER[0]
    options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": decay}
    peer = torch.optim.RAdam if radam else torch.optim.AdamW
    torch_optimizer = peer(twins, **options, **({"decoupled_weight_decay": True} if radam else {}))
    problem = Problem(leaves, radam)
    for _ in range(10):
        for leaf, twin in zip(leaves, twins):
            leaf.gradient.normal_()
            twin.grad = leaf.gradient.clone()
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        problem.launch(1.0)
        torch_optimizer.step()
    for leaf, twin in zip(leaves, twins):
        torch.testing.assert_close(leaf.parameter, twin.detach(), rtol=1e-11, atol=1e-13)


def test_a_tick_of_many_tensors(device):
    leaves = [Leaf.draw(1, i, device) for i in range(300)]
    for leaf in leaves[::7]:
        leaf.gradient = None
    problem = Problem(leaves)
    rows, shared = problem.state.new_empty(300, 8), problem.state.new_empty(3)
    hyper = torch.tensor(HYPER, dtype=FP64, device=device)
    sums = torch.tensor([9.0, 0.0, 16.0], dtype=FP64, device=device)
    limit = torch.tensor([2.5], dtype=FP64, device=device)
    launch_tick(
        problem.tensors, hyper, limit, sums, problem.steps, rows, shared, problem.norm,
        problem.counts, radam=True,
    )  # fmt: skip
    assert problem.norm.item() == 5.0 and shared[1] == 1
    assert shared[0].item() == pytest.approx(0.5, rel=1e-6)
    for leaf, step, row in zip(leaves, problem.steps, rows):
        assert step == leaf.step + (leaf.gradient is not None)
        assert row.isfinite().all() == (leaf.gradient is not None)
        if leaf.gradient is not None:
            assert row[0] == pytest.approx(1 - HYPER[leaf.group][1]) and row[7] == 0
            # RAdam without second moments in the first step
            assert (row[4:6].tolist() == [0, 1]) == (leaf.step == 0)


@pytest.mark.parametrize("count", [0, 1, 4097, 200_000])
def test_finish_adds_the_partial_sums_of_each_class(count, device):
    partial = torch.rand(count + 5, dtype=FP64, device=device)
    bounds = torch.tensor([0, count, count, count + 5], device=device)
    sums = partial.new_empty(3)
    launch_grad_norm_finish(partial, bounds, sums)
    exact = [math.fsum(part) for part in (partial[:count].tolist(), [], partial[count:].tolist())]
    assert sums.tolist() == pytest.approx(exact, rel=1e-14)


def test_the_norm_has_the_same_bits_in_every_run_and_order_of_segments(device):
    kinds = [(FP32, 0), (BF16, 0), (FP32, 1), (FP64, 0)]
    leaves = [
        Leaf.draw(size, i, device, FP32, dtype, offset=offset)
        for i, (size, (dtype, offset)) in enumerate(zip([CHUNK + 7, 900, CHUNK, 33], kinds))
    ]
    leaves[1].gradient[5] = 3.0
    problem = Problem(leaves)
    partials = []
    for segments in (problem.segments, problem.segments, problem.segments[::-1]):
        partial = torch.empty(problem.chunks.shape[1], dtype=FP64, device=device)
        for part in [segments] if len(partials) < 1 else [[s] for s in segments]:
            launch_grad_norm(problem.tensors, problem.chunks, part, partial)
        partials.append(partial)
    assert len(problem.segments) == 4
    assert torch.equal(partials[0], partials[1]) and torch.equal(partials[0], partials[2])
    exact = sum(leaf.gradient.double().square().sum().item() for leaf in leaves)
    assert partials[0].sum().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("attempts", [0, 1, 7, 10**7])
def test_a_tick_sets_how_far_warmed_averages_move(attempts, device):
    averages = (EMA(0.999, warmup=True), EMA(0.9), PowerEMA(0.1), PowerEMA(0.05), EMA(0.3, True))
    problem = Problem([Leaf.draw(1, 0, device)])
    problem.counts[0] = attempts
    shared = torch.full((2 + len(averages),), GUARD, dtype=FP64, device=device)
    rows = problem.state.new_empty(1, 8, dtype=FP64)
    hyper, limit = (torch.tensor(x, dtype=FP64, device=device) for x in (HYPER, [math.inf]))
    ramps = [average.ramp or (0.0, 0.0, 0.0, 0.0) for average in averages]
    launch_tick(
        problem.tensors, hyper, limit, None, problem.steps, rows, shared, problem.norm.double(),
        problem.counts, torch.tensor(ramps, dtype=FP64, device=device), radam=False,
    )  # fmt: skip
    exact = [(1 - average.decay(torch.tensor(attempts))).item() for average in averages]
    exact[1] = GUARD  # its decay is constant
    assert shared[2:].tolist() == pytest.approx(exact, rel=1e-9)
