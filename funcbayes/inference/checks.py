"""What every method checks at its door."""

import torch


def check_state(state: object, kind: type, made_by: str, *, name: str = "state") -> None:
    """Refuses a state of another method, or what is none.

    Args:
        state: what came.
        kind: the method's state.
        made_by: the functions that make one, for the message.
        name: the argument's name in the message.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"`{name}` is a {type(state).__name__}, expected a {kind.__name__}: the result of"
            f" {made_by}"
        )


def check_training(callback: object) -> None:
    """Refuses to train where no gradients can be had, and what is no callback.

    Args:
        callback: a function, or None.

    Raises:
        RuntimeError: inference mode is on.
        TypeError: `callback` is not callable.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "training needs gradients, which torch.inference_mode forbids: call fit outside of it"
        )
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`callback` is a {type(callback).__name__}, expected a function of two arguments,"
            " or None"
        )
