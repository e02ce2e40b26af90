"""Distil a Stable Diffusion to four steps with LoRA layers alone: an LCM as one small file.

python examples/lora_lcm.py TEACHER DATA OUT [iterations]

TEACHER is the folder of a Stable Diffusion pipeline. DATA is a safetensors file: "latents", as the
U-Net sees them, the embedded prompt of each, "prompts" [N, L, E], and of the empty prompt, "null"
[L, E]. OUT receives the layers and the run. Without arguments a tiny random pipeline stands in.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import fastcm
from fastcm.adapters import lora
from fastcm.adapters.diffusers import load

GUIDANCE = 7.5
LAYERS = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut"
LAYERS += " downsamplers.0.conv upsamplers.0.conv time_emb_proj"
TIMES = [1000.0, 760.0, 500.0, 260.0]  # where diffusers' LCMScheduler evaluates in four steps


def stand_in(folder: Path) -> list[str]:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=12,
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.PNDMScheduler(**betas, prediction_type="epsilon", skip_prk_steps=True)
    parts = {"unet": model, "scheduler": scheduler}
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    for name, part in parts.items():
        part.save_pretrained(folder / "teacher" / name)
    index["_class_name"] = "StableDiffusionPipeline"
    (folder / "teacher" / "model_index.json").write_text(json.dumps(index))
    made = {"latents": torch.randn(64, 4, 8, 8), "prompts": torch.randn(64, 5, 12)}
    save_file({**made, "null": torch.zeros(5, 12)}, folder / "data.safetensors")
    return [str(folder / name) for name in ("teacher", "data.safetensors", "lcm")] + ["5"]


arguments = sys.argv[1:] or stand_in(Path(tempfile.mkdtemp()))
folder, data, out = (Path(argument) for argument in arguments[:3])
iterations = int(arguments[3]) if len(arguments) > 3 else 10_000

rows = load_file(data)
# of what is predicted the config of Stable Diffusion 1.5 is silent
teacher = load(folder, shape=rows["latents"].shape[1:], prediction="eps")
student, p = teacher.network, teacher.parameterization  # frozen, as it is loaded
student.model.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=LAYERS.split()))
objective = fastcm.ConsistencyDistillation(
    lora.WithoutAdapters(student), p, solver="ddim", discretization=1000, skip=20,
    guidance=GUIDANCE, null_condition={"encoder_hidden_states": rows["null"]},
)  # fmt: skip
optimizer = fastcm.AdamW([q for q in student.parameters() if q.requires_grad], lr=1e-4)
trainer = fastcm.Trainer(
    student, objective, optimizer, batch_size=16, directory=out / "run", save_frozen=False,
    data=fastcm.Dataset(rows["latents"], cond={"encoder_hidden_states": rows["prompts"]}),
)  # fmt: skip
average = trainer.fit(iterations).ema_network()
file = lora.save_lora(average.model, out, prefix="unet")

some = {"encoder_hidden_states": rows["prompts"][:2]}
x = fastcm.Sampler(average, p, times=TIMES, shape=teacher.shape)(2, seed=0, cond=some)
print(f"latents of deviation {x.std():.2f} in four steps; in diffusers:")
print(f"pipeline.load_lora_weights({str(out)!r}, weight_name={file.name!r})")
print("pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)")
print("pipeline(prompt, num_inference_steps=4, guidance_scale=1.0)")
