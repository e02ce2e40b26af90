"""Train a one-step generator on your own tensors: rectified flow, then its distillation.

python examples/own_data.py [file.npy]      [N, ...], float (about -1..1) or uint8 images
"""

import copy
import math
import sys

import numpy as np
import torch

import fastcm


def two_moons(n: int = 20_000) -> torch.Tensor:
    angle = math.pi * torch.rand(n)
    side = torch.randint(2, (n,)) * 2 - 1
    moon = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], dim=1)
    return 0.8 * moon + 0.05 * torch.randn(n, 2)


data = torch.from_numpy(np.load(sys.argv[1])) if len(sys.argv) > 1 else two_moons()
shape, path = tuple(data.shape[1:]), fastcm.Linear()

# any nn.Module with the call net(x, t, cond=None) -> F, F of the shape of x, does
net = fastcm.networks.MLP(shape=shape, width=128, depth=3)
flow = fastcm.Trainer(net, fastcm.FlowMatching(), data=data, batch_size=512).fit(1000)
teacher = flow.ema_network(0)
student = copy.deepcopy(teacher).requires_grad_(True)
objective = fastcm.ConsistencyDistillation(teacher)
distilled = fastcm.Trainer(student, objective, data=data, batch_size=512).fit(1000).ema_network(0)

for name, sampler in {
    "flow, 50 steps": fastcm.Sampler(teacher, path, steps=50, method="ode", shape=shape),
    "flow, 1 step": fastcm.Sampler(teacher, path, steps=1, method="ode", shape=shape),
    "distilled, 1 step": fastcm.Sampler(distilled, path, steps=1, shape=shape),
}.items():
    distance = fastcm.evaluation.sliced_wasserstein(sampler(2000, seed=0), data[:2000])
    print(f"{name:18s} sliced Wasserstein distance to the data {distance:.4f}")
