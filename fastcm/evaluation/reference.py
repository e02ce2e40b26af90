"""What samples are compared with in a space of features, and the comparison."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastcm.data.datasets import as_tensor, read_arrays
from fastcm.evaluation.gaussians import Estimate, Gaussian, frechet_estimate
from fastcm.evaluation.images import FeatureNetwork, image_features, stored_images
from fastcm.evaluation.manifolds import precision_recall
from fastcm.runs.files import replace_file

_STATISTICS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the data's features, and the features where there are images.

    Args:
        gaussian: mean and covariance, for the Frechet distance.
        features: float32 ``[M, D]``, for precision and recall; they may be of a part of the data.
    """

    gaussian: Gaussian
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """That of features ``[M, D]``; ValueError for less than two rows."""
        warn_of_rank(len(features), features.shape[1], "reference images")
        return cls(Gaussian.of(features), features)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], net: FeatureNetwork, *, batch_size: int = 64
    ) -> Reference:
        """That of a file or folder.

        Args:
            path: an .npz file with ``mu`` and ``sigma``, as of EDM, or of ADM, whose images
                ``arr_0`` serve precision and recall beside them; or a folder or file of images, see
                `image_features`.
            net: of whose features the statistics are, and which computes those of images.
            batch_size: images at once.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not readable, holds something else, or statistics of other features.
        """
        file = Path(path)
        if file.suffix.lower() == ".pkl":
            raise ValueError(
                f"{file} is a pickle, which can run any code when it is read, and is not: save its "
                "mu and sigma as an .npz file where you trust it, np.savez(FILE, mu=..., sigma=...)"
            )
        if file.is_dir():
            return cls.of(image_features(net, file, batch_size=batch_size))
        arrays = read_arrays(file)
        names = next((pair for pair in _STATISTICS if {*pair} <= arrays.keys()), None)
        images = stored_images(arrays)
        if names is None and images is None:
            raise ValueError(
                f"{file} must hold mu and sigma, or images arr_0, got {', '.join(sorted(arrays))}"
            )
        gaussian = (
            None if names is None else _gaussian(arrays[names[0]], arrays[names[1]], net, file)
        )
        if images is None:
            assert gaussian is not None
            return cls(gaussian)
        features = image_features(net, images, batch_size=batch_size)
        return cls.of(features) if gaussian is None else cls(gaussian, features)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write mean and covariance as EDM reads them, ``mu`` and ``sigma`` of an .npz file."""
        file = Path(path)
        if file.suffix.lower() != ".npz":
            raise ValueError(f"the file of a reference must end in .npz, got {file}")
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.gaussian.mean.numpy(), sigma=self.gaussian.covariance.numpy())
        replace_file(file, buffer.getvalue())
        return file


@dataclass(frozen=True)
class Comparison:
    """How far samples are from a reference.

    Args:
        frechet: the Frechet distance, see `fastcm.evaluation.compare`.
        precision, recall: None where the reference has no features.
    """

    frechet: Estimate
    precision: Estimate | None = None
    recall: Estimate | None = None


def compare(features: Tensor, reference: Reference, *, neighbours: int = 3) -> Comparison:
    """The distances of samples' features to a reference, with intervals of 95 %.

    Args:
        features: ``[N, D]`` of `image_features`. The Frechet distance is larger of fewer:
            compare figures of the same N only.
        reference: of the same features.
        neighbours: k of precision and recall.

    Returns:
        The Frechet distance, its interval from a jackknife over 20 groups of the samples, none for
        N < 40; precision and recall with intervals for shares. All intervals take the
        reference as known.

    Raises:
        ValueError: features of another width; fewer than two, or too few for the neighbours.

    Source: Heusel et al. 2017; Kynkaanniemi et al. 2019.
    """
    width = len(reference.gaussian.mean)
    if features.dim() != 2 or features.shape[1] != width:
        raise ValueError(f"features must be [N, {width}] as the reference's, got {features.shape}")
    warn_of_rank(len(features), width, "samples")
    frechet = frechet_estimate(features, reference.gaussian)
    if reference.features is None:
        return Comparison(frechet)
    precision, recall = precision_recall(features, reference.features, neighbours=neighbours)
    return Comparison(frechet, precision, recall)


def warn_of_rank(n: int, width: int, what: str) -> None:
    """Warn of a covariance that is not of full rank."""
    if n <= width:
        warnings.warn(
            f"{n} {what} have a covariance of rank {n - 1} at most in {width} features: the "
            f"Frechet distance is far above that of many, and compares with none but the like",
            stacklevel=3,
        )


def _gaussian(mu: Any, sigma: Any, net: FeatureNetwork, file: Path) -> Gaussian:
    mean, covariance = as_tensor(mu), as_tensor(sigma)
    if mean.shape != (net.width,) or covariance.shape != (net.width, net.width):
        raise ValueError(
            f"{file} has statistics of {list(mean.shape)} and {list(covariance.shape)}, and "
            f"{type(net).__name__} has {net.width} features: they are of another network"
        )
    mean, covariance = mean.double(), covariance.double()
    size = float(covariance.diagonal().abs().max())
    skew = float((covariance - covariance.T).abs().max())
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{file} has statistics that are not finite")
    if covariance.diagonal().min() < 0 or skew > 1e-3 * size:
        raise ValueError(f"sigma in {file} is no covariance: it is negative or not symmetric")
    return Gaussian(mean, (covariance + covariance.T) / 2)
