"""Small networks of every kind, with batches that fit them.

They are what a law about any network is tried on: each kind holds something that a
transformation can stumble over (buffers, tied or frozen weights, attention's fused kernels,
recurrent layers, tensors written in place, inputs and outputs that are no single tensor).

```python
from funcbayes.testing import networks

net = networks.make("convolution")
x, y = networks.inputs("convolution", 5), networks.targets(5)
logits = net(*networks.arguments(x))
```
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from funcbayes.core import trees

NUM_CLASSES = 3
"""Logits that every network here returns for a datum."""

_VOCABULARY = 7


class Attention(nn.Module):
    """A transformer layer with dropout in attention and between, and a stray parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(4, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4, 8]`."""
        return self.head(self.encoder(x + self.position).mean(1))


class FusedAttention(nn.Module):
    """Attention by both of torch's fused calls, the second of them causal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.second = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4, 8]`."""
        x = x + self.first(x, x, x, need_weights=False)[0]
        q, k, v = self.second(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.drop(x + mixed.transpose(1, 2).flatten(2)).mean(1))


class Embedding(nn.Module):
    """Takes integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_VOCABULARY, 5)
        self.head = nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4]` integers."""
        return self.head(self.table(x).sum(1))


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between: vmap has no rule for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4, 3]`."""
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4]`."""
        return self.head(self.drop(torch.tanh(self.second(torch.tanh(self.first(x))))))


class DictInput(nn.Module):
    """Takes a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)
        self.head = nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, NUM_CLASSES))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        """Logits of `{"a": [batch, 3], "b": [batch, 2]}`."""
        return self.head(self.left(x["a"]) + self.right(x["b"]))


class PairInput(DictInput):
    """Takes two positional arguments, which a tuple of inputs becomes."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits of `[batch, 3]` and `[batch, 2]`."""
        return super().forward({"a": a, "b": b})


class DictOutput(nn.Module):
    """Returns a dict of tensors: no likelihood applies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Any:
        """Logits and features of `[batch, 4]`."""
        features = self.trunk(x)
        return {"logits": self.head(features), "features": features}


class TupleOutput(DictOutput):
    """Returns a tuple of tensors: no likelihood applies to it."""

    def forward(self, x: Tensor) -> Any:
        """Logits and features of `[batch, 4]`."""
        outputs = super().forward(x)
        return outputs["logits"], outputs["features"]


class InPlace(nn.Module):
    """Writes to its own input, to activations and to a residual sum.

    What it writes to its input, written again, changes nothing: two calls on one tensor
    give the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clip = nn.Hardtanh(-1.5, 1.5, inplace=True)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2, inplace=True)
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[batch, 4]`."""
        hidden = self.relu(self.first(self.clip(x)))
        residual = self.drop(self.second(hidden))
        residual += hidden
        return self.head(self.relu(residual))


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, NUM_CLASSES))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Dropout(0.2),
        nn.Linear(8, NUM_CLASSES),
    )


def _frozen() -> nn.Module:
    net = _linear()
    net.get_submodule("0").requires_grad_(False)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "convolution": _convolution,
    "norms": _norms,
    "attention": Attention,
    "fused_attention": FusedAttention,
    "embedding": Embedding,
    "recurrent": Recurrent,
    "tied": Tied,
    "frozen": _frozen,
    "dict": DictInput,
    "pair": PairInput,
    "inplace": InPlace,
    "dict_output": DictOutput,
    "tuple_output": TupleOutput,
}
"""Builders by kind; `make` calls them with a seed."""

LOGIT_KINDS = tuple(kind for kind in NETWORKS if not kind.endswith("_output"))
"""The kinds that return one tensor of logits `[batch, 3]`, as a likelihood wants it."""

UNBATCHABLE_KINDS = ("recurrent",)
"""The kinds that vmap has no rule for: their samples run one by one."""

# What a batch is made of, from a function that draws `[num, *shape]`.
_INPUTS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "convolution": lambda draw: draw(2, 4, 4),
    "norms": lambda draw: draw(2, 4),
    "attention": lambda draw: draw(4, 8),
    "fused_attention": lambda draw: draw(4, 8),
    "recurrent": lambda draw: draw(4, 3),
    "dict": lambda draw: {"a": draw(3), "b": draw(2)},
    "pair": lambda draw: (draw(3), draw(2)),
}


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A freshly initialised network in evaluation mode, without touching global state.

    Args:
        kind: one of `NETWORKS`.
        seed: of its parameters, and of buffers such as running statistics, which are not the
            0 and 1 that a layer starts with.
        dtype: of its parameters and floating-point buffers.

    Raises:
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = NETWORKS[kind]()
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net.to(dtype).eval()


def inputs(kind: str, num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A batch of inputs for a network of this kind.

    Args:
        kind: one of `NETWORKS`.
        num: rows of the batch; may be 0.
        seed: of the values, which are standard normal, or integers for `embedding`.
        dtype: of floating-point inputs.

    Returns:
        A tensor `[num, …]`, or a dict or a tuple of them.

    Raises:
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, _VOCABULARY, (num, 4), generator=generator)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num, *shape, generator=generator, dtype=dtype)

    return _INPUTS[kind](draw) if kind in _INPUTS else draw(4)


def targets(num: int, seed: int = 1) -> Int[Tensor, " num"]:
    """Labels for the three classes that every network here has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, NUM_CLASSES, (num,), generator=generator)


def rows(x: Any, start: int, stop: int) -> Any:
    """Some rows of a batch, as views."""
    return trees.tensor_map(lambda leaf: leaf[start:stop], x)


def strided(x: Any) -> Any:
    """The same numbers in memory that is not contiguous: every other one of a larger tensor."""

    def spread(leaf: Tensor) -> Tensor:
        wide = torch.stack([leaf, torch.zeros_like(leaf)], dim=-1)
        return wide[..., 0]

    return trees.tensor_map(spread, x)


def arguments(x: Any) -> tuple[Any, ...]:
    """A batch as positional arguments of a network: a tuple's entries, or one argument."""
    return x if isinstance(x, tuple) else (x,)


def _check_kind(kind: str) -> None:
    if kind not in NETWORKS:
        raise ValueError(f"`kind` is {kind!r}, expected one of {', '.join(NETWORKS)}")
