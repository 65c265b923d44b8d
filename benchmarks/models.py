"""The networks that are timed, and inputs for them.

Every network has a toy size, which the tests use: the same layers, a few units each.
"""

import itertools

import torch
from torch import Tensor, nn

NUM_CLASSES = 10


class Mlp(nn.Sequential):
    """784-512-256-10, 536 k parameters."""

    def __init__(self, *, dropout: bool, toy: bool):
        sizes = (12, 8, 6) if toy else (784, 512, 256)
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            layers += [nn.Dropout(0.1)] if dropout else []
        super().__init__(*layers, nn.Linear(sizes[-1], NUM_CLASSES))


class SmallMlp(nn.Sequential):
    """64-128-10, the size at which ensembles of small networks are trained."""

    def __init__(self, *, dropout: bool, toy: bool):
        if dropout:
            raise ValueError("the small MLP has no variant with dropout")
        width = 8 if toy else 128
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


class LeNet(nn.Sequential):
    """Two convolutions, two linear layers, on 28×28, 545 k parameters."""

    def __init__(self, *, dropout: bool, toy: bool):
        first, second, hidden = (2, 3, 8) if toy else (32, 64, 306)
        drop = [nn.Dropout(0.1)] if dropout else []
        super().__init__(
            *(nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), *drop),
            *(nn.Linear(second * 25, hidden), nn.ReLU(), *drop),
            nn.Linear(hidden, NUM_CLASSES),
        )


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


class Transformer(nn.Module):
    """Encoder of d = 128, 2 layers, 32 positions, and a head on the mean over positions.

    The position embedding is an `nn.Parameter` that is added to the input: a use that no
    layer's rule covers.
    """

    def __init__(self, *, dropout: bool, toy: bool):
        super().__init__()
        length, dim, hidden = (3, 8, 8) if toy else (32, 128, 512)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        layer = nn.TransformerEncoderLayer(
            dim, 4, hidden, dropout=0.1 if dropout else 0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.position).mean(1))


NAMES = ("mlp", "lenet", "resnet-w16", "resnet-w64", "transformer", "small-mlp")


def build(name: str, *, dropout: bool = False, toy: bool = False) -> nn.Module:
    """A network in eval mode; the same weights at every call, torch's global seed untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fresh(name, dropout=dropout, toy=toy).eval()


def fresh(name: str, *, dropout: bool = False, toy: bool = False) -> nn.Module:
    """A network with weights from torch's global generator, in train mode."""
    match name:
        case "mlp":
            return Mlp(dropout=dropout, toy=toy)
        case "lenet":
            return LeNet(dropout=dropout, toy=toy)
        case "resnet-w16" | "resnet-w64":
            net = ResNet18(int(name.removeprefix("resnet-w")), dropout=dropout, toy=toy)
            _settle_batch_norm(net, inputs(name, 16, toy=toy)[0])
            return net
        case "transformer":
            return Transformer(dropout=dropout, toy=toy)
        case "small-mlp":
            return SmallMlp(dropout=dropout, toy=toy)
    raise ValueError(f"unknown model {name!r}, expected one of {', '.join(NAMES)}")


def inputs(name: str, num: int, *, toy: bool = False, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs `[num, ...]` that suit the network, and class labels `[num]`."""
    shape = {
        "mlp": (12,) if toy else (784,),
        "lenet": (1, 28, 28),
        "resnet-w16": (3, 8, 8) if toy else (3, 32, 32),
        "resnet-w64": (3, 8, 8) if toy else (3, 32, 32),
        "transformer": (3, 8) if toy else (32, 128),
        "small-mlp": (64,),
    }[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, *shape, generator=generator)
    return x, torch.randint(NUM_CLASSES, (num,), generator=generator)


def _settle_batch_norm(net: nn.Module, x: Tensor) -> None:
    # With the initial statistics (0, 1) the activations of an untrained network fade from
    # layer to layer; those of one batch keep them in the range of a trained network's.
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net(x)
    for norm in norms:
        norm.momentum = 0.1
