"""Pytrees: what goes in comes out, without copies, and errors name the leaf."""

import math
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from funcbayes.core import trees


class Pair(NamedTuple):
    first: object
    second: object


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TREES = st.recursive(
    SHAPES,  # a leaf, as its shape; `build` makes the tensor
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("tuple", parts)),
        st.dictionaries(st.sampled_from(["a", "fc.weight", "0", "b"]), inner, min_size=1),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=6,
)
LIKE = {"a": torch.zeros(2), "b": [torch.zeros(2, 2), torch.zeros(())]}


def build(spec, make):
    """A tree of `make(shape)` from what `TREES` gives."""
    match spec:
        case Pair(first=a, second=b):
            return Pair(build(a, make), build(b, make))
        case ("tuple", list() as parts):
            return tuple(build(part, make) for part in parts)
        case tuple():
            return make(spec)
        case list():
            return [build(part, make) for part in spec]
        case _:
            return {name: build(part, make) for name, part in spec.items()}


def numbered(*batch, dtype=torch.float64):
    """Makes leaves that hold different numbers each."""
    count = 0

    def make(shape):
        nonlocal count
        size = math.prod((*batch, *shape))
        count += size
        return torch.arange(count - size, count, dtype=dtype).reshape((*batch, *shape))

    return make


def same_memory(a, b):
    return (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


# -- ravel and unravel ---------------------------------------------------------------------


@given(spec=TREES, batch=st.lists(st.integers(0, 3), max_size=2))
def test_ravel_and_unravel_are_inverse(spec, batch):
    like, tree = build(spec, numbered()), build(spec, numbered(*batch))
    flat = trees.ravel(tree, batch_dims=len(batch))
    assert flat.shape == (*batch, trees.num_elements(like))
    back = trees.unravel(flat, like, batch_dims=len(batch))
    assert trees.same_structure(back, tree)
    assert_close(trees.leaves(back), trees.leaves(tree), rtol=0, atol=0)
    parts = [x.reshape(*batch, math.prod(x.shape[len(batch) :])) for x in trees.leaves(tree)]
    assert_close(flat, torch.cat(parts, dim=-1), rtol=0, atol=0)


@given(spec=TREES, batch=st.lists(st.integers(1, 3), max_size=2))
def test_neither_way_copies_what_lies_in_one_buffer(spec, batch):
    like = build(spec, numbered())
    flat = torch.randn(*batch, trees.num_elements(like), dtype=torch.float64)
    tree = trees.unravel(flat, like, batch_dims=len(batch))
    storage = flat.untyped_storage().data_ptr()
    assert {leaf.untyped_storage().data_ptr() for leaf in trees.leaves(tree)} == {storage}
    again = trees.ravel(tree, batch_dims=len(batch))
    assert_close(again, flat, rtol=0, atol=0)
    if flat.numel():
        assert again.data_ptr() == flat.data_ptr()
        flat.add_(1)  # writing through is what the views are for
        assert_close(again, flat, rtol=0, atol=0)


@pytest.mark.parametrize(
    "tree",
    [
        [torch.arange(6.0)[3:], torch.arange(6.0)[:3]],  # two storages
        (lambda x: [x[3:], x[:3]])(torch.arange(6.0)),  # out of order
        (lambda x: [x[:2], x[3:]])(torch.arange(6.0)),  # a gap
        (lambda x: [x[:4], x[2:]])(torch.arange(6.0)),  # overlapping
        (lambda x: [x[::2], x[1::2]])(torch.arange(6.0)),  # strided
        (lambda x: [x.T[:1], x.T[1:]])(torch.arange(6.0).view(3, 2)),  # not contiguous
        (lambda x: [x[0], x[0].expand(2)])(torch.arange(6.0)),  # expanded
        (lambda x: [x[:2], x.view(torch.int32)[2:]])(torch.arange(6.0)),  # another dtype
    ],
)
def test_leaves_of_one_storage_that_do_not_follow_each_other_are_copied(tree):
    assert_close(trees.ravel(tree), torch.cat([x.flatten() for x in tree]), rtol=0, atol=0)


def test_batched_leaves_of_one_storage_are_told_from_their_rows():
    x = torch.arange(12.0)
    # Each leaf contiguous, one behind the other: as rows they interleave.
    tree = [x[:4].view(2, 2), x[4:8].view(2, 2)]
    expected = torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7]])
    assert_close(trees.ravel(tree, batch_dims=1), expected, rtol=0, atol=0)
    other_stride = [x[:6].view(2, 3), x.as_strided((2, 2), (4, 1), 3)]
    flat = trees.ravel(other_stride, batch_dims=1)
    assert_close(flat, torch.cat(other_stride, dim=1), rtol=0, atol=0)
    sliding = [x[:6].view(2, 3), x[3:9].view(2, 3)]
    assert_close(trees.ravel(sliding, batch_dims=1), torch.cat(sliding, dim=1), rtol=0, atol=0)


