"""Saved states come back bit for bit; everything else is refused in one sentence."""

import errno
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import funcbayes as fb
from funcbayes import checkpoint
from funcbayes.core import trees

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
# What the first version of the format looked like.
FIRST_FORMAT = (
    b'\x98\x02\x00\x00\x00\x00\x00\x00{"__metadata__":{"funcbayes":"{\\"digest\\":\\"77a24c3'
    b'69f2c522e11a2e38e59b30a88068efaaf161de1c1ddc05f874efb5aff\\",\\"format\\":1,\\"version'
    b'\\":\\"0.1.0\\",\\"type\\":\\"list\\",\\"structure\\":{\\"list\\":[{\\"type\\":\\"func'
    b'bayes.Diagonal\\",\\"fields\\":{\\"mean\\":{\\"dict\\":[[\\"fc.weight\\",{\\"tensor\\"'
    b':\\"state[0].mean[\'fc.weight\']\\",\\"complex\\":false,\\"requires_grad\\":false}]]},'
    b'\\"std\\":{\\"tuple\\":[null,{\\"OrderedDict\\":[[\\"a\\",{\\"tensor\\":\\"state[0].st'
    b'd[1][\'a\']\\",\\"complex\\":false,\\"requires_grad\\":false}]]}]}}},\\"text\\"]}}"},"'
    b'state[0].std[1][\'a\']":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"state[0].mean'
    b'[\'fc.weight\']":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]}}   \x03\x00\x00\x00'
    b"\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00@"
)


class MyPosterior(NamedTuple):
    mean: Any
    scale: Any


def some(shape=(2, 3), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def params(seed=0):
    return {"fc.weight": some((4, 3), seed=seed), "fc.bias": some((4,), seed=seed + 1)}


def network(width=3, *, bias=True):
    return nn.Sequential(OrderedDict(fc=nn.Linear(width, 4, bias=bias)))


def curvature():
    """Of a network with the layer fc and more: every kind of block once."""
    blocks = {
        ("fc.weight",): fb.curvature.blocks.KroneckerBlock(
            some((1, 3, 3)), some((1, 4, 4)), torch.tensor(7.0)
        ),
        ("fc.bias",): fb.curvature.blocks.DiagonalBlock(some((4,))),
        ("conv",): fb.curvature.blocks.EigenKroneckerBlock(
            some((2, 3, 5)), some((2, 3, 3)), some((2, 5, 5))
        ),
        ("a", "b"): fb.curvature.blocks.DenseBlock(some((2, 3, 3))),
        ("c", "d", "e"): fb.curvature.blocks.LowRankBlock(some((1, 2)), some((1, 5, 2))),
    }
    return fb.curvature.blocks.Curvature(blocks)


def small_curvature():
    """Of the network with the layer fc alone."""
    blocks = {names: curvature().blocks[names] for names in (("fc.weight",), ("fc.bias",))}
    return fb.curvature.blocks.Curvature(blocks)


def laplace():
    kind = fb.laplace.LaplaceState
    fields = {
        **dict.fromkeys(kind._fields),  # those that are optional
        "mean": params(),
        "curvature": small_curvature(),
        "num_data": torch.tensor(7),
        "loss": torch.tensor(1.5),
    }
    return kind(**fields)


def block_normal():
    factors = {
        ("fc.weight",): fb.posteriors.KroneckerFactor(
            some((1, 4, 3)), some((1, 4, 4)), some((1, 3, 3))
        ),
        ("fc.bias",): fb.posteriors.DenseFactor(torch.eye(4).expand(1, 4, 4)),
    }
    return fb.posteriors.BlockNormal(params(), factors)


def states():
    p = params()
    swag = fb.swag.init(p, max_rank=2)
    for i in range(3):
        swag = fb.swag.update(swag, params(i))
    diagonal = fb.posteriors.Diagonal(p, trees.tree_map(torch.abs, p))
    stacked = trees.stack([params(i) for i in range(5)])
    members = fb.ensemble.EnsembleState(stacked, {"norm.running_mean": some((5, 4))})
    return {
        "swag": swag,
        "swag posterior": fb.swag.posterior(swag),
        "laplace": laplace(),
        "vi": fb.vi.init(p),
        "ensemble": members,
        "diagonal": diagonal,
        "low rank": fb.posteriors.LowRank(p, p, stacked),
        "block normal": block_normal(),
        "block normal of other factors": fb.posteriors.BlockNormal(
            p,
            {
                ("fc.weight",): fb.posteriors.LowRankFactor(
                    some((2, 6)), some((2, 6, 1)), some((2, 1))
                ),
                ("fc.bias",): fb.posteriors.DiagonalFactor(some((4,))),
            },
        ),
        "curvature": curvature(),
        "empirical": fb.posteriors.Empirical(stacked, {}),
        "mixture": fb.posteriors.mixture([diagonal, fb.swag.posterior(swag)], [1, 2]),
        "dropout": fb.posteriors.DropoutMasks(p, None, "row"),
        "dropout with a rate": fb.posteriors.DropoutMasks(p, 0.25, "batch"),
        "conformal sets": fb.conformal.SetsState(torch.tensor(0.3, dtype=torch.float64), "aps"),
        "conformal intervals": fb.conformal.IntervalsState(some((2,)), "absolute"),
        "key": fb.random.split(fb.random.key(2**128 - 1), 3)[2],
        "all in one": {"epoch": 3, "states": [swag, (fb.vi.init(p), None)]},
    }


def assert_same(a, b, where="state"):
    """Types, structure, and bits; and no memory is shared."""
    assert type(a) is type(b) or {type(a), type(b)} == {Tensor, nn.Parameter}, where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.requires_grad == b.requires_grad, where
        assert b.is_leaf, where
        assert b.is_contiguous(), where
        a, b = (x.detach().cpu().resolve_conj().resolve_neg().contiguous() for x in (a, b))
        assert a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8)), where
        assert not a.numel() or a.data_ptr() != b.data_ptr(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert repr(a) == repr(b), where  # nan is itself, 1 is not 1.0


def round_trip(state, path, **options):
    fb.save(path, state)
    return fb.load(path, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


# What goes in comes out


@pytest.mark.parametrize("name", states())
def test_every_state_and_posterior_comes_back(name, path):
    state = states()[name]
    assert_same(state, round_trip(state, path))


@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize(
    "structure", ["diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank"]
)
def test_laplace_fits_come_back_with_their_evidence_at_any_noise(structure, per_output, path):
    net = network()
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(
        model,
        (some((6, 3)), some((6, 4), seed=1)),
        likelihood=fb.likelihoods.Gaussian(noise_std=0.5),
        structure=structure,
        rank=3 if structure == "low_rank" else None,
        per_output_noise=per_output,
    )
    back = round_trip(state, path, model=model)
    assert_same(state, back)
    for one, other in ((state, back), (fb.laplace.decompose(state), fb.laplace.decompose(back))):
        for noise_std in (None, 0.2, *([torch.tensor([0.1, 0.2, 0.3, 0.4])] * per_output)):
            options = {"prior_precision": 2.0, "noise_std": noise_std}
            # The bits are the same, and so is all that is computed from them.
            found = fb.laplace.log_marginal_likelihood(other, **options)
            assert found.equal(fb.laplace.log_marginal_likelihood(one, **options))
            a, b = (fb.laplace.posterior(s, **options) for s in (one, other))
            assert_same(a.sample(0, 2), b.sample(0, 2))
            round_trip(a, path)


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS, *COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5)], ids=str)
def test_every_dtype_and_shape(dtype, shape, path):
    if dtype == torch.complex32:
        warnings.filterwarnings("ignore", message="ComplexHalf support is experimental")
    x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same({"x": x, "y": x}, round_trip({"x": x, "y": x}, path))
    assert_same(x, round_trip(x, path))


