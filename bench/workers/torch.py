"""The reference: transformers in float32 on the pruned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator

# A core for each thread, as the other engines have it.
os.environ["OMP_PROC_BIND"] = "true"
os.environ["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

PROMPT_STEP = 512


class Session:
    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        self._context = context
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        # The faster attention, where the class has it; it leaves out a cap of its scores without a word.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        self._model = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            attn_implementation="eager" if capped else None,
            dtype=torch.float32,
            local_files_only=True,
        ).eval()
        self.restart()

    def restart(self) -> None:
        self._cache = DynamicCache(config=self._model.config)

    def extend(self, ids: np.ndarray) -> np.ndarray:
        total = self._cache.get_seq_length() + len(ids)
        if total > self._context:
            raise ValueError(f"{total} tokens do not fit in a context of {self._context}")
        return self._run(ids, self._cache, 1)[-1]

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        cache = DynamicCache(config=self._model.config)
        for start in range(0, len(ids), PROMPT_STEP):
            yield self._run(ids[start : start + PROMPT_STEP], cache, 0)

    @torch.inference_mode()
    def _run(self, ids: np.ndarray, cache: DynamicCache, rows: int) -> np.ndarray:
        """Logits of the last `rows` positions (0: of all), float32 [rows, vocabulary]."""
        # Received arrays may be read-only, which torch does not take.
        tokens = torch.tensor(np.array(ids))[None]
        output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=rows)
        return output.logits[0].numpy()
