from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.calibration import builtin_text, calibration_windows, evaluation_windows
from dlp_deploy.errors import UserError


def test_windows_repeat_with_the_seed_and_differ_without(tiny_tokenizer: Any) -> None:
    first, again, other = (calibration_windows("builtin", tiny_tokenizer, 8, 32, seed) for seed in (0, 0, 1))
    assert first.ids.shape == (8, 32)
    assert first.sha256 == again.sha256
    assert (first.ids == again.ids).all()
    assert first.sha256 != other.sha256


def test_windows_are_pieces_of_the_text(tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = builtin_text("evaluation")[:5000]
    path = tmp_path / "text.txt"
    path.write_text(text)
    for window in calibration_windows(str(path), tiny_tokenizer, 5, 40, 3).ids:
        assert tiny_tokenizer.decode(window) in text


class Letters:
    """A tokenizer whose tokens are the characters' codes."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 40), st.integers(0, 5))
def test_windows_are_disjoint_where_the_text_suffices(
    tmp_path_factory: pytest.TempPathFactory, nsamples: int, seqlen: int, slack: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(chr(33 + index) for index in range(nsamples * seqlen + slack)))
    ids = calibration_windows(str(path), Letters(), nsamples, seqlen, seed).ids.flatten().tolist()
    assert len(set(ids)) == nsamples * seqlen


def test_short_text_gives_overlapping_windows_but_not_less_than_one(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefgh")
    assert calibration_windows(str(path), Letters(), 6, 8, 0).ids.shape == (6, 8)
    with pytest.raises(UserError, match=r"has 8 tokens, less than one window of 9; give a longer text"):
        calibration_windows(str(path), Letters(), 1, 9, 0)


def test_builtin_parts_share_no_paragraph() -> None:
    calibration = set(builtin_text("calibration").split("\n\n"))
    evaluation = set(builtin_text("evaluation").split("\n\n"))
    assert not calibration & evaluation
    assert sum(map(len, calibration)) > 100_000
    assert sum(map(len, evaluation)) > 50_000


def test_evaluation_windows_are_consecutive(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    ids = evaluation_windows(str(path), Letters(), None, 3).ids
    assert "".join(map(chr, ids.flatten())) == "abcdefghi"
    assert evaluation_windows(str(path), Letters(), 2, 3).ids.shape == (2, 3)
    assert evaluation_windows(str(path), Letters(), 9, 3).ids.shape == (3, 3)


def test_jsonl_takes_the_text_fields(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")) + "\n")
    ids = evaluation_windows(str(path), Letters(), None, 8).ids
    assert "".join(map(chr, ids[0])) == "one\n\ntwo"


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', "[1]"])
def test_jsonl_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r'docs\.jsonl, line 2: not a JSON object with a "text" field'):
        calibration_windows(str(path), Letters(), 1, 2, 0)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        calibration_windows(str(path), Letters(), 1, 2, 0)


def test_unknown_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor one of: builtin, c4, wikitext2, ptb"):
        calibration_windows(str(tmp_path / "none.txt"), Letters(), 1, 2, 0)


@pytest.mark.parametrize("spec", ["c4", "wikitext2", "ptb"])
def test_hub_out_of_reach_names_the_flag(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"out of reach.*use --calib builtin"):
        calibration_windows(spec, Letters(), 1, 8, 0)


@pytest.mark.parametrize(("nsamples", "seqlen"), [(0, 8), (1, 1), (-1, 8)])
def test_sizes_too_small(nsamples: int, seqlen: int) -> None:
    with pytest.raises(UserError, match="too few"):
        calibration_windows("builtin", Letters(), nsamples, seqlen, 0)
