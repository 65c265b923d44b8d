"""How each known use of parameters turns recorded tensors into squared per-datum gradients.

A rule knows one family of torch functions, `output = op(a, weight, bias)`. From what the
forward pass recorded (the input `a`, or the normalised input of a norm) and the gradients g at
the output it gives every datum's gradient or, where that is cheaper, the sum of their squares
without them.

Shapes in this module: gradients are `[batch, columns, *shape]`, with one column for the
gradient of a loss and one for each column of the Hessian root in the GGN; recorded tensors are
`[batch, *shape]`. `*shape` is that of one datum, in whatever layout the model calls `op`.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

# Per-datum gradients are formed for as many data at a time as fit here: beyond the L2 cache,
# squaring and adding them costs as much as the product that made them.
SLICE_BYTES = 2**21
# From these sizes on, a convolution's weight gradient is faster by the convolution library
# (batched over the data) than by unfolding the input.
MIN_POSITIONS, MIN_CHANNELS = 128, 8


Arguments = dict[str, Any]
"""The arguments of a call by name, defaults filled in."""


class Rule:
    """What one family of torch functions has to say about its parameters.

    Attributes:
        name: what a report calls it.
        is_linear: whether the weight acts as a matrix on vectors at positions, so that
            `input_form` and `output_form` describe its use.
        transposed: whether these forms describe the transposed weight.
    """

    name = ""
    is_linear = False
    transposed = False

    def arrange(self, arguments: Arguments, is_leaf: Callable[[Any], bool]) -> Arguments | None:
        """The arguments with the parameters under "weight" and "bias"; None: not understood."""
        return arguments if self.understands(arguments) else None

    def understands(self, arguments: Arguments) -> bool:
        """Whether the call is one of those that the rule describes."""
        return True

    def forward(self, func: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Makes the call; gives what to record of it, and its output."""
        return arguments["input"], func(**arguments)

    def options(self, arguments: Arguments) -> Any:
        """What the contractions need to know of the call (strides and the like)."""
        return None

    def weight_gradients(
        self, options: Any, recorded: Tensor, grads: Tensor, shape: torch.Size
    ) -> Tensor:
        """The gradients `[batch, columns, *shape]` of a weight of that shape."""
        raise NotImplementedError

    def bias_gradients(self, options: Any, grads: Tensor) -> Tensor:
        """The gradients `[batch, columns, *bias.shape]`."""
        raise NotImplementedError

    def input_form(self, options: Any, recorded: Tensor, shape: torch.Size) -> Tensor:
        """The vectors that a weight of that shape acts on, `[batch, groups, positions, i]`.

        With the gradients in `output_form`, and the weight seen as `[groups, o, i]`, a datum's
        gradient is the sum over positions of the outer products.
        """
        raise NotImplementedError

    def output_form(self, options: Any, grads: Tensor, shape: torch.Size) -> Tensor:
        """The gradients at what it gives, `[batch, columns, groups, positions, o]`."""
        raise NotImplementedError

    def data_per_slice(
        self, options: Any, recorded: Tensor, grads: Tensor, shape: torch.Size
    ) -> int:
        """For how many data at a time `weight_gradients` should be asked."""
        return _fitting(grads.shape[1] * shape.numel(), grads)

    def weight_squares(
        self, options: Any, recorded: Tensor, grads: Tensor, shape: torch.Size
    ) -> Tensor:
        """Σ over data and columns of the squared gradient of a weight used once."""
        total = grads.new_zeros(shape)
        size = self.data_per_slice(options, recorded, grads, shape)
        for a, g in zip(recorded.split(size), grads.split(size), strict=True):
            total += sum_of_squares(self.weight_gradients(options, a, g, shape))
        return total

    def bias_squares(self, options: Any, grads: Tensor) -> Tensor:
        """Σ over data and columns of the squared gradient of a bias used once."""
        return sum_of_squares(self.bias_gradients(options, grads))


def sum_of_squares(grads: Tensor) -> Tensor:
    """Σ over data and columns of the squares of `[batch, columns, *shape]`."""
    return _squares(grads).sum(0)


