"""Edit coloured digits with a consistency model: fill in, colour, enlarge, interpolate.

python examples/editing.py [out.png]      needs the extra "demo"; two minutes on two free CPU cores
"""

import copy
import sys

import torch
from fastcm.pictures import save_rows

import fastcm
from fastcm import editing, ops, rng
from fastcm.data import digits, to_unit
from fastcm.sampling import multistep

# digits in one of three inks, [N, 3, 8, 8] in -1..1
grey = (to_unit(digits().x) + 1) / 2
inks = torch.tensor([[1.0, 0.45, 0.3], [0.35, 0.85, 0.4], [0.4, 0.6, 1.0]])
data = 2 * grey * inks[torch.arange(len(grey)) % 3, :, None, None] - 1
train, held_out = data[:-16], data[-16:]

# a flow, then its one-step distillation: see own_data.py
path = fastcm.Linear()
net = fastcm.networks.MLP(shape=(3, 8, 8), width=384, depth=4)
flow = fastcm.Trainer(net, fastcm.FlowMatching(), data=train, batch_size=256).fit(2000)
teacher = flow.ema_network(0)
student = copy.deepcopy(teacher).requires_grad_(True)
objective = fastcm.ConsistencyDistillation(teacher)
trainer = fastcm.Trainer(student, objective, data=train, batch_size=256).fit(1000)
model = trainer.ema_network(0).eval()

key = fastcm.NoiseKey(seed=0)
z = ops.noise(held_out.shape, key, stream=rng.SAMPLE)
times = [0.9, 0.75, 0.6, 0.45, 0.3, 0.15]
rows = {"digits": held_out}


@torch.no_grad()
def edit(start, constraint):
    """What the model makes of `start` while `constraint` holds x0 to what is known."""
    return multistep(model, path, z, key, times=times, start=start, constraint=constraint)


# inpainting: the right half is missing
known = torch.zeros(8, 8, dtype=torch.bool)
known[:, :4] = True
rows["left half"] = torch.where(known, held_out, 0.0)
rows["filled in"] = edit(rows["left half"], editing.inpainting(held_out, known))

# colourisation: only the grey is known
shade = editing.luminance(held_out)
rows["grey"] = shade.expand_as(held_out)
rows["coloured"] = edit(rows["grey"], editing.colourisation(shade))

# super-resolution: only the means of 2 x 2 blocks are known
low = editing.shrink(held_out, 2)
rows["4 x 4 pixels"] = editing.enlarge(low, 2)
rows["enlarged"] = edit(rows["4 x 4 pixels"], editing.super_resolution(low, 2))

# interpolation: between the noise of two samples, denoised in one step
weights = torch.linspace(0, 1, 16)
between = editing.interpolate(z[:1].expand_as(z), z[2:3].expand_as(z), weights)
with torch.no_grad():
    rows["interpolated"] = fastcm.sampling.one_step(model, path, between)

for name, kept in {
    "filled in": (rows["filled in"] - held_out)[..., known],
    "coloured": editing.luminance(rows["coloured"]) - shade,
    "enlarged": editing.shrink(rows["enlarged"], 2) - low,
}.items():
    print(f"{name:10s} keeps what is known to {kept.abs().max():.1e}")
print(save_rows(rows, sys.argv[1] if len(sys.argv) > 1 else "editing.png"))