def test_special_values_keep_their_bits(path):
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 2**0.5])
    x.view(torch.int32)[0] += 5  # a NaN with a payload
    assert_same(x, round_trip(x, path))


def test_tensors_that_lie_oddly_in_memory(path):
    base = some((4, 6))
    z = torch.complex(base, base + 1)
    state = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "flipped view": base.flip(0)[1:],
        "expanded": some((1, 6)).expand(1000, 6),
        "channels last": some((2, 3, 4, 5)).to(memory_format=torch.channels_last),
        "offset": base.view(-1)[7:],
        "the same": base,
        "the same again": base,
        "conjugated": z.conj(),
        "its imaginary part": z.conj().imag,
        "inference": torch.inference_mode()(lambda: base + 1)(),
        "parameter": nn.Parameter(base.clone()),
        "result": nn.Parameter(base.clone()) * 2,
    }
    before = trees.clone(state)
    loaded = round_trip(state, path)
    assert_same(state, loaded)
    for name, x in before.items():
        assert torch.equal(x, state[name]), name
    loaded["the same"].zero_()
    assert loaded["the same again"].any()


def test_leaves_that_require_grad_do_so_again_and_train(path):
    state = round_trip(fb.vi.init(params()), path)
    leaves = trees.leaves(state)
    optimizer = torch.optim.Adam(leaves)
    sum(leaf.square().sum() for leaf in leaves).backward()
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
    half = round_trip(fb.vi.init(params()), path, dtype=torch.float16)
    assert all(x.requires_grad and x.is_leaf for x in trees.leaves(half))


