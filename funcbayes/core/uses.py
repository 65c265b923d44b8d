"""The interpreter: sees every torch function that a forward pass calls, and may answer it.

A `TorchFunctionMode` is on top of autograd and of `torch.func`, so rules written here hold
for any model code, also inside `vmap` and `grad`. Composites that torch would answer whole
(attention, recurrent layers with dropout between them) are re-expressed by their parts, so
that a rule for a part meets it wherever it occurs.
"""

# ruff: noqa: FBT001, FBT002 (the signatures are torch's)

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcbayes.core import trees

Rule = Callable[..., Any]
"""A rule takes the arguments of the function that it stands for, and returns its result."""


FORMAT = {
    getattr(Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
        *("element_size", "get_device", "is_floating_point", "is_complex", "is_contiguous"),
        *("is_signed", "is_inference", "__len__", "type"),
    )
} | {torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel, torch.result_type}
"""Functions that tell of a tensor what is no value: the same whenever the formats are."""
_ATTRIBUTES = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn"),
        *("is_cuda", "is_sparse", "is_meta", "is_quantized", "itemsize", "nbytes", "grad"),
    )
}
_FACTORIES = {
    *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "empty", "full", "tensor")),
    *(
        getattr(torch, f"{name}_like")
        for name in ("zeros", "ones", "empty", "full", "rand", "randn")
    ),
}


# Of all but their first argument, these take the format alone.
_LIKE_OTHERS = {
    getattr(Tensor, name) for name in ("type_as", "expand_as", "view_as", "reshape_as", "to")
}


def values_taken(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """The arguments on whose values, not formats alone, a function's result may depend."""
    if func in FORMAT or func in _ATTRIBUTES or func in _FACTORIES:
        return ()
    return args[:1] if func in _LIKE_OTHERS else (args, kwargs)


class Interpreter(TorchFunctionMode):
    """Answers the torch functions that have a rule; the others run as they are.

    Inside a rule the interpreter is off; a rule that re-expresses a composite enters it
    again around the parts (`with self:`).

    Args:
        rules: by function, as `torch.nn.functional` or `torch` has it.
    """

    def __init__(self, rules: Mapping[Callable[..., Any], Rule]) -> None:
        """Takes the rules; enter the object to make them hold."""
        super().__init__()
        self.rules = dict(rules)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers by rule where there is one."""
        rule = self.rules.get(func)
        return (rule or func)(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by its mathematical form.

    The fused kernels have no batching rule under `vmap(grad)` and keep their dropout mask
    to themselves. Arguments and shapes are those of torch's function.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores.dtype, keep=True)
    weights = torch.softmax(scores, dim=-1) if attn_mask is None else _safe_softmax(scores)
    # vmap refuses dropout as a random operation, also at rate 0.
    weights = F.dropout(weights, dropout_p, training=True) if dropout_p else weights
    return weights @ value


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` by linear maps, softmax and dropout.

    Arguments, shapes and results are those of torch's function: `[time, batch, embedding]`,
    or `[time, embedding]` for one sequence.
    """
    batched = query.dim() == 3
    self_attention = query is key and key is value
    if not batched:
        query = query.unsqueeze(1)
        key, value = (query, query) if self_attention else (key.unsqueeze(1), value.unsqueeze(1))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    time, batch, width = query.shape
    head = width // num_heads

    if not use_separate_proj_weight and in_proj_weight is not None and self_attention:
        # One use of the weight: `chunk` on the result, not on the parameter.
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        if use_separate_proj_weight or in_proj_weight is None:
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            weights = in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(part, weight, bias)  # pyright: ignore[reportArgumentType]
            for part, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, width)])
        v = torch.cat([v, bias_v.expand(1, batch, width)])

    def split_heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], batch, num_heads, head).permute(1, 2, 0, 3)

    q = split_heads(q)
    k = split_heads(k) if static_k is None else static_k.view(batch, num_heads, -1, head)
    v = split_heads(v) if static_v is None else static_v.view(batch, num_heads, -1, head)
    if add_zero_attn:
        zero = k.new_zeros(batch, num_heads, 1, head)
        k, v = torch.cat([k, zero], dim=2), torch.cat([v, zero], dim=2)
    added = k.shape[2] - (key.shape[0] if static_k is None else static_k.shape[1])

    scores = (q / math.sqrt(head)) @ k.transpose(-2, -1)
    if attn_mask is None and is_causal:
        raise ValueError("`is_causal` is a hint beside `attn_mask`: pass the mask as well")
    if attn_mask is not None:
        mask = F.pad(_additive(attn_mask, scores.dtype, keep=False), (0, added))
        if mask.dim() == 3:
            mask = mask.view(batch, num_heads, *mask.shape[1:])
        scores = scores + mask
    if key_padding_mask is not None:
        padding = F.pad(_additive(key_padding_mask, scores.dtype, keep=False), (0, added))
        scores = scores + padding[:, None, None, :]

    # Like torch: where all keys are masked, the answer is 0 without weights, NaN with them.
    masked = attn_mask is not None or key_padding_mask is not None
    weights = _safe_softmax(scores) if masked and not need_weights else scores.softmax(dim=-1)
    weights = F.dropout(weights, dropout_p, training=training) if dropout_p else weights
    out = (weights @ v).permute(2, 0, 1, 3).reshape(time, batch, width)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    averaged = weights.mean(dim=1) if average_attn_weights else weights
    if not batched:
        out, averaged = out.squeeze(1), averaged.squeeze(0)
    return out, averaged if need_weights else None


