"""Bit-packed masks: the bits themselves, the file, and what is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.torch import save_file

from dlp_deploy.errors import UserError
from dlp_deploy.recipes.masks import (
    ModelIdentity,
    PackedMask,
    apply_mask,
    mask_of,
    merge_masks,
    open_masks,
    pack_mask,
    unpack_mask,
    weights_sha256,
    write_masks,
)

MODEL = ModelIdentity(
    name="tiny",
    sha256="0" * 64,
    family="llama",
    blocks=2,
    hidden=24,
    intermediate=37,
    heads=4,
    kv_heads=2,
    norm_epsilon=1e-5,
)
BLOCK_0 = "model.layers.0.mlp.up_proj.weight"
BLOCK_1 = "model.layers.1.mlp.up_proj.weight"

bool_matrices = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=70))


def masked(seed: int, rows: int = 37, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator)
    return weights, torch.rand(rows, columns, generator=generator) < 0.3


def write_tiny(path: Path, name: str = BLOCK_0, seed: int = 0, model: ModelIdentity = MODEL) -> torch.Tensor:
    weights, keep = masked(seed)
    write_masks(path, {name: mask_of(keep, weights)}, model)
    return keep


def pack_bit_by_bit(keep: np.ndarray) -> np.ndarray:
    """The format's definition, spelled out."""
    rows, columns = keep.shape
    packed = np.zeros((rows, -(-columns // 8)), np.uint8)
    for row in range(rows):
        for column in range(columns):
            packed[row, column // 8] |= int(keep[row, column]) << (column % 8)
    return packed


@settings(deadline=None)
@given(bool_matrices)
def test_packing_is_what_the_format_says(keep):
    np.testing.assert_array_equal(pack_mask(keep), pack_bit_by_bit(keep))


@settings(deadline=None)
@given(bool_matrices)
def test_unpacking_returns_the_mask(keep):
    assert torch.equal(unpack_mask(pack_mask(keep), keep.shape), torch.from_numpy(keep))


@settings(deadline=None)
@given(bool_matrices, st.integers(0, 69), st.integers(0, 69))
def test_rows_can_be_sliced_packed(keep, first, last):
    rows = slice(first, last)
    expected = torch.from_numpy(keep[rows])
    assert torch.equal(unpack_mask(pack_mask(keep)[rows], expected.shape), expected)


@pytest.mark.parametrize("shape", [(1, 1), (830, 545), (3, 8), (7, 9)])
def test_torch_and_numpy_masks_pack_alike(shape):
    keep = torch.rand(shape) < 0.5
    np.testing.assert_array_equal(pack_mask(keep), pack_mask(keep.numpy()))
    np.testing.assert_array_equal(pack_mask(keep.T), pack_mask(keep.T.contiguous()))


def test_only_bool_matrices_are_masks():
    with pytest.raises(TypeError, match="float32"):
        pack_mask(torch.ones(2, 2))
    with pytest.raises(TypeError, match="1 dimensions"):
        pack_mask(torch.ones(2, dtype=torch.bool))


def test_file_round_trip(tmp_path):
    weights, keep = masked(0)
    path = tmp_path / "masks.safetensors"
    write_masks(path, {BLOCK_0: mask_of(keep, weights)}, MODEL)
    masks = open_masks(path)
    assert masks.names() == [BLOCK_0]
    assert masks.shape(BLOCK_0) == (37, 24)
    assert masks.model == MODEL
    assert torch.equal(masks.mask(BLOCK_0), keep)
    assert masks.packed(BLOCK_0).source_sha256 == weights_sha256(weights)
    assert masks.packed(BLOCK_0).sparsity() == pytest.approx(1 - keep.float().mean().item())


def test_file_is_plain_safetensors(tmp_path):
    keep = write_tiny(tmp_path / "masks.safetensors")
    with safe_open(tmp_path / "masks.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor(BLOCK_0), pack_mask(keep))
        assert json.loads(file.metadata()["modules"])[BLOCK_0]["shape"] == [37, 24]


def test_digest_depends_on_values_and_dtype_not_on_strides():
    weights, _ = masked(0)
    assert weights_sha256(weights.T.contiguous().T) == weights_sha256(weights)
    assert weights_sha256(weights.bfloat16()) != weights_sha256(weights)
    assert weights_sha256(weights + 1) != weights_sha256(weights)


def test_merging_joins_block_files(tmp_path):
    first = write_tiny(tmp_path / "0", BLOCK_0, seed=0)
    second = write_tiny(tmp_path / "1", BLOCK_1, seed=1)
    merge_masks(tmp_path / "all", [tmp_path / "0", tmp_path / "1"])
    masks = open_masks(tmp_path / "all")
    assert masks.names() == [BLOCK_0, BLOCK_1]
    assert torch.equal(masks.mask(BLOCK_0), first)
    assert torch.equal(masks.mask(BLOCK_1), second)


def test_merging_refuses_duplicates_and_strangers(tmp_path):
    write_tiny(tmp_path / "0")
    write_tiny(tmp_path / "1")
    with pytest.raises(UserError, match=BLOCK_0):
        merge_masks(tmp_path / "all", [tmp_path / "0", tmp_path / "1"])
    write_tiny(tmp_path / "1", BLOCK_1, model=ModelIdentity(**{**vars(MODEL), "name": "other"}))
    with pytest.raises(UserError, match="other"):
        merge_masks(tmp_path / "all", [tmp_path / "0", tmp_path / "1"])
    assert not (tmp_path / "all").exists()


def test_opening_a_large_file_reads_no_bits(tmp_path):
    """200 MB of bits are opened, and one mask of 8 kB read, within far less memory."""
    keep = torch.ones(16384, 8192, dtype=torch.bool)
    bits = pack_mask(keep)
    packed = PackedMask((16384, 8192), bits, "0" * 64)
    many = {f"model.layers.{i}.mlp.up_proj.weight": packed for i in range(12)}
    _, small = masked(0)
    many[BLOCK_0 + ".small"] = PackedMask((37, 24), pack_mask(small), "0" * 64)
    write_masks(tmp_path / "masks", many, MODEL)
    before = resident_bytes()
    masks = open_masks(tmp_path / "masks")
    assert torch.equal(masks.mask(BLOCK_0 + ".small"), small)
    assert resident_bytes() - before < 100e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_applying_zeroes_exactly_the_pruned(dtype):
    weights, keep = masked(0)
    weights = weights.to(dtype)
    pruned = apply_mask(weights, keep)
    assert torch.equal(pruned[keep], weights[keep])
    assert not pruned[~keep].any()
    assert not torch.signbit(pruned[~keep]).any()
    assert pruned.dtype == dtype


def test_masks_fit_a_fine_tune(tmp_path):
    write_tiny(tmp_path / "masks")
    tuned = ModelIdentity(**{**vars(MODEL), "name": "tiny-chat", "sha256": "1" * 64})
    open_masks(tmp_path / "masks").check_fits(tuned, {BLOCK_0: (37, 24), "lm_head.weight": (99, 24)})


@pytest.mark.parametrize(
    ("change", "shapes", "named"),
    [
        ({"blocks": 3}, {BLOCK_0: (37, 24)}, "blocks is 2 in tiny, 3 in other"),
        ({"norm_epsilon": 1e-6}, {BLOCK_0: (37, 24)}, "norm_epsilon"),
        ({}, {BLOCK_0: (37, 32)}, "37x24 here and 37x32"),
        ({}, {BLOCK_1: (37, 24)}, BLOCK_0),
    ],
)
def test_masks_of_another_model_are_refused(tmp_path, change, shapes, named):
    write_tiny(tmp_path / "masks")
    other = ModelIdentity(**{**vars(MODEL), "name": "other", **change})
    with pytest.raises(UserError, match=named):
        open_masks(tmp_path / "masks").check_fits(other, shapes)


def test_what_is_no_mask_file_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(UserError, match="no such mask file"):
        open_masks(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="no whole safetensors file"):
        open_masks(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds no masks"):
        open_masks(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "dlp-masks", "version": "9"})
    with pytest.raises(UserError, match="version 9"):
        open_masks(path)


def test_a_file_without_masks_is_refused(tmp_path):
    write_masks(tmp_path / "masks", {}, MODEL)
    with pytest.raises(UserError, match="mask of no weight"):
        open_masks(tmp_path / "masks")


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    write_tiny(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="no whole safetensors file"):
        open_masks(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"model": "{}", "modules": "{}"},
        {
            "model": json.dumps(vars(MODEL)),
            "modules": json.dumps({"a": {"shape": [4, 99], "sha256": "", "signs": ""}}),
        },
        {
            "model": json.dumps(vars(MODEL)),
            "modules": json.dumps({"b": {"shape": [4, 8], "sha256": "", "signs": ""}}),
        },
        {
            "model": json.dumps(vars(MODEL)),
            "modules": json.dumps({"a": {"shape": [4], "sha256": "", "signs": ""}}),
        },
        {"model": json.dumps(vars(MODEL)), "modules": "[]"},
    ],
)
def test_damaged_metadata_are_refused(tmp_path, metadata):
    path = tmp_path / "masks.safetensors"
    save_file(
        {"a": torch.zeros(4, 1, dtype=torch.uint8)},
        path,
        metadata={"format": "dlp-masks", "version": "1", **metadata},
    )
    with pytest.raises(UserError, match=r"masks\.safetensors: "):
        open_masks(path)
