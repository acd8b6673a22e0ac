"""One artifact, unchanged, in the tools that other people serve with: each says what torch says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openai
import pytest
import torch
import yaml
from openai import OpenAI
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, LlamaConfig

from dlp_deploy.artifact import CHECKPOINT, check_files, read_manifest
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import clean_environment, install
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.errors import UserError
from dlp_deploy.export.genai import genai_config
from dlp_deploy.export.pack import pack, unpack
from dlp_deploy.export.reshaped import restore_graph

from .artifacts import pruned, with_graphs
from .servers import started
from .tiny_models import SIZES, save_tiny_model, torch_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = ["def main():", "The quick brown fox jumps over", "Grüße, 世界 😀"]
CHAT = [{"role": "user", "content": "Hello"}]
RENDERED = "user: Hello\nassistant:"
NEW_TOKENS = 24
CONTEXT = 96

DEEPSPARSE_PROGRAM = """
import json, sys
from deepsparse import TextGeneration
folder, prompts, new_tokens, context, prompt_step = json.loads(sys.argv[1])
pipeline = TextGeneration(
    model=folder,
    sequence_length=context,
    prompt_sequence_length=prompt_step,
    internal_kv_cache=True,
    num_cores=1,
)
outputs = [pipeline(prompt=prompt, max_new_tokens=new_tokens, do_sample=False) for prompt in prompts]
print(json.dumps([output.generations[0].text for output in outputs]))
"""


class Torch:
    """Greedy decoding of an artifact's pruned checkpoint in torch: what all others are held against."""

    def __init__(self, artifact: Path) -> None:
        folder = artifact / CHECKPOINT
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = torch_model(folder)

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"]

    def tokens(self, prompt: str, count: int = NEW_TOKENS) -> list[int]:
        ids = torch.tensor([self.ids(prompt)])
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        return output[0, ids.shape[1] :].tolist()

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """An exported tiny llama with a chat template, for both engines in fp32 and int8."""
    folder = tmp_path_factory.mktemp("elsewhere")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", chat_template=TEMPLATE)
    model = save_tiny_model(folder / "model", LlamaConfig(**SIZES), tokenizer)
    return with_graphs(pruned(model, folder / "tiny-dlp-s70"), "fp32,int8", "onnxruntime,deepsparse")


# One of each kind of graph.
GRAPHS = (
    *("llama", "llama-tied", "mistral", "mistral-windowed", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
    *("phi3", "phi4-mini", "opt", "heads-of-24"),
)


@pytest.fixture(scope="module", params=GRAPHS)
def artifact(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
) -> Path:
    folder = tmp_path_factory.mktemp("families") / request.param
    return with_graphs(pruned(tiny_checkpoint(request.param), folder), "fp32", "onnxruntime")


# optimum-onnx 0.1 takes the size of a head for hidden size / heads, which qwen3 and some mistrals break.
@pytest.mark.parametrize(
    "artifact", ["llama", "llama-tied", "llama-bias", "qwen2", "phi3", "opt"], indirect=True
)
def test_optimum_generates_what_torch_does(artifact: Path) -> None:
    reference = Torch(artifact)
    model = ORTModelForCausalLM.from_pretrained(artifact / "onnxruntime")
    tokenizer = AutoTokenizer.from_pretrained(artifact / "onnxruntime")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == reference.tokens(prompt)


@pytest.mark.parametrize("artifact", ["llama", "opt"], indirect=True)
def test_optimum_takes_texts_of_one_length_at_once_and_shorter_ones_padded_on_the_right(
    artifact: Path,
) -> None:
    reference = Torch(artifact)
    model = ORTModelForCausalLM.from_pretrained(artifact / "onnxruntime")
    ids = torch.tensor([reference.ids(text * 9)[:12] for text in PROMPTS])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = reference.model.generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, attention_mask=mask, **options).tolist() == expected.tolist()
    mask[1, 7:] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[1, :7]
        torch.testing.assert_close(logits, reference.model(ids[1:2, :7]).logits[0], rtol=1e-4, atol=1e-4)


has_genai = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime-genai has no release for Python 3.10"
)


def genai_tokens(model: Any, ids: list[int]) -> list[int]:
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NEW_TOKENS)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()[len(ids) :]


