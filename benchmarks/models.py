"""The networks that are timed: those of `funcbayes bench`, and larger and smaller ones."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcbayes.cli.bench import networks
from funcbayes.cli.bench.networks import NUM_CLASSES, Network


class SmallMlp(nn.Sequential):
    """64-128-10, the size at which ensembles of small networks are trained."""

    def __init__(self, *, dropout: bool, toy: bool):
        if dropout:
            raise ValueError("the small MLP has no variant with dropout")
        width = 8 if toy else 128
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet18 with the CIFAR stem, on 32×32: 701 k parameters at width 16, 11.2 M at 64."""

    def __init__(self, width: int, *, dropout: bool, toy: bool):
        super().__init__()
        if toy:
            width = 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, channels_in = [], width
        for stage in range(2 if toy else 4):
            channels = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(ResidualBlock(channels_in, channels, stride))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.1) if dropout else nn.Identity()
        self.head = nn.Linear(channels_in, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))


def resnet(width: int, *, dropout: bool, toy: bool) -> ResNet18:
    net = ResNet18(width, dropout=dropout, toy=toy)
    # With the initial statistics (0, 1) the activations of an untrained network fade from
    # layer to layer; those of one batch keep them in the range of a trained network's.
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net(NETWORKS[f"resnet-w{width}"].inputs(16, toy=toy)[0])
    for norm in norms:
        norm.momentum = 0.1
    return net


NETWORKS = {
    **networks.NETWORKS,
    "small-mlp": Network(SmallMlp, (64,), (64,)),
    "resnet-w16": Network(partial(resnet, 16), (3, 32, 32), (3, 8, 8)),
    "resnet-w64": Network(partial(resnet, 64), (3, 32, 32), (3, 8, 8)),
}


class Setting(NamedTuple):
    """Where a cell runs, and how large it is.

    Attributes:
        device: where networks and inputs lie. They are made on the CPU, so that they are the
            same on every device, and moved.
        toy: whether all sizes are a few units, for tests.
    """

    device: torch.device
    toy: bool = False

    def build(self, name: str, *, dropout: bool = False, seed: int = 0) -> nn.Module:
        """The network in eval mode."""
        network = NETWORKS[name].build(dropout=dropout, toy=self.toy, seed=seed)
        return network.to(self.device)

    def inputs(self, name: str, num: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs `[num, ...]`, and class labels `[num]`."""
        x, y = NETWORKS[name].inputs(num, toy=self.toy, seed=seed)
        return x.to(self.device), y.to(self.device)

    @property
    def tolerance(self) -> float:
        """Of relative differences: convolutions on CUDA round to TF32."""
        return 1e-3 if self.device.type == "cpu" else 1e-2