def test_mixed_dtypes_ravel_to_the_widest_and_come_back():
    tree = {"a": torch.tensor([1.5]), "b": torch.tensor([2.5], dtype=torch.float64)}
    tree["c"] = torch.tensor([3.5], dtype=torch.bfloat16)
    flat = trees.ravel(tree)
    assert flat.dtype == torch.float64
    assert flat.tolist() == [1.5, 2.5, 3.5]
    back = trees.unravel(flat, tree)
    assert {name: leaf.dtype for name, leaf in back.items()} == {
        name: leaf.dtype for name, leaf in tree.items()
    }
    assert_close(back, tree, rtol=0, atol=0)


def test_ravel_refuses_a_tree_without_leaves_and_unravel_another_size():
    with pytest.raises(ValueError, match="no leaves, so there is nothing to ravel"):
        trees.ravel({})
    with pytest.raises(ValueError, match="`flat` has 6 entries, expected 7"):
        trees.unravel(torch.zeros(6), LIKE)


def weighted(tree):
    flat = trees.ravel(tree)
    return (flat.square() * torch.arange(1.0, flat.shape[-1] + 1)).sum()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, in jvp
def test_derivatives_reach_every_leaf_also_of_views_of_one_buffer():
    flat = torch.randn(7)
    tree = trees.unravel(flat, LIKE)
    expected = 2 * flat * torch.arange(1.0, 8)
    assert_close(trees.ravel(grad(weighted)(tree)), expected)
    assert_close(grad(lambda x: weighted(trees.unravel(x, LIKE)))(flat), expected)

    leaves = [leaf.detach().requires_grad_() for leaf in trees.leaves(tree)]
    gradients = torch.autograd.grad(weighted(trees.unflatten(leaves, LIKE)), leaves)
    assert_close(trees.ravel(list(gradients)), expected)

    tangent = trees.tree_map(torch.ones_like, tree)
    assert_close(jvp(weighted, (tree,), (tangent,))[1], expected.sum())
    with forward_ad.dual_level():
        duals = trees.tree_map(forward_ad.make_dual, tree, tangent)
        assert_close(forward_ad.unpack_dual(weighted(duals)).tangent, expected.sum())


@pytest.mark.parametrize("axis", [0, 1])
def test_ravel_and_unravel_work_inside_vmap(axis):
    flat = torch.randn(3, 7)
    rows = flat if axis == 0 else flat.T
    back = vmap(lambda x: trees.ravel(trees.unravel(x, LIKE)), in_dims=axis)(rows)
    assert_close(back, flat, rtol=0, atol=0)
    stacked = trees.unravel(flat, LIKE, batch_dims=1)
    assert_close(vmap(trees.ravel)(stacked), flat, rtol=0, atol=0)
    assert_close(vmap(grad(weighted))(stacked)["a"], (2 * flat * torch.arange(1.0, 8))[:, :2])


# -- structure -----------------------------------------------------------------------------


@given(spec=TREES)
def test_leaves_names_and_structure_agree(spec):
    tree = build(spec, numbered())
    named = trees.leaves_with_names(tree)
    assert [leaf.data_ptr() for _, leaf in named] == [x.data_ptr() for x in trees.leaves(tree)]
    assert len({name for name, _ in named}) == len(named)
    if not isinstance(tree, torch.Tensor):
        for name, leaf in named:
            assert eval("tree" + name) is leaf
    assert_close(trees.unflatten(trees.leaves(tree), tree), tree, rtol=0, atol=0)
    trees.check_like(tree, tree, name="tree")


@given(spec=TREES, num=st.integers(1, 4))
def test_unstack_undoes_stack(spec, num):
    make = numbered()
    members = [build(spec, make) for _ in range(num)]
    stacked = trees.stack(members)
    assert trees.leading_size(stacked) == num
    for i, (member, back) in enumerate(zip(members, trees.unstack(stacked), strict=True)):
        assert trees.same_structure(member, back)
        assert_close(trees.leaves(back), trees.leaves(member), rtol=0, atol=0)
        for leaf, whole in zip(trees.leaves(back), trees.leaves(stacked), strict=True):
            assert same_memory(leaf, whole[i])


def test_index_and_tensor_map_leave_what_is_no_tensor():
    tree = {"x": torch.arange(3.0), "none": None, "number": 2}
    assert trees.index(tree, 1) == {"x": torch.tensor(1.0), "none": None, "number": 2}
    assert trees.leading_size(tree) == 3
    assert [leaf.numel() for leaf in trees.tensor_leaves(tree)] == [3]