@has_genai
def test_onnxruntime_genai_generates_what_torch_does(artifact: Path) -> None:
    import onnxruntime_genai as genai

    reference = Torch(artifact)
    model = genai.Model(str(artifact / "onnxruntime"))
    tokenizer = genai.Tokenizer(model)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).tolist()
        assert ids == reference.ids(prompt)
        # The token that ends a text is one of the text in transformers only.
        ends = reference.tokenizer.eos_token_id
        expected = [token for token in reference.tokens(prompt) if token != ends]
        assert [token for token in genai_tokens(model, ids) if token != ends] == expected


@has_genai
def test_onnxruntime_genai_reads_int8_and_the_chat_template(chatty: Path) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(chatty / "onnxruntime-int8"))
    tokenizer = genai.Tokenizer(model)
    assert tokenizer.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True) == RENDERED
    ids = tokenizer.encode(RENDERED).tolist()
    with EngineWorker.spawn(engine_named("onnxruntime"), [min(os.sched_getaffinity(0))]) as worker:
        worker.load(chatty / "onnxruntime-int8" / "model.onnx", CONTEXT, len(ids))
        ours = worker.generate(np.array(ids), NEW_TOKENS).tokens
    assert genai_tokens(model, ids) == list(ours)


@pytest.mark.parametrize(
    ("config", "generation", "ends", "pad", "bos"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None}, {}, 2, 2, 1),
        (
            {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0},
            {"eos_token_id": [7, 2]},
            [7, 2],
            0,
            7,
        ),
        (
            {"eos_token_id": [5, 6], "bos_token_id": 0, "pad_token_id": None},
            {"pad_token_id": 3},
            [5, 6],
            3,
            0,
        ),
        (
            {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None},
            {"eos_token_id": None, "pad_token_id": None},
            0,
            0,
            0,
        ),
        ({"eos_token_id": None, "bos_token_id": None, "pad_token_id": 4}, {}, None, 4, None),
    ],
)
def test_special_tokens_of_genai_come_from_both_configs(
    config: dict[str, Any], generation: dict[str, Any], ends: Any, pad: int, bos: int | None
) -> None:
    model = genai_config(LlamaConfig(**SIZES | config, architectures=["LlamaForCausalLM"]), generation)[
        "model"
    ]
    found = tuple(model.get(name) for name in ("eos_token_id", "pad_token_id", "bos_token_id"))
    assert found == (ends, pad, bos)
    assert None not in model.values()


@has_genai
def test_onnxruntime_genai_ends_where_the_tokenizer_says_when_no_config_does(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    import onnxruntime_genai as genai

    config = LlamaConfig(**SIZES | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None})
    checkpoint = save_tiny_model(tmp_path / "model", config, tiny_tokenizer)
    artifact = with_graphs(pruned(checkpoint, tmp_path / "a"), "fp32", "onnxruntime")
    written = json.loads((artifact / "onnxruntime" / "genai_config.json").read_text())["model"]
    end = tiny_tokenizer.eos_token_id
    assert (written["eos_token_id"], written["pad_token_id"], written["bos_token_id"]) == (end, end, end)
    reference = Torch(artifact)
    expected = reference.tokens(PROMPTS[0])
    expected = expected[: expected.index(end)] if end in expected else expected
    found = genai_tokens(genai.Model(str(artifact / "onnxruntime")), reference.ids(PROMPTS[0]))
    assert [token for token in found if token != end] == expected


# --- DeepSparse's own tools ---


@pytest.fixture(scope="module")
def deepsparse_python() -> Path:
    return install("deepsparse-server")


@pytest.fixture
def copy(chatty: Path, tmp_path: Path) -> Path:
    """The artifact, to be used by tools that write into it."""
    return shutil.copytree(chatty, tmp_path / chatty.name)


