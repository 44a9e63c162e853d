"""A tiny encoder, and the batches of two ranks."""

import torch
from torch import nn

WORLD_SIZE, B, DIM, K, M, T, LR, STEPS = 2, 8, 6, 20, 0.9, 0.2, 0.5, 3
IMAGE = (3, 9, 9)


def tiny_encoder(dim=DIM):
    """Return an encoder [B, 3, 9, 9] -> [B, dim] with batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, dim),
    )


def joint_views(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(WORLD_SIZE * B, *IMAGE, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]


def part(x, rank):
    return x[rank * len(x) // WORLD_SIZE : (rank + 1) * len(x) // WORLD_SIZE]
