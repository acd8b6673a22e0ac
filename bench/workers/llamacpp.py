"""llama.cpp through its C interface, which the xllamacpp wheel exports beside a Python one for servers.

The server cannot say how likely a given text is, nor be timed token by token without its own queue and
sampler around the engine. The layout of the two parameter structs is that of the locked wheel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

# A core for each thread, as the other engines have it.
os.environ["OMP_PROC_BIND"] = "true"
os.environ["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))

import numpy as np
import xllamacpp

# Longer prompts are read in steps; also the most positions whose logits are held at once.
STEP = 512
READ_FILE, F32_FILE, F32_CACHE, NOT_FUSED = 0, 0, 0, 0
ERROR_LEVEL = 4

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Settings(ctypes.Structure):
    """llama_context_params up to the last field that is set here, and room for the rest."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("sequences_and_outputs", ctypes.c_uint32 * 4),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("kinds", ctypes.c_int32 * 4),
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_float * 8),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    )


class _ModelSettings(ctypes.Structure):
    """llama_model_params up to the last field that is set here, and room for the rest."""

    _fields_ = (
        ("devices_and_overrides", ctypes.c_void_p * 2),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    )


class _Batch(ctypes.Structure):
    """llama_batch: without positions and sequences, tokens go behind what the cache holds."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


class Session:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._library = _library()
        self._errors = _Errors(self._library)
        self.versions = {
            "xllamacpp": xllamacpp.__version__,
            "llama.cpp": self._library.llama_version().decode(),
            "built for": _instructions(self._library.llama_print_system_info().decode()),
            "numpy": np.__version__,
        }

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        library = self._library
        settings = library.llama_model_default_params()
        # What it rearranges for its kernels would else be in memory beside the mapped file.
        settings.load_mode = READ_FILE
        self._model = library.llama_model_load_from_file(model.encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {model}: {self._errors.first}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._cache = self._context(context) if prompt else None
        self._window_cache: _Cache | None = None

    def restart(self) -> None:
        assert self._cache is not None
        self._cache.restart()

    def extend(self, ids: np.ndarray) -> np.ndarray:
        assert self._cache is not None
        for start in range(0, len(ids), STEP):
            logits = self._cache.extend(ids[start : start + STEP], 1)
        return logits[-1]

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        if self._window_cache is None or self._window_cache.length < len(ids):
            self._window_cache = self._context(len(ids))
        self._window_cache.restart()
        for start in range(0, len(ids), STEP):
            piece = ids[start : start + STEP]
            yield self._window_cache.extend(piece, len(piece))

    def _context(self, length: int) -> _Cache:
        return _Cache(self._library, self._model, length, self._threads, self._vocabulary, self._errors)


class _Cache:
    """A llama_context: keys and values of up to `length` positions."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: int,
        length: int,
        threads: int,
        vocabulary: int,
        errors: _Errors,
    ) -> None:
        self.length, self._library, self._vocabulary, self._errors = length, library, vocabulary, errors
        settings = library.llama_context_default_params()
        settings.n_ctx = length
        settings.n_batch = settings.n_ubatch = min(STEP, length)
        settings.n_threads = settings.n_threads_batch = threads
        if library.llama_model_ftype(model) == F32_FILE:
            # By default the cache is float16, and so is what the fused attention computes in.
            settings.type_k = settings.type_v = F32_CACHE
            settings.flash_attn_type = NOT_FUSED
        self._pointer = library.llama_init_from_model(model, settings)
        if not self._pointer:
            raise ValueError(f"llama.cpp cannot make a context of {length}: {errors.first}")
        self.restart()

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._library.llama_free(self._pointer)

    def restart(self) -> None:
        self.done = 0
        self._library.llama_memory_clear(self._library.llama_get_memory(self._pointer), False)

    def extend(self, ids: np.ndarray, rows: int) -> np.ndarray:
        """Logits float32 [rows, vocabulary] of the last `rows` of ids int64 [n], behind the cached ones."""
        self.done += len(ids)
        if self.done > self.length:
            raise ValueError(f"{self.done} tokens do not fit in a context of {self.length}")
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        wanted = np.zeros(len(ids), dtype=np.int8)
        wanted[-rows:] = 1
        batch = _Batch(n_tokens=len(ids), token=tokens.ctypes.data, logits=wanted.ctypes.data)
        status = self._library.llama_decode(self._pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}: {self._errors.first}")
        logits = self._library.llama_get_logits(self._pointer)
        return np.ctypeslib.as_array(logits, (rows, self._vocabulary)).copy()


class _Errors:
    """The first error that llama.cpp reported, which says most; what else it has to say is dropped."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.first = ""
        # Kept, for the library calls it as long as it lives.
        self._callback = _Log(self._note)
        library.llama_log_set(self._callback, None)

    def _note(self, level: int, text: bytes, _data: object) -> None:
        if level == ERROR_LEVEL and not self.first:
            self.first = text.decode(errors="replace").strip()


def _library() -> ctypes.CDLL:
    """The C functions used here. Raises RuntimeError for a build with another layout of its structs."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    signatures = {
        "llama_version": (ctypes.c_char_p,),
        "llama_print_system_info": (ctypes.c_char_p,),
        "llama_log_set": (None, _Log, pointer),
        "llama_model_default_params": (_ModelSettings,),
        "llama_context_default_params": (_Settings,),
        "llama_model_load_from_file": (pointer, ctypes.c_char_p, _ModelSettings),
        "llama_model_ftype": (ctypes.c_int, pointer),
        "llama_model_get_vocab": (pointer, pointer),
        "llama_vocab_n_tokens": (integer, pointer),
        "llama_init_from_model": (pointer, pointer, _Settings),
        "llama_free": (None, pointer),
        "llama_get_memory": (pointer, pointer),
        "llama_memory_clear": (None, pointer, ctypes.c_bool),
        "llama_decode": (integer, pointer, _Batch),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if _defaults(library) != (512, 2048, 512, 4, -1, 1, 1, -1, 1, -1):
        raise RuntimeError("this build of llama.cpp lays out its settings in another way than the locked one")
    return library


def _defaults(library: ctypes.CDLL) -> tuple[int, ...]:
    context, model = library.llama_context_default_params(), library.llama_model_default_params()
    lengths = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_threads)
    kinds = (context.flash_attn_type, context.type_k, context.type_v)
    return (*lengths, *kinds, model.n_gpu_layers, model.split_mode, model.load_mode)


def _instructions(system: str) -> str:
    """The vector instructions that the library was built for, from what it says of itself."""
    known = ("AVX", "AVX2", "F16C", "FMA", "AVX512", "AVX512_VNNI", "AVX_VNNI", "AMX_INT8")
    return " ".join(name for name in known if f" {name} = 1" in system)
