"""Precision and recall against their definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcm.evaluation import manifolds
from fastcm.evaluation.manifolds import precision_recall, wilson


def by_definition(samples: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    def share(inside: Tensor, centres: Tensor) -> float:
        count = 0
        for x in inside.tolist():
            for i, c in enumerate(centres.tolist()):
                others = sorted(
                    sum((a - b) ** 2 for a, b in zip(c, other)) ** 0.5
                    for j, other in enumerate(centres.tolist())
                    if j != i
                )
                if sum((a - b) ** 2 for a, b in zip(x, c)) ** 0.5 <= others[k - 1]:
                    count += 1
                    break
        return count / len(inside)

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_they_are_the_shares_within_any_ball(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = 1.3 * torch.randn(37, 4) + 0.7, torch.randn(31, 4)
    expected = by_definition(samples, reference, k)
    found = precision_recall(samples, reference, neighbours=k)
    assert (found[0].value, found[1].value) == expected
    assert found == precision_recall(samples, reference, neighbours=k)
    monkeypatch.setattr(manifolds, "_ENTRIES", 100)  # a few rows at a time
    assert precision_recall(samples, reference, neighbours=k) == found


def test_far_from_the_data_nothing_is_precise_and_on_few_of_them_little_is_recalled() -> None:
    data = torch.randn(300, 8)
    far = precision_recall(data + 100, data)
    assert [e.value for e in far] == [0, 0] and far[0].low == 0 and far[0].high > 0.001  # type: ignore[operator]
    collapsed = data[:1] + 1e-3 * torch.randn(300, 8)
    precision, recall = precision_recall(collapsed, data)
    assert precision.value == 1 and recall.value < 0.05
    same = precision_recall(data, data)
    assert [e.value for e in same] == [1, 1]


def test_a_large_mean_costs_no_digits() -> None:
    x, y = torch.randn(100, 4), torch.randn(100, 4)
    x, y = x.mul(64).round() / 64, y.mul(64).round() / 64  # 2**14 is added exactly
    found = precision_recall(x, y)
    assert precision_recall(x + 2**14, y + 2**14) == found


def test_the_intervals_are_wilsons() -> None:
    """Against the roots p of |count / n - p| = z sqrt(p (1 - p) / n)."""
    for count, n in ((0, 12), (7, 12), (12, 12), (4321, 5000)):
        found = wilson(count, n)
        assert found.value == count / n
        for end in (found.low, found.high):
            assert end is not None
            distance = abs(count / n - end)
            assert distance == pytest.approx(1.95996 * (end * (1 - end) / n) ** 0.5, abs=1e-7)


@pytest.mark.parametrize(("n", "m", "k"), [(3, 9, 3), (9, 3, 3), (9, 9, 0)])
def test_too_few_rows_for_the_neighbours_are_refused(n: int, m: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"with {k} neighbours need more"):
        precision_recall(torch.zeros(n, 2), torch.zeros(m, 2), neighbours=k)
