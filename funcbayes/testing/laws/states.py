"""Law 5: states are data. They pass through vmap and compile, merge, and are saved and loaded."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.testing.laws.comparing import check_same, fail, place
from funcbayes.testing.laws.snapshots import Snapshot

_MOST_CUTS = 16


def check_state_vmappable(
    function: Callable[..., Any],
    *stacked: Any,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `vmap(function)` equals a loop over the leading axis.

    So that, for instance, `vmap(update)` of stacked states is many runs at once.

    Args:
        function: from states and tensors to a state; pure.
        *stacked: its arguments; their tensor leaves share a leading axis, other leaves are
            passed on as they are.
        rtol: allowed relative to each number.
        atol: allowed beside it. None for both: half of the digits of the dtype (√eps) of the
            leaf's largest number.

    Raises:
        ValueError: the leaves do not share a leading axis.
        AssertionError: `vmap` refuses the function, or the two differ, or an argument was
            written to; the message names the leaf.
    """
    law = "check_state_vmappable"
    num = trees.leading_size(stacked)
    before = Snapshot(stacked, name="stacked")
    looped = []
    for i in range(num):
        looped.append(function(*trees.index(stacked, i)))
        _check_untouched(law, before, "function")
        for name, leaf in trees.leaves_with_names(looped[-1]):
            if not isinstance(leaf, Tensor):
                came = type(leaf).__name__
                fail(law, f"the result, {place(name)}, is a {came}, which vmap cannot stack")
    expected = trees.stack([trees.clone(result) for result in looped])
    axes = trees.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, stacked)
    try:
        found = torch.func.vmap(function, in_dims=axes)(*stacked)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        fail(
            law,
            f"vmap(function) raised {type(error).__name__}: {_first_line(error)}",
            "a Python `if`, `float()`, `.item()` or `bool()` on a tensor's value, or a write into"
            " a tensor from outside",
        )
    _check_untouched(law, before, "vmap(function)")
    check_same(
        found,
        expected,
        law=law,
        what="vmap(function) against a loop",
        cause="an operation takes the leading axis for one of its own, or reduces over all axes",
        rtol=rtol,
        atol=atol,
        samples=True,
    )


