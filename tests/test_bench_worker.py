"""A worker process: what goes over the wire, and what is said when it dies, hangs or misbehaves.

The engine here is a file of its own, which is all that a new one needs.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dlp_deploy.bench import worker as worker_module
from dlp_deploy.bench.engines import Engine
from dlp_deploy.bench.worker import EngineWorker, WorkerError
from dlp_deploy.bench.workers import frames

# Logits that depend on every token before, so that a lost or doubled one shows.
PROGRAM = """
import ctypes, os, socket, sys, tempfile, time
import numpy as np

VOCABULARY = 11

class Session:
    def __init__(self, threads):
        print("chatter on standard output", flush=True)
        os.write(1, b"more of it from C")
        self.versions = {
            "counting": "1.0",
            "threads": str(threads),
            "cores": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "omp": os.environ["OMP_NUM_THREADS"],
        }

    def load(self, model, context, prompt, fill):
        print("loading", model)
        if model.endswith("abort"):
            print("compiling", flush=True)
            tempfile.mkdtemp()
            os.write(2, b"Assertion at graph.cpp:167\\nBacktrace:\\n 0# something\\n")
            os.abort()
        if "signal" in model:
            os.kill(os.getpid(), int(model.rsplit("-", 1)[1]))
        if model.endswith("hang"):
            os.write(2, b"working on it\\n")
            time.sleep(600)
        if model.endswith("call-home"):
            socket.create_connection(("127.0.0.1", 9))
        if "dies-after" in model:
            self.left = int(model.rsplit("-", 1)[1])
        if model.endswith("nan"):
            self.broken = True
        if model.endswith("fail"):
            raise ValueError("no such\\nmodel")
        self.context = context
        self.restart()

    left = None
    broken = False

    def restart(self):
        self.seen = []
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.abort()

    def extend(self, ids):
        assert ids.dtype == np.int64
        self.seen += ids.tolist()
        assert len(self.seen) <= self.context
        return self.row(self.seen)

    def windows(self, ids):
        for start in range(0, len(ids), 3):
            yield np.stack([self.row(ids[: i + 1].tolist()) for i in range(start, min(start + 3, len(ids)))])

    def row(self, seen):
        random = np.random.default_rng(seen)
        scores = random.normal(size=VOCABULARY).astype(np.float32)
        if self.broken and len(seen) > 12:
            scores[3] = np.nan
        return scores
