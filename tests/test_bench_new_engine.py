"""A new engine is one file: dropped beside the others it is found, checked, measured and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench import bench, engines
from dlp_deploy.bench.environments import install, list_engines
from dlp_deploy.bench.markdown import to_markdown
from dlp_deploy.bench.plan import plan_runs

from .bench_artifacts import exported_artifact

ENGINE_FILE = """
from dlp_deploy.bench.engines import Engine

ENGINE = Engine(
    name="torch-without-cache",
    title="PyTorch, all anew for every token",
    worker=__file__,
    reads="checkpoint",
    precisions=("fp32",),
    licence="BSD-3-Clause",
    modules=("torch", "transformers"),
)


class Session:
    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        self.versions = {"torch": torch.__version__}

    def load(self, model, context, prompt, fill):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.restart()

    def restart(self):
        self.ids = []

    def extend(self, ids):
        self.ids += ids.tolist()
        return next(self.windows(self.ids))[-1]

    def windows(self, ids):
        import torch

        with torch.inference_mode():
            yield self.model(torch.tensor([list(ids)])).logits[0].numpy()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are engines, as those in bench/engines are."""
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    engines.engines.cache_clear()
    yield tmp_path
    engines.engines.cache_clear()


def test_a_new_engine_is_one_file(
    folder: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "torch_without_cache.py").write_text(ENGINE_FILE)
    assert install("torch-without-cache").is_file()
    assert "torch-without-cache" in [status.engine.name for status in list_engines()]
    artifact = exported_artifact(
        tiny_checkpoint("llama"),
        tmp_path_factory.mktemp("new") / "tiny-s70",
        quant="fp32",
        target="onnxruntime",
        baseline="fp32",
    )
    name = "torch-without-cache-fp32-s70"
    assert [run.name for run in plan_runs(artifact, read_manifest(artifact), "all", None)] == [
        "onnxruntime-fp32-dense",
        "onnxruntime-fp32-s70",
        "torch-fp32-s70",
        name,
    ]
    quick = {"cores": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 1, "eval_windows": 0}
    report = bench(artifact, engine="torch-without-cache", **quick)  # type: ignore[arg-type]
    run = report.run(name)
    assert (run.status, run.reason) == ("ok", "")
    assert run.output_check is not None
    assert run.output_check.greedy_match == 1
    assert report.speedup_over(name, "onnxruntime-fp32-dense")
    assert "PyTorch, all anew for every token" in to_markdown(report)
