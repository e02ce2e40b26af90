"""Train on the latents of an autoencoder, and sample images.

python examples/latents.py VAE IMAGES OUT [iterations]

VAE is the folder of an autoencoder of diffusers, or of a pipeline with one; IMAGES a folder of
images. Without arguments a tiny random autoencoder and crops of two photographs stand in.
"""

import sys
import tempfile
from pathlib import Path

import torch

import fastcm
from fastcm.adapters.autoencoders import load
from fastcm.data.images import image_folder
from fastcm.evaluation.pictures import save_grid

SIZE, BATCH = 32, 64


def stand_in(folder: Path) -> list[str]:
    import diffusers

    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        scaling_factor=1.0,
    ).save_pretrained(folder / "vae")  # fmt: skip
    (folder / "images").mkdir()
    for i, image in enumerate(fastcm.data.photographs(64, size=SIZE).x):
        save_grid(image[None], folder / "images" / f"{i:03d}.png")
    return [str(folder / name) for name in ("vae", "images", "out")] + ["20"]


arguments = sys.argv[1:] or stand_in(Path(tempfile.mkdtemp()))
vae, images, out = (Path(argument) for argument in arguments[:3])
iterations = int(arguments[3]) if len(arguments) > 3 else 20_000

# what `fastcm encode` does for more images than fit into memory, and resumes
autoencoder = load(vae)
x = image_folder(images, size=SIZE).x
means = torch.cat([autoencoder.moments(batch)[0] for batch in x.split(BATCH)])

net = fastcm.networks.DiT(*means.shape[1:3], patch=2, width=64, depth=2, num_heads=4)
objective = fastcm.EasyConsistency()
trainer = fastcm.Trainer(net, objective, data=means, batch_size=BATCH, directory=out / "run")
trainer.fit(iterations)

sampler = fastcm.Sampler.from_run(out / "run", steps=2)
save_grid(autoencoder.decode(sampler(16, seed=0)).cpu(), out / "samples.png")
print(f"16 images in two steps: {out / 'samples.png'}")
