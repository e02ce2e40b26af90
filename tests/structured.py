"""A network whose condition is one tensor, and the same network of a dict; for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcm.sampling import split_weight

N = 24


class Features(nn.Module):
    """An MLP of x, two times and features ``[B, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 2 + 5, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        s = t if s is None else s
        cond = self.features(cond)
        out: Tensor = self.layers(torch.cat([x, t[:, None], s[:, None], cond], 1))
        return out

    def features(self, cond: Tensor) -> Tensor:
        return cond


class Structured(Features):
    """The same, the features being in a dict: [B, 2], and of a tuple [B, 3] with a mask [B]."""

    def features(self, cond: Any) -> Tensor:
        tokens, mask = cond["prompt"]
        return torch.cat([cond["style"], tokens * mask[:, None]], 1)


class Weighted(Features):
    """With the weight of guidance as a sixth feature."""

    def features(self, cond: Any) -> Tensor:
        features, w = split_weight(cond)
        return features + w[:, None]


class StructuredWeighted(Structured):
    def features(self, cond: Any) -> Tensor:
        cond, w = split_weight(cond)
        return super().features(cond) + w[:, None]


def structured(features: Tensor) -> dict[str, Any]:
    return {"style": features[:, :2], "prompt": (features[:, 2:], torch.ones(len(features)))}


FEATURES = torch.linspace(-1, 1, 5 * N).reshape(N, 5).cos()
DATA = torch.linspace(-2, 2, 2 * N).reshape(N, 2).sin()
NULL = {"style": torch.zeros(2), "prompt": (torch.zeros(3), None)}


def network(kind: type[Features]) -> Features:
    torch.manual_seed(3)
    return kind()


def teacher(kind: type[Features]) -> Features:
    torch.manual_seed(4)
    return kind()
