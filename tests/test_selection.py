from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dlp_deploy.selection import Numbers, kth_smallest, largest_of_rows

# Few distinct values: ties at the threshold are the hard part.
FEW_VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 4, width=32)


def numbers_of(values: np.ndarray, size: int) -> Numbers:
    pieces = [values[start : start + size] for start in range(0, values.size, size)]
    return Numbers(values.size, [partial(np.asarray, piece) for piece in pieces])


@given(arrays(np.float32, st.integers(1, 300), elements=FEW_VALUES), st.integers(1, 100), st.data())
def test_kth_smallest_is_that_of_the_sorted_numbers(values: Any, size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, values.size - 1))
    assert kth_smallest(numbers_of(values, size), rank) == np.sort(values)[rank]


@pytest.mark.parametrize("shape", ["normal", "heavy-tailed", "mostly-zero", "constant", "sorted"])
@pytest.mark.parametrize("quantile", [0.0, 0.001, 0.5, 0.7, 1.0])
def test_kth_smallest_of_many_more_than_the_sample(shape: str, quantile: float) -> None:
    random = np.random.default_rng(1)
    values = np.abs(random.standard_normal(1_000_003)).astype(np.float32)
    if shape == "heavy-tailed":
        values = np.exp(8 * values)
    elif shape == "mostly-zero":
        values[random.random(values.size) < 0.9] = 0
    elif shape == "constant":
        values[:] = 3
    elif shape == "sorted":
        values.sort()
    rank = round(quantile * (values.size - 1))
    assert kth_smallest(numbers_of(values, 10_007), rank) == np.sort(values)[rank]


def test_rank_beyond_the_numbers() -> None:
    with pytest.raises(IndexError):
        kth_smallest(numbers_of(np.ones(3, dtype=np.float32), 2), 3)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=FEW_VALUES), st.data())
def test_largest_of_rows_is_a_stable_descending_sort(values: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, values.shape[1]))
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    expected = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(expected, order, True, axis=1)
    assert (largest_of_rows(values, count) == expected).all()
