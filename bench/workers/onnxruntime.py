"""ONNX Runtime at its best for decoding: the KV cache lives in one buffer per layer and side, bound
as both past and present, so that no token copies it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

# Longer prompts are read in steps, so that the logits of all positions, which the graph returns,
# stay small.
PROMPT_STEP = 512


class Session:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._cores = sorted(os.sched_getaffinity(0))
        self.versions = {"onnxruntime": ort.__version__, "numpy": np.__version__}

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads spin between operators of a run but not between runs, when others are measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A core for each thread. This thread is the first of them; the engine counts processors from one.
        if others := self._cores[1 : self.threads]:
            affinities = ";".join(str(core + 1) for core in others)
            options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        os.sched_setaffinity(0, self._cores[:1])
        self._cache = self._new_cache(context if prompt else 0)
        self._window_cache = self._new_cache(0)

    def restart(self) -> None:
        self._cache.restart()

    def extend(self, ids: np.ndarray) -> np.ndarray:
        for start in range(0, len(ids), PROMPT_STEP):
            logits = self._cache.extend(ids[start : start + PROMPT_STEP])
        return logits[-1]

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        if self._window_cache.length < len(ids):
            self._window_cache = self._new_cache(len(ids))
        self._window_cache.restart()
        for start in range(0, len(ids), PROMPT_STEP):
            yield self._window_cache.extend(ids[start : start + PROMPT_STEP])

    def _new_cache(self, length: int) -> _SharedCache | _ConcatenatedCache:
        metadata = self._session.get_modelmeta().custom_metadata_map
        concatenated = metadata.get("kv_cache") == "concatenated"
        return (_ConcatenatedCache if concatenated else _SharedCache)(self._session, length)


class _SharedCache:
    """Keys and values of up to `length` positions, and the bindings that share them with the graph."""

    def __init__(self, session: ort.InferenceSession, length: int) -> None:
        self._session, self.length = session, length
        self._binding = session.io_binding()
        self._mask = np.ones((1, length), dtype=np.int64)
        self._buffers = []
        outputs = {output.name: output.shape for output in session.get_outputs()}
        self._vocabulary = outputs["logits"][-1]
        for past in session.get_inputs():
            if not past.name.startswith("past_key_values."):
                continue
            buffer, present = _zeros(past, length), _present(past.name)
            if present not in outputs:
                raise ValueError(f"the graph has {past.name} but no output {present}")
            self._binding.bind_ortvalue_input(past.name, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._buffers.append(buffer)
        self.restart()

    def restart(self) -> None:
        self.done = 0

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocabulary] of ids int64 [n] after the cached positions."""
        self.done = _end(self.done, ids, self.length)
        self._binding.bind_cpu_input("input_ids", ids[None])
        self._binding.bind_cpu_input("attention_mask", self._mask[:, : self.done])
        # Bound to an array of ours: fetching it from the binding would wrap every cache buffer anew.
        logits = np.empty((1, len(ids), self._vocabulary), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(self._binding)
        return logits[0]


class _ConcatenatedCache:
    """Keys and values in a graph that copies them with the new ones into buffers of its own."""

    def __init__(self, session: ort.InferenceSession, length: int) -> None:
        self._session, self.length = session, length
        self._inputs = {entry.name for entry in session.get_inputs()}
        self._empty = {
            past.name: _zeros(past, 0)
            for past in session.get_inputs()
            if past.name.startswith("past_key_values.")
        }
        self.restart()

    def restart(self) -> None:
        self.done, self._past = 0, self._empty

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [n, vocabulary] of ids int64 [n] after the cached positions."""
        start, self.done = self.done, _end(self.done, ids, self.length)
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.done), dtype=np.int64),
            "position_ids": np.arange(start, self.done, dtype=np.int64)[None],
        }
        binding = self._session.io_binding()
        for name in self._inputs.intersection(feed):
            binding.bind_cpu_input(name, feed[name])
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *map(_present, self._past)):
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self._past = dict(zip(self._past, presents, strict=True))
        return logits.numpy()[0]


def _zeros(past: ort.NodeArg, length: int) -> ort.OrtValue:
    _, heads, _, head_dim = past.shape
    dtype = np.float16 if past.type == "tensor(float16)" else np.float32
    return ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, length, head_dim), dtype=dtype))


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def _end(start: int, ids: np.ndarray, length: int) -> int:
    if start + len(ids) > length:
        raise ValueError(f"{start + len(ids)} tokens do not fit in a context of {length}")
    return start + len(ids)