def check_merge(
    fit: Callable[[Any], Any],
    merge: Callable[[Any, Any], Any],
    data: Any,
    *,
    cuts: Sequence[int] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that merged states of disjoint shards are the state of all data.

    For every cut, `merge(fit(data[:cut]), fit(data[cut:]))` equals `fit(data)`, as does the
    merge the other way round; so do three shards, merged from either side. `merge` leaves
    its arguments alone.

    Args:
        fit: from data to a state.
        merge: from two states to one.
        data: tensors in any tree, with one leading axis over data, e.g. `(inputs, targets)`.
        cuts: where to cut. None: everywhere, or at 16 places where there are more.
        rtol: allowed relative to each number.
        atol: allowed beside it. None for both: half of the digits of the dtype (√eps) of the
            leaf's largest number.

    Raises:
        ValueError: the data are fewer than 2, their leading axes differ, or a cut is outside.
        AssertionError: the law does not hold; the message names cut, leaf and entry.
    """
    law = "check_merge"
    num = trees.leading_size(data)
    if num < 2:
        raise ValueError(f"`data` holds {num} data, expected at least 2 to cut between")
    if cuts is None:
        most = min(num - 1, _MOST_CUTS)
        cuts = sorted({1 + i * (num - 2) // max(1, most - 1) for i in range(most)})
    for cut in cuts:
        if not 0 < cut < num:
            raise ValueError(f"`cuts` holds {cut}, expected between 1 and {num - 1}")

    def rows(start: int, stop: int) -> Any:
        return trees.tensor_map(lambda leaf: leaf[start:stop], data)

    close = {"law": law, "rtol": rtol, "atol": atol}
    cause = (
        "a mean where a sum is meant, a count that is not added, or a part (the shift between the"
        " shards' means) that is left out"
    )
    whole = fit(data)

    def merged(a: Any, b: Any, where: str) -> Any:
        before = Snapshot([a, b], name="arguments")
        result = merge(a, b)
        _check_untouched(law, before, f"merge ({where})")
        return result

    for cut in cuts:
        where = f"data cut at {cut} of {num}"
        a, b = fit(rows(0, cut)), fit(rows(cut, num))
        both = merged(a, b, where)
        check_same(both, whole, what=f"{where}: merge against fit", cause=cause, **close)
        swapped = merged(b, a, where)
        what = f"{where}: merge(b, a) against merge(a, b)"
        check_same(swapped, both, what=what, cause="one argument is privileged", **close)
    if num >= 3:
        first, second = num // 3, 2 * num // 3
        a, b, c = fit(rows(0, first)), fit(rows(first, second)), fit(rows(second, num))
        where = f"data cut at {first} and {second} of {num}"
        left = merged(merged(a, b, where), c, where)
        right = merged(a, merged(b, c, where), where)
        for result, how in ((left, "merge(merge(a, b), c)"), (right, "merge(a, merge(b, c))")):
            check_same(result, whole, what=f"{where}: {how} against fit", cause=cause, **close)


def check_checkpoint_round_trip(state: Any, *, types: Sequence[type] = ()) -> None:
    """Checks that `funcbayes.save` and `funcbayes.load` give a state back, bit for bit.

    Type, structure, dtypes, shapes, devices and every bit; memory of its own, apart from the
    state's and the file's; and saving does not change the state. A state that is on another
    device than the CPU is loaded to its device.

    Args:
        state: a state or a posterior.
        types: NamedTuple classes of the user's own in it, as for `funcbayes.load`.

    Raises:
        AssertionError: something differs; the message names the leaf.
    """
    from funcbayes.checkpoint import load, save

    law = "check_checkpoint_round_trip"
    tensors = trees.tensor_leaves(state)
    device = tensors[0].device if tensors else None
    before = Snapshot(state, name="state")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save(path, state)
        _check_untouched(law, before, "save")
        loaded = load(path, device=device, types=tuple(types))
        if type(loaded) is not type(state):
            ours, theirs = type(loaded).__name__, type(state).__name__
            fail(law, f"a {ours} came back where a {theirs} was saved")
        check_same(loaded, state, law=law, what="what was loaded against the state", exact=True)
        mine = {_memory(leaf) for leaf in tensors if leaf.numel()}
        for name, leaf in trees.leaves_with_names(loaded):
            if isinstance(leaf, Tensor) and leaf.numel():
                if _memory(leaf) in mine:
                    fail(law, f"what was loaded, leaf {name}: shares memory with the state")
                with torch.no_grad():
                    leaf.zero_()
        again = load(path, device=device, types=tuple(types))
        what = "what was loaded a second time, after the first was written to"
        cause = "loaded tensors share the file's memory, or each other's"
        check_same(again, state, law=law, what=what, cause=cause, exact=True)


def check_compiles(
    function: Callable[..., Any],
    *args: Any,
    backend: str = "inductor",
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `torch.compile` makes one graph of a function, and one for all values.

    The function is called with the arguments, and then with other values of the same shapes:
    floating-point tensors times 0.75, other tensors with their entries rolled, and Python
    numbers changed (an integer by 1), as a counter in a state changes from step to step. What
    is no value but an option is bound beforehand, by `functools.partial`.

    Resets `torch.compiler`, so that what other code compiled before does not count.

    Args:
        function: from tensors, numbers and trees of them to such.
        *args: its arguments.
        backend: of `torch.compile`; "aot_eager" needs no compiler on the machine.
        rtol: allowed relative to each number.
        atol: allowed beside it. None for both: half of the digits of the dtype (√eps) of the
            leaf's largest number.

    Raises:
        AssertionError: it does not compile to one graph, differs from the uncompiled function,
            or compiles again for other values.
    """
    law = "check_compiles"
    close = {"law": law, "rtol": rtol, "atol": atol}
    others = _other_values(args)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    try:
        # Of the compiler's own warnings some are errors where warnings are.
        with warnings.catch_warnings(action="ignore"):
            found = compiled(*args)
    except Exception as error:
        function(*args)  # an error of its own is none of compilation
        fail(
            law,
            f"torch.compile(fullgraph=True) raised {type(error).__name__}: {_first_line(error)}",
            "a Python `if`, `float()` or `.item()` on a tensor's value, or a call that the"
            " compiler cannot follow",
        )
    what = "the compiled function against the function"
    check_same(found, function(*args), what=what, **close)
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            found = compiled(*others)
    except RuntimeError as error:
        if "recompile" not in str(error):
            raise
        fail(
            law,
            f"other values of the same shapes compile a new graph: {_guard(error)}",
            "a Python number in the state that changes from step to step; make it a tensor",
        )
    what = "the compiled function against the function, with other values"
    cause = "a value of the first call was taken for a constant"
    check_same(found, function(*others), what=what, cause=cause, **close)


def _other_values(args: Any) -> Any:
    others: dict[int, Any] = {}

    def other(leaf: Any) -> Any:
        # One tensor in two places stays one: the compiler relies on it.
        if isinstance(leaf, Tensor) and id(leaf) in others:
            return others[id(leaf)]
        others[id(leaf)] = _other_value(leaf)
        return others[id(leaf)]

    return trees.tree_map(other, args)


def _other_value(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        value = leaf.detach().clone()
        if leaf.is_floating_point() or leaf.is_complex():
            value = value * 0.75
        elif leaf.dim():
            value = value.reshape(-1).roll(1).reshape(leaf.shape)
        return value.requires_grad_(leaf.requires_grad)
    if isinstance(leaf, bool) or not isinstance(leaf, int | float):
        return leaf
    return leaf + 1 if isinstance(leaf, int) else leaf * 0.75


def _check_untouched(law: str, before: Snapshot, call: str) -> None:
    changed = before.difference()
    if changed:
        fail(law, f"after {call}, {changed[0]}", changed[1])


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage().data_ptr()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else "no message"


def _guard(error: Exception) -> str:
    """The check that failed, which torch writes after a dash."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    guards = [line for line in lines if line.startswith("- ")]
    return (guards or lines)[0][:300]
