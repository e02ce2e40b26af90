"""Tiny random models of diffusers, in folders as its pipelines have them, and how those call them.

Imported by tests that have diffusers; the classes are those of the real checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

B, L, E = 2, 5, 12
"""Rows, tokens of a prompt and their width."""


@dataclass(frozen=True)
class Tiny:
    """A model with its scheduler.

    called: F of (model, x, timestep of the scheduler, condition), as in the pipeline's loop.
    null: of the condition, for guidance.
    """

    pipeline: str
    make: Callable[[], nn.Module]
    scheduler: Callable[[], Any]
    shape: tuple[int, ...]
    cond: Callable[[int], Any]
    called: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
    null: Any = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def component(self) -> str:
        return "unet" if "UNet" in type(self.model()).__name__ else "transformer"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        for p in model.parameters():  # what starts at zero would hide what it multiplies
            if p.dim() > 1 or not p.any():
                nn.init.normal_(p, std=0.1)
        return model

    def write(self, folder: Path) -> Path:
        """A pipeline's folder, as `save_pretrained` leaves it."""
        model, scheduler = self.model(), self.scheduler()
        model.save_pretrained(folder / self.component)
        scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": self.pipeline,
            "_diffusers_version": diffusers.__version__,
            self.component: ["diffusers", type(model).__name__],
            "scheduler": ["diffusers", type(scheduler).__name__],
            **self.more,
        }
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder


def prompt(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, L, E, generator=torch.Generator().manual_seed(seed))


def pooled(n: int, width: int = 6) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2))


def mask(n: int) -> Tensor:
    return (torch.arange(L) < L - 2).float().repeat(n, 1)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 10


def told(t: Tensor, n: int = B) -> Tensor:
    return t.expand(n)


def unet(channels: int = 2, **settings: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **settings,
    )  # fmt: skip


def prompted_unet(**settings: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=E,
        **settings,
    )  # fmt: skip


def sdxl_unet(**settings: Any) -> nn.Module:
    return prompted_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 6 * 4,
        **settings,
    )


def pixart(**settings: Any) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=8, caption_channels=E, norm_num_groups=1, **settings,
    )  # fmt: skip


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, norm_num_groups=1, num_embeds_ada_norm=10,
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=E, caption_projection_dim=16,
        pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def flux(guidance_embeds: bool) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=E, pooled_projection_dim=6,
        guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sana(**settings: Any) -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=E, sample_size=8, **settings,
    )  # fmt: skip


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=E,
        freq_dim=8, ffn_dim=16, num_layers=2,
    )  # fmt: skip


# the loops of the pipelines, with t as the scheduler has it, 0-d


