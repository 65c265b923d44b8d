"""A snapshot of everything that a call must leave alone."""

from typing import Any

import torch
from torch import nn


def snapshot(net: nn.Module) -> dict[str, Any]:
    """The bits, memory, gradients, modes, hooks and attributes of a module, and global state."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "storage": {name: (id(t), t.data_ptr(), t._version) for name, t in tensors.items()},
        "grads": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone())
            for name, p in net.named_parameters()
        },
        "requires_grad": {name: p.requires_grad for name, p in net.named_parameters()},
        "modes": {name: m.training for name, m in net.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in net.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in net.named_modules()
        },
        "generator": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    """Compares with a snapshot, bit for bit."""
    after = snapshot(net)
    for part in before:
        _assert_same(before[part], after[part], part)


def _assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            _assert_same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} changed"
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where} changed from {a} to {b}"
