"""The network that the command line trains."""

from jaxtyping import Float
from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Two convolutions with batch norm, a hidden layer with dropout, and a linear head.

    Args:
        num_classes: how many classes to tell apart.
        channels: of the first convolution; the second has twice as many.
        hidden: units of the hidden layer.
        dropout: rate before the hidden layer and before the head.
    """

    def __init__(
        self, num_classes: int, *, channels: int = 16, hidden: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 16, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Tensor:
        """Logits `[batch, classes]`."""
        return self.head(self.features(images))
