"""DeepSparse 1.8 with its internal KV cache.

An engine is compiled for one number of tokens per call, so there are two of them over one cache: a
prompt engine and a single-token engine. Both are compiled from the same weights, and both hold a
copy of them.

The internal cache keeps its positions in blocks of 64, and what does not fit that layout gives
wrong logits, nan, or a corrupted heap instead of an error (measured against torch, one and two
threads). What is correct, and all that this module does:
- a cache length that is a multiple of 64, of which the last position stays empty;
- a prompt step of 16, 32 or 64 tokens that begins at a multiple of itself, with a past (length -
  step) that differs from the step and holds all that is cached after the call.

On processors without VNNI the kernel for sparse int8 products of more than 32 rows is wrong: it adds two
products in 16 bits, which do not hold them. Up to 32 rows it is exact (measured against numpy: shapes up to
4096 x 11008 and back, 45 to 95 % sparse). There no call of an int8 graph has more tokens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ["NM_DISABLE_ANALYTICS"] = "1"
# One thread per core of the affinity mask, as deepsparse.benchmark does; without it threads may move.
os.environ["NM_BIND_THREADS_TO_CORES"] = "1"

import numpy as np
import onnx
from deepsparse import Engine, __version__
from deepsparse.cpu import cpu_vnni_compatible
from deepsparse.engine import LIB

BLOCK = 64
PROMPT_STEPS = (64, 32, 16)
ROWS_WITHOUT_VNNI = 32


class Session:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._cores = sorted(os.sched_getaffinity(0))
        self.versions = {"deepsparse": __version__, "numpy": np.__version__, "onnx": onnx.__version__}

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        self._model = Path(model)
        saturates = not cpu_vnni_compatible() and _has_int8_products(self._model)
        self._most_rows = ROWS_WITHOUT_VNNI if saturates else None
        self._window: _Compiled | None = None
        self._window_cache: _Cached | None = None
        self._cache = self._new_cache(context, prompt, fill) if prompt else _Cached([])

    def restart(self) -> None:
        self._cache.restart()

    def extend(self, ids: np.ndarray) -> np.ndarray:
        *_, logits = self._cache.steps(ids)
        return logits[-1]

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        if self._most_rows and len(ids) > self._most_rows:
            if self._window_cache is None or self._window_cache.room < len(ids):
                self._window_cache = self._new_cache(len(ids), len(ids), 0)
            self._window_cache.restart()
            yield from self._window_cache.steps(ids)
            return
        # Without a cache any number of tokens is right. The one past position is masked; a past
        # of length zero would make the shape dynamic.
        if self._window is None or self._window.tokens != len(ids):
            self._window = None
            self._window = self._compiled(len(ids), len(ids) + 1, cached=False)
        yield self._window.run(ids, 0)

    def _new_cache(self, context: int, prompt: int, fill: int) -> _Cached:
        """Engines for prompts of `prompt` tokens behind `fill` others, and for single tokens."""
        step = _prompt_step(prompt, fill, self._most_rows or prompt)
        length = _cache_length(context, prompt, step)
        # Compiling is the work of one thread, and takes minutes for a large model: both at the same time.
        with ThreadPoolExecutor(len(self._cores)) as pool:
            compiled = partial(self._compiled, length=length, cached=True)
            engines = list(pool.map(compiled, sorted({step, 1}, reverse=True)))
        os.sched_setaffinity(0, self._cores[:1])
        return _Cached(engines)

    def _compiled(self, tokens: int, length: int, cached: bool) -> _Compiled:
        # The engine binds the threads that it starts, by the affinity of this one, which works beside them.
        os.sched_setaffinity(0, self._cores)
        try:
            return _Compiled(self._model, tokens, length, self.threads, cached)
        finally:
            os.sched_setaffinity(0, self._cores[:1])


def _has_int8_products(model: Path) -> bool:
    graph = onnx.load(str(model), load_external_data=False).graph
    return any(node.op_type == "MatMulInteger" for node in graph.node)


def _prompt_step(prompt: int, fill: int, most: int) -> int:
    """Tokens per call, at most `most`, that read a prompt behind `fill` others in the fewest calls; what is
    left over goes token by token, and so does all of a prompt that begins at no multiple of any step."""
    steps = [step for step in PROMPT_STEPS if step <= min(prompt, most) and fill % step == 0]
    return min(steps, key=lambda step: prompt // step + prompt % step, default=1)


def _cache_length(context: int, prompt: int, step: int) -> int:
    """Positions to compile for, so that `context` of them can be used."""
    needed = max(context + 1, prompt + step)
    return BLOCK * -(-max(needed, 2 * step + 1) // BLOCK)


class _Cached:
    """Engines of falling numbers of tokens per call, over one internal KV cache."""

    def __init__(self, engines: list[_Compiled]) -> None:
        self.engines = engines
        self.restart()

    def restart(self) -> None:
        self.done = 0
        self.cache = LIB.kv_cache(0, 0)

    @property
    def room(self) -> int:
        """Positions that it can hold: the last one stays empty."""
        return self.engines[0].length - 1

    def steps(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Append ids int64 [n]; the logits of each call, float32 [tokens of that call, vocabulary]."""
        if self.done + len(ids) > self.room:
            raise ValueError(f"{self.done + len(ids)} tokens do not fit in a cache of {self.room + 1}")
        start = 0
        while start < len(ids):
            engine = next(engine for engine in self.engines if self._fits(engine.tokens, len(ids) - start))
            yield engine.run(ids[start : start + engine.tokens], self.done, self.cache)
            start += engine.tokens
            self.done += engine.tokens

    def _fits(self, tokens: int, left: int) -> bool:
        """Whether a call of `tokens` tokens is one of those that the internal cache gets right."""
        if tokens == 1:
            return True
        holds = self.engines[0].length - tokens
        return tokens <= left and self.done % tokens == 0 and self.done + tokens <= holds