def test_clones_are_detached_contiguous_copies():
    x = torch.randn(3, 2, requires_grad=True)
    copy = trees.clone({"x": x.T, "k": 2})
    assert copy["k"] == 2
    assert_close(copy["x"], x.detach().T, rtol=0, atol=0)
    assert not copy["x"].requires_grad
    assert copy["x"].is_contiguous()
    with torch.no_grad():
        x.zero_()
    assert bool(copy["x"].any())
    assert not any(bool(leaf.any()) for leaf in trees.leaves(trees.zeros_like(copy["x"])))


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"fc.weight": torch.zeros(3, 4)}, r"`params\['fc.weight'\]` has shape \(3, 4\), expected "
         r"\(4, 3\): was it transposed\?"),
        ({"fc.weight": torch.zeros(4, 2)}, r"has shape \(4, 2\), expected \(4, 3\)$"),
        ({"fc.weight": torch.zeros(4)}, r"has shape \(4,\), expected \(4, 3\)$"),
        ({"fc.weigth": torch.zeros(4, 3)}, r"`params` has another structure: "
         r"params\['fc.weight'\] is missing; params\['fc.weigth'\] is not expected"),
        ({}, r"params\['fc.weight'\] is missing"),
        ({"fc.weight": None}, r"`params\['fc.weight'\]` is a NoneType, expected a tensor"),
        ({"fc.weight": [torch.zeros(4, 3)]}, r"params\['fc.weight'\]\[0\] is not expected"),
        (torch.zeros(4, 3), r"params\['fc.weight'\] is missing"),
        (OrderedDict({"fc.weight": torch.zeros(4, 3)}), "`params` is a OrderedDict of"),
    ],
)  # fmt: skip
def test_check_like_names_the_leaf(tree, message):
    with pytest.raises(ValueError, match=message):
        trees.check_like(tree, {"fc.weight": torch.zeros(4, 3)}, name="params")


def test_check_like_says_that_only_the_order_differs():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"leaves in the order \['b'\], \['a'\], expected that of"):
        trees.check_like({"b": x, "a": x}, {"a": x, "b": x}, name="params")


def test_check_like_tells_a_list_from_a_tuple():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="`params` is a tuple of"):
        trees.check_like((x,), [x], name="params")


def test_check_like_with_batch_axes():
    like = {"w": torch.zeros(2, 3), "s": torch.zeros(())}
    trees.check_like({"w": torch.zeros(5, 2, 3), "s": torch.zeros(5)}, like, name="p", batch_dims=1)
    with pytest.raises(ValueError, match=r"`p\['w'\]` has shape \(3,\), expected \(2, 3\)"):
        trees.check_like(like, like, name="p", batch_dims=1)
    bad = {"w": torch.zeros(5, 2, 3), "s": torch.zeros(())}
    with pytest.raises(ValueError, match=r"`p\['s'\]` has shape \(\), expected 1 leading axes"):
        trees.check_like(bad, like, name="p", batch_dims=1)


def test_stack_checks_its_trees():
    with pytest.raises(ValueError, match="`trees` is empty"):
        trees.stack([])
    with pytest.raises(ValueError, match=r"`trees\[1\]\['a'\]` has shape \(3,\), expected \(2,\)"):
        trees.stack([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3, 2)}, r"\"\['a'\]\": 2, \"\['b'\]\": 3"),
        ({"a": torch.zeros(2), "b": torch.zeros(())}, r"\"\['b'\]\": None"),
        ({}, r"absent \(no tensor\), expected one length for all"),
        ([None, 3], r"absent \(no tensor\)"),
    ],
)
def test_leading_size_wants_one_length(tree, message):
    with pytest.raises(ValueError, match=message):
        trees.leading_size(tree)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.tensor([1.0, x]).to(torch.float8_e5m2),
        lambda x: torch.tensor([0.0, x]).to_sparse(),
        lambda x: torch.complex(torch.tensor([1.0]), torch.tensor([x])),
        lambda x: torch.tensor([1e38, 1e38, x]),
        lambda x: torch.tensor([6e4, 6e4, x]).half(),
        lambda x: [torch.tensor([x]), torch.empty(0), torch.ones(2, dtype=torch.float64)],
        lambda x: torch.tensor([x, 1.0]).expand(3, 2),
    ],
)
def test_any_tensor_is_finite_or_not(make):
    assert trees.is_finite(make(2.0))
    assert not trees.is_finite(make(math.inf))
    assert not trees.is_finite(make(math.nan))
    assert trees.is_finite({"whole": torch.arange(3), "nothing": None})


def test_check_finite_names_the_leaf_and_counts():
    big = torch.full((4,), torch.finfo(torch.float32).max)  # the sum overflows, no entry does
    fine = {"big": big, "int": torch.ones(2, dtype=torch.int64), "none": None, "e": torch.zeros(0)}
    trees.check_finite(fine, name="params")
    for value in (math.nan, math.inf, -math.inf):
        bad = {**fine, "w": torch.tensor([1.0, value, 2.0])}
        with pytest.raises(ValueError, match=r"`params\['w'\]` has 1 of 3 entries NaN or infinite"):
            trees.check_finite(bad, name="params")
    with pytest.raises(ValueError, match="2 of 2 entries"):
        trees.check_finite(torch.tensor([math.inf, -math.inf]), name="params")
