"""The memory format of images that convolutions on CPU prefer."""

from typing import Any

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.model import Model


def meet_convolutions(model: Model, x: Any) -> bool:
    """Whether the channels-last format may pay for a model's inputs."""
    found = any(_is_image(leaf) for leaf in trees.tensor_leaves(x))
    weights = trees.tensor_leaves((model.params, model.constants))
    return found and any(leaf.dim() == 4 for leaf in weights)


def channels_last(x: Any) -> Any:
    """The inputs, images among them with their channels last in memory."""
    return trees.tensor_map(
        lambda leaf: leaf.to(memory_format=torch.channels_last) if _is_image(leaf) else leaf, x
    )


def as_they_are(x: Any) -> Any:
    """The inputs."""
    return x


def _is_image(leaf: Tensor) -> bool:
    return leaf.dim() == 4 and leaf.is_floating_point() and leaf.device.type == "cpu"