class _Compiled:
    """The graph compiled for `tokens` tokens per call and a cache of `length` positions.

    Positions are aligned to the right: the cache grows to the left of the new tokens, as in the
    engine's own pipelines.
    """

    def __init__(self, model: Path, tokens: int, length: int, threads: int, cached: bool) -> None:
        self.tokens, self.length = tokens, length
        with _reshaped(model, tokens, length) as (path, graph):
            inside = [output.name.startswith("present.") for output in graph.output] if cached else None
            self._engine = Engine(str(path), batch_size=1, num_cores=threads, cached_outputs=inside)
        self._ids = np.zeros((1, tokens), dtype=np.int64)
        self._positions = np.zeros((1, tokens), dtype=np.int64)
        self._attention = np.zeros((1, length), dtype=np.int64)
        self._causal = np.zeros((1, 1, tokens, length), dtype=np.int64)
        self._causal[0, 0, :, length - tokens :] = np.tril(np.ones((tokens, tokens), dtype=np.int64))
        named = {
            "input_ids": self._ids,
            "positions": self._positions,
            "attention_mask": self._attention,
            "causal_mask": self._causal,
        }
        # Past inputs of batch 0 tell the engine to use its own cache.
        for value in graph.input:
            if value.name.startswith("past_key_values."):
                shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
                named[value.name] = np.zeros([0 if cached else 1, *shape[1:]], dtype=np.float32)
        self._inputs = [named[name] for name in self._engine.input_names]

    def run(self, ids: np.ndarray, done: int, cache: LIB.kv_cache | None = None) -> np.ndarray:
        """Logits float32 [tokens, vocabulary] of ids int64 [tokens] after `done` cached positions."""
        past = self.length - self.tokens
        self._ids[0] = ids
        self._positions[0] = np.arange(done, done + self.tokens)
        self._attention[0, : past - done] = 0
        self._attention[0, past - done :] = 1
        self._causal[0, 0, :, : past - done] = 0
        self._causal[0, 0, :, past - done : past] = 1
        return self._engine._eng_net.execute_list_out(self._inputs, cache)[0][0]


@contextmanager
def _reshaped(model: Path, tokens: int, length: int) -> Iterator[tuple[Path, onnx.GraphProto]]:
    """The graph with static input shapes, in a temporary folder beside links to its weights."""
    proto = onnx.load(str(model), load_external_data=False)
    sizes = {
        "input_ids": {1: tokens},
        "positions": {1: tokens},
        "attention_mask": {1: length},
        "causal_mask": {2: tokens, 3: length},
    }
    for value in proto.graph.input:
        for axis, size in {0: 1, **sizes.get(value.name, {2: length - tokens})}.items():
            value.type.tensor_type.shape.dim[axis].dim_value = size
    with tempfile.TemporaryDirectory() as folder:
        for name in _external_files(proto.graph):
            Path(folder, name).symlink_to((model.parent / name).resolve())
        path = Path(folder, "model.onnx")
        onnx.save(proto, str(path))
        yield path, proto.graph


def _external_files(graph: onnx.GraphProto) -> set[str]:
    return {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