"""


def row(seen: list[int]) -> np.ndarray:
    return np.random.default_rng(seen).normal(size=11).astype(np.float32)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    worker = tmp_path / "counting.py"
    worker.write_text(PROGRAM)
    return Engine("counting", "Counting 1.0", str(worker), "counting", ("fp32",), "Apache-2.0", ("numpy",))


@pytest.fixture
def core() -> int:
    return min(os.sched_getaffinity(0))


@pytest.fixture
def worker(engine: Engine, core: int) -> Iterator[EngineWorker]:
    with EngineWorker.spawn(engine, [core]) as started:
        started.load(Path("model"), context=40, prompt=4)
        yield started


def test_versions_pinning_and_threads(worker: EngineWorker, core: int) -> None:
    assert worker.versions == {"counting": "1.0", "threads": "1", "cores": str(core), "omp": "1"}
    assert os.sched_getaffinity(worker.pid) == {core}


def test_logits_after_the_prompt_and_after_each_later_token(worker: EngineWorker) -> None:
    ids = np.arange(9)
    expected = [row(ids[:end].tolist()) for end in range(4, 10)]
    np.testing.assert_array_equal(worker.logits(ids, prompt=4), expected)


def test_each_token_of_logits_is_an_answer_of_its_own(worker: EngineWorker) -> None:
    """So that the time limit is for one token, not for all. No other question could be asked in between."""
    asked = []
    worker.logits(np.arange(9), prompt=4, advance=lambda: asked.append(worker.memory()))
    assert len(asked) == 6


def test_greedy_decoding_fills_the_cache_before_the_prompt(worker: EngineWorker) -> None:
    ids, seen = np.arange(20), list(range(20))
    generation = worker.generate(ids, new_tokens=6)
    for token in generation.tokens:
        assert token == row(seen).argmax()
        seen.append(token)
    assert len(generation.tokens) == 6
    assert len(generation.samples_ms) == 5
    assert generation.ttft_ms > 0


def test_logits_that_are_no_numbers_are_noticed(worker: EngineWorker) -> None:
    assert worker.generate(np.arange(9), 6).finite
    worker.load(Path("nan"), context=40, prompt=4)
    assert worker.generate(np.arange(9), 4).finite
    assert not worker.generate(np.arange(9), 6).finite


def test_given_tokens_are_followed_as_if_they_were_chosen(worker: EngineWorker) -> None:
    ids = np.arange(9)
    tokens = worker.generate(ids, 4).tokens
    logits = worker.follow(ids, np.array(tokens[:3]))
    assert tuple(logits.argmax(-1)) == tokens
    other = worker.follow(ids, np.array([5, 5]))
    np.testing.assert_array_equal(other, [row([*range(9), *[5] * more]) for more in range(3)])


def test_each_generation_starts_from_an_empty_cache(worker: EngineWorker) -> None:
    assert worker.generate(np.arange(9), 3).tokens == worker.generate(np.arange(9), 3).tokens


def test_likelihood_of_each_next_token(worker: EngineWorker) -> None:
    windows = np.random.default_rng(0).integers(0, 11, (3, 8))
    nll = worker.window_nll(windows)
    assert nll.shape == (3, 7)
    for window, got in zip(windows, nll, strict=True):
        for i in range(7):
            scores = row(window[: i + 1].tolist()).astype(np.float64)
            expected = np.log(np.exp(scores).sum()) - scores[window[i + 1]]
            assert got[i] == pytest.approx(expected, rel=1e-5)


def test_the_cache_can_be_extended_step_by_step(worker: EngineWorker) -> None:
    worker.restart()
    worker.extend(np.array([1, 2]))
    np.testing.assert_array_equal(worker.extend(np.array([3])), row([1, 2, 3]))


def test_memory_is_that_of_the_worker_not_of_its_parent(worker: EngineWorker) -> None:
    ballast = np.ones(1 << 25)
    usage = worker.memory()
    assert usage.rss_bytes <= usage.peak_rss_bytes < ballast.nbytes
    assert usage.cpu_s > 0


def test_an_exception_is_told_and_survived(worker: EngineWorker) -> None:
    with pytest.raises(WorkerError, match="ValueError: no such model") as caught:
        worker.load(Path("fail"), context=40, prompt=4)
    assert "\n" not in str(caught.value)
    assert "Traceback" in caught.value.log
    worker.load(Path("model"), context=40, prompt=4)
    assert worker.logits(np.arange(5), 5).shape == (1, 11)


def test_an_abort_becomes_an_error_with_its_last_words(engine: Engine, core: int) -> None:
    with (
        EngineWorker.spawn(engine, [core]) as worker,
        pytest.raises(
            WorkerError, match=r"counting \(load\) was ended by SIGABRT.*Assertion at graph.cpp:167"
        ),
    ):
        worker.load(Path("abort"), context=40, prompt=4)


@pytest.mark.parametrize(
    ("number", "name"), [(9, r"SIGKILL \(was there enough memory\?\)"), (40, "signal 40")]
)
def test_a_signal_is_told_whether_it_has_a_name_or_not(
    engine: Engine, core: int, number: int, name: str
) -> None:
    with (
        EngineWorker.spawn(engine, [core]) as worker,
        pytest.raises(WorkerError, match=rf"counting \(load\) was ended by {name}"),
    ):
        worker.load(Path(f"signal-{number}"), context=40, prompt=4)


def test_the_last_words_are_those_at_the_end_of_a_long_log(
    engine: Engine, core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is looked at what an engine has said long before, which may be gigabytes, nor at errors that it
    survived."""
    monkeypatch.setattr(worker_module, "LOG_TAIL", 400)
    with EngineWorker.spawn(engine, [core]) as worker:
        for _ in range(3):
            with pytest.raises(WorkerError, match="no such model") as failed:
                worker.load(Path("fail"), context=40, prompt=4)
            assert 0 < len(failed.value.log) <= 400
        with pytest.raises(WorkerError, match=r"last words: Assertion at graph\.cpp:167"):
            worker.load(Path("abort"), context=40, prompt=4)


def test_an_abort_leaves_no_temporary_files(
    engine: Engine, core: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with EngineWorker.spawn(engine, [core]) as worker:
        with pytest.raises(WorkerError, match="Assertion"):
            worker.load(Path("abort"), context=40, prompt=4)
        (left,) = folder.rglob("tmp*")
        assert left.is_dir()
    assert not list(folder.iterdir())


def test_a_worker_that_hangs_is_ended(engine: Engine, core: int) -> None:
    with EngineWorker.spawn(engine, [core]) as worker:
        worker.time_limit_s = 3
        said = r"no answer for 3 s and was ended; its last words: working on it"
        with pytest.raises(WorkerError, match=said):
            worker.load(Path("hang"), context=40, prompt=4)
    assert not Path(f"/proc/{worker.pid}").exists()


def test_a_worker_has_no_network(engine: Engine, core: int) -> None:
    with EngineWorker.spawn(engine, [core]) as worker, pytest.raises(WorkerError, match="no network"):
        worker.load(Path("call-home"), context=40, prompt=4)


def test_an_engine_that_does_not_start_says_why(engine: Engine, core: int) -> None:
    Path(engine.worker).write_text("import no_such_engine")
    with pytest.raises(WorkerError, match="No module named 'no_such_engine'"):
        EngineWorker.spawn(engine, [core])


def test_a_closed_worker_is_gone(engine: Engine, core: int) -> None:
    worker = EngineWorker.spawn(engine, [core])
    worker.close()
    worker.close()
    assert not Path(f"/proc/{worker.pid}").exists()


SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9), max_size=3),
    st.lists(arrays.arrays(st.sampled_from(["<i8", "<f4", "|u1", "<f8"]), SHAPES), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_messages_arrive_as_they_were_sent(body: dict[str, Any], sent: list[np.ndarray]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        named = {str(index): array for index, array in enumerate(sent)}
        sender = Thread(target=frames.send, args=(ours, body, named))
        sender.start()
        received, got = frames.receive(theirs)
        sender.join()
    assert received == body
    assert list(got) == list(named)
    for name, array in named.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_a_message_cut_short_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(b'\x40\0\0\0\0\0\0\0{"body"')
        ours.close()
        with pytest.raises(EOFError):
            frames.receive(theirs)
