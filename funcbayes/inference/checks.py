"""What every method checks at its door."""


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
