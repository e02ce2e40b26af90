"""Train by accelerate: your loop, its wrappers, and fastcm's objective, noise and optimizer.

python examples/with_accelerate.py [steps]       alone, or by accelerate launch, or torchrun
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

import fastcm

BATCH = 64  # of all processes: the numbers do not depend on how many there are, but for rounding

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
accelerator = Accelerator(  # which finds other processes on a CPU only if told of it
    cpu=not torch.cuda.is_available(),
    dataloader_config=DataLoaderConfiguration(split_batches=True),
)
torch.manual_seed(0)
data = 0.1 * torch.randn(4096, 2) + torch.tensor([1.0, -1.0])
net = fastcm.networks.MLP(shape=(2,), width=64).to(accelerator.device)
objective = fastcm.ConsistencyTraining()
optimizer = fastcm.AdamW(net.parameters(), 1e-3, max_grad_norm=1.0, ema=objective.target_average)
target = optimizer.ema_module(0, net)  # live, and in every process: the optimizer updates it
order = torch.Generator().manual_seed(0)
loader = DataLoader(TensorDataset(data), BATCH, shuffle=True, drop_last=True, generator=order)
wrapped, prepared, loader = accelerator.prepare(net, optimizer, loader)

share = BATCH // accelerator.num_processes
# a process has its own rows, and noise for them
key = fastcm.NoiseKey(0, first_sample=accelerator.process_index * share, device=accelerator.device)
step = 0
while step < steps:
    for (x0,) in loader:
        loss = objective.loss(wrapped, fastcm.Batch(x0, key), target)
        accelerator.backward(loss.mean)
        prepared.step()
        prepared.zero_grad()
        key.advance_()
        step += 1
        if step % 100 == 0:
            accelerator.print(f"step {step}: loss {loss.mean.item():.4f}")
        if step == steps:
            break

x = fastcm.Sampler(target, fastcm.Linear(), steps=2, shape=(2,))(1000, seed=0)
distance = fastcm.evaluation.sliced_wasserstein(x.cpu(), data[:1000])
accelerator.print(f"sliced Wasserstein distance to the data {distance:.3f}")
