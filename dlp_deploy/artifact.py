"""The artifact folder and its manifest: what was pruned, how, what was exported, and the checks.

    artifacts/<model>-dlp-s70-int8/
      manifest.json                  this module
      recipe.yaml  masks.safetensors dlp_deploy.recipes
      checkpoint/                    pruned Hugging Face checkpoint, tokenizer and config
      finetuning.{json,png}          loss by step, if the kept weights were tuned
      <engine>/                      the sparse graph in the asked precision, tokenizer and config
      <engine>-<precision>/          further precisions, when several were asked for
      baseline/<precision>/          the dense model in ONNX Runtime, for comparison
      baseline/llamacpp-<precision>/ the same in llama.cpp

A graph folder holds model.onnx and model.onnx.data, or model.gguf for llama.cpp, and reference.safetensors
(what its logits should be).

Every file is listed with its size and SHA-256, so that a truncated copy is recognized. All paths in the
manifest are relative to its folder and stay below it: a manifest may come from anybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from .errors import UserError
from .storage import is_temporary, sha256_file, write_text
from .threads import map_in_threads

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
MASKS = "masks.safetensors"
RECIPE = "recipe.yaml"

EngineName = Literal["deepsparse", "onnxruntime", "llamacpp"]
Precision = Literal["fp32", "int8", "int4"]
Activations = Literal["dynamic", "static"]


def _inside(path: str) -> str:
    relative = PurePosixPath(path)
    plain = path == relative.as_posix() != "." and path.isprintable() and "\\" not in path
    if not plain or relative.is_absolute() or ".." in relative.parts or path == MANIFEST:
        raise PydanticCustomError(
            "outside", "{path} lies outside the artifact; do not trust it", {"path": repr(path)}
        )
    return path


def _of_a_graph(path: str) -> str:
    if PurePosixPath(path).parts[0] == CHECKPOINT:
        raise PydanticCustomError("checkpoint", "a graph is not in {path}; do not trust it", {"path": path})
    return path


def _known_schema(version: int) -> int:
    if version != SCHEMA:
        raise PydanticCustomError(
            "schema",
            "{version} is of another release of dlp-deploy; this one reads {known}",
            {"version": version, "known": SCHEMA},
        )
    return version


# Below the artifact's folder, and in no need of resolving: what it names may be read, replaced and removed.
InsidePath = Annotated[str, AfterValidator(_inside)]
GraphPath = Annotated[InsidePath, AfterValidator(_of_a_graph)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Stored):
    """Where the dense model came from."""

    name: str
    location: str
    architecture: str
    sha256: str
    blocks: int
    parameters: int


class BlockSparsity(_Stored):
    """One decoder block: its layer score, the sparsity it was given, and the one counted in its mask."""

    index: int
    score: float | None
    asked: float
    measured: float
    weights: int


class HeadSparsity(_Stored):
    """The output head, where it is pruned: the sparsity that was asked for, and the one counted in its mask.

    `untied` says that the embedding served as head, which is now a weight of its own.
    """

    asked: float
    measured: float
    weights: int
    untied: bool


class CalibrationRecord(_Stored):
    """The token windows that the activations were measured on; `sha256` is over the int64 token ids."""

    source: str
    windows: int
    tokens_per_window: int
    seed: int
    sha256: str


class Pruning(_Stored):
    """How a model was pruned. `sparsity` is that of its blocks; `head` is None where the head is dense."""

    method: str
    allocation: str
    statistic: str | None
    alpha: float | None
    pattern: str
    sparsity_asked: float
    sparsity: float
    blocks: tuple[BlockSparsity, ...]
    calibration: CalibrationRecord | None
    resumed_from_block: tuple[int, ...] = ()
    head: HeadSparsity | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a word of a dense head: earlier releases refuse what they do not know."""
        stored = serialize(self)
        return stored if self.head is not None else {k: v for k, v in stored.items() if k != "head"}


class HeldOutLoss(_Stored):
    """Mean negative log-likelihood in nats per token, before and after, on text that was not trained on."""

    source: str
    windows: int
    tokens_per_window: int
    sha256: str
    before: float
    after: float


class Finetuning(_Stored):
    """One fine-tuning of the weights that the masks keep; `masks_sha256` is of the mask file, unchanged.

    `lora_rank` is None when the weights themselves were trained. With a `teacher`, the share
    `distill_weight` of the loss was the divergence from it at `temperature`. `seconds` is the wall time of
    the whole run, with both evaluations.
    """

    created: str
    text: CalibrationRecord
    held_out: HeldOutLoss
    lora_rank: int | None
    teacher: str | None
    temperature: float | None
    distill_weight: float | None
    learning_rate: float
    windows_per_step: int
    steps: int
    trained_parameters: int
    dtype: Literal["float32", "bfloat16"]
    seconds: float
    masks_sha256: str


class OutputCheck(_Stored):
    """Agreement of an engine's logits with a reference: torch on the same weights before quantization,
    or ONNX Runtime on the very same graph.

    `max_rel_error` is max |engine - reference| / max |reference| over all logits of the checked
    positions, `mean_rel_error` the same with the mean of |engine - reference|; `greedy_match` is the
    share of positions with the same arg max.
    """

    engine: str
    reference: Literal["torch", "onnxruntime"]
    max_rel_error: float
    mean_rel_error: float
    greedy_match: float
    positions: int


