"""One artifact in everything that people serve it with: is the greedy text that of torch?

    python benchmarks/served_elsewhere.py ARTIFACT [--new-tokens 32]

ARTIFACT needs fp32 graphs for both engines. Loaders: optimum's ORTModelForCausalLM, onnxruntime-genai,
DeepSparse's TextGeneration and deepsparse.server, and dlp-deploy serve; servers are asked by the openai
client. Torch runs the pruned checkpoint. Ends with status 1 where a text differs, and says at which token,
and by how much torch preferred its own there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from openai import OpenAI
from optimum.onnxruntime import ORTModelForCausalLM
from processes import DLP_DEPLOY, announced
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_deploy.artifact import CHECKPOINT, check_files, read_manifest
from dlp_deploy.bench.environments import clean_environment, install
from dlp_deploy.progress import say

TEXTS = (
    "The history of the Roman Empire begins with",
    "def fibonacci(n):\n    ",
    "Grüße aus Köln! 世界 is the",
)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
CONTEXT = 160
PROMPT_STEP = 16
SHOWN = 48

PIPELINE = """
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


@dataclass(frozen=True)
class Greedy:
    """What torch says after a prompt: one token more than was asked for, and by how much the logit of each
    is above that of the second best."""

    prompt: str
    tokens: list[int]
    margins: list[float]
    decode: Callable[[list[int]], str]

    def difference(self, text: str) -> int | None:
        """The first token that `text` does not have; None where it is all the same.

        DeepSparse's pipelines sometimes say one token more than they were asked for.
        """
        if text in (self.decode(self.tokens[:-1]), self.decode(self.tokens)):
            return None
        counts = range(1, len(self.tokens) + 1)
        starts = (self.decode(self.tokens[:count]).rstrip("\ufffd") for count in counts)
        return next((index for index, start in enumerate(starts) if not text.startswith(start)), len(counts))


class Torch:
    """The pruned checkpoint, in transformers."""

    def __init__(self, artifact: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(artifact / CHECKPOINT)
        self.model = AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT, dtype=torch.float32)

    def chat(self) -> str:
        return self.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)

    def greedy(self, prompt: str, count: int) -> Greedy:
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        return Greedy(prompt, tokens, (best[:, 0] - best[:, 1]).tolist(), self.decode)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def optimum(graph: Path, prompts: Sequence[str], count: int) -> list[str]:
    model, tokenizer = ORTModelForCausalLM.from_pretrained(graph), AutoTokenizer.from_pretrained(graph)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def genai(graph: Path, prompts: Sequence[str], count: int) -> list[str]:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(graph))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    texts = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + count)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(tokenizer.decode(generator.get_sequence(0)[len(ids) :]))
    return texts


def pipeline(graph: Path, prompts: Sequence[str], count: int) -> list[str]:
    arguments = json.dumps([str(graph), list(prompts), count, CONTEXT, PROMPT_STEP])
    command = [str(install("deepsparse-server")), "-c", PIPELINE, arguments]
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"TextGeneration ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def deepsparse_server(graph: Path) -> Iterator[tuple[str, str]]:
    """The address of deepsparse.server, and what it calls the model."""
    options = {"sequence_length": CONTEXT, "prompt_sequence_length": PROMPT_STEP, "internal_kv_cache": True}
    endpoint = {"task": "text_generation", "model": str(graph), "kwargs": options}
    config = {"num_cores": 1, "num_workers": 1, "integration": "openai", "endpoints": [endpoint]}
    command = [str(install("deepsparse-server").with_name("deepsparse.server")), "--integration", "openai"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        command += ["--config_file", file.name, "--host", "127.0.0.1", "--port", "0"]
        with announced(command, "Uvicorn running on", clean_environment()) as url:
            yield f"{url}/v1", str(graph)


@contextmanager
def dlp_deploy_serve(engine: str, graph: Path) -> Iterator[tuple[str, str]]:
    artifact = graph.resolve().parent
    command = [DLP_DEPLOY, "serve", str(artifact), "--engine", engine, "--precision", "fp32"]
    with announced([*command, "--port", "0", "--context", str(CONTEXT)], "Serving ") as url:
        yield url, artifact.name


def asked(server: Any, graph: Path, prompts: Sequence[str], count: int) -> list[str]:
    """Completions of all prompts but the last, which is what the model's template makes of CHAT."""
    with server(graph) as (url, model):
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": model, "max_tokens": count, "temperature": 0}
        replies = [client.completions.create(prompt=prompt, **options) for prompt in prompts[:-1]]
        answer = client.chat.completions.create(messages=CHAT, **options)  # type: ignore[arg-type]
    return [*(reply.choices[0].text for reply in replies), answer.choices[0].message.content or ""]


LOADERS: dict[str, tuple[str, Callable[[Path, Sequence[str], int], list[str]]]] = {
    "ORTModelForCausalLM": ("onnxruntime", optimum),
    "onnxruntime-genai": ("onnxruntime", genai),
    "dlp-deploy serve": ("onnxruntime", partial(asked, partial(dlp_deploy_serve, "onnxruntime"))),
    "TextGeneration": ("deepsparse", pipeline),
    "deepsparse.server": ("deepsparse", partial(asked, deepsparse_server)),
    "dlp-deploy serve, deepsparse": ("deepsparse", partial(asked, partial(dlp_deploy_serve, "deepsparse"))),
}


def graph_of(artifact: Path, engine: str) -> Path:
    export = read_manifest(artifact).export_for(engine, "fp32", dense=False)
    if export is None:
        raise SystemExit(
            f"{artifact} has no fp32 graph for {engine}; add it: dlp-deploy export {artifact} --quant fp32"
        )
    return artifact / export.path


def row(loader: str, expected: Greedy, text: str) -> tuple[str, bool]:
    place, verdict = expected.difference(text), "yes"
    if place is not None:
        verdict = f"no, from token {place}"
        if place < len(expected.margins):
            verdict += f", where the logit of torch's is {expected.margins[place]:.1e} above the next"
    return (
        f"| {loader} | {quoted(expected.prompt[-SHOWN:])} | {quoted(text[:SHOWN])} | {verdict} |",
        place is None,
    )


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    reference = Torch(options.artifact)
    expected = [reference.greedy(prompt, options.new_tokens) for prompt in (*TEXTS, reference.chat())]
    rows, equal = ["| loader | prompt | greedy text | as torch |", "|---|---|---|---|"], []
    for loader, (engine, run) in LOADERS.items():
        if run is genai and find_spec("onnxruntime_genai") is None:
            say("onnxruntime-genai is not installed (it has no release for this Python)")
            continue
        texts = run(
            graph_of(options.artifact, engine), [greedy.prompt for greedy in expected], options.new_tokens
        )
        for greedy, text in zip(expected, texts, strict=True):
            line, same = row(loader, greedy, text)
            say(line)
            rows.append(line)
            equal.append(same)
    check_files(options.artifact, read_manifest(options.artifact))
    closest = min(min(greedy.margins) for greedy in expected)
    print("\n".join(rows))
    print(
        f"\n{sum(equal)} of {len(equal)} texts of {options.new_tokens} tokens are those of torch, whose two"
    )
    print(f"best logits come as close as {closest:.1e}. Every file of the artifact is as it was.")
    raise SystemExit(not all(equal))


if __name__ == "__main__":
    main()
