"""A model of the diffusers library as a network ``net(x, t, cond=None) -> F``.

Works on the model object, by its config or by what its `forward` is called with; diffusers itself
is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastcm.adapters.families import FAMILIES, Call, call_of
from fastcm.networks.conditions import Condition
from fastcm.networks.protocol import check_output

_CONDITIONS = ("class_labels", "encoder_hidden_states")
_SAMPLES = ("sample", "hidden_states")


class DiffusersNetwork(nn.Module):
    """Serves a diffusers model: UNet2DModel, SD3Transformer2DModel, FluxTransformer2DModel, ...

    What the model predicts, and on which path, is the `Parameterization` that the caller names (or
    `load` reads): a DDPM model is ``Parameterization(VariancePreserving(...), "eps")``, whose
    network time is the index that such models are trained on; a flow model of diffusers is
    ``Parameterization()`` with ``time_scale=1000``, Flux with 1.

    Args:
        model: of one of `FAMILIES`, called as its pipelines do; any other is called as
            ``model(x, timestep, **cond, return_dict=False)``.
        time_scale: timestep of the model / network time.
        condition: the keyword that a `cond` which is a tensor is passed as; None finds it.

    A model that also predicts a variance (twice the channels, as DiT) gives its first half. One
    that drops labels in training, as DiT, no longer does: that is `condition_dropout`'s, and of a
    distillation student and target have to see the same.

    Raises:
        TypeError: model is not an nn.Module, or its `forward` takes no sample and timestep, or not
            the keyword `condition`.
        ValueError: a config that asks for more than x, t and a condition; see `families.call_of`.
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
        self.model = model
        self.time_scale = time_scale
        self.name = type(model).__name__
        config = getattr(model, "config", None)
        if self.name in FAMILIES and isinstance(config, Mapping):
            self.call = call_of(self.name, config)
            found = self.call.needed[:1] if len(self.call.needed) == 1 else []
        else:
            self.call = _by_signature(list(takes))
            # where a model takes both, the prompt is what it is conditioned on
            found = [name for name in reversed(_CONDITIONS) if name in takes]
        self.condition = condition or (found[0] if found else None)
        for module in model.modules():
            if hasattr(module, "token_drop") and hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """F of the shape of x ``[B, C, H, W]``, of a video ``[B, C, T, H, W]``, at times t ``[B]``.

        Args:
            cond: a dict by the keywords of the model's `forward`, ``self.call.keys``; a tensor for
                a model that needs one alone: labels ``[B]``, or the embedded prompt ``[B, L, E]``;
                None for a model without.

        Raises:
            ValueError, TypeError: keys that are missing or unknown, x of a shape that the model
                does not take, an output of another shape.
        """
        self.check_sample(x.shape[1:])
        inputs = self.call.inputs(x, self._keywords(cond))
        sample = x if self.call.packed is None else self.call.packed(x)
        times = {"timestep": self.time_scale * t}
        out = self.model(**{self.call.sample: sample}, **times, **inputs, return_dict=False)[0]
        return check_output("model", self.call.output(out, x), x)

    def check_sample(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the model takes samples of this shape ``[C, ...]``."""
        call = self.call
        if call.patch is None:
            return
        sizes = shape[1:]
        if len(sizes) != len(call.patch) or shape[0] != call.channels:
            axes = "[B, {}, H, W]" if len(call.patch) == 2 else "[B, {}, T, H, W]"
            raise ValueError(
                f"x must be {axes.format(call.channels)} for this {self.name}, got "
                f"[B, {', '.join(map(str, shape))}]"
            )
        if any(n % p for n, p in zip(sizes, call.patch)):
            raise ValueError(
                f"the sizes of x must be multiples of {list(call.patch)} for this {self.name}, "
                f"got {list(sizes)}"
            )

    def _keywords(self, cond: Condition | None) -> dict[str, Any]:
        keys = self.call.keys
        if cond is None:
            cond = {}
        elif isinstance(cond, Tensor) and self.condition is not None:
            cond = {self.condition: cond}
        elif not keys:
            raise ValueError(f"cond was given, but this {self.name} takes no condition")
        if not isinstance(cond, Mapping):
            raise TypeError(
                f"cond must be a dict of {_listed(keys)} for this {self.name}, "
                f"got {type(cond).__name__}"
            )
        _check_keys(self.name, "cond", cond, keys)
        return dict(cond)


def _by_signature(takes: list[str]) -> Call:
    """Of a class that is not known: its keywords, none of them needed."""
    sample = next(name for name in _SAMPLES if name in takes)
    others = {sample, "timestep", "return_dict"}
    return Call(sample=sample, keys={name: False for name in takes if name not in others})


def _check_keys(model: str, name: str, cond: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Raise ValueError unless cond holds what is needed and nothing else."""
    missing = [key for key, needed in keys.items() if needed and key not in cond]
    unknown = [key for key in cond if key not in keys]
    if missing or unknown:
        problems = [f"{what} {which}" for what, which in
                    (("lacks", missing), ("has unknown", unknown)) if which]  # fmt: skip
        raise ValueError(
            f"{name} {' and '.join(problems)}: this {model} takes {_listed(keys)} in it"
        )
    for key, nested in keys.items():
        if isinstance(nested, Mapping) and key in cond:
            if not isinstance(cond[key], Mapping):
                raise TypeError(
                    f"{name}[{key!r}] must be a dict of {_listed(nested)} for this {model}, "
                    f"got {type(cond[key]).__name__}"
                )
            _check_keys(model, f"{name}[{key!r}]", cond[key], nested)


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key!r}" if needed else f"{key!r} (optional)" for key, needed in keys.items()
    )
