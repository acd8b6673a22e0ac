"""Transport form: every byte comes back, pruned weights take little, and damage is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.artifact import list_files, read_manifest, write_manifest
from dlp_deploy.errors import UserError
from dlp_deploy.export.pack import MAGIC, PIECE, pack, unpack
from dlp_deploy.export.pieces import DamagedPiece, decode, encode

from .artifacts import pruned, sealed, with_graphs


def sparse(dtype: str, count: int, sparsity: float, fill: int = 0, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    kept = random.random(count) >= sparsity
    info = np.dtype(dtype)
    values = random.integers(1, 256, (count, info.itemsize), dtype=np.uint8).view(info)[:, 0]
    return np.where(kept, values, np.array(fill, info))


def nibbles(count: int, sparsity: float, fill: int) -> np.ndarray:
    values = np.random.default_rng(1).integers(0, 16, 2 * count).astype(np.uint8)
    values[np.random.default_rng(2).random(2 * count) < sparsity] = fill
    return values[0::2] | (values[1::2] << 4)


def plain_decode(form: bytes, length: int) -> bytes:
    """The format as its description says it, bit by bit."""
    stream = BytesIO(form)

    def mask(count: int) -> list[int]:
        packed = stream.read((count + 7) // 8)
        return [packed[i // 8] >> (i % 8) & 1 for i in range(count)]

    def plane(count: int) -> list[int]:
        kind = stream.read(1)[0]
        if kind == 0:
            return list(stream.read(count))
        fill = stream.read(1)[0]
        if kind == 1:
            return [fill] * count
        if kind == 2:
            return [stream.read(1)[0] if bit else fill for bit in mask(count)]
        bits = mask(2 * count)
        packed = stream.read((sum(bits) + 1) // 2)
        stored = iter([half for byte in packed for half in (byte & 15, byte >> 4)])
        units = [next(stored) if bit else fill for bit in bits]
        return [low | high << 4 for low, high in zip(units[0::2], units[1::2], strict=True)]

    width = stream.read(1)[0]
    if width == 1:
        result = bytes(plane(length))
    else:
        bits = mask(length // width)
        planes = [plane(sum(bits)) for _ in range(width)]
        elements = iter(zip(*planes, strict=True))
        result = b"".join(bytes(next(elements)) if bit else bytes(width) for bit in bits)
    assert not stream.read()
    return result


FEW = st.sampled_from([0, 0, 0, 1, 8, 136, 255])


@given(data=st.binary(min_size=1, max_size=200) | st.lists(FEW, min_size=1, max_size=300).map(bytes))
def test_any_bytes_come_back_and_grow_by_two_at_most(data: bytes) -> None:
    form = encode(data)
    assert decode(BytesIO(form).read, len(data)) == data
    assert plain_decode(form, len(data)) == data
    assert len(form) <= len(data) + 2


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["<f4", "<f2", "i1"]),
    count=st.integers(1, 70_000),
    sparsity=st.sampled_from([0.0, 0.5, 0.7, 0.99, 1.0]),
    seed=st.integers(0, 9),
)
def test_weights_of_any_type_and_count_come_back(dtype: str, count: int, sparsity: float, seed: int) -> None:
    data = sparse(dtype, count, sparsity, seed=seed).tobytes()
    assert decode(BytesIO(encode(data)).read, len(data)) == data


@pytest.mark.parametrize(
    ("data", "bits_a_weight", "weights"),
    [
        (sparse("<f4", 65536, 0.7), 1 + 0.3 * 32, 65536),
        (sparse("<f2", 65536, 0.7), 1 + 0.3 * 16, 65536),
        (sparse("i1", 65536, 0.7), 1 + 0.3 * 8, 65536),
        (sparse("u1", 65536, 0.7, fill=128), 1 + 0.3 * 8, 65536),
        (nibbles(32768, 0.7, fill=8), 1 + 0.28 * 4, 65536),
        # Half precision widened to single: two of the four bytes are empty.
        (np.left_shift(sparse("<u2", 65536, 0.7).astype("<u4"), 16), 1 + 0.3 * 16, 65536),
        (sparse("<f4", 65536, 0.0), 32, 65536),
    ],
    ids=["fp32", "fp16", "int8", "uint8", "int4", "bf16 as fp32", "dense"],
)
def test_a_weight_takes_a_bit_and_its_share_of_nonzeros(
    data: np.ndarray, bits_a_weight: float, weights: int
) -> None:
    form = encode(data.tobytes())
    assert plain_decode(form, data.nbytes) == data.tobytes()
    assert len(form) * 8 / weights == pytest.approx(bits_a_weight, rel=0.02)


def test_a_piece_that_is_cut_short_or_of_no_kind_is_refused() -> None:
    form = encode(sparse("<f4", 100, 0.5).tobytes())
    for length in range(len(form)):
        with pytest.raises(DamagedPiece):
            decode(BytesIO(form[:length]).read, 400)
    for head in (b"\x03", b"\x00", b"\x01\x09", b"\x02\xff"):
        with pytest.raises(DamagedPiece):
            decode(BytesIO(head + form).read, 401)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A pruned and exported tiny llama, with a file longer than a piece and an empty one."""
    folder = pruned(tiny_checkpoint("llama"), tmp_path_factory.mktemp("pack") / "tiny-dlp-s70")
    (folder / "long.bin").write_bytes(sparse("i1", PIECE + 12345, 0.7).tobytes())
    (folder / "empty.txt").write_bytes(b"")
    return with_graphs(folder, "fp32,int8,int4", "deepsparse,onnxruntime")