ODD_KEYS = ("", ".", "a.b", "it's", '"', "\\", "\n\0", "日本 🙂", "\ud800", "__metadata__", "state")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters(), max_size=4)  # surrogates too
)
words = st.text(st.characters(), max_size=4) | st.sampled_from(ODD_KEYS)
keys = words | st.lists(words, max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype, seed: some(shape, dtype, seed),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(FLOATS + COMPLEX[1:]),
    st.integers(0, 99),
)
nested = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.builds(MyPosterior, inner, inner)
        | st.builds(fb.posteriors.Diagonal, inner, inner)
    ),
    max_leaves=8,
)


@given(state=nested)
def test_any_nested_tree_comes_back(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "file"
    assert_same(state, round_trip(state, path, types=(MyPosterior,)))
    if "\\ud" not in repr(state):
        with safetensors.safe_open(path, "pt") as file:
            assert len(file.keys()) == len(trees.tensor_leaves(state))


def test_keys_that_are_tuples_of_strings(path):
    # Each of these is another key, though some look alike when written out.
    alike = ("a", ("a",), "('a',)", '["a"]', ("a", "b"), ("a, b",), "a, b", (), ("",), "", "()")
    state = {key: some(seed=i) for i, key in enumerate(alike)}
    assert_same(state, round_trip(state, path))
    assert_same(OrderedDict(state), round_trip(OrderedDict(state), path))
    assert unpack(path.read_bytes())[1]["format"] == 2


def test_a_file_of_the_first_format_is_read_and_written_as_ever(path):
    state = [
        fb.posteriors.Diagonal(
            {"fc.weight": torch.tensor([[1.0, 2.0]])}, (None, OrderedDict(a=torch.tensor(3)))
        ),
        "text",
    ]
    path.write_bytes(FIRST_FORMAT)
    assert_same(state, fb.load(path))
    fb.save(path, state)
    assert unpack(path.read_bytes())[1]["format"] == 1


def test_odd_keys(path):
    state = {key: some(seed=i) for i, key in enumerate(ODD_KEYS)}
    assert_same(state, round_trip(state, path))


def test_the_package_safetensors_reads_the_file(path):
    state = {str(dtype): torch.ones(3, dtype=dtype) for dtype in (*FLOATS, *OTHERS)}
    fb.save(path, {**state, "complex": torch.ones(3, dtype=torch.complex64)})
    theirs = safetensors.torch.load_file(path)
    for name, x in state.items():
        assert theirs[f"state[{name!r}]"].dtype == x.dtype
        assert torch.equal(theirs[f"state[{name!r}]"].double(), x.double())
    assert theirs["state['complex']"].shape == (3, 2)


def test_same_state_same_file(tmp_path):
    for name in "ab":
        fb.save(tmp_path / name, states()["mixture"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_predictions_of_a_loaded_posterior_are_the_same(path):
    net = nn.Linear(3, 4)
    model = fb.Model.from_module(net)
    posterior = fb.posteriors.Diagonal(model.params, trees.tree_map(torch.abs, model.params))
    loaded = round_trip(posterior, path, model=model)
    x = some((5, 3))
    ours, theirs = (fb.predict(model, p, x, key=0, num_samples=4) for p in (posterior, loaded))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)


def test_paths_as_text_and_through_links_and_of_any_name(tmp_path, monkeypatch):
    state = params()
    monkeypatch.chdir(tmp_path)
    for path in ("name only", str(tmp_path / "x.y.z"), Path("n" * 255)):
        assert_same(state, round_trip(state, path))
    (tmp_path / "link").symlink_to("linked to")
    assert_same(state, round_trip(state, "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "linked to").is_file()


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(path):
    path.parent.joinpath("plain").write_text("")
    fb.save(path, params())
    assert path.stat().st_mode == path.parent.joinpath("plain").stat().st_mode
    path.chmod(0o600)
    fb.save(path, params())
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.cuda
def test_cuda_tensors_come_back_where_they_are_asked_for(path):
    state = trees.tree_map(lambda x: x.cuda(), states()["swag"])
    loaded = round_trip(state, path)
    assert_same(state, loaded)
    assert {x.device.type for x in trees.leaves(loaded)} == {"cpu"}
    loaded = fb.load(path, device="cuda")
    assert_same(state, loaded)
    assert {x.device for x in trees.leaves(loaded)} == {torch.device("cuda", 0)}


# Arguments of load


def test_dtype_converts_floating_leaves_only(path):
    state = {"f": some(), "i": torch.arange(3), "b": torch.ones(2, dtype=torch.bool), "c": COMPLEX}
    state["c"] = torch.ones(2, dtype=torch.complex64)
    loaded = round_trip(state, path, dtype=torch.float64)
    assert [loaded[k].dtype for k in "fibc"] == [
        *(torch.float64, torch.int64, torch.bool, torch.complex64)
    ]
    assert torch.equal(loaded["f"], state["f"].double())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", ["float32", torch.int64, float], ids=str)
def test_a_dtype_that_is_not_floating_point(dtype, path):
    fb.save(path, params())
    with pytest.raises(TypeError, match=r"`dtype` is .* expected a floating-point torch\.dtype"):
        fb.load(path, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", torch.device("xpu", 7)], ids=str)
def test_a_device_that_is_not_there(device, path):
    fb.save(path, params())
    with pytest.raises(ValueError, match=r"`device` is '.*', which is not available here") as info:
        fb.load(path, device=device)
    assert "\n" not in str(info.value)


def test_the_default_device_has_no_say(path):
    fb.save(path, params())
    with torch.device("meta"):
        loaded = fb.load(path)
    assert_same(params(), loaded)


def model_of(net):
    return fb.Model.from_module(net)


@pytest.mark.parametrize(
    "name",
    [
        *("swag", "swag posterior", "laplace", "vi", "diagonal", "low rank", "block normal"),
        *("block normal of other factors", "empirical", "mixture", "dropout"),
        *("dropout with a rate", "all in one"),
    ],
)
def test_a_state_of_this_model_is_taken_and_one_of_another_refused(name, path):
    state = states()[name]
    fb.save(path, state)
    assert_same(state, fb.load(path, model=model_of(network())))
    with pytest.raises(
        ValueError, match=r"does not fit `model`: `state.*\['fc\.weight'\]` has shape"
    ):
        fb.load(path, model=model_of(network(2)))
    with pytest.raises(ValueError, match=r"does not fit `model`: .*\['fc\.bias'\] is not expected"):
        fb.load(path, model=model_of(network(bias=False)))


@pytest.mark.parametrize(
    ("name", "field", "batch"),
    [
        *[("swag", "sum_sq_dev", ()), ("swag", "deviations", (2,)), ("vi", "rho", ())],
        *[("diagonal", "std", ()), ("low rank", "std", ()), ("low rank", "factor", (5,))],
    ],
)
def test_the_trees_beside_the_mean_are_compared_too(name, field, batch, path):
    state = states()[name]
    changed = {**getattr(state, field), "fc.weight": torch.zeros(*batch, 4, 2)}
    fb.save(path, state._replace(**{field: changed}))
    with pytest.raises(
        ValueError,
        match=rf"does not fit `model`: `state\.{field}\['fc\.weight'\]` has shape \(4, 2\), exp",
    ):
        fb.load(path, model=model_of(network()))


def test_the_leaves_of_blocks_and_factors_are_compared_too(path):
    state = block_normal()
    del state.factors[("fc.bias",)]
    fb.save(path, {"nested": [state]})
    message = r"`state\['nested'\]\[0\]\.factors` has leaves 'fc\.bias' missing; expected each"
    with pytest.raises(ValueError, match=message):
        fb.load(path, model=model_of(network()))
    for state, where in (
        (curvature(), "state"),
        (laplace()._replace(curvature=curvature()), r"state\.curvature"),
    ):
        fb.save(path, state)
        message = rf"`{where}\.blocks` has leaves 'conv', 'a', 'b', … not expected; expected each"
        with pytest.raises(ValueError, match=message):
            fb.load(path, model=model_of(network()))
    ours = small_curvature()
    assert_same(ours, round_trip(ours, path, model=model_of(network())))


def test_constants_of_an_ensemble_are_compared_too(path):
    def net(width):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, width))

    _, state = fb.ensemble.from_modules([net(2), net(2)])
    fb.save(path, state)
    assert_same(state, fb.load(path, model=model_of(net(2))))
    fb.save(path, state._replace(constants={"1.running_mean": torch.zeros(2, 4)}))
    with pytest.raises(ValueError, match=r"state\.constants\['1\.running_var'\] is missing"):
        fb.load(path, model=model_of(net(2)))


def test_a_tree_is_compared_itself_and_what_has_no_parameters_cannot_be(path):
    net = nn.Sequential(OrderedDict(fc=nn.Linear(3, 4)))
    assert_same(params(), round_trip(params(), path, model=model_of(net)))
    fb.save(path, {"fc.weight": some()})
    with pytest.raises(ValueError, match=r"state\['fc\.bias'\] is missing"):
        fb.load(path, model=model_of(net))
    fb.save(path, fb.random.key(0))
    with pytest.raises(ValueError, match="neither `mean` nor `params`"):
        fb.load(path, model=model_of(net))


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_is_none(path):
    fb.save(path, params())
    with pytest.raises(TypeError, match=r"`model` is a Linear, expected a funcbayes\.Model"):
        fb.load(path, model=nn.Linear(2, 2))


def test_a_type_of_ones_own_is_found_among_types_only(path):
    state = MyPosterior(params(), {"nested": MyPosterior(some(), None)})
    fb.save(path, state)
    assert_same(state, fb.load(path, types=(MyPosterior,)))
    with pytest.raises(ValueError, match=r"holds a MyPosterior, .* types=\(MyPosterior,\)"):
        fb.load(path)
    changed = namedtuple("MyPosterior", ["mean", "std"])
    with pytest.raises(ValueError, match=r"with the fields mean, scale, .* now has mean, std"):
        fb.load(path, types=(changed,))
    reordered = namedtuple("MyPosterior", ["scale", "mean"])
    assert torch.equal(fb.load(path, types=[reordered]).mean["fc.bias"], params()["fc.bias"])


def test_fields_that_came_later_have_their_defaults_or_are_missed(path):
    fb.save(path, MyPosterior(params(), None))
    more = namedtuple("MyPosterior", ["mean", "noise", "scale"], defaults=["none", 1.0])
    loaded = fb.load(path, types=(more,))
    assert_same(loaded, more(params(), "none", None))
    without = namedtuple("MyPosterior", ["mean", "noise", "scale"])
    with pytest.raises(
        ValueError,
        match=r"a MyPosterior with the fields mean, scale, but the class now has mean, noise,"
        r" scale: load it with the class that it was saved with",
    ):
        fb.load(path, types=(without,))
    less = namedtuple("MyPosterior", ["mean"])
    with pytest.raises(ValueError, match="fields mean, scale, but the class now has mean: load"):
        fb.load(path, types=(less,))


def test_a_type_with_the_name_of_one_of_the_library_is_another(path):
    mine = namedtuple("Diagonal", ["mean", "std"])
    fb.save(path, [mine(1, 2), fb.posteriors.Diagonal(3, 4)])
    with pytest.raises(ValueError, match="holds a Diagonal, which is not in `types`"):
        fb.load(path)
    first, second = fb.load(path, types=(mine,))
    assert type(first) is mine
    assert type(second) is fb.posteriors.Diagonal


@pytest.mark.usefixtures("unchecked")
def test_types_that_are_none(path):
    fb.save(path, MyPosterior(1, 2))
    assert fb.load(path, types=MyPosterior) == MyPosterior(1, 2)
    for types in ((int,), ("MyPosterior",), (nn.Linear,), (tuple,)):
        with pytest.raises(TypeError, match="expected classes made with NamedTuple"):
            fb.load(path, types=types)
    with pytest.raises(ValueError, match="two classes named MyPosterior"):
        fb.load(path, types=(MyPosterior, namedtuple("MyPosterior", "a")))


# What cannot be stored


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (nn.Linear(1, 1), "a Linear"),
        (print, "a builtin_function_or_method"),
        (np.zeros(3), "a ndarray"),
        (np.float64(1), "a float64"),
        ({1, 2}, "a set"),
        (b"bytes", "a bytes"),
        (torch.float32, "a dtype"),
        (torch.eye(2).to_sparse(), "a tensor of layout torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "a tensor of dtype torch.bits8"),
        (torch.zeros(2).max(0), "a max"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_stored_is_named(leaf, kind, path):
    state = fb.posteriors.Diagonal({"a": some()}, {"a": [some(), leaf]})
    with pytest.raises(TypeError, match=rf"`state\.std\['a'\]\[1\]` is {kind}, which cannot"):
        fb.save(path, state)
    assert list(path.parent.iterdir()) == []


def test_a_tensor_subclass_cannot_be_stored(path):
    class Mine(Tensor):
        pass

    with pytest.raises(TypeError, match="`state` is a Mine, which cannot be stored"):
        fb.save(path, some().as_subclass(Mine))


@pytest.mark.parametrize(
    "key", [0, None, ("a", 1), (("a",),), (np.str_("a"),), np.str_("a"), MyPosterior("a", "b")],
    ids=repr,
)  # fmt: skip
def test_keys_that_are_neither_strings_nor_tuples_of_them_are_refused(key, path):
    message = r"`state\['x'\]` has the key .* expected strings or tuples of strings as keys"
    with pytest.raises(TypeError, match=message):
        fb.save(path, {"x": {key: some()}})


@pytest.mark.parametrize("kind", [list, tuple, dict, MyPosterior])
def test_states_that_are_nested_too_deeply(kind, path):
    def nested(depth):
        state = some()
        for _ in range(depth):
            if kind is dict:
                state = {"a": state}
            elif kind is MyPosterior:
                state = MyPosterior(state, None)
            else:
                state = kind([state])
        return state

    deepest = nested(100)
    assert_same(deepest, round_trip(deepest, path, types=(MyPosterior,)))
    for depth in (101, 2000):
        with pytest.raises(
            ValueError, match=r"`state` is nested more than 100 levels deep \(at `st"
        ):
            fb.save(path, nested(depth))
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(ValueError, match=r"expected at most 100: .* or does it contain itself"):
        fb.save(path, itself)


def test_saving_inside_a_transform_or_without_values(path):
    def save(x):
        fb.save(path, {"x": x})
        return x.sum()

    for transformed in (torch.vmap(save), torch.func.grad(save)):
        with pytest.raises(ValueError, match=r"`state\['x'\]` belongs to a torch\.func transform"):
            transformed(some())
    with pytest.raises(ValueError, match=r"`state\['x'\]` is a meta tensor"):
        fb.save(path, {"x": some().to("meta")})
    assert not path.exists()


# Places where no file can be


def test_a_path_that_is_a_folder(tmp_path):
    for call in (lambda p: fb.save(p, params()), fb.load):
        with pytest.raises(IsADirectoryError, match=r"`path` is '.*', a folder, expected the name"):
            call(tmp_path)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*/a/b': make it first"):
        fb.save(tmp_path / "a" / "b" / "c", params())
    with pytest.raises(FileNotFoundError, match=r"`path` is '.*', but there is no such file"):
        fb.load(tmp_path / "a")


def test_a_pipe_is_neither_written_to_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file: name another"):
        fb.save(tmp_path / "pipe", params())
    with pytest.raises(ValueError, match="is not a file of funcbayes: it is no regular file"):
        fb.load(tmp_path / "pipe")


def test_without_permission_to_write(path, monkeypatch):
    fb.save(path, params())
    for place in (path, path.parent):  # a test that runs as root may write anywhere
        monkeypatch.setattr(os, "access", lambda p, _, place=place: Path(p) != place)
        with pytest.raises(PermissionError, match=f"'{place}' may not be written to"):
            fb.save(path, params(5))
        assert_same(params(), fb.load(path))


@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(what, path, monkeypatch):
    fb.save(path, params())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = (checkpoint, "_write") if what == "write" else (os, what)
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        fb.save(path, params(5))
    monkeypatch.undo()
    assert list(path.parent.iterdir()) == [path]
    assert_same(params(), fb.load(path))


def test_an_interrupt_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    fb.save(path, params())

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fb.save(path, params(5))
    assert list(path.parent.iterdir()) == [path]
    assert_same(params(), fb.load(path))


KILLED = """
import os, signal, sys
import torch
import funcbayes as fb
from funcbayes import checkpoint

path, calls = sys.argv[1], iter(range(10))
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
contents = checkpoint._contents
points = {
    "halfway": (checkpoint, "_contents", lambda leaf: die() if next(calls) else contents(leaf)),
    "fsync": (os, "fsync", die),
    "replace": (os, "replace", die),
}
new = {"a": torch.ones(300_000), "b": torch.ones(300_000)}
for module, name, replacement in points.values():
    child = os.fork()
    if not child:
        setattr(module, name, replacement)
        fb.save(path, new)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
print("ready", flush=True)
while True:
    fb.save(path, new)
    fb.save(path, {"a": torch.zeros(300_000), "b": torch.zeros(300_000)})
"""


def test_a_kill_while_saving_leaves_a_whole_file(path):
    old = {"a": torch.zeros(300_000), "b": torch.zeros(300_000)}
    fb.save(path, old)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            # Killed at three known points, each time before the new file took its place …
            assert child.stdout.readline() == "ready\n"
            # … and here at any.
            time.sleep(0.1)
        finally:
            child.kill()
    whole = fb.load(path)
    assert whole["a"].equal(whole["b"])
    assert float(whole["a"][0]) in (0, 1)


def test_a_file_that_is_replaced_while_it_is_read(path):
    done = threading.Event()

    def keep_saving():
        for i in range(10_000):
            fb.save(path, [torch.full((50_000 + 1000 * (i % 2),), float(i % 2))] * 2)
            if done.is_set():
                break

    fb.save(path, [torch.zeros(50_000)] * 2)
    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        seen = set()
        stop = time.monotonic() + 5
        while len(seen) < 2 and time.monotonic() < stop:
            for _ in range(20):
                a, b = fb.load(path)
                assert a.equal(b)
                assert len(a) == 50_000 + 1000 * int(a[0])
                seen.add(int(a[0]))
    finally:
        done.set()
        writer.join()
    assert seen == {0, 1}


# Files that are not whole


def unpack(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["funcbayes"]), data[8 + length :]


def pack(header, content, data, *, seal=True):
    """A file as `save` lays it out; sealed, its digest is right, whatever it holds."""
    content = {"digest": "0" * 64, **{k: v for k, v in content.items() if k != "digest"}}
    text = {"__metadata__": {"funcbayes": json.dumps(content, separators=(",", ":"))}, **header}
    head = json.dumps(text, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    whole = len(head).to_bytes(8, "little") + head + data
    if seal:
        digest = hashlib.sha256(whole).hexdigest().encode()
        whole = whole.replace(b"0" * 64, digest, 1)
    return whole


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "file"
    fb.save(path, fb.posteriors.Diagonal(params(), [some((0, 2)), torch.tensor(2.0), "text", 0.5]))
    return path.read_bytes()


def refusal(path, data):
    path.write_bytes(data)
    start = time.monotonic()
    kinds = r"^`.*` (is truncated|was changed|was written by a newer|is not a file|holds)\b"
    with pytest.raises(ValueError, match=kinds) as info:
        fb.load(path)
    assert type(info.value) is ValueError
    assert time.monotonic() - start < 1
    message = str(info.value)
    assert message.startswith(f"`{path}` ")
    assert "\n" not in message
    return message


def test_packing_as_the_tests_do_gives_the_same_bytes(good):
    assert pack(*unpack(good)) == good


def test_every_truncation_is_one(good, path):
    length = int.from_bytes(good[:8], "little")
    cuts = {*range(0, len(good), 11), *range(60), 8 + length - 1, 8 + length, len(good) - 1}
    for cut in sorted(cuts):
        assert "is truncated: it has" in refusal(path, good[:cut]), cut


def test_every_changed_bit_is_found(good, path):
    length = int.from_bytes(good[:8], "little")
    places = [
        *range(8),
        *range(8, 8 + length, 7),
        *range(8 + length - 3, 8 + length + 3),
        *range(8 + length, len(good), 5),
        len(good) - 1,
    ]
    assert len(places) > 100
    for i, place in enumerate(places):
        data = bytearray(good)
        data[place] ^= 1 << i % 8
        message = refusal(path, bytes(data))
        if place >= 8 + length:
            assert "its contents do not have its digest" in message, place


def test_changes_that_parse_as_before_are_found(good, path):
    length = int.from_bytes(good[:8], "little")
    head, data = good[8 : 8 + length], good[8 + length :]

    def with_header(head):
        return len(head).to_bytes(8, "little") + head + data

    assert with_header(head) == good
    spaces = b" " * 8
    changed = [
        head + spaces,
        head.rstrip().ljust(length + 8, b"\t"),
        head.replace(b'"shape"', b' "shape"', 1).rstrip(b" ") + spaces,
        head.replace(b"0.5", b"0.6"),
        head.replace(b"text", b"Text"),
        head.replace(b"fc.bias", b"fc.Bias"),
        head.replace(b'"F32"', b'"I32"'),
    ]
    for head in changed:
        assert "was changed after it was saved" in refusal(path, with_header(head))
    assert "expected" in refusal(path, good + b"\0")
    digest = good.index(b'digest\\":\\"') + len(b'digest\\":\\"')
    upper = good[digest : digest + 64].upper()
    assert "digest" in refusal(path, good[:digest] + upper + good[digest + 64 :])


@pytest.mark.parametrize("length", [0, 1, 2, 40, 2**16, 2**31, 2**32 + 5, 2**60, 2**63, 2**64 - 1])
def test_a_wrong_header_length_allocates_nothing(length, good, path):
    data = length.to_bytes(8, "little") + good[8:]
    message = refusal(path, data)
    assert ("is truncated" in message) == (length > len(good))


def edits(header, content):
    """Headers that someone edited, with what the message says; all have a right digest."""
    name, other, last = "state.mean['fc.weight']", "state.mean['fc.bias']", "state.std[1]"
    unread, malformed = "its header cannot be read", "its structure does not fit"
    entry = "a tensor's entry"

    def tensor(**values):
        return {**header, name: {**header[name], **values}}, content

    def root(node):
        return header, {**content, "structure": node}

    leaf = {"tensor": name, "complex": False, "requires_grad": False}
    yield header, {**content, "format": 3}, "was written by a newer funcbayes"
    yield header, {**content, "format": 10**30}, "was written by a newer funcbayes"
    yield header, {**content, "format": "2"}, unread
    yield header, {**content, "format": 1.5}, unread
    yield header, {**content, "format": True}, unread
    yield header, {**content, "format": None}, unread
    yield header, {**content, "format": 0}, unread
    yield header, {k: v for k, v in content.items() if k != "format"}, unread
    yield header, {k: v for k, v in content.items() if k != "structure"}, unread
    for dtype in ("F31", 3, None, [], {}, "C64"):
        yield *tensor(dtype=dtype), entry
    for dtype in ("F64", "BF16"):
        yield *tensor(dtype=dtype), entry
    for shape in ([3, 3], [-4, -3], [2**62, 2**62], [12.0], "12", None, {}, [True, 12], [1] * 70):
        yield *tensor(shape=shape), entry
    for offsets in ([0, 47], [48, 0], [0], [0, 1, 2], "ab", None, [0, 2**70], [-1, 47]):
        yield *tensor(data_offsets=offsets), entry
    yield *tensor(data_offsets=[8, 56]), "do not follow one another"
    yield *tensor(shape=[2**58], data_offsets=[0, 2**60]), "do not follow"
    huge = {"dtype": "U8", "shape": [2**60], "data_offsets": [68, 68 + 2**60]}
    yield {**header, "huge": huge}, content, "is truncated"
    yield {**header, name: 5}, content, entry
    yield {**header, name: {}}, content, entry
    yield {k: v for k, v in header.items() if k != other}, content, "do not follow one another"
    yield {k: v for k, v in header.items() if k != last}, content, "bytes, expected"
    yield {("x" if k == other else k): v for k, v in header.items()}, content, malformed
    for node in (
        *(
            {},
            {"dict": 3},
            {"dict": [[1]]},
            {"dict": [[[3], 2]]},
            {"dict": [[None, 2]]},
            {"dict": ["abc"]},
            {"list": 5},
        ),
        *({"tensor": "nowhere"}, {**leaf, "tensor": "nowhere"}, {**leaf, "tensor": []}),
        *({"list": [leaf, leaf]}, {**leaf, "complex": True}, {"class": "os.system"}, []),
        *({"type": "funcbayes.Diagonal", "fields": 3}, {"type": [], "fields": {}}),
        {"tensor": other, "complex": 3, "requires_grad": "yes"},
    ):
        yield *root(node), malformed
    yield *root({"type": "funcbayes.Wishart", "fields": {}}), "holds a funcbayes.Wishart, which"
    yield *root({"type": "os.system", "fields": {}}), "holds a os.system, which is not in `types`"
    yield *root({"type": "funcbayes.Diagonal", "fields": {}}), "holds a funcbayes.Diagonal with the"


def test_edited_headers_with_a_right_digest_are_refused(good, path):
    header, content, data = unpack(good)
    cases = list(edits(header, content))
    assert len(cases) > 40
    for edited_header, edited_content, message in cases:
        edited = pack(edited_header, edited_content, data)
        assert message in refusal(path, edited), (edited_header, edited_content)
        unsealed = pack(edited_header, edited_content, data, seal=False)
        refusal(path, unsealed)


def test_deep_nesting_is_no_crash(good, path):
    header, content, data = unpack(good)
    deep = "[" * 100_000 + "]" * 100_000
    head = good[8 : 8 + int.from_bytes(good[:8], "little")]
    for text in (
        head.replace(b'"state', b'"x":' + deep.encode() + b',"state', 1),
        checkpoint._BEFORE_DIGEST + b"0" * 64 + b'\\",\\"x\\":' + deep.encode() + b'}"}}',
    ):
        assert "header cannot be read" in refusal(
            path, len(text).to_bytes(8, "little") + text + data
        )
    node: Any = 1
    for _ in range(400):
        node = {"list": [node]}
    assert "does not fit" in refusal(
        path, pack(header, {**content, "structure": {"list": [{}, node]}}, data)
    )


def test_random_bytes_in_random_places(good, path):
    rng = random.Random(0)
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if data != good:
            refusal(path, bytes(data))
        a, b = sorted(rng.sample(range(len(good)), 2))
        refusal(path, good[:a] + good[b:])  # a part is missing
        refusal(path, good[:a] + good[a:b] + good[a:b] + good[b:])  # a part is there twice


def foreign(tmp_path):
    state = params()
    torch.save(state, tmp_path / "torch")
    np.savez(tmp_path / "numpy.npz", **{k: v.numpy() for k, v in state.items()})
    safetensors.torch.save_file(state, tmp_path / "safetensors")
    safetensors.torch.save_file(state, tmp_path / "with metadata", {"format": "pt"})
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "text").write_text("fc.weight = 3\n" * 10)
    (tmp_path / "json").write_text(json.dumps({"weights": [1, 2, 3]}))
    (tmp_path / "zeros").write_bytes(bytes(1000))
    return sorted(tmp_path.iterdir())


def test_files_of_others_are_said_to_be(tmp_path):
    files = foreign(tmp_path)
    assert len(files) == 8
    for file in files:
        assert "is not a file of funcbayes" in refusal(file, file.read_bytes()), file


MEMORY = """
import sys
import torch
import funcbayes as fb

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

path, megabytes = sys.argv[1], 2**20 // 4
fb.save(path, {"a": torch.zeros(10)})
fb.load(path)  # what is imported late, or allocated once
# Above 32 MB, glibc gives freed memory back at once.
leaves = {str(i): torch.ones(50 * megabytes) for i in range(4)}
leaves["odd"] = torch.ones(50 * megabytes, 2)[:, 0]
before = status("VmRSS")
fb.save(path, leaves)
saving = status("VmHWM") - before
open("/proc/self/clear_refs", "w").write("5")
del leaves
before = status("VmRSS")
loaded = fb.load(path, dtype=torch.float64)
print(saving, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_is_one_leaf_for_saving_and_one_copy_for_loading(path):
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], check=True, capture_output=True, text=True
    )
    saving, loading = map(float, child.stdout.split())
    # The leaf that does not lie contiguously has 50 MB. The file has 250: 500 in float64, beside
    # which the last leaves to be converted are there in float32 too.
    assert saving < 50 + 20
    assert loading < 500 + 100 + 20
