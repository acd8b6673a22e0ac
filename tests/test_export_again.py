"""Exporting to an artifact that has graphs: nothing finished is lost, and what is asked for is added."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dlp_deploy.artifact import CHECKPOINT, check_files, graph_of, read_manifest, write_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.errors import UserError
from dlp_deploy.export import calibrated, export, publish, resumed
from dlp_deploy.unfinished import LOCK

from .artifacts import pruned
from .limits import file_size_limit

PLAIN = {"target": "onnxruntime", "baseline": "none", "rounding": "nearest"}
COMMAND = ("--target", "onnxruntime", "--baseline", "none", "--rounding", "nearest")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """fp32 as its own, and int8, for ONNX Runtime; its dense model is in a folder that can be taken away."""
    folder = tmp_path_factory.mktemp("again")
    dense = shutil.copytree(tiny_checkpoint("llama"), folder / "dense")
    return export(pruned(dense, folder / "artifact"), "fp32,int8", **PLAIN)


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "artifact"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def graphs(artifact: Path) -> dict[str, str]:
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    listed = {stored.path for stored in manifest.files}
    assert listed == contents(artifact).keys() - {"manifest.json"}
    return {made.path: made.precision for made in manifest.exports}


def written(artifact: Path) -> dict[str, int]:
    """When each graph was written."""
    return {made.path: (artifact / made.path / "model.onnx").stat().st_mtime_ns for made in exports(artifact)}


def exports(artifact: Path) -> Any:
    return read_manifest(artifact).exports


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_fp32": "model.layer.0.*"}, "matches no linear layer"),
        ({"target": "none", "baseline": "fp32"}, "unknown model"),
        ({"quant": "int7"}, "int7"),
    ],
)
def test_force_with_a_wrong_option_changes_nothing(
    options: dict[str, str], said: str, artifact: Path, whole: Path
) -> None:
    dense = whole.with_name("dense")
    dense.rename(dense.with_name("away"))
    before = contents(artifact)
    try:
        with pytest.raises(UserError, match=said):
            export(artifact, **{"quant": "int8", **PLAIN, **options}, force=True)
    finally:
        dense.with_name("away").rename(dense)
    assert contents(artifact) == before


def test_force_on_a_full_disk_changes_nothing(artifact: Path) -> None:
    before = contents(artifact)
    with file_size_limit(300_000), pytest.raises(UserError, match=r"no room to write .*onnxruntime"):
        export(artifact, "fp32", **PLAIN, force=True)
    assert contents(artifact) == before


@pytest.mark.parametrize("options", [("--quant", "int8"), ("--quant", "int4", "--rounding", "gptq")])
def test_force_for_a_graph_that_turns_out_wrong_is_one_line_and_changes_nothing(
    options: tuple[str, ...],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    before = contents(artifact)
    found = publish.engine_logits
    monkeypatch.setattr(publish, "engine_logits", lambda *arguments: -found(*arguments))
    status, _, error = run("export", artifact, *COMMAND, *options, "--force")
    assert (status, error.count("\n")) == (1, 1)
    assert "error of its logits in onnxruntime" in error
    assert contents(artifact) == before


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the graph that is checked as the `call`-th is checked."""
    calls = []
    check = publish.engine_logits

    def checked(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return check(*arguments)

    monkeypatch.setattr(publish, "engine_logits", checked)


def test_an_interrupted_export_goes_on_behind_the_last_finished_graph(
    artifact: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("export", artifact, "--target", "none", "--rounding", "nearest")
    with monkeypatch.context() as patched:
        interrupted_at(2, patched)
        status, _, error = run(*command)
    assert status == 130
    assert "run the same command again, without --force" in error.splitlines()[-1]
    assert list(graphs(artifact)) == ["onnxruntime", "onnxruntime-int8", "baseline/fp32"]
    assert not list(artifact.rglob("*.partial"))
    before = written(artifact)
    assert run(*command)[0] == 0
    assert list(graphs(artifact))[2:] == ["baseline/fp32", "baseline/int8", "baseline/int4"]
    assert before.items() <= written(artifact).items()
    status, _, error = run(*command)
    assert (status, error.count("\n")) == (2, 1)
    assert "--force" in error


SMOOTHED = ("--target", "deepsparse", "--baseline", "none")


def rounded_blocks(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Blocks that GPTQ was begun for, from now on; Ctrl-C instead of the `stop_at`-th."""
    begun: list[int] = []
    measure = calibrated.measure_inputs

    def measured(*arguments: Any) -> Any:
        if len(begun) == stop_at:
            raise KeyboardInterrupt
        begun.append(len(begun))
        return measure(*arguments)

    monkeypatch.setattr(calibrated, "measure_inputs", measured)
    return begun


def test_an_interrupted_rounding_goes_on_behind_the_last_finished_block(
    artifact: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("deepsparse")
    straight = Path(shutil.copytree(artifact, tmp_path / "straight"))
    export(straight, "int8", "deepsparse", "none")
    before = graphs(artifact)
    with monkeypatch.context() as patched:
        assert rounded_blocks(patched, stop_at=2) == []
        assert run("export", artifact, *SMOOTHED)[0] == 130
    assert [path.name for path in artifact.glob("*.partial")] == [resumed.FOLDER]
    listed = {stored.path for stored in read_manifest(artifact).files}
    assert not any(path.startswith(resumed.FOLDER) for path in listed)

    with monkeypatch.context() as patched:
        begun = rounded_blocks(patched)
        patched.setattr(publish, "measure_smoothing", pytest.fail)
        status, _, said = run("export", artifact, *SMOOTHED)
    assert status == 0
    assert "2 of 3 blocks were rounded before" in said
    assert begun == [0]
    assert graphs(artifact) == before | {"deepsparse": "int8"}
    assert not list(artifact.glob("*.partial"))
    assert contents(artifact / "deepsparse").keys() == contents(straight / "deepsparse").keys()
    for name in ("model.onnx", "model.onnx.data"):
        assert (artifact / "deepsparse" / name).read_bytes() == (straight / "deepsparse" / name).read_bytes()


@pytest.mark.parametrize("change", [{"calib": "text"}, {"block_size": 64}, {"keep_fp32": "*.o_proj"}])
def test_blocks_that_were_rounded_in_another_way_are_rounded_again(
    change: dict[str, str], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "calib" in change:
        text = tmp_path / "text.txt"
        text.write_text(" ".join(str(number) for number in range(4000)))
        change = {"calib": str(text)}
    options: dict[str, Any] = {"quant": "int4", "target": "onnxruntime", "baseline": "none"}
    with monkeypatch.context() as patched:
        rounded_blocks(patched, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            export(artifact, **options)
    begun = rounded_blocks(monkeypatch)
    export(artifact, **options, **change)
    assert begun == [0, 1, 2]
    assert not list(artifact.glob("*.partial"))


def test_a_rounding_that_is_interrupted_in_its_first_block_leaves_nothing(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(artifact)
    rounded_blocks(monkeypatch, stop_at=0)
    with pytest.raises(KeyboardInterrupt):
        export(artifact, "int4", "onnxruntime", "none")
    assert contents(artifact) == before
    assert not list(artifact.glob(f"{resumed.FOLDER}/*"))


def test_force_that_is_interrupted_loses_no_graph(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the new graphs takes the own folder of one that is not made anew yet."""
    with monkeypatch.context() as patched:
        interrupted_at(2, patched)
        with pytest.raises(KeyboardInterrupt):
            export(artifact, "int4,fp32", **PLAIN, force=True)
    assert graphs(artifact) == {
        "onnxruntime": "int4",
        "onnxruntime-fp32": "fp32",
        "onnxruntime-int8": "int8",
    }
    assert graph_of(artifact, "onnxruntime", None).precision == "int4"


def test_a_finished_graph_that_is_not_listed_is_kept_and_listed(artifact: Path) -> None:
    before = written(artifact)
    manifest = read_manifest(artifact)
    write_manifest(
        artifact,
        manifest.model_copy(
            update={
                "exports": manifest.exports[:1],
                "files": tuple(f for f in manifest.files if not f.path.startswith("onnxruntime-int8/")),
            }
        ),
    )
    (artifact / "onnxruntime-int4.partial").mkdir()
    export(artifact, "int8", **PLAIN)
    assert graphs(artifact) == {"onnxruntime": "fp32", "onnxruntime-int8": "int8"}
    assert written(artifact) == before


@pytest.mark.parametrize(
    "options", [{"quant": "int8", "block_size": 64}, {"quant": "fp32,int8", "keep_fp32": "lm_head"}]
)
def test_a_graph_made_in_another_way_is_replaced_by_force_alone(
    options: dict[str, Any], artifact: Path
) -> None:
    before = contents(artifact)
    with pytest.raises(UserError, match=r"onnxruntime-int8 exists; add --force"):
        export(artifact, **PLAIN, **options)
    assert contents(artifact) == before
    export(artifact, **PLAIN, **options, force=True)
    assert set(graphs(artifact)) == {"onnxruntime", "onnxruntime-int8"}
    (made,) = (made for made in exports(artifact) if made.precision == "int8")
    assert made.block_size == options.get("block_size", 32)
    assert made.kept_fp32 == (("lm_head",) if "keep_fp32" in options else ())


def test_a_measurement_that_kept_nothing_is_not_repeated(artifact: Path) -> None:
    export(artifact, "int8", **PLAIN, keep_fp32="auto", force=True)
    (made,) = (made for made in exports(artifact) if made.precision == "int8")
    assert (made.keep_fp32, made.kept_fp32) == ("auto", ())
    before = written(artifact)
    export(artifact, "int8,int4", **PLAIN, keep_fp32="auto")
    assert before.items() <= written(artifact).items()


def test_layers_kept_by_name_are_not_those_that_a_measurement_would_keep(artifact: Path) -> None:
    export(artifact, "int8", **PLAIN, keep_fp32="lm_head", force=True)
    with pytest.raises(UserError, match=r"onnxruntime-int8 exists; add --force"):
        export(artifact, "int8,int4", **PLAIN, keep_fp32="auto")


def test_a_further_precision_needs_no_force_and_takes_no_folder(artifact: Path) -> None:
    before = written(artifact)
    export(artifact, "int4", **PLAIN)
    assert graphs(artifact)["onnxruntime-int4"] == "int4"
    assert before.items() <= written(artifact).items()
    assert graph_of(artifact, "onnxruntime", None).precision == "fp32"


def test_one_export_at_a_time(artifact: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    before = contents(artifact)
    with FileLock(artifact / LOCK):
        status, _, error = run("export", artifact, *COMMAND, "--quant", "int4")
        assert (status, error.count("\n")) == (2, 1)
        assert f"another run is writing to {artifact}" in error
    (artifact / LOCK).unlink()
    assert contents(artifact) == before


def test_an_altered_checkpoint_is_not_exported(artifact: Path) -> None:
    shard = next((artifact / CHECKPOINT).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"checkpoint/.* was altered"):
        export(artifact, "int4", **PLAIN)
    assert not (artifact / "onnxruntime-int4").exists()


def test_a_dense_model_that_changed_since_pruning_is_no_baseline(
    llama_folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    artifact = pruned(llama_folder, tmp_path / "artifact")
    weights = llama_folder / "model.safetensors"
    original, before = weights.read_bytes(), contents(artifact)
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    command = ("export", artifact, "--quant", "fp32", "--target", "onnxruntime", "--baseline", "fp32")
    status, _, error = run(*command)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{llama_folder} is not the model that was pruned" in error
    assert contents(artifact) == before
    weights.write_bytes(original)
    assert run(*command)[0] == 0
    assert list(graphs(artifact)) == ["onnxruntime", "baseline/fp32"]
