"""What stands for no condition is part of a run: a sampler of it needs no reminder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from fastcm.runs.checkpoint import list_checkpoints, load


class Prompted(nn.Module):
    """Conditioned on a dict of a prompt and a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.prompt = nn.Linear(3, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        extra, _ = cond["more"]
        out: Tensor = self.x(x) + self.prompt(cond["prompt"]).mean(1) + extra[:, None]
        return out


def cond(n: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "prompt": torch.randn(n, 2, 4, generator=g),
        "more": (torch.randn(n, generator=g), torch.ones(n, dtype=torch.bool)),
    }


NULL = {"prompt": torch.randn(2, 4), "more": (0.5, None)}


def trained(folder: Path, null: Any = NULL, **options: Any) -> fastcm.Trainer:
    torch.manual_seed(0)
    objective = fastcm.FlowMatching(condition_dropout=0.5, null_condition=null)
    data = fastcm.Dataset(torch.randn(16, 3), cond=cond(16))
    options = {"batch_size": 8, "progress": False, "compile": False, **options}
    return fastcm.Trainer(Prompted(), objective, data=data, directory=folder, **options)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b


def test_a_sampler_of_a_run_has_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path).fit(2)
    net = Prompted()
    sampler = fastcm.Sampler.from_run(tmp_path, net=net, method="ode", steps=3)
    assert same(sampler.null_condition, NULL)
    wanted = fastcm.Sampler(
        trainer.ema_network(0), fastcm.Linear(), method="ode", steps=3, null_condition=NULL
    )
    call: dict[str, Any] = {"cond": cond(4, 1), "guidance": 2.0}
    assert torch.equal(sampler((4, 3), **call), wanted((4, 3), **call))
    other = fastcm.Sampler.from_run(tmp_path, net=net, null_condition={"prompt": 0.0})
    assert other.null_condition == {"prompt": 0.0}


@pytest.mark.parametrize("null", [-1, 0.25, torch.tensor([0.5])])
def test_numbers_and_tensors_come_back_as_they_were(tmp_path: Path, null: Any) -> None:
    objective = fastcm.FlowMatching(condition_dropout=0.5, null_condition=null)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            out: Tensor = self.inner(x) + cond.reshape(-1, 1).to(x)
            return out

    data = fastcm.Dataset(torch.randn(16, 3), cond=torch.randn(16, 1))
    fastcm.Trainer(
        Net(), objective, data=data, batch_size=8, directory=tmp_path, progress=False
    ).fit(1)
    found = fastcm.Sampler.from_run(tmp_path, net=Net()).null_condition
    assert same(found, null) and type(found) is type(null)


def test_a_run_resumes_with_the_same_one_only(tmp_path: Path) -> None:
    trained(tmp_path).fit(2)
    again = trained(tmp_path).load()
    again.fit(1)
    assert "null" in load(list_checkpoints(tmp_path)[0]).groups
    with pytest.raises(ValueError, match="null_condition"):
        trained(tmp_path, {**NULL, "prompt": torch.zeros(2, 4)}).load()


def test_a_folder_to_hand_on_has_it(tmp_path: Path) -> None:
    trained(tmp_path / "run").fit(1)
    out = fastcm.save_pretrained(tmp_path / "run", tmp_path / "hub", net=Prompted())
    assert (out / "null_condition.safetensors").is_file()
    found = fastcm.from_pretrained(out, net=Prompted())
    assert same(found.null_condition, NULL)