@pytest.fixture(scope="module")
def packed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(artifact, tmp_path_factory.mktemp("packed") / "tiny.dlp")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_artifact_comes_back_bit_for_bit_and_was_smaller(
    artifact: Path, packed: Path, tmp_path: Path
) -> None:
    assert contents(unpack(packed, tmp_path / "back")) == contents(artifact)
    whole = sum(stored.bytes for stored in read_manifest(artifact).files)
    assert packed.stat().st_size < 0.7 * whole


def test_by_default_the_packed_file_is_beside_the_artifact_and_the_artifact_beside_the_file(
    artifact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(artifact, copy)
    path = pack(copy)
    assert path == tmp_path / "model.dlp"
    with pytest.raises(UserError, match=r"model exists; .*--force"):
        unpack(path)
    shutil.rmtree(copy)
    assert unpack(path) == copy
    assert contents(copy) == contents(artifact)
    with pytest.raises(UserError, match=r"model\.dlp exists; .*--force"):
        pack(copy)
    assert pack(copy, force=True) == path


def test_the_folder_that_one_is_in_is_packed_and_replaced(
    artifact: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(artifact, copy)
    monkeypatch.chdir(copy)
    assert pack(".") == tmp_path / "model.dlp"
    (copy / "long.bin").unlink()
    inside = shutil.copy(packed, copy)
    with pytest.raises(UserError, match=r"is in \., which would be replaced"):
        unpack(inside, ".", force=True)
    assert Path(inside).is_file()
    unpack(packed, ".", force=True)
    assert contents(copy) == contents(artifact)


def test_an_artifact_without_files_is_packed(artifact: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write_manifest(empty, read_manifest(artifact).model_copy(update={"files": ()}))
    assert contents(unpack(pack(empty), tmp_path / "back")) == contents(empty)


def test_an_altered_or_missing_file_is_not_packed(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(artifact, copy)
    data = copy / "long.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"long\.bin was altered"):
        pack(copy)
    data.unlink()
    with pytest.raises(UserError, match=r"long\.bin is missing"):
        pack(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", [3, 12, 40, 0.1, 0.3, 0.5, 0.7, 0.9, -1])
def test_a_flipped_bit_anywhere_is_noticed_and_leaves_nothing(
    packed: Path, tmp_path: Path, place: float
) -> None:
    data = bytearray(packed.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 64
    damaged = tmp_path / "damaged.dlp"
    damaged.write_bytes(data)
    with pytest.raises(UserError):
        unpack(damaged)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.dlp"]


@pytest.mark.parametrize("kept", [0, 7, 20, 0.5, -1])
def test_a_file_that_is_cut_short_is_refused(packed: Path, tmp_path: Path, kept: float) -> None:
    data = packed.read_bytes()
    damaged = tmp_path / "damaged.dlp"
    damaged.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"damaged\.dlp"):
        unpack(damaged)
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "a/../../outside", "..\\outside", "", "manifest.json"]
)
def test_paths_that_leave_the_artifact_are_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    manifest = read_manifest(artifact)
    stored = manifest.files[0].model_copy(update={"path": name})
    text = manifest.model_copy(update={"files": (stored,)}).model_dump_json().encode()
    bad = tmp_path / "bad.dlp"
    bad.write_bytes(MAGIC + len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match=r"bad\.dlp: files\.0\.path: .* outside the artifact"):
        unpack(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.dlp"]


def test_unpacking_leaves_an_unfinished_run_of_that_name_alone(packed: Path, tmp_path: Path) -> None:
    work = tmp_path / "tiny.partial" / "work"
    work.mkdir(parents=True)
    unpack(packed, tmp_path / "tiny")
    with pytest.raises(UserError):
        unpack(Path(__file__), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.partial"]
    assert work.is_dir()


def test_what_is_no_artifact_or_no_packed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no artifact"):
        pack(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        unpack(tmp_path / "none.dlp")
    other = tmp_path / "other.dlp"
    other.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match="not written by dlp-deploy pack"):
        unpack(other)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
@pytest.mark.parametrize("equal", [True, False])
def test_two_files_at_one_place_are_refused(
    artifact: Path, tmp_path: Path, names: tuple[str, str], equal: bool
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    (copy / "one").write_bytes(b"one")
    (copy / "two").write_bytes(b"one" if equal else b"two")
    write_manifest(
        copy, read_manifest(artifact).model_copy(update={"exports": (), "files": list_files(copy)})
    )
    text = (copy / "manifest.json").read_bytes()
    places = text.replace(b'"one"', f'"{names[0]}"'.encode()).replace(b'"two"', f'"{names[1]}"'.encode())
    bad = pack(copy, tmp_path / "bad.dlp")
    body = bad.read_bytes()[len(MAGIC) + 8 + len(text) :]
    bad.write_bytes(MAGIC + len(places).to_bytes(8, "little") + places + body)
    with pytest.raises(UserError, match=r"bad\.dlp: its manifest has two files at a"):
        unpack(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.dlp", "model"]


def test_a_file_takes_the_place_of_no_folder_and_a_folder_that_of_no_file(
    artifact: Path, packed: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_bytes(b"mine")
    for force in (False, True):
        with pytest.raises(UserError, match=r"folder is a folder, and a file is to be written; .*--output"):
            pack(artifact, folder, force)
        with pytest.raises(UserError, match=r"file is a file, and a folder is to be written; .*--output"):
            unpack(packed, file, force)
    assert file.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_equal_files_are_stored_once(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(artifact, copy)
    noise = np.random.default_rng(3).bytes(PIECE)
    (copy / "one.bin").write_bytes(noise)
    sealed(copy, read_manifest(copy).exports)
    single = pack(copy, tmp_path / "single.dlp").stat().st_size
    (copy / "two.bin").write_bytes(noise)
    sealed(copy, read_manifest(copy).exports)
    double = pack(copy, tmp_path / "double.dlp")
    assert double.stat().st_size < single + 1000
    assert (unpack(double) / "two.bin").read_bytes() == noise
