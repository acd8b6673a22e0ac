"""Perplexity of an artifact: of what the user asked for, on files that are what the manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dlp_deploy.artifact import CHECKPOINT
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
