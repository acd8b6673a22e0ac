"""The command line on a tiny real model, and what it says to wrong input: one line, exit status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest

import dlp_deploy
from dlp_deploy.artifact import check_files, graph_of, read_manifest

from .artifacts import pruned, sealed, with_graphs

TINY = ("--calib", "builtin", "--nsamples", "4", "--seqlen", "64")


def test_prune_export_makes_a_verified_artifact(
    run: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "artifact"
    status, out, _ = run(
        "prune-export",
        "--model",
        tiny_checkpoint("llama"),
        "--quant",
        "fp32",
        "--baseline",
        "fp32",
        "--output",
        output,
        *TINY,
    )
    assert status == 0
    assert out.strip() == str(output)
    manifest = read_manifest(output)
    check_files(output, manifest)
    assert manifest.pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    assert [export.path for export in manifest.exports] == ["deepsparse", "onnxruntime", "baseline/fp32"]
    for export in manifest.exports:
        assert export.checks
        assert all(check.max_rel_error < 1e-4 for check in export.checks)
        assert export.sparsity == pytest.approx(0.0 if export.dense else 0.7, abs=1e-3)
    assert not list(tmp_path.glob("*.partial"))

    status, _, err = run("prune-export", "--model", tiny_checkpoint("llama"), "--output", output, *TINY)
    assert status == 2
    assert "--force" in err

    scores = []
    for engine in ("torch", "onnxruntime"):
        status, out, _ = run(
            "eval", output, "--engine", engine, "--data", "builtin", "--windows", 3, "--seqlen", 64, "--json"
        )
        assert status == 0
        scores.append(json.loads(out)["perplexity"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


def test_export_adds_a_precision_and_refuses_to_replace_one(
    run: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "artifact"
    assert run("prune", "--model", tiny_checkpoint("qwen2"), "--output", output, *TINY)[0] == 0
    command = ("export", output, "--target", "onnxruntime", "--baseline", "none", "--quant", "int8")
    assert run(*command)[0] == 0
    assert [export.precision for export in read_manifest(output).exports] == ["int8"]
    status, _, err = run(*command)
    assert status == 2
    assert "--force" in err
    assert run(*command, "--force")[0] == 0
    check_files(output, read_manifest(output))


def test_a_precision_is_there_once_and_the_first_asked_for_is_the_artifacts_own(
    run: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "artifact"
    assert run("prune", "--model", tiny_checkpoint("qwen2"), "--output", output, *TINY)[0] == 0
    command = ("export", output, "--target", "onnxruntime", "--baseline", "none", "--quant")

    def graphs() -> dict[str, str]:
        check_files(output, read_manifest(output))
        return {export.path: export.precision for export in read_manifest(output).exports}

    assert run(*command, "fp32,int8")[0] == 0
    assert graphs() == {"onnxruntime": "fp32", "onnxruntime-int8": "int8"}
    status, _, err = run(*command, "int8")
    assert (status, err.count("\n")) == (2, 1)
    assert run(*command, "int8", "--force")[0] == 0
    assert graphs() == {"onnxruntime": "fp32", "onnxruntime-int8": "int8"}
    assert graph_of(output, "onnxruntime", None).precision == "fp32"
    assert run(*command, "int4,fp32", "--force")[0] == 0
    assert graph_of(output, "onnxruntime", None).precision == "int4"
    assert graphs() == {"onnxruntime": "int4", "onnxruntime-fp32": "fp32", "onnxruntime-int8": "int8"}


def test_an_engine_that_fails_is_one_line(
    run: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = with_graphs(pruned(tiny_checkpoint("llama"), tmp_path / "artifact"), "fp32", "onnxruntime")
    model = artifact / "onnxruntime" / "model.onnx"
    graph = onnx.load(str(model), load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, str(model))
    sealed(artifact, read_manifest(artifact).exports)
    status, out, err = run("eval", artifact, "--engine", "onnxruntime", "--data", "builtin", "--windows", 1)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "NoSuchOperator" in err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("prune", "--model", "m"), "--resume goes on from there"),
        (("export", "a", "--force"), "run the same command again, without --force, to go on"),
        (("eval", "a"), "interrupted\n"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    command: tuple[str, ...],
    said: str,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dlp_deploy, {"eval": "evaluate"}.get(command[0], command[0]), interrupted)
    status, out, err = run(*command)
    assert (status, out) == (130, "")
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prune-export", "--model", "llama2-8b"), "llama2-7b"),
        (("prune-export", "--model", "/nowhere/at-all", "--sparsity", "0.7"), "unknown model"),
        (("prune-export", "--model", "MODEL", "--sparsity", "1.0", *TINY), "[0, 1)"),
        (("prune-export", "--model", "MODEL", "--sparsity", "nan", *TINY), "[0, 1)"),
        (("prune-export", "--model", "MODEL", "--alpha", "7", *TINY), "alpha"),
        (("prune-export", "--model", "MODEL", "--quant", "int7", *TINY), "int7"),
        (("prune-export", "--model", "MODEL", "--method", "wander", *TINY), "wanda"),
        (("prune-export", "--model", "MODEL", "--sparsity", "much"), "--sparsity"),
        (("bench", "/nowhere/at-all"), "no artifact"),
        (("recipe", "show", "no-such-recipe"), "no-such-recipe"),
        (("engine", "install", "tvm"), "deepsparse"),
        (("no-such-command",), "no-such-command"),
    ],
)
def test_wrong_input_is_one_clear_line(
    arguments: tuple[str, ...],
    said: str,
    run: Callable[..., tuple[int, str, str]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_checkpoint("llama"))
    status, out, err = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert status == 2
    assert not out
    assert len(err.strip().splitlines()) == 1
    assert said in err
    assert not list(tmp_path.rglob("*.partial"))


def test_the_release_is_told(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--version") == (0, f"dlp-deploy {version('dlp-deploy')}\n", "")