def run_pipeline(python: Path, folder: Path, prompts: list[str], prompt_step: int) -> list[str]:
    arguments = json.dumps([str(folder), prompts, NEW_TOKENS, CONTEXT, prompt_step])
    done = subprocess.run(
        [str(python), "-c", DEEPSPARSE_PROGRAM, arguments],
        capture_output=True,
        text=True,
        env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def texts_of(reference: Torch, tokens: list[int]) -> tuple[str, str]:
    """The pipeline sometimes decodes one token more than it was asked for; both are what these tokens say."""
    assert len(tokens) == NEW_TOKENS + 1
    return reference.decode(tokens[:-1]), reference.decode(tokens)


def test_deepsparse_pipelines_generate_what_torch_does_and_leave_a_whole_artifact(
    copy: Path, deepsparse_python: Path, tmp_path: Path
) -> None:
    reference = Torch(copy)
    graph = copy / "deepsparse" / "model.onnx"
    before = graph.read_bytes()
    texts = run_pipeline(deepsparse_python, graph.parent, PROMPTS, prompt_step=4)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text in texts_of(reference, reference.tokens(prompt, NEW_TOKENS + 1))
    assert graph.read_bytes() != before, "the pipeline no longer writes its shapes into the graph"
    check_files(copy, read_manifest(copy))
    assert graph.read_bytes() == before


def test_deepsparse_pipelines_run_int8_as_our_worker_does(copy: Path, deepsparse_python: Path) -> None:
    install("deepsparse")
    reference = Torch(copy)
    (text,) = run_pipeline(deepsparse_python, copy / "deepsparse-int8", PROMPTS[:1], prompt_step=1)
    with EngineWorker.spawn(engine_named("deepsparse"), [min(os.sched_getaffinity(0))]) as worker:
        worker.load(copy / "deepsparse-int8" / "model.onnx", CONTEXT, 1)
        ours = worker.generate(np.array(reference.ids(PROMPTS[0])), NEW_TOKENS + 1).tokens
    assert text in texts_of(reference, list(ours))


def test_deepsparse_server_answers_the_openai_client(
    copy: Path, deepsparse_python: Path, tmp_path: Path
) -> None:
    folder = str(copy / "deepsparse")
    options = {"sequence_length": CONTEXT, "prompt_sequence_length": 4, "internal_kv_cache": True}
    endpoint = {"task": "text_generation", "model": folder, "kwargs": options}
    config = {"num_cores": 1, "num_workers": 1, "integration": "openai", "endpoints": [endpoint]}
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(config))
    command = [str(deepsparse_python.with_name("deepsparse.server")), "--integration", "openai"]
    command += ["--config_file", str(tmp_path / "server.yaml"), "--host", "127.0.0.1", "--port", "0"]
    reference = Torch(copy)
    with started(command, marker="Uvicorn running on", env=clean_environment()) as server:
        url = next(word for word in server.lines[-1].split() if word.startswith("http"))
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        reply = client.completions.create(model=folder, prompt=PROMPTS[0], max_tokens=NEW_TOKENS)
        assert reply.choices[0].text in texts_of(reference, reference.tokens(PROMPTS[0], NEW_TOKENS + 1))
        answer = client.chat.completions.create(model=folder, messages=CHAT, max_tokens=NEW_TOKENS)
        assert answer.choices[0].message.content in texts_of(
            reference, reference.tokens(RENDERED, NEW_TOKENS + 1)
        )
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="another", prompt="x")


def reshaped(path: Path, tokens: int, length: int) -> None:
    """What DeepSparse's tools do to a graph: its dimensions become numbers."""
    model = onnx.load(path, load_external_data=False)
    sizes = {"batch": 1, "tokens": tokens, "length": length, "past": length - tokens}
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.dim_value = sizes[dimension.dim_param]
    onnx.save(model, path)


@pytest.mark.parametrize("folder", ["deepsparse", "deepsparse-int8"])
def test_a_reshaped_graph_is_whole_for_every_command(copy: Path, folder: str, tmp_path: Path) -> None:
    graph = copy / folder / "model.onnx"
    before = graph.read_bytes()
    reshaped(graph, 1, 128)
    assert graph.read_bytes() != before
    assert (unpack(pack(copy, tmp_path / "packed.dlp")) / folder / "model.onnx").read_bytes() == before
    reshaped(graph, 64, 2048)
    check_files(copy, read_manifest(copy), (folder,))
    assert graph.read_bytes() == before


def test_any_other_change_of_a_graph_is_an_alteration(copy: Path) -> None:
    graph = copy / "deepsparse" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[5].name = "another"
    onnx.save(model, graph)
    altered = graph.read_bytes()
    with pytest.raises(UserError, match="was altered after export"):
        check_files(copy, read_manifest(copy))
    assert graph.read_bytes() == altered
    graph.write_bytes(altered[: len(altered) // 2])
    assert not restore_graph(graph, "0" * 64)
    with pytest.raises(UserError, match="was altered after export"):
        check_files(copy, read_manifest(copy))
