"""Tiny models of every family, made with the real transformers classes and a real trained tokenizer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlp_deploy.calibration import builtin_text
from dlp_deploy.cli import main

from .artifacts import pruned, with_graphs
from .servers import POSITIONS, ServerProcess, served_artifact, serving
from .tiny_models import TINY_CONFIGS, VOCABULARY, checkpoints, save_tiny_model

# Neither a deadline nor the check for slow data: both fail where the machine is busy, and nothing is wrong.
# The same examples everywhere: what passes here passes in CI.
settings.register_profile(
    "any-machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")

# Engines whose environments take minutes to download, and the tests that need them.
LARGE_ENGINES = {
    "test_llamacpp.py": ("llamacpp",),
    "test_served_elsewhere.py": ("deepsparse-server",),
    "test_sparseml.py": ("sparseml", "llmcompressor"),
}
INSTALL = """
import sys
from dlp_deploy.bench.environments import install
from dlp_deploy.termination import termination_as_interrupt
with termination_as_interrupt():
    for engine in sys.argv[1:]:
        install(engine)
"""
installer = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Download large engines while the tests run that come before; those that need them wait for it."""
    files = {item.path.name for item in session.items}
    engines = [engine for file, names in LARGE_ENGINES.items() if file in files for engine in names]
    if engines and not session.config.option.collectonly:
        command = [sys.executable, "-c", INSTALL, *engines]
        session.config.stash[installer] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if installer in session.config.stash:
        process = session.config.stash[installer]
        if process.poll() is None:
            # The whole group, and the installer waits for its pip: one that lived on would write into the
            # folder that the next session makes anew.
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens, trained on the built-in text; adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")[:60_000]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """`tiny_checkpoint(kind)`: folder of a tiny model of TINY_CONFIGS, made once; not to be altered."""
    return checkpoints(TINY_CONFIGS, tmp_path_factory.mktemp("models"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with graphs for ONNX Runtime in fp32, its own, and int8, made once; not to be altered."""
    folder = pruned(tiny_checkpoint("llama"), tmp_path_factory.mktemp("artifact") / "tiny")
    return with_graphs(folder, "fp32,int8", "onnxruntime")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The artifact of tests/servers.py, made once; not to be altered."""
    return served_artifact(tmp_path_factory.mktemp("served"), tiny_tokenizer)


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[ServerProcess]:
    """One that serves all that the model has room for, for the tests of one file."""
    with serving(served, context=POSITIONS) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return server.client


@pytest.fixture
def llama_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny llama of the test's own, to be damaged at will."""
    return save_tiny_model(tmp_path / "own-llama", TINY_CONFIGS["llama"](), tiny_tokenizer)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlp-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
