"""The networks that the command line trains: one for images, one for tables."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcbayes.cli.data import Splits


def make(data: Splits) -> nn.Module:
    """An untrained network for a data set: features, and a linear `head`.

    It gives logits `[batch, classes]`, or means `[batch]` in regression.
    """
    shape = tuple(data.train.inputs.shape[1:])
    num_outputs = len(data.classes) or None
    if len(shape) == 1:
        return SmallMLP(shape[0], num_outputs)
    return SmallConvNet(shape, num_outputs)


class SmallConvNet(nn.Module):
    """Two convolutions with batch norm, a hidden layer with dropout, and a linear head.

    Args:
        shape: of an image: channels, height, width.
        num_outputs: how many classes to tell apart; None for one number `[batch]`.
        channels: of the first convolution; the second has twice as many.
        hidden: units of the hidden layer.
        dropout: rate before the hidden layer and before the head.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_outputs: int | None,
        *,
        channels: int = 16,
        hidden: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        in_channels, height, width = shape
        # Images of any size leave the convolutions at most 4 pixels high and wide.
        pool = math.ceil(height / 4), math.ceil(width / 4)
        pixels = (height // pool[0]) * (width // pool[1])
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(pool),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * pixels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(hidden, num_outputs or 1)
        self.squeeze = num_outputs is None

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Logits `[batch, classes]`, or means `[batch]`."""
        outputs = self.head(self.features(images))
        return outputs.squeeze(-1) if self.squeeze else outputs


class SmallMLP(nn.Module):
    """Two hidden layers with dropout, and a linear head.

    Its first layer starts with the variance of He et al. (2015), arXiv:1502.01852, six times
    torch's own: networks then differ where there are no data, which an ensemble lives on.

    Args:
        num_features: columns of the table.
        num_outputs: how many classes to tell apart; None for one number `[batch]`.
        hidden: units of each hidden layer.
        dropout: rate after each hidden layer.
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int | None,
        *,
        hidden: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        with torch.no_grad():
            for parameter in self.features[0].parameters():
                parameter.mul_(math.sqrt(6))
        self.head = nn.Linear(hidden, num_outputs or 1)
        self.squeeze = num_outputs is None

    def forward(self, rows: Float[Tensor, "batch features"]) -> Tensor:
        """Logits `[batch, classes]`, or means `[batch]`."""
        outputs = self.head(self.features(rows))
        return outputs.squeeze(-1) if self.squeeze else outputs
