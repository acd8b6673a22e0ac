"""Quantization: zeros stay zero, errors stay within half a step, and packing is what the engine reads."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dlp_deploy.export.quantize import dequantize_per_block, quantize_per_block, quantize_per_channel

finite = st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite)


@given(matrices, st.sampled_from([4, 8]))
def test_channel_error_is_at_most_half_a_step_and_zeros_survive(weight: np.ndarray, bits: int) -> None:
    quantized = quantize_per_channel(weight, bits)
    assert quantized.values.dtype == np.int8
    assert np.abs(quantized.values).max() <= 2 ** (bits - 1) - 1
    assert (quantized.values[weight == 0] == 0).all()
    error = np.abs(quantized.dequantize() - weight)
    assert (error <= quantized.scale[:, None] * 0.5001).all()


@given(matrices, st.sampled_from([4, 8]), st.sampled_from([16, 32]))
def test_block_zeros_survive_and_the_peak_is_exact(weight: np.ndarray, bits: int, block: int) -> None:
    quantized = quantize_per_block(weight, bits, block)
    restored = dequantize_per_block(quantized, weight.shape[1])
    assert restored.shape == weight.shape
    assert (restored[weight == 0] == 0).all()
    step = np.repeat(np.abs(quantized.scale), block, axis=1)[:, : weight.shape[1]]
    # The side of the grid opposite to the peak is one level shorter, so it may miss by a whole step.
    assert (np.abs(restored - weight) <= step * 1.0001).all()


def test_a_row_of_zeros_is_not_divided_by() -> None:
    weight = np.zeros((3, 32), np.float32)
    assert (quantize_per_channel(weight).dequantize() == 0).all()
    assert (dequantize_per_block(quantize_per_block(weight, 4, 32), 32) == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_onnxruntime_reads_the_packing_as_we_mean_it(bits: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(24, 64)).astype(np.float32)
    quantized = quantize_per_block(weight, bits, 32)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=24, bits=bits, block_size=32
    )
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 24])],
        [
            onnx.numpy_helper.from_array(quantized.packed, "w"),
            onnx.numpy_helper.from_array(quantized.scale, "s"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(product.T, dequantize_per_block(quantized, 64), rtol=1e-5, atol=1e-6)
