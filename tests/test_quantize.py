"""Quantization: zeros stay zero, errors stay within half a step, and packing is what the engine reads."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dlp_deploy.export.grid import Grid
from dlp_deploy.export.quantize import pack_blocks, quantize, scale_of_columns, unpack_blocks

finite = st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite)


grids = st.builds(Grid, st.sampled_from([4, 8]), st.sampled_from([None, 16, 32]))


@given(matrices, grids)
def test_zeros_survive_and_no_weight_is_off_by_more_than_the_grid_allows(
    weight: np.ndarray, grid: Grid
) -> None:
    quantized = quantize(weight, grid)
    assert quantized.levels.dtype == np.int8
    assert quantized.levels.min() >= grid.lowest
    assert quantized.levels.max() <= grid.highest
    assert (quantized.levels[weight == 0] == 0).all()
    step = np.abs(scale_of_columns(quantized.scale, grid, weight.shape[1]))
    # In a block the side opposite to the peak is one level shorter, so it may miss by a whole step.
    assert (
        np.abs(quantized.dequantize() - weight) <= step * (0.5001 if grid.block is None else 1.0001)
    ).all()


@given(matrices, st.sampled_from([4, 8]), st.sampled_from([16, 32]))
def test_packing_loses_nothing(weight: np.ndarray, bits: int, block: int) -> None:
    quantized = quantize(weight, Grid(bits, block))
    unpacked = unpack_blocks(pack_blocks(quantized), quantized.grid, weight.shape[1])
    np.testing.assert_array_equal(unpacked, quantized.levels)


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, 32)])
def test_a_row_of_zeros_is_not_divided_by(grid: Grid) -> None:
    assert (quantize(np.zeros((3, 32), np.float32), grid).dequantize() == 0).all()


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(8, 32), Grid(4, 32)])
@pytest.mark.filterwarnings("error")
def test_weights_too_small_for_a_step_are_as_good_as_zeros(grid: Grid) -> None:
    """Rows of tokens that no text has decay to such numbers."""
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[1, 5] = 1.4e-45, 1.0
    quantized = quantize(weight, grid)
    assert (quantized.scale != 0).all()
    assert (quantized.levels[weight == 0] == 0).all()
    np.testing.assert_allclose(quantized.dequantize(), weight, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_onnxruntime_reads_the_packing_as_we_mean_it(bits: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(24, 64)).astype(np.float32)
    quantized = quantize(weight, Grid(bits, 32))
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=24, bits=bits, block_size=32
    )
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 24])],
        [
            onnx.numpy_helper.from_array(pack_blocks(quantized), "w"),
            onnx.numpy_helper.from_array(quantized.scale, "s"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(product.T, quantized.dequantize(), rtol=1e-5, atol=1e-6)
