"""Train under Lightning: fastcm's objective, noise and optimizer in a LightningModule.

python examples/with_lightning.py [steps]          alone, or by torchrun --nproc-per-node 2
"""

import os
import sys
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastcm

BATCH = 64


class Generator(lightning.LightningModule):
    """A network and the method that trains it; with Lightning's automatic optimization."""

    def __init__(self, net: torch.nn.Module, objective: Any, lr: float = 1e-3) -> None:
        super().__init__()
        self.net, self.objective, self.lr = net, objective, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        average = self.objective.target_average
        optimizer = fastcm.AdamW(self.net.parameters(), self.lr, max_grad_norm=1.0, ema=average)
        # in a list, or it would be a part of this module; its weights are the optimizer's
        self.target = [optimizer.ema_module(0, self.net)]
        return optimizer

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (x0,) = batch
        # a process has its own rows, and noise for them
        key = fastcm.NoiseKey(
            0, self.global_step, first_sample=self.global_rank * len(x0), device=self.device
        )
        loss = self.objective.loss(self.net, fastcm.Batch(x0, key), self.target[0])
        self.log("loss", loss.mean, prog_bar=True)
        return loss.mean


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
torch.manual_seed(0)
data = 0.1 * torch.randn(4096, 2) + torch.tensor([1.0, -1.0])
loader = DataLoader(TensorDataset(data), BATCH, shuffle=True, drop_last=True)
model = Generator(fastcm.networks.MLP(shape=(2,), width=64), fastcm.ConsistencyTraining())
processes = int(os.environ.get("WORLD_SIZE", 1))
trainer = lightning.Trainer(
    max_steps=steps, max_epochs=-1, devices=processes, accelerator="auto",
    strategy="auto" if processes == 1 else "ddp", logger=False, enable_checkpointing=False,
)  # fmt: skip
trainer.fit(model, loader)

target = model.target[0]
x = fastcm.Sampler(target, fastcm.Linear(), steps=2, shape=(2,))(1000, seed=0)
if trainer.is_global_zero:
    distance = fastcm.evaluation.sliced_wasserstein(x.cpu(), data[:1000])
    print(f"sliced Wasserstein distance to the data {distance:.3f}")