def _squares(grads: Tensor) -> Tensor:
    """Σ over columns of the squares of `[batch, columns, *shape]`."""
    squares = grads.square()
    return squares[:, 0] if grads.shape[1] == 1 else squares.sum(1)


def _fitting(numbers_per_datum: int, like: Tensor) -> int:
    return max(1, SLICE_BYTES // max(1, numbers_per_datum * like.element_size()))


class Linear(Rule):
    """`F.linear`, at any number of positions."""

    name = "linear"
    is_linear = True

    def understands(self, arguments) -> bool:
        """See `Rule.understands`."""
        weight, bias = arguments["weight"], arguments["bias"]
        return weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        g = grads.reshape(*grads.shape[:2], -1, shape[0])
        a = recorded.reshape(recorded.shape[0], -1, shape[1])
        return _per_datum_product(g.mT, a)

    def bias_gradients(self, options, grads) -> Tensor:
        """See `Rule.bias_gradients`."""
        return grads.flatten(2, -2).sum(2) if grads.dim() > 3 else grads

    def input_form(self, options, recorded, shape) -> Tensor:
        """See `Rule.input_form`."""
        return recorded.reshape(recorded.shape[0], 1, -1, shape[1])

    def output_form(self, options, grads, shape) -> Tensor:
        """See `Rule.output_form`."""
        return grads.reshape(*grads.shape[:2], 1, -1, shape[0])

    def weight_squares(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_squares`."""
        batch = grads.shape[0]
        if grads[0, 0].numel() != shape[0]:
            return super().weight_squares(options, recorded, grads, shape)
        # One position: (g_o a_i)² = g_o² a_i², so the columns add up before the product.
        g = _squares(grads).reshape(batch, shape[0])
        return g.T @ recorded.reshape(batch, shape[1]).square()


class ConvOptions(NamedTuple):
    """How a convolution was called.

    Attributes:
        stride: per axis.
        padding: on both sides of each axis.
        dilation: per axis.
        groups: number of groups.
        extra: what padding="same" adds on the right, in the order of `F.pad`.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    extra: list[int]


def groups(options: Any) -> int:
    """Into how many groups of channels a use with these options parts its weight."""
    return options.groups if isinstance(options, ConvOptions) else 1


class Conv(Rule):
    """`F.conv1d`, `F.conv2d`, `F.conv3d`: any stride, padding, dilation, groups."""

    is_linear = True

    def __init__(self, dims: int):
        self.dims = dims
        self.name = f"conv{dims}d"

    def options(self, arguments) -> ConvOptions:
        """See `Rule.options`."""
        weight, padding = arguments["weight"], arguments["padding"]
        dilation = self._per_axis(arguments["dilation"])
        extra = [0] * self.dims
        if padding == "same":
            spread = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding, extra = [s // 2 for s in spread], [s % 2 for s in spread]
        elif padding == "valid":
            padding = 0
        return ConvOptions(
            stride=self._per_axis(arguments["stride"]),
            padding=self._per_axis(padding),
            dilation=dilation,
            groups=arguments["groups"],
            extra=[side for size in reversed(extra) for side in (0, size)],
        )

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        batch, columns = grads.shape[:2]
        if self._by_convolution(options, recorded, grads, shape):
            a = self._padded(options, recorded)
            g = self._images(grads[:, 0], lead=1)
            return self._convolved(options, a, g, shape).unsqueeze(1)
        groups = options.groups
        a = self.input_form(options, recorded, shape).flatten(0, 1)
        g = self._positions_last(grads).unflatten(2, (groups, -1)).transpose(1, 2)
        products = _per_datum_product(g.flatten(0, 1), a)
        return (
            products.unflatten(0, (batch, groups)).transpose(1, 2).reshape(batch, columns, *shape)
        )

    def bias_gradients(self, options, grads) -> Tensor:
        """See `Rule.bias_gradients`."""
        return self._positions_last(grads).sum(-1)

    def data_per_slice(self, options, recorded, grads, shape) -> int:
        """See `Rule.data_per_slice`."""
        if self._by_convolution(options, recorded, grads, shape):
            return _fitting(shape.numel() + recorded[0].numel() + grads[0].numel(), grads) * 8
        positions = grads[0, 0].numel() // shape[0]
        unfolded = options.groups * math.prod(shape[1:]) * positions
        return _fitting(grads.shape[1] * shape.numel() + unfolded, grads)

    def input_form(self, options, recorded, shape) -> Tensor:
        """See `Rule.input_form`."""
        a = self._padded(options, recorded)
        return self._unfolded(options, a, shape).unflatten(1, (options.groups, -1)).mT

    def output_form(self, options, grads, shape) -> Tensor:
        """See `Rule.output_form`."""
        return self._positions_last(grads).unflatten(2, (options.groups, -1)).mT

    def _by_convolution(self, options, recorded, grads, shape) -> bool:
        # With several columns the unfolded input is shared by all, and the product is large.
        return (
            grads.shape[1] == 1
            and options.groups == 1
            and shape[1] >= MIN_CHANNELS
            and grads[0, 0].numel() // shape[0] >= MIN_POSITIONS
        )

    def _convolved(self, options, a, g, shape) -> Tensor:
        like = a.new_empty(shape)

        def of_one_datum(a: Tensor, g: Tensor) -> Tensor:
            return torch.ops.aten.convolution_backward(
                g, a, like, None, options.stride, options.padding, options.dilation,
                False, [0] * self.dims, 1, [False, True, False],
            )[1]  # fmt: skip

        return vmap(of_one_datum)(a, g)

    def _padded(self, options, recorded) -> Tensor:
        """The images, with what padding="same" adds on one side."""
        a = self._images(recorded, lead=1)
        return F.pad(a, options.extra) if any(options.extra) else a

    def _unfolded(self, options, a, shape) -> Tensor:
        """`[batch, channels · kernel, images · positions]`."""
        a = F.pad(a, [size for size in reversed(options.padding) for _ in range(2)])
        for axis, (kernel, stride, dilation) in enumerate(
            zip(shape[2:], options.stride, options.dilation, strict=True)
        ):
            a = a.unfold(3 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        # [batch, images, channels, *positions, *kernel]
        positions = range(3, 3 + self.dims)
        kernel = range(3 + self.dims, 3 + 2 * self.dims)
        a = a.permute(0, 2, *kernel, 1, *positions)
        return a.reshape(a.shape[0], a.shape[1] * math.prod(shape[2:]), -1)

    def _positions_last(self, grads: Tensor) -> Tensor:
        """`[batch, columns, channels, images · positions]`."""
        return self._images(grads, lead=2).transpose(2, 3).flatten(3)

    def _images(self, x: Tensor, *, lead: int) -> Tensor:
        """With the axis of images that an unbatched call leaves out."""
        return x.unsqueeze(lead) if x.dim() == lead + 1 + self.dims else x

    def _per_axis(self, value: Any) -> list[int]:
        return [value] * self.dims if isinstance(value, int) else _repeat(value, self.dims)


class MatrixProduct(Linear):
    """`input @ weight` with a matrix as weight: a Linear map by its transpose."""

    name = "matmul"
    transposed = True

    def arrange(self, arguments, is_leaf) -> Arguments | None:
        """See `Rule.arrange`."""
        left, right = arguments["input"], arguments["other"]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if right.dim() != 2 or left.dim() == 0 or is_leaf(left):
            return None
        return {"input": left, "weight": right, "bias": None}

    def forward(self, func, arguments) -> tuple[Tensor, Tensor]:
        """See `Rule.forward`."""
        return arguments["input"], func(arguments["input"], arguments["weight"])

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        return super().weight_gradients(options, recorded, grads, _turned(shape)).mT

    def weight_squares(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_squares`."""
        if grads[0, 0].numel() != shape[1]:
            return Rule.weight_squares(self, options, recorded, grads, shape)
        return super().weight_squares(options, recorded, grads, _turned(shape)).T

    def input_form(self, options, recorded, shape) -> Tensor:
        """See `Rule.input_form`."""
        return super().input_form(options, recorded, _turned(shape))

    def output_form(self, options, grads, shape) -> Tensor:
        """See `Rule.output_form`."""
        return super().output_form(options, grads, _turned(shape))


def _turned(shape: torch.Size) -> torch.Size:
    return torch.Size((shape[1], shape[0]))


class _Elementwise(Rule):
    """A parameter and a tensor, one entry with one entry, with broadcasting."""

    def arrange(self, arguments, is_leaf) -> Arguments | None:
        """See `Rule.arrange`."""
        left, right = arguments["input"], arguments["other"]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if is_leaf(left) == is_leaf(right) or arguments.get("alpha", 1) != 1:
            return None
        if is_leaf(left):
            left, right = right, left
        return {"input": left, "weight": right, "bias": None}

    def data_per_slice(self, options, recorded, grads, shape) -> int:
        """See `Rule.data_per_slice`."""
        return _fitting(grads[0].numel(), grads)


class Added(_Elementwise):
    """`input + weight`, such as a position embedding or a bias of one's own."""

    name = "add"

    def forward(self, func, arguments) -> tuple[Tensor, Tensor]:
        """See `Rule.forward`."""
        output = func(arguments["input"], arguments["weight"])
        return output.new_empty(0), output

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        return _summed_to(grads, shape)


class Scaled(_Elementwise):
    """`input * weight`, such as a gain of one's own."""

    name = "mul"

    def forward(self, func, arguments) -> tuple[Tensor, Tensor]:
        """See `Rule.forward`."""
        return arguments["input"], func(arguments["input"], arguments["weight"])

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        missing = grads.dim() - 1 - recorded.dim()
        a = recorded.reshape(recorded.shape[0], *(1,) * (missing + 1), *recorded.shape[1:])
        return _summed_to(grads * a, shape)


def _summed_to(grads: Tensor, shape: torch.Size) -> Tensor:
    """`[batch, columns, *out]` summed over the axes along which a tensor of `shape` broadcasts."""
    missing = grads.dim() - 2 - len(shape)
    kept = (1,) * missing + tuple(shape)
    axes = [i + 2 for i, size in enumerate(kept) if size == 1 and grads.shape[i + 2] != 1]
    summed = grads.sum(axes, keepdim=True) if axes else grads
    return summed.reshape(*grads.shape[:2], *shape)


class Embedding(Rule):
    """`F.embedding` without `max_norm` (it writes to the weight) or frequency scaling."""

    name = "embedding"

    def understands(self, arguments) -> bool:
        """See `Rule.understands`."""
        return arguments["max_norm"] is None and not arguments["scale_grad_by_freq"]

    def options(self, arguments) -> int | None:
        """The token whose gradient is left out, None if there is none."""
        padding_idx = arguments["padding_idx"]
        if padding_idx is not None and padding_idx < 0:
            padding_idx += arguments["weight"].shape[0]
        return padding_idx

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        batch, columns = grads.shape[:2]
        rows, g = self._rows(options, recorded, grads, shape)
        sums = g.new_zeros(batch * shape[0], columns * shape[1]).index_add_(0, rows, g)
        return sums.view(batch, shape[0], columns, shape[1]).transpose(1, 2)

    def weight_squares(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_squares`."""
        tokens, sums = self.row_gradients(options, recorded, grads, shape)
        return grads.new_zeros(shape).index_add_(0, tokens, sums.square().sum(1))

    def row_gradients(
        self, options: Any, recorded: Tensor, grads: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the rows that each datum uses, and of no others.

        Returns:
            For each pair of a datum and a token in it, the token `[pairs]` and the gradient of
            its row `[pairs, columns, size]`.
        """
        rows, g = self._rows(options, recorded, grads, shape)
        used, place = rows.unique(return_inverse=True)
        sums = g.new_zeros(len(used), g.shape[1]).index_add_(0, place, g)
        return used % shape[0], sums.view(len(used), -1, shape[1])

    def _rows(self, padding_idx, recorded, grads, shape) -> tuple[Tensor, Tensor]:
        """Row datum · vocabulary + token of each position; its gradient, columns joined."""
        batch, columns = grads.shape[:2]
        index = recorded.reshape(batch, -1).long()
        g = grads.reshape(batch, columns, -1, shape[1]).transpose(1, 2)
        if padding_idx is not None:
            g = g * (index != padding_idx)[..., None, None]
        rows = index + shape[0] * torch.arange(batch, device=index.device)[:, None]
        return rows.flatten(), g.reshape(-1, columns * shape[1])


_AFFINE = ("weight", "bias")


class Norm(Rule):
    """Normalisation, then weight and bias elementwise; records the normalised input."""

    name = "norm"

    def options(self, arguments) -> tuple[int, ...]:
        """The axes of the input that the parameters have."""
        if "normalized_shape" not in arguments:
            return (1,)
        dims = arguments["input"].dim()
        return tuple(range(dims - len(arguments["normalized_shape"]), dims))

    def forward(self, func, arguments) -> tuple[Tensor, Tensor]:
        """See `Rule.forward`."""
        weight, bias = arguments.get("weight"), arguments.get("bias")
        own = self.options(arguments)
        shape = arguments["input"].shape
        spread = [size if axis in own else 1 for axis, size in enumerate(shape)]
        plain = {name: value for name, value in arguments.items() if name not in _AFFINE}
        normalised = output = func(**plain)
        if weight is not None:
            output = output * weight.view(spread)
        if bias is not None:
            output = output + bias.view(spread)
        return normalised, output

    def weight_gradients(self, options, recorded, grads, shape) -> Tensor:
        """See `Rule.weight_gradients`."""
        return self.bias_gradients(options, grads * recorded.unsqueeze(1))

    def bias_gradients(self, options, grads) -> Tensor:
        """See `Rule.bias_gradients`."""
        summed = [axis for axis in range(2, grads.dim()) if axis - 2 not in options]
        return grads.sum(summed) if summed else grads

    def data_per_slice(self, options, recorded, grads, shape) -> int:
        """See `Rule.data_per_slice`."""
        return _fitting(grads[0].numel(), grads)


def _per_datum_product(left: Tensor, right: Tensor) -> Tensor:
    """`[batch, columns, m, r] · [batch, r, k]` for each datum and column."""
    batch, columns, m, r = left.shape
    return torch.bmm(left.reshape(batch, columns * m, r), right).view(batch, columns, m, -1)


def _repeat(values: Any, dims: int) -> list[int]:
    values = list(values)
    return values * dims if len(values) == 1 else values


# The signatures of the functions below; torch's own builtins do not tell theirs.
def _linear(input, weight, bias=None): ...
def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...
def _binary(input, other): ...
def _add(input, other, *, alpha=1): ...


_CONV, _BINARY = inspect.signature(_conv), inspect.signature(_binary)
_ADD = inspect.signature(_add)
RULES: dict[Callable[..., Any], tuple[Rule, inspect.Signature]] = {
    F.linear: (Linear(), inspect.signature(_linear)),
    F.conv1d: (Conv(1), _CONV),
    F.conv2d: (Conv(2), _CONV),
    F.conv3d: (Conv(3), _CONV),
    F.embedding: (Embedding(), inspect.signature(F.embedding)),
    F.layer_norm: (Norm(), inspect.signature(F.layer_norm)),
    F.rms_norm: (Norm(), inspect.signature(F.rms_norm)),
    F.group_norm: (Norm(), inspect.signature(F.group_norm)),
    F.batch_norm: (Norm(), inspect.signature(F.batch_norm)),
    F.instance_norm: (Norm(), inspect.signature(F.instance_norm)),
    torch.matmul: (MatrixProduct(), _BINARY),
    torch.mm: (MatrixProduct(), _BINARY),
    torch.Tensor.matmul: (MatrixProduct(), _BINARY),
    torch.Tensor.mm: (MatrixProduct(), _BINARY),
    torch.add: (Added(), _ADD),
    torch.Tensor.add: (Added(), _ADD),
    torch.mul: (Scaled(), _BINARY),
    torch.Tensor.mul: (Scaled(), _BINARY),
}
"""The known functions: every other use of a parameter takes the general path."""


def bind(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_leaf: Callable[[Any], bool],
) -> tuple[Rule, Arguments] | None:
    """The rule and the arguments of a call of a known function; None if it is unusual.

    Args:
        func: one of `RULES`.
        args: its arguments.
        kwargs: its arguments by name.
        is_leaf: whether an object is one of the parameters.
    """
    rule, signature = RULES[func]
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    arguments = rule.arrange(bound.arguments, is_leaf)
    return None if arguments is None else (rule, arguments)
