"""Batches: what counts as data, and what is said where it does not."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from funcbayes.core.data import batch_size, batches

X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)


class Stream(IterableDataset):
    def __iter__(self):
        yield X, Y
        yield X[:2], Y[:2]


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [(X, Y)],
        ([X, Y],),
        DataLoader(TensorDataset(X, Y), batch_size=5),
        iter([(X, Y)]),
        ((x, y) for x, y in [(X, Y)]),
        [(X, Y), (X[:0], Y[:0])],  # an empty batch beside a full one passes
    ],
)
def test_data_in_each_form_gives_the_same_batch(data):
    ((x, y),) = batches(data)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_a_pair_of_batches_is_two_batches():
    assert [len(y) for _, y in batches(((X, Y), (X[:2], Y[:2])))] == [5, 2]
    assert [len(y) for _, y in batches(Stream())] == [5, 2]


def test_inputs_are_pytrees():
    ((x, _),) = batches(({"a": X, "b": [X]}, Y))
    assert batch_size(x) == 5
    assert batch_size((None, X[:3])) == 3


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, r"`loader` is a int, expected an iterable of \(inputs, targets\) pairs"),
        ([X], TypeError, "batch 0 of `loader` is a Tensor, expected a pair"),
        ([X, Y], TypeError, "batch 0 of `loader` is a Tensor, expected a pair"),
        ([(X, Y), (X, Y, Y)], TypeError, "batch 1 of `loader` is a tuple of 3, expected a pair"),
        (TensorDataset(X, Y), TypeError, "`loader` is a TensorDataset, which gives single .*Data"),
        ([], ValueError, "`loader` yielded no data, .* exhausted generator"),
        ((X[:0], Y[:0]), ValueError, "`loader` yielded no data"),
        (DataLoader(TensorDataset(X, Y), batch_size=9, drop_last=True), ValueError, "drop_last"),
        ([(torch.tensor(1.0), Y)], ValueError, "an input is a scalar tensor"),
        ([("text", Y)], ValueError, "inputs hold no tensor"),
    ],
)
def test_what_is_no_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        list(batches(data, name="loader"))


def test_an_exhausted_generator_is_refused():
    stream = iter([(X, Y)])
    list(batches(stream))
    with pytest.raises(ValueError, match="is it an exhausted generator"):
        list(batches(stream))
