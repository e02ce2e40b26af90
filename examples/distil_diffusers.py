"""Distil a model of diffusers to a few steps, and write it back as a pipeline.

python examples/distil_diffusers.py TEACHER DATA OUT [iterations]

TEACHER is the folder of a pipeline: SD3, PixArt, Sana, Stable Diffusion, ... DATA is a safetensors
file of rows: "latents", as the network sees them, and embedded prompts by the keywords of the model
("encoder_hidden_states", "pooled_projections", ...); the same of the empty prompt, one row each, as
"null.encoder_hidden_states", ... Without arguments a tiny random SD3 stands in.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fastcm
from fastcm.adapters.diffusers import load, save

STEPS, GUIDANCE = 4, 4.0


def stand_in(folder: Path) -> list[str]:
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"transformer": model, "scheduler": scheduler}
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    for name, part in parts.items():
        part.save_pretrained(folder / "teacher" / name)
    index["_class_name"] = "StableDiffusion3Pipeline"
    (folder / "teacher" / "model_index.json").write_text(json.dumps(index))
    n, prompt, pooled = 64, torch.zeros(1, 5, 16), torch.zeros(1, 8)
    rows = {"encoder_hidden_states": torch.randn(n, 5, 16), "pooled_projections": torch.randn(n, 8)}
    null = {"null.encoder_hidden_states": prompt, "null.pooled_projections": pooled}
    save_file({"latents": torch.randn(n, 4, 8, 8), **rows, **null}, folder / "data.safetensors")
    return [str(folder / name) for name in ("teacher", "data.safetensors", "student")] + ["20"]


arguments = sys.argv[1:] or stand_in(Path(tempfile.mkdtemp()))
folder, data, out = (Path(argument) for argument in arguments[:3])
iterations = int(arguments[3]) if len(arguments) > 3 else 10_000

rows = load_file(data)
latents = rows.pop("latents")
nulls = {key: rows.pop(key)[0] for key in list(rows) if key.startswith("null.")}
null = {key: nulls.get(f"null.{key}") for key in rows}  # None: stays as it is

teacher = load(folder, shape=latents.shape[1:])
p, grid = teacher.parameterization, teacher.grid()
solver = "euler" if isinstance(p.path, fastcm.Linear) else "ddim"
objective = fastcm.ConsistencyDistillation(
    teacher.network, p, guidance=GUIDANCE, null_condition=null, solver=solver, grid=grid,
    discretization=1000, skip=20, target_average=fastcm.EMA(0.95),
)  # fmt: skip
student = copy.deepcopy(teacher.network).requires_grad_(True)
run = out.with_name(f"{out.name}-run")
trainer = fastcm.Trainer(
    student, objective, fastcm.AdamW(student.parameters(), lr=1e-5), batch_size=16,
    data=fastcm.Dataset(latents, cond=rows), directory=run,
)  # fmt: skip
trainer.fit(iterations)
saved = save(run, out, like=folder, steps=STEPS, grid=grid)
call = ", ".join(f"{key}={value}" for key, value in {**saved.call, "guidance_scale": 1.0}.items())
print(f"DiffusionPipeline.from_pretrained({str(saved.path)!r})(prompt, {call})")
