"""Fast tokenizers from the vocabulary in a GGUF file.

Byte-level BPE vocabularies are rebuilt here with the pre-tokenizer that the file names, as
transformers' own conversion splits text by one rule for all of them and mixes up bos and eos.
SentencePiece vocabularies go through transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .errors import UserError
from .gguf_model import metadata

CONTROL, USER_DEFINED = 3, 4
# What decoders take; the default adds token_type_ids, which they refuse.
MODEL_INPUTS = ["input_ids", "attention_mask"]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises UserError when its splitting rule is unknown; a tokenizer.json beside the file is then the way out.
    """
    special = _special_tokens(path)
    if metadata(path, "tokenizer.ggml.model") == "gpt2":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_bpe(path, special), model_input_names=MODEL_INPUTS, **special
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.add_special_tokens(special)
    tokenizer.chat_template = metadata(path, "tokenizer.chat_template")
    return tokenizer


def _special_tokens(path: Path) -> dict[str, str]:
    tokens = metadata(path, "tokenizer.ggml.tokens")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata(path, f"tokenizer.ggml.{kind}_token_id") for kind, name in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _byte_level_bpe(path: Path, special: dict[str, str]) -> Tokenizer:
    tokens = metadata(path, "tokenizer.ggml.tokens")
    rule = metadata(path, "tokenizer.ggml.pre", "gpt-2")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata(path, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule, path)
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = metadata(path, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(_added(tokens, kinds, CONTROL))
    tokenizer.add_tokens(_added(tokens, kinds, USER_DEFINED))
    if metadata(path, "tokenizer.ggml.add_bos_token", False):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def _added(tokens: list[str], kinds: list[int], kind: int) -> list[AddedToken]:
    special = kind == CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _pre_tokenizer(rule: str, path: Path) -> Any:
    if rule in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    splits = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}
    if rule not in splits:
        raise UserError(
            f"{path}: text splitting rule {rule!r} is not known; put the model's tokenizer.json beside it"
        )
    split = pre_tokenizers.Split(Regex(splits[rule]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
