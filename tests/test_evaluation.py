"""Perplexity of an artifact: of what the user asked for, on files that are what the manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dlp_deploy import evaluation
from dlp_deploy.artifact import CHECKPOINT
from dlp_deploy.bench.environments import install
from dlp_deploy.calibration import evaluation_windows
from dlp_deploy.errors import UserError
from dlp_deploy.evaluation import evaluate

from .tiny_models import torch_model

SHORT: dict[str, Any] = {"data": "builtin", "windows": 3, "seqlen": 32}


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """One of the test's own, to be damaged at will."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "tiny"))


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("cores", [None, 1])
def test_perplexity_is_that_of_transformers(engine: str, cores: int | None, tiny_artifact: Path) -> None:
    threads = torch.get_num_threads()
    found = evaluate(str(tiny_artifact), engine, cores=cores, **SHORT)
    assert torch.get_num_threads() == threads
    tokenizer = AutoTokenizer.from_pretrained(tiny_artifact / CHECKPOINT)
    ids = evaluation_windows("builtin", tokenizer, 3, 32).ids
    with torch.inference_mode():
        loss = torch_model(tiny_artifact / CHECKPOINT)(ids, labels=ids).loss
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert (found.engine, found.precision) == (engine, "fp32")


def test_deepsparse_says_what_torch_says(served: Path) -> None:
    install("deepsparse")
    options = SHORT | {"seqlen": 100}
    found = evaluate(str(served), "deepsparse", precision="fp32", **options)
    expected = evaluate(str(served), "torch", **options)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-2)
    assert (found.engine, found.tokens, found.sha256) == ("deepsparse", expected.tokens, expected.sha256)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("llama2-7b", ("--engine", "onnxruntime"), "llama2-7b is no artifact"),
        (
            "llama2-7b",
            ("--engine", "onnxrutime"),
            "there is no engine 'onnxrutime'; did you mean onnxruntime?",
        ),
        (
            "ARTIFACT",
            ("--engine", "onnxruntime", "--precision", "int4"),
            "no sparse graph for onnxruntime int4",
        ),
        ("ARTIFACT", ("--engine", "onnxruntime", "--dense"), "no dense graph for onnxruntime"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_downloaded(
    model: str,
    options: tuple[str, ...],
    said: str,
    tiny_artifact: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(*arguments: object) -> None:
        raise AssertionError("it was downloaded")

    monkeypatch.setattr(evaluation, "resolve_model", download)
    monkeypatch.setattr(evaluation, "evaluation_windows", download)
    name = str(tiny_artifact) if model == "ARTIFACT" else model
    status, out, error = run("eval", name, *options)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error


def test_a_standard_error_that_is_not_known_is_null_in_json(
    tiny_artifact: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    options = ("--data", "builtin", "--seqlen", "32", "--json", "--windows")
    found = [
        json.loads(run("eval", tiny_artifact, *options, windows)[1], parse_constant=pytest.fail)
        for windows in (1, 2)
    ]
    assert found[0]["stderr"] is None
    assert found[1]["stderr"] > 0


def test_a_perplexity_beyond_all_numbers_is_null_in_json(
    llama_folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e6
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    command = ("eval", llama_folder, "--data", "builtin", "--seqlen", "32", "--windows", "2")
    status, out, _ = run(*command, "--json")
    assert status == 0
    assert json.loads(out, parse_constant=pytest.fail)["perplexity"] is None
    assert "perplexity inf" in run(*command)[1]


@pytest.mark.parametrize("option", ["--seqlen", "--windows"])
def test_no_tokens_have_no_perplexity(
    option: str, tiny_artifact: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = run("eval", tiny_artifact, "--data", "builtin", option, "0")
    assert (status, error.count("\n")) == (2, 1)
    assert "too few; the least is 1 window of 2" in error


@pytest.mark.parametrize("options", [("--dense",), ("--precision", "int8")])
def test_torch_has_no_graphs_to_choose_among(
    options: tuple[str, ...], tiny_artifact: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = run("eval", tiny_artifact, "--data", "builtin", *options)
    assert (status, error.count("\n")) == (2, 1)
    assert "torch runs the checkpoint in fp32" in error


@pytest.mark.parametrize("cores", [0, 1000])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_cores_that_are_not_there(engine: str, cores: int, tiny_artifact: Path) -> None:
    with pytest.raises(UserError, match=f"--cores {cores}"):
        evaluate(str(tiny_artifact), engine, cores=cores, **SHORT)


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("engine", "says_so"), [("torch", True), ("onnxruntime", False)])
def test_altered_weights_are_noticed_by_the_engine_that_reads_them(
    engine: str, says_so: bool, artifact: Path
) -> None:
    altered(next((artifact / CHECKPOINT).glob("*.safetensors")))
    if says_so:
        with pytest.raises(UserError, match=r"checkpoint/.*safetensors was altered"):
            evaluate(str(artifact), engine, **SHORT)
    else:
        assert evaluate(str(artifact), engine, **SHORT).windows == 3


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_altered_tokenizer_is_noticed(engine: str, artifact: Path) -> None:
    altered(artifact / CHECKPOINT / "tokenizer.json")
    with pytest.raises(UserError, match=r"checkpoint/tokenizer\.json was altered"):
        evaluate(str(artifact), engine, **SHORT)
