"""Texts, and the token windows drawn from them, for calibration and for evaluation.

A text is named by a spec: "builtin" (the standard library's documentation topics, always there), "c4",
"wikitext2" or "ptb" (from the hub), or the path of a .txt or .jsonl file. Windows are drawn as in the
code of Wanda (Sun et al., 2023, section 4.1) and SparseGPT: c4 by document, other texts by offset.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch

from .checkpoint import safetensors_entries
from .errors import UserError, first_line

Part = Literal["calibration", "evaluation"]

EVALUATION_TOPIC_STRIDE = 4
C4_EVALUATION_DOCUMENTS = 1100
HUB_TEXTS = ("c4", "wikitext2", "ptb")


@dataclass(frozen=True)
class TokenWindows:
    """`ids` is int64 [windows, length]; `sha256` is over its bytes, little-endian."""

    ids: torch.Tensor
    source: str
    seed: int
    sha256: str

    @staticmethod
    def of(windows: list[list[int]] | torch.Tensor, source: str, seed: int) -> TokenWindows:
        ids = torch.as_tensor(windows, dtype=torch.int64)
        digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
        return TokenWindows(ids, source, seed, digest)


def calibration_windows(
    spec: str, tokenizer: Any, nsamples: int | None, seqlen: int, seed: int, *, shorter: bool = False
) -> TokenWindows:
    """Draw `nsamples` windows of `seqlen` tokens at random places of the calibration part of a text.

    Windows do not overlap where the text is long enough for that; None takes as many as there are (but
    c4 has too many for that). With `shorter`, windows are as long as a text that is shorter than `seqlen`.
    Raises UserError when the text is unknown, unreadable, out of reach, or shorter than one window.
    """
    _check_sizes(1 if nsamples is None else nsamples, seqlen)
    draw = random.Random(seed)
    if spec == "c4":
        if nsamples is None:
            raise UserError("c4 is too long to take all of it; say how many windows with --nsamples")
        windows = _windows_of_documents(_c4("calibration"), tokenizer, nsamples, seqlen, draw)
    else:
        tokens = _encode(tokenizer, _text(spec, "calibration"))
        seqlen = min(seqlen, max(len(tokens), 2)) if shorter else seqlen
        _check_length(spec, tokens, seqlen)
        starts = _starts(len(tokens), nsamples or len(tokens) // seqlen, seqlen, draw)
        windows = [tokens[start : start + seqlen] for start in starts]
    return TokenWindows.of(windows, spec, seed)


def evaluation_windows(spec: str, tokenizer: Any, count: int | None, seqlen: int) -> TokenWindows:
    """The first `count` (None: all) consecutive windows of the evaluation part of a text.

    For files this is the whole file; the built-in text shares no paragraph with its calibration part.
    Raises UserError as `calibration_windows` does.
    """
    _check_sizes(count if count is not None else 1, seqlen)
    return TokenWindows.of(_consecutive(spec, tokenizer, seqlen, count), spec, 0)


def file_windows(path: str, tokenizer: Any, seqlen: int) -> torch.Tensor:
    """All consecutive windows of a text file: int64 [windows, seqlen]. Raises UserError as the others do."""
    _check_sizes(1, seqlen)
    return torch.tensor(_consecutive(path, tokenizer, seqlen, None), dtype=torch.int64)


def _consecutive(spec: str, tokenizer: Any, seqlen: int, count: int | None) -> list[list[int]]:
    tokens = _encode(tokenizer, _text(spec, "evaluation"))
    _check_length(spec, tokens, seqlen)
    available = len(tokens) // seqlen
    starts = range(0, min(count or available, available) * seqlen, seqlen)
    return [tokens[start : start + seqlen] for start in starts]


def stored_windows(path: Path, source: str, seed: int, name: str = "ids") -> TokenWindows:
    """Windows whose ids were written to a safetensors file as `name`."""
    return TokenWindows.of(safetensors_entries(path)[name].read(), source, seed)


def _check_sizes(nsamples: int, seqlen: int) -> None:
    if nsamples < 1 or seqlen < 2:
        raise UserError(f"{nsamples} windows of {seqlen} tokens are too few; the least is 1 window of 2")


def _check_length(spec: str, tokens: list[int], seqlen: int) -> None:
    if len(tokens) < seqlen:
        raise UserError(
            f"text {spec} has {len(tokens)} tokens, less than one window of {seqlen}; "
            "give a longer text or a smaller --seqlen"
        )


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the text is cut into windows, so it may be longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _starts(tokens: int, nsamples: int, seqlen: int, draw: random.Random) -> list[int]:
    slack = tokens - nsamples * seqlen
    if slack < 0:
        return [draw.randint(0, tokens - seqlen) for _ in range(nsamples)]
    # Distribute the tokens that stay unused as gaps: every set of disjoint windows is as likely.
    gaps = sorted(draw.randint(0, slack) for _ in range(nsamples))
    starts = [gap + index * seqlen for index, gap in enumerate(gaps)]
    draw.shuffle(starts)
    return starts


def _windows_of_documents(
    documents: Any, tokenizer: Any, nsamples: int, seqlen: int, draw: random.Random
) -> list[list[int]]:
    """One window each from random documents that are longer than a window."""
    windows: list[list[int]] = []
    tries_left = 1000 * nsamples
    while len(windows) < nsamples:
        if not tries_left:
            raise UserError(f"c4 has too few documents of {seqlen} tokens; give a smaller --seqlen")
        tries_left -= 1
        tokens = _encode(tokenizer, documents[draw.randint(0, len(documents) - 1)]["text"])
        if len(tokens) > seqlen:
            start = draw.randint(0, len(tokens) - seqlen - 1)
            windows.append(tokens[start : start + seqlen])
    return windows


def _text(spec: str, part: Part) -> str:
    if spec == "builtin":
        return builtin_text(part)
    if spec == "c4":
        return " ".join(_c4(part)[:C4_EVALUATION_DOCUMENTS]["text"])
    if spec == "wikitext2":
        split = "train" if part == "calibration" else "test"
        rows = _hub_rows("Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-*.parquet")
        return (" " if part == "calibration" else "\n\n").join(rows["text"])
    if spec == "ptb":
        split = "train" if part == "calibration" else "test"
        rows = _hub_rows("ptb-text-only/ptb_text_only", f"penn_treebank/*{split}*", "refs/convert/parquet")
        return " ".join(rows["sentence"])
    return _file_text(Path(spec))


def builtin_text(part: Part) -> str:
    """Documentation topics of the running Python: every fourth is for evaluation, the rest for calibration.

    Topics quote each other, so each paragraph is used once and the parts have none in common.
    """
    names = sorted(topics)
    evaluation = list(_new_paragraphs(names[::EVALUATION_TOPIC_STRIDE], set()))
    if part == "evaluation":
        return "\n\n".join(evaluation)
    rest = [name for index, name in enumerate(names) if index % EVALUATION_TOPIC_STRIDE]
    return "\n\n".join(_new_paragraphs(rest, set(evaluation)))


def _new_paragraphs(names: list[str], seen: set[str]) -> Iterator[str]:
    for name in names:
        for paragraph in (text.strip("\n") for text in topics[name].split("\n\n")):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph


def _file_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"text {path} is neither a file nor one of: builtin, {', '.join(HUB_TEXTS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    return "\n\n".join(_jsonl_texts(path, text)) if path.suffix == ".jsonl" else text


def _jsonl_texts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: not a JSON object with a "text" field') from None


def _c4(part: Part) -> Any:
    shard = "c4-train.00000-of-01024" if part == "calibration" else "c4-validation.00000-of-00008"
    return _hub_rows("allenai/c4", f"en/{shard}.json.gz")


def _hub_rows(repository: str, pattern: str, revision: str | None = None) -> Any:
    """Rows of the matching files of a hub data set. Raises UserError when they cannot be had."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Not load_dataset(repository): it retries for half a minute when there is no network.
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=pattern)
        names = sorted(str(path) for path in Path(folder).glob(pattern) if path.is_file())
        names = names or sorted(str(path) for path in Path(folder).glob(f"{pattern}/*") if path.is_file())
        kind = "json" if ".json" in pattern else "parquet"
        return datasets.load_dataset(kind, data_files=names, split="train")
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "no connection to the hub" if offline else first_line(error)
        raise UserError(
            f"data set {repository} is out of reach ({reason}); "
            "use --calib builtin (for eval: --data builtin) or a text file"
        ) from None