class Export(_Stored):
    """One graph of the artifact, in folder `path`; `opset` is None for one that is not ONNX.

    `sparsity` is the share of zeros counted in the exported block weights; it exceeds that of the
    masks by `rounded_to_zero`, the share of kept weights that quantization made zero. `rounding` is
    "gptq" or "nearest", None in fp32; `block_size` the inputs that share a scale, None for all;
    `keep_fp32` what was asked not to be quantized ("auto": by measurement), and `kept_fp32` the layers
    that were not. Of int8 activations, `activations` says whether they have a scale per token, dynamic, or
    per layer, static, and `smoothed` whether their outliers were moved into the weights; None where there
    are none. `calibration` is the text that any of this was measured on; None where nothing was, and in
    graphs of releases that did not record it.
    """

    path: GraphPath
    engine: EngineName
    precision: Precision
    dense: bool
    sparsity: float
    rounded_to_zero: float
    weight_bytes: int
    opset: int | None = None
    rounding: str | None = None
    block_size: int | None = None
    keep_fp32: str = "none"
    kept_fp32: tuple[str, ...] = ()
    activations: Activations | None = None
    smoothed: bool | None = None
    calibration: CalibrationRecord | None = None
    checks: tuple[OutputCheck, ...] = ()
    notes: tuple[str, ...] = ()


class StoredFile(_Stored):
    path: InsidePath
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(_Stored):
    schema_version: Annotated[int, AfterValidator(_known_schema)] = SCHEMA
    created: str
    dlp_deploy: str
    source: Source
    pruning: Pruning
    finetuning: tuple[Finetuning, ...] = ()
    exports: tuple[Export, ...] = ()
    files: tuple[StoredFile, ...] = ()

    def export_for(self, engine: str, precision: str | None, dense: bool) -> Export | None:
        """The export with these properties, or None. Of any precision: the one in the engine's own folder, if
        there is one."""
        found = [
            export
            for export in self.exports
            if (export.engine, export.dense) == (engine, dense) and precision in (None, export.precision)
        ]
        return min(found, key=lambda export: export.path != engine, default=None)


def graph_of(folder: Path, engine: str, precision: str | None, dense: bool = False) -> Export:
    """An artifact's graph to run, whose files are found to be what the manifest says.

    Raises UserError when there is none like that, for files that are missing, altered or not listed, and
    for a graph that the engine must not be given (see export/loadable.py).
    """
    manifest = read_manifest(folder)
    if export := manifest.export_for(engine, precision, dense):
        check_files(folder, manifest, (f"{export.path}/",))
        _check_graph(folder, manifest, export)
        return export
    wanted = " ".join(filter(None, ("dense" if dense else "sparse", "graph for", engine, precision)))
    has = ", ".join(f"{e.engine} {e.precision}{' dense' if e.dense else ''}" for e in manifest.exports)
    raise UserError(f"{folder} has no {wanted}; it has: {has or 'none'}; add one with: dlp-deploy export")


def _check_graph(folder: Path, manifest: Manifest, export: Export) -> None:
    """Raise UserError unless the manifest lists the graph's file and all that it reads."""
    # Imported here: reading a manifest must not cost the import of onnx.
    from .bench.engines import engine_named
    from .export.loadable import require_loadable

    listed = {stored.path for stored in manifest.files}
    model = f"{export.path}/{engine_named(export.engine).model_file}"
    beside = require_loadable(folder / model, export.engine) if model in listed else ()
    for name in (model, *(f"{export.path}/{name}" for name in beside)):
        if name not in listed:
            raise UserError(f"{folder / name} is not listed in {MANIFEST}; export it again")


def list_files(folder: Path, known: Iterable[StoredFile] = ()) -> tuple[StoredFile, ...]:
    """Size and SHA-256 of every file below `folder` but the manifest, in path order. What is unfinished, or
    about to be removed, is left out.

    Files that are in `known` are taken from there and not hashed again.
    """
    digests = {stored.path: stored for stored in known}
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST and not is_temporary(path.relative_to(folder))
    )

    def stored(path: Path) -> StoredFile:
        name = path.relative_to(folder).as_posix()
        return digests.get(name) or StoredFile(path=name, bytes=path.stat().st_size, sha256=sha256_file(path))

    return tuple(map_in_threads(stored, files))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json. Raises UserError when the folder is no artifact of a known schema."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is no artifact (it has no {MANIFEST}); make one with: dlp-deploy prune-export"
        )
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest with this text. Raises UserError naming `path`, where it is from, when it is none."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field or 'not JSON'}: {first['msg']}") from None


def check_files(folder: Path, manifest: Manifest, below: Iterable[str] = ("",)) -> None:
    """Raise UserError naming the first file that is missing or differs from the manifest, and when the
    manifest lists none to compare with.

    Only files whose path starts with one of `below` are read: benchmarking one engine need not
    hash the graphs of the other. A graph that DeepSparse's own tools were run on is put in order.
    """
    prefixes = tuple(below)
    for prefix in prefixes:
        if not any(stored.path.startswith(prefix) for stored in manifest.files):
            raise UserError(f"{folder / MANIFEST} lists no file of {folder / prefix}; export it again")

    def check(stored: StoredFile) -> None:
        path = folder / stored.path
        if not path.is_file():
            raise UserError(f"{folder} is incomplete: {stored.path} is missing; export it again")
        if not _is_as_stored(path, stored):
            raise UserError(f"{path} was altered after export (its SHA-256 differs); export it again")

    map_in_threads(check, (stored for stored in manifest.files if stored.path.startswith(prefixes)))


def _is_as_stored(path: Path, stored: StoredFile) -> bool:
    if path.stat().st_size == stored.bytes and sha256_file(path) == stored.sha256:
        return True
    # Imported here: reading a manifest must not cost the import of onnx.
    from .export.reshaped import restore_graph

    return path.suffix == ".onnx" and restore_graph(path, stored.sha256)


def newest_artifact(folder: Path = Path("artifacts")) -> Path:
    """The most recently finished artifact below `folder`. Raises UserError when there is none."""
    found = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no artifact below {folder}/; make one with: dlp-deploy prune-export")
    return found[-1].parent
