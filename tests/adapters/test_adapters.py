"""The adapter for diffusers models without diffusers: by how `forward` is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastcm.adapters.diffusers import DiffusersNetwork


class Labelled(nn.Module):
    """As UNet2DModel: class_labels, a tuple, with twice the channels if it learns a variance."""

    def __init__(self, copies: int = 1) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, sample: Tensor, timestep: Tensor, class_labels=None, return_dict=True):
        assert not return_dict
        shift = 0 if class_labels is None else class_labels[:, None, None, None]
        F = sample + timestep[:, None, None, None] + shift
        return (torch.cat([F, *[0 * F] * (self.copies - 1)], dim=1),)


class Prompted(nn.Module):
    """As UNet2DConditionModel: a prompt, and labels that are not what it is conditioned on."""

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, class_labels=None, return_dict=True
    ):
        assert class_labels is None
        return (hidden_states + encoder_hidden_states.mean((1, 2))[:, None, None, None],)


def test_time_labels_and_the_half_without_variance():
    x, t, labels = torch.randn(3, 2, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    wanted = x + 1000 * t[:, None, None, None]
    for copies in (1, 2):
        net = DiffusersNetwork(Labelled(copies), time_scale=1000.0)
        assert torch.equal(net(x, t), wanted)
        assert torch.equal(net(x, t, labels), wanted + labels[:, None, None, None])
    with pytest.raises(ValueError, match="model must return a tensor of the shape"):
        DiffusersNetwork(Labelled(3))(x, t)


def test_a_prompt_is_cond():
    x, t, prompt = torch.randn(3, 2, 4, 4), torch.rand(3), torch.randn(3, 7, 5)
    got = DiffusersNetwork(Prompted())(x, t, prompt)
    assert torch.equal(got, x + prompt.mean((1, 2))[:, None, None, None])


def test_models_that_do_not_fit_are_refused():
    class Plain(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True):
            return (sample,)

    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        DiffusersNetwork(lambda sample, timestep: sample)
    with pytest.raises(TypeError, match=r"Linear.forward takes \['input'\]"):
        DiffusersNetwork(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="condition must be a keyword"):
        DiffusersNetwork(Plain(), condition="class_labels")
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(DiffusersNetwork(Plain())(x, torch.rand(2)), x)
    with pytest.raises(ValueError, match="takes no condition"):
        DiffusersNetwork(Plain())(x, torch.rand(2), torch.zeros(2))


def test_importing_the_adapter_does_not_import_diffusers():
    code = "import sys, fastcm.adapters.diffusers; print('diffusers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