def call_unet(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return model(x, t, **(cond or {})).sample


def call_prompted(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return model(x, t, return_dict=False, **cond)[0]


def call_lcm(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The pipeline's get_guidance_scale_embedding is this one of 1000 times the weight."""
    w = diffusers.models.embeddings.get_timestep_embedding(
        1000.0 * (cond["guidance"] - 1), model.config.time_cond_proj_dim, downscale_freq_shift=1
    )
    return model(
        x, t, encoder_hidden_states=cond["encoder_hidden_states"], timestep_cond=w,
        return_dict=False,
    )[0]  # fmt: skip


def call_expanded(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """PixArt, DiT, SD3, Wan; PixArt and DiT predict a variance, too."""
    out = model(hidden_states=x, timestep=told(t, len(x)), return_dict=False, **cond)[0]
    return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


def call_flux(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    n, C, H, W = x.shape
    packed = x.view(n, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.zeros(H // 2, W // 2, 3)
    ids[..., 1] += torch.arange(H // 2)[:, None]
    ids[..., 2] += torch.arange(W // 2)[None, :]
    out = model(
        hidden_states=packed.reshape(n, H * W // 4, 4 * C), timestep=told(t, n) / 1000,
        img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(L, 3), return_dict=False, **cond,
    )[0]  # fmt: skip
    return out.view(n, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, C, H, W)


def call_sana(model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    timestep = told(t, len(x)) * model.config.timestep_scale
    cond = dict(cond)
    if "guidance" in cond:
        cond["guidance"] = cond["guidance"] * model.config.guidance_embeds_scale
    return model(x, timestep=timestep, return_dict=False, **cond)[0]


def ddpm(name: str = "DDPMScheduler", **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**settings)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
TEXT = {"encoder_hidden_states": 0.0}
MASKED = {**TEXT, "encoder_attention_mask": None}
POOLED = {**TEXT, "pooled_projections": 0.0}


def with_prompt(n: int) -> dict[str, Any]:
    return {"encoder_hidden_states": prompt(n)}


def with_mask(n: int) -> dict[str, Any]:
    return {**with_prompt(n), "encoder_attention_mask": mask(n)}


def with_pooled(n: int) -> dict[str, Any]:
    return {**with_prompt(n), "pooled_projections": pooled(n)}


def with_weight(n: int) -> Tensor:
    return torch.linspace(1.5, 4.0, n)


MODELS: dict[str, Tiny] = {
    "unet": Tiny(
        "DDPMPipeline", unet, ddpm(), (2, 8, 8), lambda n: None, call_unet
    ),
    "labelled": Tiny(
        "DDPMPipeline", lambda: unet(num_class_embeds=10), ddpm(prediction_type="v_prediction"),
        (2, 8, 8), lambda n: {"class_labels": labels(n)}, call_unet, {"class_labels": 3},
    ),
    "sd": Tiny(
        "StableDiffusionPipeline", prompted_unet, ddpm("PNDMScheduler", **SD),
        (4, 8, 8), with_prompt, call_prompted, TEXT,
    ),
    "sdxl": Tiny(
        "StableDiffusionXLPipeline", sdxl_unet, ddpm("EulerDiscreteScheduler", **SD), (4, 8, 8),
        lambda n: {
            **with_prompt(n),
            "added_cond_kwargs": {
                "text_embeds": pooled(n), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * n),
            },
        },
        call_prompted, {**TEXT, "added_cond_kwargs": {"text_embeds": 0.0, "time_ids": None}},
        {"force_zeros_for_empty_prompt": True},
    ),
    "lcm": Tiny(
        "LatentConsistencyModelPipeline", lambda: prompted_unet(time_cond_proj_dim=16),
        ddpm("LCMScheduler", **SD), (4, 8, 8),
        lambda n: {**with_prompt(n), "guidance": with_weight(n)}, call_lcm,
        {**TEXT, "guidance": None},
    ),
    "pixart": Tiny(
        "PixArtSigmaPipeline", pixart, ddpm("DPMSolverMultistepScheduler", **LINEAR), (4, 8, 8),
        with_mask, call_expanded, MASKED,
    ),
    "pixart-sizes": Tiny(
        "PixArtAlphaPipeline", lambda: pixart(use_additional_conditions=True),
        ddpm("DPMSolverMultistepScheduler", **LINEAR), (4, 8, 8),
        lambda n: {
            **with_mask(n),
            "added_cond_kwargs": {
                "resolution": torch.tensor([[64.0, 64.0]] * n),
                "aspect_ratio": torch.tensor([[1.0]] * n),
            },
        },
        call_expanded,
        {**MASKED, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "dit": Tiny(
        "DiTPipeline", dit, ddpm("DDIMScheduler", **LINEAR), (4, 8, 8),
        lambda n: {"class_labels": labels(n)}, call_expanded, {"class_labels": 10},
    ),
    "sd3": Tiny(
        "StableDiffusion3Pipeline", sd3, ddpm("FlowMatchEulerDiscreteScheduler", shift=3.0),
        (4, 8, 8), with_pooled, call_expanded, POOLED,
    ),
    "flux": Tiny(
        "FluxPipeline", lambda: flux(True),
        ddpm("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True), (4, 8, 8),
        lambda n: {**with_pooled(n), "guidance": with_weight(n)}, call_flux,
        {**POOLED, "guidance": None},
    ),
    "flux-plain": Tiny(
        "FluxPipeline", lambda: flux(False), ddpm("FlowMatchEulerDiscreteScheduler", shift=1.0),
        (4, 8, 8), with_pooled, call_flux, POOLED,
    ),
    "sana": Tiny(
        "SanaPipeline", lambda: sana(timestep_scale=0.5),
        ddpm("DPMSolverMultistepScheduler", flow_shift=3.0, **FLOW), (4, 8, 8), with_mask,
        call_sana, MASKED,
    ),
    "sana-guided": Tiny(
        "SanaPipeline", lambda: sana(guidance_embeds=True),
        ddpm("FlowMatchEulerDiscreteScheduler", shift=3.0), (4, 8, 8),
        lambda n: {**with_mask(n), "guidance": with_weight(n)}, call_sana,
        {**MASKED, "guidance": None},
    ),
    "wan": Tiny(
        "WanPipeline", wan, ddpm("UniPCMultistepScheduler", flow_shift=5.0, **FLOW),
        (4, 3, 8, 8), with_prompt, call_expanded, TEXT,
    ),
}  # fmt: skip
