"""Small networks of every kind, with batches that fit them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funcbayes.core import trees


class Attention(nn.Module):
    """A transformer layer with dropout in attention and between, and a stray parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(4, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.position).mean(1))


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between: vmap has no rule for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.second(torch.tanh(self.first(x))))))


class DictInput(nn.Module):
    """Takes a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)
        self.head = nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.head(self.left(x["a"]) + self.right(x["b"]))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def frozen() -> nn.Module:
    net = linear()
    net[0].requires_grad_(False)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "convolution": convolution,
    "attention": Attention,
    "recurrent": Recurrent,
    "tied": Tied,
    "frozen": frozen,
    "dict": DictInput,
}

_SHAPES: dict[str, Any] = {
    "linear": (4,),
    "convolution": (2, 4, 4),
    "attention": (4, 8),
    "recurrent": (4, 3),
    "tied": (4,),
    "frozen": (4,),
    "dict": {"a": (3,), "b": (2,)},
}


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A freshly initialised network in evaluation mode, without touching global state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETWORKS[kind]()
        for buffer in net.buffers():  # running statistics that are not just 0 and 1
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net.to(dtype).eval()


def inputs(kind: str, num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A batch of inputs for a network of this kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(num, *shape, generator=generator, dtype=dtype)

    shapes = _SHAPES[kind]
    if isinstance(shapes, dict):
        return {name: draw(shape) for name, shape in shapes.items()}
    return draw(shapes)


def targets(num: int, seed: int = 1) -> Tensor:
    """Labels for the three classes that every network here has."""
    return torch.randint(0, 3, (num,), generator=torch.Generator().manual_seed(seed))


def rows(x: Any, start: int, stop: int) -> Any:
    """Some rows of a batch."""
    return trees.tensor_map(lambda leaf: leaf[start:stop], x)
