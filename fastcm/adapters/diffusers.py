"""A model of the diffusers library as a network ``net(x, t, cond=None) -> F``.

Works on the model object, by what its `forward` is called with; diffusers itself is not imported.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from fastcm.networks.protocol import check_output

_CONDITIONS = ("class_labels", "encoder_hidden_states")
_SAMPLES = ("sample", "hidden_states")


class DiffusersNetwork(nn.Module):
    """Serves a diffusers model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, ...

    What the model predicts, and on which path, is the `Parameterization` that the caller names:
    a DDPM model is ``Parameterization(VariancePreserving(...), "eps")``, whose network time is the
    index that such models are trained on; a flow model of diffusers is ``Parameterization()`` with
    ``time_scale=1000``.

    Args:
        model: called as ``model(x, timestep, class_labels=cond, return_dict=False)``, or with
            encoder_hidden_states in the place of class_labels where its `forward` has that.
        time_scale: timestep / network time.
        condition: the keyword that `cond` is passed as; None finds it.

    A model that also predicts a variance (twice the channels, as DiT) gives its first half.

    Raises:
        TypeError: model is not an nn.Module, or its `forward` takes no sample and timestep, or not
            the keyword `condition`.
    """

    def __init__(
        self, model: nn.Module, *, time_scale: float = 1.0, condition: str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        takes = inspect.signature(model.forward).parameters
        if "timestep" not in takes or not any(name in takes for name in _SAMPLES):
            raise TypeError(
                f"model must take one of {_SAMPLES} and timestep, as diffusers models do; "
                f"{type(model).__name__}.forward takes {list(takes)}"
            )
        if condition is not None and condition not in takes:
            raise TypeError(
                f"condition must be a keyword of {type(model).__name__}.forward, "
                f"{list(takes)}, got {condition!r}"
            )
        # a text-conditioned U-Net takes both: the prompt is what it is conditioned on
        found = [name for name in reversed(_CONDITIONS) if name in takes]
        self.model = model
        self.time_scale = time_scale
        self.condition = condition or (found[0] if found else None)
        self.sample = next(name for name in _SAMPLES if name in takes)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """F of the shape of x ``[B, C, H, W]``, at network times t ``[B]``.

        Args:
            cond: labels ``[B]``, or the embedded prompt ``[B, L, E]``; None for a model without.

        Raises:
            ValueError: cond for a model that takes none; an output of another shape.
        """
        if cond is not None and self.condition is None:
            raise ValueError(f"cond was given, but {type(self.model).__name__} takes no condition")
        keywords = {} if self.condition is None else {self.condition: cond}
        inputs = {self.sample: x, "timestep": self.time_scale * t, **keywords}
        F: Tensor = self.model(**inputs, return_dict=False)[0]
        if F.dim() > 1 and F.shape[1] == 2 * x.shape[1]:
            F = F[:, : x.shape[1]]
        return check_output("model", F, x)
