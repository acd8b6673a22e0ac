"""An artifact's manifest may come from anybody, and its files may have been altered: both are noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dlp_deploy.artifact import (
    CHECKPOINT,
    MANIFEST,
    StoredFile,
    check_files,
    graph_of,
    list_files,
    read_manifest,
    write_manifest,
)
from dlp_deploy.errors import UserError
from dlp_deploy.storage import drop_leftovers, new_folder, partial_folder

from .artifacts import sealed

HOSTILE = ("../outside", "/etc/passwd", "", ".", "a/../../b", "a//b", "./a", "a/", "..\\b", "a\nb", MANIFEST)


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """One of the test's own, to be damaged at will."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "tiny"))


def rewritten(artifact: Path, place: str, path: str) -> Path:
    stored = json.loads((artifact / MANIFEST).read_text())
    stored[place][0]["path"] = path
    (artifact / MANIFEST).write_text(json.dumps(stored))
    return artifact


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("place", ["files", "exports"])
def test_a_path_that_leaves_the_artifact_is_refused(place: str, path: str, artifact: Path) -> None:
    with pytest.raises(UserError, match=rf"{place}\.0\.path: .* outside the artifact") as caught:
        read_manifest(rewritten(artifact, place, path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [CHECKPOINT, f"{CHECKPOINT}/graph"])
def test_the_checkpoint_is_no_place_for_a_graph(path: str, artifact: Path) -> None:
    with pytest.raises(UserError, match="a graph is not in checkpoint"):
        read_manifest(rewritten(artifact, "exports", path))


def test_every_command_refuses_a_hostile_manifest_and_removes_nothing(
    artifact: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "precious").mkdir()
    rewritten(artifact, "exports", "../precious")
    for command in (
        ("export", artifact, "--quant", "fp32", "--target", "onnxruntime", "--baseline", "none", "--force"),
        ("eval", artifact, "--engine", "onnxruntime", "--data", "builtin"),
        ("serve", artifact),
        ("pack", artifact),
        ("bench", artifact, "--engine", "onnxruntime"),
    ):
        status, _, error = run(*command)
        assert (status, error.count("\n")) == (2, 1)
        assert "outside the artifact" in error
    assert (tmp_path / "precious").is_dir()


def test_a_manifest_that_is_no_text_is_refused(artifact: Path) -> None:
    (artifact / MANIFEST).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"manifest\.json: not JSON"):
        read_manifest(artifact)


def test_a_manifest_of_another_release_is_refused_as_such(artifact: Path) -> None:
    stored = json.loads((artifact / MANIFEST).read_text())
    for change in ({"schema_version": 2}, {"schema_version": 2, "masks": "in another form"}):
        (artifact / MANIFEST).write_text(json.dumps(stored | change))
        with pytest.raises(
            UserError, match="schema_version: 2 is of another release of dlp-deploy; this one reads 1"
        ):
            read_manifest(artifact)


def without(artifact: Path, names: str) -> Path:
    """The artifact, its manifest no longer listing files whose path begins with `names`."""
    manifest = read_manifest(artifact)
    files = tuple(stored for stored in manifest.files if not stored.path.startswith(names))
    write_manifest(artifact, manifest.model_copy(update={"files": files}))
    return artifact


@pytest.mark.parametrize(
    "names", ["onnxruntime/", "onnxruntime/model.onnx.data", "onnxruntime/model.onnx"], ids=str
)
def test_a_graph_that_is_not_listed_is_not_run(names: str, artifact: Path) -> None:
    assert graph_of(artifact, "onnxruntime", "fp32").path == "onnxruntime"
    with pytest.raises(UserError, match=r"manifest\.json"):
        graph_of(without(artifact, names), "onnxruntime", "fp32")


def test_a_graph_that_reads_another_file_is_not_run(artifact: Path) -> None:
    """Its digest is right: whoever wrote the graph wrote the manifest."""
    model = artifact / "onnxruntime" / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"model.onnx.data", b"../../etc/passw"))
    sealed(artifact, read_manifest(artifact).exports)
    with pytest.raises(UserError, match="not a file beside it"):
        graph_of(artifact, "onnxruntime", "fp32")


def test_only_what_is_asked_for_is_compared(artifact: Path) -> None:
    (artifact / "onnxruntime-int8" / "config.json").write_text("{}")
    assert graph_of(artifact, "onnxruntime", "fp32").precision == "fp32"
    with pytest.raises(UserError, match=r"onnxruntime-int8/config\.json was altered"):
        graph_of(artifact, "onnxruntime", "int8")
    with pytest.raises(UserError, match=r"config\.json was altered"):
        check_files(artifact, read_manifest(artifact))


def test_what_is_not_finished_is_not_listed(artifact: Path) -> None:
    before = list_files(artifact)
    for name in ("deepsparse.partial", "baseline/int8.partial", ".traced-x1", ".onnxruntime.77.old"):
        (artifact / name).mkdir(parents=True)
        (artifact / name / "model.onnx").write_bytes(b"half")
    (artifact / ".recipe.yaml.77.partial").write_text("half")
    assert list_files(artifact) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_takes_the_place_of_a_link_whose_target_stays(tmp_path: Path, there: bool) -> None:
    elsewhere = tmp_path / "large-disk" / "model"
    if there:
        elsewhere.mkdir(parents=True)
        (elsewhere / "old").touch()
    link = tmp_path / "model"
    link.symlink_to(elsewhere)
    with new_folder(link) as folder:
        (folder / "new").touch()
    assert [path.name for path in link.iterdir()] == ["new"]
    assert not link.is_symlink()
    assert (elsewhere / "old").exists() == there
    assert {path.name for path in tmp_path.iterdir()} - {"large-disk"} == {"model"}
    (tmp_path / ".model.7.old").symlink_to(elsewhere)
    drop_leftovers(tmp_path)
    assert not (tmp_path / ".model.7.old").is_symlink()
    assert (elsewhere / "old").exists() == there


def test_what_a_killed_process_left_is_put_in_order(tmp_path: Path) -> None:
    for name in ("a.partial", ".traced-x1", "b", ".b.7.old", ".c.7.old", "kept"):
        (tmp_path / name).mkdir()
    (tmp_path / ".f.7.partial").touch()
    drop_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "kept"]


def test_a_new_folder_leaves_the_unfinished_run_of_that_name_alone(tmp_path: Path) -> None:
    final = tmp_path / "model"
    partial_folder(final).mkdir()
    (partial_folder(final) / "hours").touch()
    with new_folder(final) as folder, new_folder(tmp_path / "other") as other:
        (folder / "file").touch()
        assert folder.parent == other.parent == tmp_path
    assert (final / "file").is_file()
    with pytest.raises(RuntimeError), new_folder(final) as folder:
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.partial", "other"]
    assert (partial_folder(final) / "hours").is_file()
    assert (final / "file").is_file()


def test_sizes_are_none_below_zero() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        StoredFile(path="a", bytes=-1, sha256="")
