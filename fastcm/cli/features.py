"""The option --features of ``fastcm evaluate``: which network, compared with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastcm.evaluation import (
    DINOv2,
    Estimate,
    Inception,
    Reference,
    compare,
    image_features,
)
from fastcm.evaluation.images import Images

NETWORKS: dict[str, Callable[[Path], Inception | DINOv2]] = {
    "inception": Inception,
    "dinov2": DINOv2,
}


@dataclass(frozen=True)
class Features:
    """A network of features, and how images go through it.

    Args:
        net: the network, on its device.
        batch: images at once.
        source: file or folder of the reference; None for the run's held-out data.
        write: file for the reference's statistics.
        reference: which `beside` makes or reads.
    """

    net: Inception | DINOv2
    batch: int
    source: Path | None
    write: Path | None
    reference: Reference | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        return (self.net.distance, "precision", "recall")

    def beside(self, images: Images) -> Features:
        """The same, compared with what was given, or else with these images."""
        if self.source is None:
            found = Reference.of(self.of(images))
        else:
            found = Reference.read(self.source, self.net, batch_size=self.batch)
        if self.write is not None:
            found.save(self.write)
        return replace(self, reference=found)

    def of(self, images: Images) -> Tensor:
        """The features of images."""
        return image_features(self.net, images, batch_size=self.batch)

    def cells(self, features: Tensor) -> list[str]:
        """A row's figures, for `columns`."""
        assert self.reference is not None
        found = compare(features, self.reference)
        return [cell(found.frechet, ".4g"), cell(found.precision), cell(found.recall)]


def cell(estimate: Estimate | None, form: str = ".3f") -> str:
    """A figure and its interval as the table shows them."""
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def features_of(
    name: str | None,
    weights: Path | None,
    reference: Path | None,
    write_reference: Path | None,
    batch: int,
    device: torch.device,
) -> Features | None:
    """The network of --features on a device; None without the option.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: an option is missing, wrong or without --features; other weights.
    """
    if name is None:
        for option, value in (
            ("weights", weights),
            ("reference", reference),
            ("write-reference", write_reference),
        ):
            if value is not None:
                raise ValueError(f"--{option} has a meaning only with --features")
        return None
    if name not in NETWORKS:
        raise ValueError(f"--features must be one of {', '.join(NETWORKS)}, got {name!r}")
    if weights is None:
        raise ValueError(
            f"--features {name} needs --weights FILE, the network's; docs/evaluation.md says "
            "where they are published"
        )
    if batch < 1:
        raise ValueError(f"--batch must be >= 1, got {batch}")
    if reference is not None and not reference.exists():
        raise FileNotFoundError(f"--reference: no such file or folder: {reference}")
    if write_reference is not None and write_reference.suffix.lower() != ".npz":
        raise ValueError(f"--write-reference must end in .npz, got {write_reference}")
    net = NETWORKS[name](weights)
    return Features(net.to(device), batch, reference, write_reference)
