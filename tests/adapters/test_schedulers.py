"""Schedulers of diffusers take the steps of fastcm.Sampler, on one set of noise tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from their_noise import SEED, close, noise

import fastcm
from fastcm import sampling
from fastcm.networks import GaussianMixture
from fastcm.schedules import KarrasGrid, ShiftedGrid

diffusers = pytest.importorskip("diffusers")

from fastcm.adapters.schedulers import plan_of  # noqa: E402

B = 6
P = fastcm.Parameterization
VP = fastcm.VariancePreserving()
VE = fastcm.VarianceExploding()
LCM, EULER = "LCMScheduler", "FlowMatchEulerDiscreteScheduler"
FLOW_LCM, CM = "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler"


def multistep(**settings: Any) -> dict[str, Any]:
    return {"method": "multistep", **settings}


def ode(solver: str, **settings: Any) -> dict[str, Any]:
    return {"method": "ode", "solver": solver, **settings}


PLANS = [
    (P(), multistep(steps=1), None, {"num_inference_steps": 1}),
    (P(), multistep(steps=4), None, {"num_inference_steps": 4}),
    (P(), multistep(steps=3), FLOW_LCM, {"num_inference_steps": 3}),
    (P(), multistep(steps=4, grid=ShiftedGrid()), FLOW_LCM, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    (P(), multistep(times=[1.0, 0.83, 0.2]), None, {"sigmas": [1.0, 0.83, 0.2]}),
    (P(), multistep(times=[0.9, 0.2]), FLOW_LCM, {"sigmas": [0.9, 0.2]}),
    (P(), ode("euler", steps=6), None, {"num_inference_steps": 6}),
    (P(), ode("euler", steps=5, grid=ShiftedGrid(1.8)), EULER,
     {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]}),
    (P(), ode("ddim", times=[1.0, 0.9, 0.3]), None, {"sigmas": [1.0, 0.9, 0.3]}),
    (P(VP, "eps"), multistep(steps=1), None, {"num_inference_steps": 1}),
    (P(VP, "eps"), multistep(steps=4), None, {"num_inference_steps": 4}),
    (P(VP, "v"), multistep(steps=8), LCM, {"num_inference_steps": 8}),
    (P(VP, "x0"), multistep(times=[1000, 777, 500, 20]), LCM, {"timesteps": [999, 776, 499, 19]}),
    (P(VP, "eps"), ode("ddim", steps=10), None, {"num_inference_steps": 10}),
    (P(VP, "v"), ode("dpmpp_2m", steps=10), None, {"num_inference_steps": 10}),
    (P(VP, "eps"), ode("dpmpp_2m", times=[1000, 700, 300, 50]), None,
     {"timesteps": [999, 699, 299, 49]}),
    (P(VE), multistep(steps=1), None, {"num_inference_steps": 1}),
    (P(VE), multistep(steps=3, grid=KarrasGrid()), None, {"num_inference_steps": 3}),
    (P(fastcm.VarianceExploding(0.01, 20.0, 1.0)), multistep(steps=4), CM,
     {"num_inference_steps": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("p", "settings", "name", "call"), PLANS, ids=str)
def test_the_scheduler_takes_the_steps_of_the_sampler(p, settings, name, call, our_noise, tmp_path):
    shape = (3, 4, 4)
    net = GaussianMixture(0.7 * torch.randn(5, *shape), 0.3, None, p)
    sampler = fastcm.Sampler(net, p, shape=shape, **settings)
    plan = plan_of(sampler, timesteps=1000, name=name)
    assert plan.call == call and name in (None, plan.name)
    kind = getattr(diffusers, plan.name)
    kind(**plan.config).save_pretrained(tmp_path)
    scheduler = kind.from_pretrained(tmp_path)  # nothing is lost in the file
    scheduler.set_timesteps(**plan.call)
    drawn = our_noise(scheduler)
    unit = 1000 if isinstance(p.path, fastcm.Linear) else 1
    flow = unit == 1000
    x = (1.0 if flow else scheduler.init_noise_sigma) * plan.noise_scale * noise((B, *shape))
    for t in scheduler.timesteps:
        inputs = x if flow else scheduler.scale_model_input(x, t)
        F = net(inputs.float(), torch.full((B,), float(t) / unit))
        x = scheduler.step(F, t, x).prev_sample
    assert len(drawn) >= (len(sampler.times) - 1 if settings["method"] == "multistep" else 0)
    close(x, sampler(B, seed=SEED))


def test_what_no_scheduler_does_is_refused_by_name():
    net = torch.nn.Identity()
    net.forward = lambda x, t, cond=None, s=None: x

    def refused(match: str, p: Any, name: str | None = None, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            plan_of(fastcm.Sampler(net, p, **settings), timesteps=1000, name=name)

    refused("TCDScheduler ends at index 0", P(VP), "TCDScheduler", steps=4)
    refused("whole times >= 2 of Variance.*steps that divide 1000", P(VP), steps=3)
    refused("whole times >= 2", P(VP), times=[1000.0, 1.0])
    refused("steps of one length", P(VP), **ode("ddim", times=[1000, 400]))
    refused("times of KarrasGrid", P(VE), times=[80.0, 3.0])
    refused(
        "'cm' with c_noise_scale = 250", P(fastcm.VarianceExploding(c_noise_scale=1.0)), steps=2
    )
    refused("'cm' with c_noise_scale = 250", P(VE, "edm"), steps=2)
    refused("the network predicts 'x0', not 'v'", P(fastcm.Linear(), "x0"), steps=2)
    refused("on TrigFlow by 'multistep'", fastcm.TrigFlow(), steps=2)
    refused("on Linear by 'heun'", P(), **ode("heun", steps=2))
    refused("on Linear by 'flow-map'", P(), method="flow-map", steps=2)
    refused("churn: no scheduler", P(), **ode("euler", steps=2, churn=sampling.Churn(1.0)))
    refused(r"scheduler must be one of \['FlowMatchEuler.*got 'LCMScheduler'", P(), LCM, steps=2)
