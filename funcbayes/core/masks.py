"""Dropout whose masks are functions of a key.

`KeyedDropout` answers every dropout call of a forward pass, whoever makes it: the `nn`
layers, `torch.nn.functional`, attention, and recurrent layers. Sample i's masks are drawn in
the order of the calls from the stream of `keys[i]`, so they are the same numbers
whether the samples run in one vmapped pass, in chunks, or one by one.

Source:
    Srivastava et al. (2014), dropout; Klambauer et al. (2017), arXiv:1706.02515, alpha
    dropout; Gal and Ghahramani (2016), arXiv:1506.02142, dropout at test time.
"""

# ruff: noqa: FBT001, FBT002 (the signatures are torch's)

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcbayes.core import random, uses, workers
from funcbayes.core.random import Key

# Masks compare 16 random bits with a threshold: four to a 64-bit word, which costs a tenth
# of a float a mask entry.
_LEVELS = 2**16
# −λα of SELU: the value that alpha dropout puts in place of a dropped one.
_ALPHA = -1.7580993408473766


class KeyedDropout(uses.Interpreter):
    """Draws every dropout mask inside from keys.

    Rates are rounded to a multiple of 2⁻¹⁶, and survivors are scaled by the rounded rate, so
    the expectation of a dropped tensor is exactly the tensor.

    An option `inplace=True` is taken for what it is in practice, leave to reuse memory, and not
    used: written into an input that all samples share, one sample's mask would reach the next.
    Functions whose name says it (`torch.dropout_`) do write.

    Args:
        keys: one key a sample.
        index: inside `vmap` over the samples, the mapped 0-d integer tensor that says which
            sample this is; None outside, where the masks are those of `keys[0]`.
        rate: replaces the rate of every dropout; None keeps each one's own.
        always: whether dropout that is switched off by evaluation mode is active as well.
        on_draw: called before each mask is drawn.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        index: Tensor | None = None,
        *,
        rate: float | None = None,
        always: bool,
        on_draw: Callable[[], None] | None = None,
    ) -> None:
        """Prepares the rules; enter the object to make it hold."""
        self.keys = list(keys)
        self.index = index
        self.rate = rate
        self.always = always
        self.on_draw = on_draw
        self._streams: dict[torch.device, list[random.Stream]] = {}
        self._traced: dict[torch.device, list[int]] = {}
        super().__init__(self._all_rules())

    def _all_rules(self) -> dict[Callable[..., Any], uses.Rule]:
        rules: dict[Callable[..., Any], uses.Rule] = {
            F.dropout: self._plain,
            F.dropout1d: self._feature(unbatched_dim=2),
            F.dropout2d: self._feature(unbatched_dim=None),
            F.dropout3d: self._feature(unbatched_dim=4),
            F.alpha_dropout: self._alpha,
            F.feature_alpha_dropout: self._feature_alpha,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head_attention,
        }
        # torch's own functions take (input, p, train) and have in-place forms.
        for name, rule in {
            "dropout": self._plain,
            "feature_dropout": self._feature(unbatched_dim=None),
            "alpha_dropout": self._alpha,
            "feature_alpha_dropout": self._feature_alpha,
        }.items():
            rules[getattr(torch, name)] = _torch_signature(rule)
            rules[getattr(torch, name + "_")] = _in_place(rule)
        for func in uses.RECURRENT:
            rules[func] = self._recurrent(func)
        return rules

    # -- rules ---------------------------------------------------------------------------

    def _plain(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        rate = self._active_rate(p, training=training)
        return self._drop(input, rate, input.shape) if rate else input

    def _feature(self, *, unbatched_dim: int | None) -> uses.Rule:
        def rule(
            input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> Tensor:
            rate = self._active_rate(p, training=training)
            if not rate:
                return input
            return self._drop(input, rate, _feature_shape(input, input.dim() == unbatched_dim))

        return rule

    def _alpha(
        self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        rate = self._active_rate(p, training=training)
        return self._alpha_drop(input, rate, input.shape) if rate else input

    def _feature_alpha(
        self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        rate = self._active_rate(p, training=training)
        return self._alpha_drop(input, rate, _feature_shape(input, False)) if rate else input

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        call = _ATTENTION.bind(*args, **kwargs)
        # torch's function has no mode: a positive rate is an active one.
        if self._active_rate(call.arguments.get("dropout_p", 0.0), training=True, part=True):
            with self:
                return uses.attention(*args, **kwargs)
        call.arguments["dropout_p"] = 0.0
        whole = F.scaled_dot_product_attention if self.index is None else uses.attention
        return whole(*call.args, **call.kwargs)

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = _MULTI_HEAD_ATTENTION.bind(*args, **kwargs)
        call.apply_defaults()
        training = call.arguments["training"]
        if self._active_rate(call.arguments["dropout_p"], training=training, part=True):
            with self:
                return uses.multi_head_attention(*args, **kwargs)
        call.arguments["dropout_p"] = 0.0
        whole = F.multi_head_attention_forward if self.index is None else uses.multi_head_attention
        return whole(*call.args, **call.kwargs)

    def _recurrent(self, func: Callable[..., Any]) -> uses.Rule:
        def rule(*args: Any) -> Any:
            start = 4 if isinstance(args[3], bool) else 5
            num_layers, p, training = args[start : start + 3]
            if num_layers > 1 and self._active_rate(p, training=training, part=True):
                with self:
                    return uses.stacked_recurrent(func, args)
            return whole(*args[: start + 1], 0.0, *args[start + 2 :])

        whole = func if self.index is None else uses.unless_mapped(func)
        return rule

    # -- drawing -------------------------------------------------------------------------

    def _active_rate(self, p: float, *, training: bool, part: bool = False) -> float:
        """The rate to apply, 0 where dropout is off.

        `part` says that dropout is an option of a larger layer, attention or a recurrent
        one: a rate of 0 there means that the layer has none, so there is none to override.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability is {p}, expected 0 ≤ p ≤ 1")
        if not (training or self.always) or (part and p == 0):
            return 0.0
        return p if self.rate is None else self.rate

    def _drop(self, x: Tensor, rate: float, shape: Sequence[int]) -> Tensor:
        if rate == 1:
            return torch.zeros_like(x)
        keep, threshold = self._keep(x, rate, shape)
        return torch.where(keep, x * (_LEVELS / (_LEVELS - threshold)), 0)

    def _alpha_drop(self, x: Tensor, rate: float, shape: Sequence[int]) -> Tensor:
        if rate == 1:
            return torch.zeros_like(x)
        keep, threshold = self._keep(x, rate, shape)
        p = threshold / _LEVELS
        slope = ((1 - p) * (1 + p * _ALPHA**2)) ** -0.5
        return torch.where(keep, x, _ALPHA) * slope - slope * _ALPHA * p

    def _keep(self, x: Tensor, rate: float, shape: Sequence[int]) -> tuple[Tensor, int]:
        """A boolean mask of the given shape for this sample, and its threshold in 2⁻¹⁶."""
        if self.on_draw is not None:
            self.on_draw()
        threshold = min(max(round(rate * _LEVELS), 1), _LEVELS - 1)
        size = torch.Size(shape).numel()
        bits = self._bits(-(-size // 4), x.device)
        keep = bits.view(torch.int16)[:, :size] >= threshold - _LEVELS // 2
        if self.index is None:
            return keep[0].view(shape), threshold
        # A mapped index into a table of all samples' masks makes the mask a mapped tensor.
        return keep.index_select(0, self.index.reshape(1)).view(shape), threshold

    def _bits(self, words: int, device: torch.device) -> Tensor:
        keys = self.keys if self.index is not None else self.keys[:1]
        if torch.compiler.is_compiling():
            before = self._traced.setdefault(device, [])
            rows = random.word_rows(keys, before, words, device)
            before.append(words)
            return rows
        streams = self._streams.get(device)
        if streams is None:
            streams = self._streams[device] = [random.Stream(key, device) for key in keys]

        def fill(start: int, stop: int) -> None:
            for i in range(start, stop):
                streams[i].words(rows[i])

        with random.outside(device):
            rows = random.memory((len(streams), words), torch.int64, device)
            workers.over_rows(fill, len(streams), words, device)
        return random.tensor(rows)


_ATTENTION = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": inspect.Parameter.empty,
            "key": inspect.Parameter.empty,
            "value": inspect.Parameter.empty,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)
_MULTI_HEAD_ATTENTION = inspect.signature(uses.multi_head_attention)


def _feature_shape(x: Tensor, unbatched: bool) -> tuple[int, ...]:
    lead = 1 if unbatched else 2
    return (*x.shape[:lead], *(1,) * (x.dim() - lead))


def _torch_signature(rule: uses.Rule) -> uses.Rule:
    def with_train(input: Tensor, p: float, train: bool) -> Tensor:
        return rule(input, p, train)

    return with_train


def _in_place(rule: uses.Rule) -> uses.Rule:
    def write(input: Tensor, p: float, train: bool) -> Tensor:
        return input.copy_(rule(input, p, train))

    return write
