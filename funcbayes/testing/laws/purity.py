"""Law 1: no call changes anything of the user's, also where it raises half-way."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from funcbayes.testing.laws.comparing import fail
from funcbayes.testing.laws.snapshots import Snapshot

_MOST_FAULTS = 24

_Signature = tuple[tuple[str, type], ...]


def check_pure(call: Callable[[], Any], watched: Any, *, raises: bool = True) -> None:
    """Checks that a call leaves what is watched, and the process, bit for bit as it was.

    Compared are, of every module: its parameters, buffers and submodules (the objects, their
    memory, their bits and whether anything wrote to them meanwhile), gradients,
    `requires_grad`, modes, hooks and attributes; of every other object the same as far as it
    has it; of the process: the global generators of torch (CUDA's where it is in use), NumPy
    and Python, thread counts, grad and inference mode, default dtype and device, autocast, and
    what else torch keeps for all.

    Args:
        call: the work under test, e.g. `lambda: fb.predict(model, posterior, x, key=0,
            num_samples=3)`. Called several times.
        watched: what it must not change: a module, a `funcbayes.Model`, a posterior or state, a
            tree of tensors, or a list of such things. NamedTuples, containers and the
            attributes of objects are looked into; those of a module's own attributes only where
            they are containers, tensors, arrays, generators or dataclasses. A cache that the
            call fills is a change as well.
        raises: whether the call is repeated with a forward pass of the watched modules (or of
            copies of them) made to raise after its work, once for each pass that the call
            makes, or for 24 of them where there are more, the first and last among them. What
            is watched must then be unchanged as well, and a last undisturbed call must work.
            Passes that go round `Module.__call__` are not seen.

    Raises:
        AssertionError: something changed; the message names it.
    """
    law = "check_pure"
    before = Snapshot(watched)

    def compare(when: str) -> None:
        changed = before.difference()
        if changed:
            fail(law, f"{when}, {changed[0]}", changed[1])

    networks = before.networks if raises else []
    with _counted({_signature(part) for net in networks for part in net.modules()}) as passes:
        call()
    compare("after the call")
    chosen = set().union(*(_outermost(network, passes.counts) for network in networks))
    total = sum(passes.counts[signature] for signature in chosen)
    if not total:
        return
    for number in _spread(total):
        with _counted(chosen, fail_at=number) as passes:
            try:
                call()
            except Exception as error:
                if not passes.failed:
                    fail(law, f"a repeated call raised {error!r}, and the first one did not")
        compare(f"after the call's forward pass {number} was made to raise")
    try:
        call()
    except Exception as error:
        fail(
            law,
            f"after calls whose forward pass was made to raise, the call itself raises {error!r}",
            "something that a raised error leaves half-done; put it back in a `finally`",
        )
    compare("after a call that followed calls made to raise")


class FaultError(Exception):
    """Raised by `check_pure` in a forward pass."""


class _Passes:
    """Counts the forward passes of modules with some signatures, in all threads."""

    def __init__(self, signatures: set[_Signature], fail_at: int | None) -> None:
        self.counts: Counter[_Signature] = Counter()
        self.failed = False
        self._signatures = signatures
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        signature = _signature(module)
        if signature not in self._signatures:
            return
        with self._lock:
            self.counts[signature] += 1
            due = self.counts.total() == self._fail_at
            self.failed = self.failed or due
        if due:
            raise FaultError(f"funcbayes.testing made forward pass {self._fail_at} raise")


@contextmanager
def _counted(signatures: set[_Signature], fail_at: int | None = None) -> Iterator[_Passes]:
    passes = _Passes(signatures, fail_at)
    if not signatures:
        yield passes
        return
    # A hook for all modules, since those called may be copies of the ones watched, and may
    # have a `forward` of their own on the instance.
    handle = register_module_forward_hook(passes)
    try:
        yield passes
    finally:
        handle.remove()


def _signature(network: nn.Module) -> _Signature:
    """What a network shares with its structural copies, and with no part of itself."""
    return tuple((name, type(part)) for name, part in network.named_modules())


def _outermost(network: nn.Module, counts: Counter[_Signature]) -> set[_Signature]:
    """The signatures of the largest parts that were called: mostly that of the network."""
    signature = _signature(network)
    if counts[signature]:
        return {signature}
    return set().union(*(_outermost(part, counts) for part in network.children()))


def _spread(total: int) -> list[int]:
    """The numbers 1 … total, or some of them with both ends."""
    if total <= _MOST_FAULTS:
        return list(range(1, total + 1))
    third = _MOST_FAULTS // 3
    middle = [third + (total - 2 * third) * i // (third + 1) for i in range(1, third + 1)]
    return [*range(1, third + 1), *middle, *range(total - third + 1, total + 1)]
