"""Training passes of ensemble members, each in a core of its own.

One pass over all members at once is the fastest where little is computed. Where much is,
convolutions above all, each member's forward and backward pass runs in a worker: its tensors
stay in its core's cache, and only as many passes are in memory as there are cores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcbayes.core import images, operations, trees, workers
from funcbayes.core.model import Model
from funcbayes.core.trees import TensorTree

# A backward pass computes about twice what the forward pass does.
_WITH_GRADIENT = 3


Format = Callable[[Any], Any]


def own_format(
    model: Model,
    member: Callable[[Format, TensorTree, dict[str, Tensor], int], Any],
    params: TensorTree,
    constants: dict[str, Tensor],
    batch: Any,
) -> Format | None:
    """How inputs are given to passes of one member each; None where one of all is faster.

    Args:
        model: keeps the answer for inputs of the same format.
        member: takes such a format, one member's parameters and constants, and its number, and
            runs its forward pass; the first one's is counted the first time.
        params: leaves `[members, *shape]`.
        constants: by name, `[members, *shape]`.
        batch: inputs and targets.
    """
    if torch.compiler.is_compiling() or workers.bound():
        return None
    cores, num_members = torch.get_num_threads(), trees.leading_size(params)
    if min(cores, num_members) == 1:
        return None
    data = trees.tensor_leaves(batch)
    everything = [*trees.tensor_leaves((params, constants)), *data]
    if trees.in_transform(everything) or any(leaf.device.type != "cpu" for leaf in everything):
        return None
    # Gradients will be known for the parameters alone, and no tangents.
    others = [*data, *trees.tensor_leaves(constants)]
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in others):
        return None
    if any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in everything):
        return None
    plans, key = model._scratch.plans, _key(num_members, batch)
    if key not in plans:

        def first(form: Format) -> Any:
            return member(form, trees.index(params, 0), trees.index(constants, 0), 0)

        found = _count(first, has_images=images.meet_convolutions(model, batch[0]))
        faster = found is not None and _costs_less(found[0], num_members, cores)
        model._scratch.remember(plans, key, found[1] if found and faster else None)
    return plans[key]


def forget(model: Model, params: TensorTree, batch: Any) -> None:
    """Has all members run together on such batches from now on."""
    scratch = model._scratch
    scratch.remember(scratch.plans, _key(trees.leading_size(params), batch), None)


def _key(num_members: int, batch: Any) -> Any:
    formats = tuple((leaf.shape, leaf.dtype) for leaf in trees.tensor_leaves(batch))
    autocast = torch.is_autocast_enabled("cpu")
    return "members", torch.get_num_threads(), num_members, autocast, formats


def _count(
    first: Callable[[Format], Any], *, has_images: bool
) -> tuple[operations.Counter, Format] | None:
    """What a pass computes, in a format that it takes; None if it may not run beside others."""
    for form in (images.channels_last, images.as_they_are)[not has_images :]:
        counter = operations.Counter()
        try:
            with torch.no_grad(), counter:
                first(form)
        except operations.OwnRandomnessError:
            return None  # threads would take the global generator's numbers in any order
        except RuntimeError:
            # A `view` that needs the usual memory format, or a fault that comes again.
            if form is images.as_they_are:
                raise
        else:
            return counter, form
    raise AssertionError("the loop ends in a return or an error")


def _costs_less(counter: operations.Counter, num_members: int, cores: int) -> bool:
    one_pass = operations.PASS + operations.KERNEL * counter.kernels
    computed = num_members * counter.operations * _WITH_GRADIENT
    together = one_pass + computed * operations.BATCHED / (cores * operations.SHARING)
    return operations.START + (num_members * one_pass + computed) / cores < together


def run(
    member: Callable[[TensorTree, dict[str, Tensor], int], tuple[Tensor, dict[str, Tensor]]],
    params: TensorTree,
    constants: dict[str, Tensor],
    again: Callable[[list[Tensor]], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs every member's pass in the workers, and its gradient with it where one is wanted.

    Args:
        member: takes one member's parameters and constants, and its number; gives its loss and
            its buffers.
        params: leaves `[members, *shape]`.
        constants: by name, `[members, *shape]`.
        again: the losses as a function of the leaves of `params`, by operations that autograd
            can follow; called for second derivatives alone.

    Returns:
        The losses `[members]`, differentiable in `params`, and the buffers `[members, *shape]`.

    Raises:
        OtherGradientsError: a loss depends on other tensors that require gradients.
        Exception: what the first member that failed raised.
    """
    with_gradients = torch.is_grad_enabled()
    stacks = trees.leaves(params)
    wanted = [with_gradients and leaf.requires_grad for leaf in stacks]
    rows = {k: torch.empty_like(stacks[k]) for k, w in enumerate(wanted) if w}
    used = [False] * len(stacks)

    def one(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        own = [x[i].detach().requires_grad_(w) for x, w in zip(stacks, wanted, strict=True)]
        mine = {name: value[i].detach() for name, value in constants.items()}
        with torch.set_grad_enabled(with_gradients):
            loss, buffers = member(trees.unflatten(own, params), mine, i)
        if loss.requires_grad:
            _check_own(loss, own)
            found = torch.autograd.grad(loss, [own[k] for k in rows], allow_unused=True)
            for k, grad in zip(rows, found, strict=True):
                if grad is not None:
                    rows[k][i].copy_(grad)
                    used[k] = True
                else:
                    rows[k][i].zero_()
        return trees.tensor_map(torch.Tensor.detach, (loss, buffers))

    done = workers.results([workers.submit(one, i) for i in range(trees.leading_size(params))])
    losses, buffers = trees.stack(done)
    # Optimizers pass over a parameter that has no gradient, as one that is not used.
    gradients = [rows[k] if used[k] else None for k in range(len(stacks))]
    if any(used):
        losses = _WithGradients.apply(losses, gradients, again, *stacks)
    return losses, buffers


class OtherGradientsError(RuntimeError):
    """A loss depends on tensors that require gradients and are no parameters of a member."""

    def __init__(self) -> None:
        super().__init__("a member's loss depends on other tensors that require gradients")


def _check_own(loss: Tensor, own: list[Tensor]) -> None:
    """Looks whether the graph of a loss ends in a member's own parameters alone."""
    known = {id(leaf) for leaf in own}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Where a graph ends: the node of a leaf, which no stub knows.
        if type(node).__name__ == "AccumulateGrad" and id(getattr(node, "variable")) not in known:  # noqa: B009
            raise OtherGradientsError
        waiting.extend(parent for parent, _ in node.next_functions)


class _WithGradients(torch.autograd.Function):
    """Losses whose gradients are known already.

    `apply(losses, gradients, again, *leaves)`; `again` computes the losses by operations that
    autograd can follow, for a second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        gradients: list[Tensor | None],
        again: Callable[[list[Tensor]], Tensor],
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*leaves)
        ctx.gradients, ctx.again = gradients, again
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = outer
        # Also where they are not needed: torch refuses what was written over, or freed.
        leaves = list(ctx.saved_tensors)
        if torch.is_grad_enabled():
            needed = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(
                torch.autograd.grad(
                    ctx.again(leaves), needed, weights, create_graph=True, allow_unused=True
                )
            )
            grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        else:
            grads = [
                None if g is None else g * weights.view(-1, *(1,) * (g.dim() - 1)).to(g.dtype)
                for g in ctx.gradients
            ]
        return (None, None, None, *grads)