def _additive(mask: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """A mask to add to the scores; `keep` says what True means in a boolean one."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    drop = ~mask if keep else mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(drop, -math.inf)


def _safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis that is 0, and not NaN, where all scores are −∞."""
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    # Twice: 0 · NaN would come back in the gradient.
    return torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm` by its mathematical form.

    Under `torch.func` the gradient of torch's own to `weight` has no derivative in `input`: it is
    taken to be 0. Arguments and shapes are those of torch's function.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    output = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm` by its mathematical form, for the same reason as `layer_norm`.

    Arguments and shapes are those of torch's function. Running statistics are not updated.
    """
    if not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    output = layer_norm(input, tuple(input.shape[2:]), eps=eps)
    spread = (-1, *(1,) * (input.dim() - 2))
    output = output if weight is None else output * weight.view(spread)
    return output if bias is None else output + bias.view(spread)


RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # pyright: ignore[reportAttributeAccessIssue]


def batchable() -> Interpreter:
    """An interpreter to enter around `vmap`, for what torch cannot batch as it stands.

    Attention gets its mathematical form, since the fused kernels have no batching rule; the
    interpreter's mere presence also switches off the transformer layer's fused kernel. A
    recurrent layer on a mapped tensor is an error at once: torch would loop over its kernel
    with a warning, or fail later.

    Linear maps whose weights are mapped take flat inputs: torch would copy the weight for every
    position of a longer input. They are written such that the weights' gradients come in the
    weights' own memory format: torch's come transposed, and to sum those over the samples takes
    forty times as long.
    """
    rules: dict[Callable[..., Any], Rule] = {F.scaled_dot_product_attention: attention}
    for func in RECURRENT:
        rules[func] = unless_mapped(func)
    interpreter = Interpreter(rules)

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # A compiler finds a way of its own, and cannot trace the question.
        plain = torch.compiler.is_compiling() or input.dim() < 2
        if plain or not trees.in_transform(weight):
            return F.linear(input, weight, bias)
        flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled():
            output = (weight @ flat.mT).mT
            output = output if bias is None else output + bias
        else:
            output = F.linear(flat, weight, bias)
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], weight.shape[0])

    def multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with interpreter:
            return multi_head_attention(*args, **kwargs)

    interpreter.rules |= {F.linear: linear, F.multi_head_attention_forward: multi_head}
    return interpreter


def unless_mapped(func: Callable[..., Any]) -> Rule:
    """A rule for a function without a batching rule: an error on tensors that vmap maps."""

    def rule(*args: Any) -> Any:
        if any(trees.in_transform(arg) for arg in args):
            raise RuntimeError(f"vmap has no batching rule for {func.__name__}")
        return func(*args)

    return rule


def stacked_recurrent(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A recurrent network of several layers, one layer a call, `F.dropout` between them.

    Args:
        func: one of `RECURRENT`.
        args: its arguments, in either form (padded or packed sequences).

    Returns:
        What `func` returns.
    """
    packed = not isinstance(args[3], bool)
    if packed:
        data, batch_sizes, hidden, weights, has_biases, num_layers, p, training, both = args
        head, tail = (batch_sizes,), ()
    else:
        data, hidden, weights, has_biases, num_layers, p, training, both, batch_first = args
        head, tail = (), (batch_first,)
    is_lstm = func is torch.lstm  # pyright: ignore[reportAttributeAccessIssue]
    states = tuple(hidden) if is_lstm else (hidden,)
    directions = 2 if both else 1
    per_layer = len(weights) // num_layers
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        if layer:
            data = F.dropout(data, p, training=training)
        rows = slice(layer * directions, (layer + 1) * directions)
        start = tuple(state[rows].contiguous() for state in states)
        own = list(weights[layer * per_layer : (layer + 1) * per_layer])
        data, *final = func(
            data,
            *head,
            start if is_lstm else start[0],
            own,
            has_biases,
            1,
            0.0,
            training,
            both,
            *tail,
        )
        finals.append(tuple(final))
    return data, *(torch.cat(parts) for parts in zip(*finals, strict=True))
