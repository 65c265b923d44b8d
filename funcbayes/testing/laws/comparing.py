"""What differs between two trees of tensors: which leaf, which sample, which entry, how far."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from funcbayes.core import trees

# Draws are one product and one sum an entry, so a few roundings of the leaf's largest number:
# a posterior is often a thousand times narrower than its mean, and two samples must not pass
# for one.
DRAW_ROUNDINGS = 16.0


def fail(law: str, found: str, cause: str | None = None) -> NoReturn:
    """Raises the error of a broken law.

    Raises:
        AssertionError: always.
    """
    # Not `assert`: laws hold under `python -O` as well.
    raise AssertionError(f"{law}: {found}" + (f". Likely cause: {cause}" if cause else ""))


def needs(law: str, posterior: Any, *names: str) -> None:
    """Refuses a posterior that lacks what a law is about.

    Raises:
        TypeError: an attribute is missing.
    """
    missing = [name for name in names if not hasattr(posterior, name)]
    if missing:
        raise TypeError(
            f"`posterior` is a {type(posterior).__name__} without"
            f" {' and '.join(f'`{name}`' for name in missing)}, which {law} is about:"
            " leave this law out, or add what is missing"
        )


def check_same(
    found: Any,
    expected: Any,
    *,
    law: str,
    what: str,
    cause: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    roundings: float | None = None,
    exact: bool = False,
    samples: bool = False,
) -> None:
    """Compares two trees leaf by leaf.

    Args:
        found: the tree under test.
        expected: what it should be.
        law: name of the law, for the message.
        what: says what `found` and `expected` are, for the message.
        cause: the likely cause, for the message.
        rtol: allowed relative to each expected number.
        atol: allowed beside it. None for both: `roundings` units in the last place of the
            leaf's largest number. One alone: the other is 0.
        roundings: None for the square root of 1/eps, which is half of the digits.
        exact: bit for bit, so that NaN equals NaN and −0.0 is not 0.0.
        samples: whether the leading axis counts samples.

    Raises:
        AssertionError: they differ.
    """
    ours, theirs = dict(trees.leaves_with_names(found)), dict(trees.leaves_with_names(expected))
    for first, second, which in ((ours, theirs, "is not expected"), (theirs, ours, "is missing")):
        names = [name for name in first if name not in second]
        if names:
            fail(law, f"{what}: the leaf {', '.join(names[:3]) or '(the tree itself)'} {which}")
    if not trees.same_structure(found, expected):
        fail(law, f"{what}: the structures differ, {_structure(found)} and {_structure(expected)}")
    for name, leaf in ours.items():
        difference = _leaf_difference(
            leaf, theirs[name], rtol, atol, roundings, exact=exact, samples=samples
        )
        if difference:
            fail(law, f"{what}{f', leaf {name}' if name else ''}: {difference}", cause)


def _leaf_difference(
    found: Any,
    expected: Any,
    rtol: float | None,
    atol: float | None,
    roundings: float | None,
    *,
    exact: bool,
    samples: bool,
) -> str | None:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        same = found is expected or (type(found) is type(expected) and found == expected)
        return None if same else f"{found!r} came where {expected!r} is expected"
    for part in ("dtype", "shape", "device", "layout"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        if ours != theirs:
            ours, theirs = (tuple(v) if part == "shape" else v for v in (ours, theirs))
            return f"the {part} is {ours} where {theirs} is expected"
    found, expected = found.detach(), expected.detach()
    if exact:
        differ, allowed = bits(found) != bits(expected), None
    else:
        differ, allowed = _beyond(found, expected, rtol, atol, roundings)
    if not differ.any():
        return None
    return describe(found, expected, differ, allowed, samples=samples)


def bits(tensor: Tensor) -> Tensor:
    """The numbers' bits as integers, in the tensor's shape."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def _beyond(
    found: Tensor,
    expected: Tensor,
    rtol: float | None,
    atol: float | None,
    roundings: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Where two tensors are further apart than is allowed, and how far that is."""
    if not (found.is_floating_point() or found.is_complex()):
        return found != expected, None
    wide = torch.complex128 if found.is_complex() else torch.float64
    ours, theirs = found.to(wide), expected.to(wide)
    if rtol is None and atol is None:
        eps = torch.finfo(found.dtype).eps
        finite = theirs[torch.isfinite(theirs)].abs()
        largest = float(finite.amax()) if finite.numel() else 0.0
        rtol, atol = 0.0, largest * (math.sqrt(eps) if roundings is None else roundings * eps)
    rtol, atol = rtol or 0.0, atol or 0.0
    allowed = atol + rtol * theirs.abs()
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    # Written so that NaN counts as different.
    differ = ~(equal | ((ours - theirs).abs() <= allowed))
    return differ, allowed


def describe(
    found: Tensor,
    expected: Tensor,
    differ: Tensor,
    allowed: Tensor | None = None,
    *,
    samples: bool = False,
    words: str = "{} came where {} is expected",
) -> str:
    """Says where two tensors are furthest apart, and how far."""
    if differ.dim() > found.dim():  # the parts of complex numbers
        differ = differ.any(-1)
    if found.layout != torch.strided:
        found, expected = found.to_dense(), expected.to_dense()
    wide = torch.complex128 if found.is_complex() else torch.float64
    apart = (found.to(wide) - expected.to(wide)).abs().masked_fill(~differ, -1)
    apart = apart.masked_fill(differ & ~torch.isfinite(apart), math.inf)
    flat = int(apart.reshape(-1).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), found.shape))
    ours, theirs = found.reshape(-1)[flat].item(), expected.reshape(-1)[flat].item()
    text = words.format(_number(ours), _number(theirs))
    if at:
        text = f"{', '.join(_index(at, samples=samples))}: {text}"
    distance = apart.reshape(-1)[flat].item()
    if 0 < distance < math.inf:
        text += f", {distance:.3g} apart"
    if allowed is not None:
        text += f" ({float(allowed.reshape(-1)[flat]):.2g} is allowed)"
    if found.numel() > 1:
        text += f"; {int(differ.sum())} of {found.numel()} numbers differ"
    return text


def place(name: str, at: Sequence[int] = ()) -> str:
    """A leaf's path and an index in words: `leaf ['w'], entry (0, 1)`."""
    leaf = f"leaf {name}" if name else "the tensor"
    return ", ".join([leaf, *_index(at)])


def _index(at: Sequence[int], *, samples: bool = False) -> list[str]:
    words = []
    if samples and at:
        words, at = [f"sample {at[0]}"], at[1:]
    return [*words, f"entry ({', '.join(map(str, at))})"] if at else words


def _number(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | complex) else repr(value)


def _structure(tree: Any) -> str:
    names = [name for name, _ in trees.leaves_with_names(tree)]
    return f"{type(tree).__name__} with leaves {names}"
