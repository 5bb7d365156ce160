"""The toy net that the tests train, for images of 8×8 pixels."""

from collections.abc import Callable

import torch
from torch import nn

SIZE = 8  # height and width of the images, as `bikd.data.toy_split` draws them


def conv_net(
    width: int = 4,  # channels of each convolution
    *,
    n_classes: int = 3,
    channels: int = 1,  # of the images
    blocks: int = 1,  # how often convolution, BatchNorm and activation follow each other
    activation: Callable[[], nn.Module] = nn.ReLU,
    pool: bool = True,  # halve height and width before the linear layer
    # of the initial weights; None: drawn from PyTorch's global generator
    seed: int | None = None,
) -> nn.Sequential:  # logits `(B, n_classes)`, float32
    "Convolutions with BatchNorm, and a linear layer."
    if seed is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _conv_net(width, n_classes, channels, blocks, activation, pool)
    return _conv_net(width, n_classes, channels, blocks, activation, pool)


def _conv_net(width, n_classes, channels, blocks, activation, pool):
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [
            nn.Conv2d(width if block else channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            activation(),
        ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    side = SIZE // 2 if pool else SIZE
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(side * side * width, n_classes))
