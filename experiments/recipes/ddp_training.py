"""DistributedDataParallel: every rank makes its tuner, and all of them decide the same.

torchrun --nproc-per-node 2 -m experiments.recipes.ddp_training
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hypergrad
from experiments import datasets


def main(epochs: int = 10) -> dict[str, float]:
    """In a process group: train on this rank's share of every batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere
    data = datasets.digits()
    train = TensorDataset(*data.train)
    sampler = DistributedSampler(train, shuffle=True)
    loader = DataLoader(train, batch_size=64 // world, sampler=sampler, drop_last=True)
    x_val, y_val = (part[:396][rank::world] for part in data.val)  # this rank's rows: as many on each
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def val_loss() -> Tensor:
        return cross_entropy(model(x_val), y_val)  # the mean over ranks is what counts

    tuner = hypergrad.Tuner(model, optimizer, val_loss, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            tuner.backward(cross_entropy(model(x), y))
            optimizer.step()
    tuner.close()
    with torch.no_grad():
        accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean()
    return {"rank": rank, "test accuracy": float(accuracy), "lr": float(tuner.values["lr"])}


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    print(main(), flush=True)
    dist.destroy_process_group()
