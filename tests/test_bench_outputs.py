"""Where results go is checked before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlp_deploy.bench.outputs import require_suffix, require_writable
from dlp_deploy.errors import UserError


def test_a_name_whose_neighbours_would_be_guessed_is_refused(tmp_path: Path) -> None:
    require_suffix(tmp_path / "run.int8.json", ".json")
    with pytest.raises(
        UserError, match=r"--output today: give a name that ends in \.json, e\.g\. today\.json"
    ):
        require_suffix(Path("today"), ".json")
    with pytest.raises(UserError, match=r"ends in \.json, e\.g\. run\.int8\.json"):
        require_suffix(Path("run.int8"), ".json")
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        require_suffix(Path("sweep.json"), ".jsonl")
    (tmp_path / "runs.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        require_suffix(tmp_path / "runs.json", ".json")


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    require_writable(tmp_path / "kept")
    require_writable(tmp_path / "kept" / "new" / "newer")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/new cannot be written to \(Not a directory\); give another"):
        require_writable(tmp_path / "file" / "new")
    with pytest.raises(UserError, match="cannot be written to"):
        require_writable(tmp_path / "file")
    # Where even root makes no files.
    with pytest.raises(UserError, match="cannot be written to"):
        require_writable(Path("/proc/self"))
    assert (tmp_path / "file").read_text() == "mine"
