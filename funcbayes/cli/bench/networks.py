"""The networks that are timed, and inputs for them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

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
        """Logits `[batch, classes]` of `[batch, positions, d]`."""
        return self.head(self.encoder(x + self.position).mean(1))


class Network(NamedTuple):
    """How a network and its inputs are made.

    Attributes:
        make: `make(dropout=…, toy=…)`, with weights from torch's global generator. A toy has
            the same layers with a few units each, for tests.
        shape: of one input.
        toy_shape: of one input of the toy.
    """

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    toy_shape: tuple[int, ...]

    def build(self, *, dropout: bool = False, toy: bool = False, seed: int = 0) -> nn.Module:
        """The network in eval mode; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also reaches CUDA's generators.
            torch.default_generator.manual_seed(seed)
            return self.make(dropout=dropout, toy=toy).eval()

    def inputs(self, num: int, *, toy: bool = False, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs `[num, ...]`, and class labels `[num]`."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, *(self.toy_shape if toy else self.shape), generator=generator)
        return x, torch.randint(NUM_CLASSES, (num,), generator=generator)


NETWORKS = {
    "mlp": Network(Mlp, (784,), (12,)),
    "lenet": Network(LeNet, (1, 28, 28), (1, 28, 28)),
    "transformer": Network(Transformer, (32, 128), (3, 8)),
}
