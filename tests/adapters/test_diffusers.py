"""The diffusers library as an independent oracle of the samplers, and its models as networks.

Both sides run one network on one set of noise tensors; its timesteps are mapped by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcm import Sampler, ops, rng, sampling
from fastcm.adapters.diffusers import DiffusersNetwork
from fastcm.networks import GaussianMixture
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey

diffusers = pytest.importorskip("diffusers")

B, SHAPE = 6, (3, 4, 4)


def network(p: Parameterization) -> GaussianMixture:
    return GaussianMixture(0.7 * torch.randn(5, *SHAPE), 0.3, None, p)


def noise(j: int = 0) -> Tensor:
    return ops.noise((B, *SHAPE), NoiseKey(11), stream=rng.SAMPLE + j)


def told(t) -> Tensor:
    return torch.full((B,), float(t))


@pytest.fixture
def same_noise(monkeypatch):
    """Each draw of a scheduler's module is the noise of the next evaluation of ours."""

    def install(scheduler) -> list[int]:
        drawn: list[int] = []

        def randn_tensor(shape, **settings) -> Tensor:
            drawn.append(len(drawn) + 1)
            return noise(drawn[-1])

        module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        return drawn

    return install


def close(got: Tensor, wanted: Tensor) -> None:
    difference = (got - wanted).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert wanted.std() > 0.1 and difference < 1e-5


def test_euler_on_the_linear_path_is_flow_match_euler():
    net, times = network(Parameterization()), [1.0, 0.83, 0.6, 0.41, 0.2]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=times)
    x = noise()
    for timestep in scheduler.timesteps:
        F = net(x, told(timestep / 1000))
        x = scheduler.step(F, timestep, x).prev_sample
    close(sampling.ode(net, Linear(), noise(), times=times), x)


def test_multistep_on_the_linear_path_is_flow_match_lcm(same_noise):
    net, times = network(Parameterization()), [1.0, 0.75, 0.5, 0.25]
    scheduler = diffusers.FlowMatchLCMScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=times)
    drawn = same_noise(scheduler)
    x = noise()
    for timestep in scheduler.timesteps:
        F = net(x, told(timestep / 1000))
        x = scheduler.step(F, timestep, x).prev_sample
    assert len(drawn) == 4  # the last one times zero
    close(sampling.multistep(net, Linear(), noise(), NoiseKey(11), times=times), x)


def test_multistep_on_the_exploding_path_is_cm_stochastic_iterative(same_noise):
    p = Parameterization(VarianceExploding())
    net = network(p)
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(timesteps=[25, 14, 6, 0])
    same_noise(scheduler)
    x = scheduler.init_noise_sigma * noise()
    for timestep in scheduler.timesteps:  # 250 ln sigma
        F = net(scheduler.scale_model_input(x, timestep).float(), told(timestep))
        x = scheduler.step(F, timestep, x).prev_sample
    times = scheduler.sigmas[:-1].tolist()
    assert times[0] == 80.0 and len(times) == 4
    close(sampling.multistep(net, p, noise(), NoiseKey(11), times=times), x)


DDPM = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_solvers_on_the_preserving_path_are_those_of_ddpm_models(solver, prediction, theirs):
    """Index i of a schedule is our time i + 1."""
    settings = {**DDPM, "beta_schedule": "scaled_linear", "prediction_type": theirs}
    indices = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    if solver == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **settings, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(10)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=indices)
    assert scheduler.timesteps.tolist() == indices
    p = Parameterization(VariancePreserving(), prediction)
    net = network(p)
    times = [i + 1.0 for i in indices]
    x = p.path.at(torch.tensor(times[:1])).sigma.float() * noise()
    for timestep in scheduler.timesteps:
        x = scheduler.step(net(x, told(timestep)), timestep, x).prev_sample
    close(sampling.ode(net, p, noise(), times=times, solver=solver), x)


def unet(**settings):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **settings,
    ).eval()


def dit(out_channels: int = 2):
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=out_channels,
        num_layers=2,
        sample_size=8,
        norm_num_groups=1,
        num_embeds_ada_norm=10,
    ).eval()


@torch.no_grad()
def test_a_unet_serves_as_a_network():
    model = unet()
    net = DiffusersNetwork(model, time_scale=1000.0)
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(net(x, t), model(x, 1000 * t).sample)
    got = Sampler(net, Linear(), steps=2, shape=(2, 8, 8))(3, seed=1)
    key = NoiseKey(1)
    z = [ops.noise(x.shape, key, stream=rng.SAMPLE + j) for j in range(2)]
    x0 = z[0] - model(z[0], told(1000)[:3]).sample
    x_half = 0.5 * x0 + 0.5 * z[1]
    wanted = x_half - 0.5 * model(x_half, told(500)[:3]).sample
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="takes no condition"):
        net(x, t, torch.tensor([0, 1, 2]))


@torch.no_grad()
def test_a_unet_of_ddpm_is_told_its_index():
    model = unet(num_class_embeds=4)
    p = Parameterization(VariancePreserving(), "eps")
    x, labels = torch.randn(3, 2, 8, 8), torch.tensor([0, 3, 1])
    got = sampling.predict(
        DiffusersNetwork(model), p, x, torch.full((3,), 42.0, dtype=torch.float64), labels
    )
    assert torch.equal(got, model(x, torch.tensor(41), labels).sample)


@torch.no_grad()
@pytest.mark.parametrize("out_channels", [2, 4])
def test_a_dit_serves_as_a_network_with_guidance(out_channels):
    """With and without a learned variance; its null label is the number of classes."""
    model = dit(out_channels)
    net = DiffusersNetwork(model, time_scale=1000.0)
    z, labels, t = torch.randn(3, 2, 8, 8), torch.tensor([0, 9, 5]), torch.full((3,), 1000.0)
    F_c, F_u = (
        model(z, t, class_labels=c).sample[:, :2] for c in (labels, torch.full_like(labels, 10))
    )
    assert (F_c - F_u).abs().max() > 1e-3
    got = sampling.one_step(net, Linear(), z, cond=labels, guidance=3.0, null_condition=10)
    torch.testing.assert_close(got, z - (F_u + 3.0 * (F_c - F_u)), rtol=1e-4, atol=1e-4)
