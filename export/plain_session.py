"""ONNX Runtime running any of our graphs as it stands, whichever engine it was written for.

A worker module (see dlp_deploy.bench.workers): it verifies graphs and is never timed, so past keys
and values are simply passed from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime


class Session:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.versions = {"onnxruntime": onnxruntime.__version__}

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # On processors without VNNI its int8 products add in 16 bits, which overflow, unless told not to.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if not _packs_in_blocks(model):
            # Its weights are then read where the file is mapped, so that memory need not hold the graph.
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self.restart()

    def restart(self) -> None:
        self._done = 0
        self._past = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._inputs.items()
            if name.startswith("past_key_values")
        }

    def extend(self, ids: np.ndarray) -> np.ndarray:
        return self._run(ids)[-1]

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        self.restart()
        yield self._run(ids)
        self.restart()

    def _run(self, ids: np.ndarray) -> np.ndarray:
        positions = np.arange(self._done, self._done + len(ids), dtype=np.int64)
        self._done += len(ids)
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self._done), np.int64),
            "positions": positions[None],
            "position_ids": positions[None],
            "causal_mask": (np.arange(self._done) <= positions[:, None]).astype(np.int64)[None, None],
        }
        feed = {name: value for name, value in feed.items() if name in self._inputs}
        outputs = dict(zip(self._outputs, self._session.run(self._outputs, feed | self._past), strict=True))
        logits = outputs.pop("logits")[0]
        self._past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        return logits


def _packs_in_blocks(model: str) -> bool:
    """Whether the graph has MatMulNBits, which computes something else with weights that are not packed."""
    graph = onnx.load(model, load_external_data=False).graph
    return any(node.op_type == "MatMulNBits" for node in graph.node)
