"""Fine-tuning under a mask: what is pruned stays pruned, what is kept learns, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from dlp_deploy import export, finetune
from dlp_deploy.artifact import CHECKPOINT, MASKS, check_files, read_manifest
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.errors import UserError
from dlp_deploy.finetuning import clock, trainer
from dlp_deploy.finetuning.loss import Distillation, Head, cross_entropy, distilled
from dlp_deploy.recipes.masks import open_masks

from .artifacts import pruned
from .tiny_models import save_tiny_model

TUNING: dict[str, Any] = {
    "data": "builtin",
    "nsamples": 48,
    "seqlen": 32,
    "eval_windows": 4,
    "learning_rate": 3e-3,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tiny_checkpoint("llama-tied"), tmp_path_factory.mktemp("pruned") / "artifact")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_mask_held(artifact: Path, tuned: Path) -> None:
    """The mask file is the same, pruned weights are +0.0 to the bit, kept ones were trained."""
    assert (tuned / MASKS).read_bytes() == (artifact / MASKS).read_bytes()
    before, after = weights_of(artifact / CHECKPOINT), weights_of(tuned / CHECKPOINT)
    masks = open_masks(tuned / MASKS)
    assert before.keys() == after.keys()
    for name in masks.names():
        keep = masks.mask(name)
        assert not after[name][~keep].view(torch.uint8).any()
        assert (after[name][keep] != before[name][keep]).float().mean() > 0.9
        assert torch.equal(after[name] != 0, before[name] != 0)
        assert after[name].dtype == before[name].dtype
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dtype": "bfloat16", "accumulate": 2, "batch_size": 3},
        {"lora_rank": 4},
        {"lora_rank": 2, "dtype": "bfloat16", "gradient_checkpointing": True},
        {"teacher": "dense", "temperature": 2.0},
        {"lora_rank": 4, "teacher": "dense", "distill_weight": 1.0},
    ],
    ids=["full", "full-bf16", "lora", "lora-bf16-checkpointing", "distilled", "lora-distilled"],
)
def test_the_mask_holds_to_the_bit_and_the_loss_falls(
    artifact: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    tuned = finetune(artifact, output=tmp_path / "tuned", epochs=3, **TUNING | how)
    assert_mask_held(artifact, tuned)
    manifest = read_manifest(tuned)
    check_files(tuned, manifest)
    (record,) = manifest.finetuning
    assert record.held_out.after < record.held_out.before - 0.02
    assert (record.lora_rank, record.teacher) == (how.get("lora_rank"), how.get("teacher"))
    assert manifest.pruning == read_manifest(artifact).pruning
    assert (tuned / "finetuning.png").read_bytes().startswith(b"\x89PNG")
    log = json.loads((tuned / "finetuning.json").read_text())
    assert [step["step"] for step in log["steps"]] == list(range(1, record.steps + 1))
    assert log["held_out_loss"]["after"] == record.held_out.after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


@pytest.mark.parametrize(
    ("kind", "rank"), [("gemma2", None), ("phi3", 2), ("qwen3", 2), ("opt", None), ("llama-bias", None)]
)
def test_every_family_is_trained_on_its_own_loss(
    tiny_checkpoint: Callable[[str], Path],
    tiny_tokenizer: Any,
    tmp_path: Path,
    kind: str,
    rank: int | None,
) -> None:
    source = pruned(tiny_checkpoint(kind), tmp_path / "pruned")
    options = TUNING | {"nsamples": 4, "batch_size": 4, "lora_rank": rank, "learning_rate": 1e-4}
    tuned = finetune(source, output=tmp_path / "tuned", **options)
    ids = calibration_windows("builtin", tiny_tokenizer, 4, TUNING["seqlen"], 0).ids
    model = AutoModelForCausalLM.from_pretrained(source / CHECKPOINT, attn_implementation="eager")
    (step,) = json.loads((tuned / "finetuning.json").read_text())["steps"]
    # OPT's config asks for dropout, so its training loss is a random number around the other.
    near = {"abs": 0.3} if kind == "opt" else {"abs": 2e-3}
    assert step["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), **near)
    after = weights_of(tuned / CHECKPOINT)
    masks = open_masks(tuned / MASKS)
    assert all(not after[name][~masks.mask(name)].any() for name in masks.names())


def test_adapters_train_what_they_merge(artifact: Path) -> None:
    from dlp_deploy.finetuning.holding import attach_masks
    from dlp_deploy.finetuning.lora import merged, with_adapters
    from dlp_deploy.finetuning.model import load_model
    from dlp_deploy.finetuning.pruned import open_pruned

    opened = open_pruned(str(artifact), None, None, artifact)
    model = load_model(opened.files, None)
    attach_masks(model, opened.masks)
    folder = artifact.parent / "config"
    adapted = with_adapters(model, opened.decoder.family, 4, folder)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained = adapted(ids).logits
        assert not torch.allclose(trained, _plain(artifact, ids), atol=1e-2)
        assert torch.allclose(merged(adapted)(ids).logits, trained, atol=1e-5)


def _plain(artifact: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT)(ids).logits


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 600),
    weight=st.floats(0, 1),
    temperature=st.floats(0.5, 4),
    cap=st.sampled_from([None, 3.0]),
)
def test_the_chunked_loss_is_that_of_whole_logits(
    tokens: int, weight: float, temperature: float, cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, 8, generator=generator).requires_grad_()
    head = Head(torch.randn(31, 8, generator=generator), cap)
    teacher_states = torch.randn(tokens, 5, generator=generator)
    teacher = Head(torch.randn(31, 5, generator=generator))
    targets = torch.randint(31, (tokens,), generator=generator)
    logits, wanted = head.logits(states), teacher.logits(teacher_states)
    hard = functional.cross_entropy(logits, targets)
    p, q = (torch.softmax(x / temperature, 1) for x in (wanted, logits))
    soft = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    for expected, found in (
        (hard, cross_entropy(states, head, targets)),
        (
            weight * soft + (1 - weight) * hard,
            distilled(states, head, targets, teacher_states, teacher, Distillation(weight, temperature)),
        ),
    ):
        assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        (gradient,) = torch.autograd.grad(found, states)
        (reference,) = torch.autograd.grad(expected, states, retain_graph=True)
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-6)


def test_a_result_exports_and_is_tuned_again(artifact: Path, tmp_path: Path) -> None:
    tuned = finetune(artifact, output=tmp_path / "tuned", **TUNING)
    again = finetune(tuned, output=tmp_path / "again", lora_rank=2, **TUNING)
    assert_mask_held(artifact, again)
    export(again, quant="fp32", target="onnxruntime", baseline="fp32")
    manifest = read_manifest(again)
    assert len(manifest.finetuning) == 2
    sparse, dense = manifest.exports
    assert sparse.sparsity == pytest.approx(manifest.pruning.sparsity, abs=1e-6)
    assert dense.sparsity == 0
    check_files(again, manifest)


def test_a_bare_checkpoint_is_held_by_its_zeros(artifact: Path, tmp_path: Path) -> None:
    tuned = finetune(artifact / CHECKPOINT, output=tmp_path / "tuned", **TUNING)
    before, after = weights_of(artifact / CHECKPOINT), weights_of(tuned / CHECKPOINT)
    for name in open_masks(tuned / MASKS).names():
        assert torch.equal(after[name] != 0, before[name] != 0)
    manifest = read_manifest(tuned)
    assert manifest.pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    export(tuned, quant="fp32", target="onnxruntime", baseline="none")
    assert "ConstantPruningModifier" in (tuned / "recipe.yaml").read_text()


def test_the_dense_model_named_for_a_bare_checkpoint_is_its_baseline(
    artifact: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    dense = str(tiny_checkpoint("llama-tied"))
    tuned = finetune(artifact / CHECKPOINT, teacher=dense, output=tmp_path / "tuned", **TUNING)
    source = read_manifest(tuned).source
    assert (source.location, source.sha256) == (dense, read_manifest(artifact).source.sha256)
    export(tuned, quant="fp32", target="none", baseline="fp32")
    assert [made.sparsity for made in read_manifest(tuned).exports] == [0]


def test_half_precision_checkpoints_keep_their_dtype(artifact: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT).to(torch.bfloat16)
    shutil.copytree(artifact / CHECKPOINT, tmp_path / "half", ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained(tmp_path / "half")
    for rank in (None, 4):
        options = TUNING | {"lora_rank": rank, "dtype": "bfloat16"}
        tuned = finetune(tmp_path / "half", masks=artifact / MASKS, output=tmp_path / f"{rank}", **options)
        assert {tensor.dtype for tensor in weights_of(tuned / CHECKPOINT).values()} == {torch.bfloat16}
        (record,) = read_manifest(tuned).finetuning
        assert record.held_out.after < record.held_out.before


def test_a_file_is_split_for_the_evaluation(artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        " ".join(f"The {n} for statement is used to iterate over the elements." for n in range(99))
    )
    tuned = finetune(artifact, output=tmp_path / "tuned", **TUNING | {"data": str(text), "nsamples": None})
    (record,) = read_manifest(tuned).finetuning
    assert record.text.windows > 4
    assert record.held_out.windows >= 1
    assert record.text.sha256 != record.held_out.sha256


# Runs `dlp-deploy finetune` in a process of its own that kills itself, hard, after a number of saved states.
KILLED = """
import os, signal, sys
from dlp_deploy.finetuning import trainer
saves = int(sys.argv.pop(1))
note = trainer.JournalSteps.on_save
def on_save(self, args, state, control, **kwargs):
    note(self, args, state, control, **kwargs)
    if state.global_step == saves:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.JournalSteps.on_save = on_save
from dlp_deploy.cli import main
main()
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The order of summation, and so the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rank", "kills"), [(None, (7,)), (4, (5, 12))], ids=["full", "lora"])
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_to_the_same_result(
    artifact: Path, tmp_path: Path, rank: int | None, kills: tuple[int, ...]
) -> None:
    """Killed with step 12 of 12, it is between the end of training and the writing of its result."""
    options = TUNING | {"nsamples": 24, "eval_windows": 2, "batch_size": 4, "epochs": 2, "lora_rank": rank}
    flags = [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    flags += ["--save-minutes", "0"]
    killed = tmp_path / "killed"
    for step in kills:
        more = [] if step == kills[0] else ["--resume"]
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                KILLED,
                str(step),
                "finetune",
                artifact,
                "--output",
                killed,
                *flags,
                *more,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert process.returncode == -signal.SIGKILL
        assert not killed.exists()
    finetune(artifact, output=killed, resume=True, **options)
    whole = finetune(artifact, output=tmp_path / "whole", **options)
    first, second = (weights_of(folder / CHECKPOINT) for folder in (killed, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)
    logs = [json.loads((folder / "finetuning.json").read_text())["steps"] for folder in (killed, whole)]
    assert [step["loss"] for step in logs[0]] == [step["loss"] for step in logs[1]]
    assert len(logs[0]) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_time_limit_ends_training_with_a_learning_rate_near_zero(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each step takes a second, and nothing else takes any time."""
    seconds, loss = [0.0], trainer.MaskedTrainer.compute_loss

    def slow_loss(*arguments: Any, **named: Any) -> Any:
        seconds[0] += 1
        return loss(*arguments, **named)

    monkeypatch.setattr(trainer.MaskedTrainer, "compute_loss", slow_loss)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    tuned = finetune(artifact, output=tmp_path / "tuned", max_minutes=30 / 60, **TUNING)
    steps = json.loads((tuned / "finetuning.json").read_text())["steps"]
    rates = [step["learning_rate"] for step in steps]
    # One pass is 6 steps: it went on while there was time.
    assert [step["seconds"] for step in steps] == list(range(1, 31))
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/nowhere/at-all", "--data", "builtin"), "unknown model"),
        (("DENSE", "--data", "builtin"), "not pruned"),
        (("ARTIFACT", "--data", "/no/text.txt"), "neither a file nor"),
        (("ARTIFACT", "--data", "builtin", "--seqlen", "9999"), "positions"),
        (("ARTIFACT", "--data", "builtin", "--lora-rank", "0"), "--lora-rank"),
        (("ARTIFACT", "--data", "builtin", "--learning-rate", "nan"), "--learning-rate"),
        (("ARTIFACT", "--data", "builtin", "--distill-weight", "2"), "--distill-weight"),
        (("ARTIFACT", "--data", "builtin", "--max-minutes", "0"), "--max-minutes"),
        (("ARTIFACT", "--data", "builtin", "--dtype", "float8"), "--dtype"),
        (("ARTIFACT", "--data", "builtin", "--teacher", "llama2-8b"), "llama2-7b"),
        (("ARTIFACT", "--data", "builtin", "--masks", "OTHER"), "blocks is"),
        (("DENSE", "--data", "builtin", "--masks", "MASKS"), "model.layers.0.self_attn.q_proj.weight"),
        (("CHECKPOINT", "--data", "builtin", "--teacher", "dense"), "--teacher MODEL"),
        (("ARTIFACT", "--data", "builtin", "--learning-rate", "1e30"), "--learning-rate"),
    ],
)
def test_wrong_input_is_one_clear_line(
    arguments: tuple[str, ...],
    said: str,
    run: Callable[..., tuple[int, str, str]],
    artifact: Path,
    tiny_checkpoint: Callable[[str], Path],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    named = {
        "ARTIFACT": artifact,
        "CHECKPOINT": artifact / CHECKPOINT,
        "DENSE": tiny_checkpoint("llama-tied"),
        "MASKS": artifact / MASKS,
    }
    if "OTHER" in arguments:
        config = LlamaConfig.from_pretrained(named["DENSE"], num_hidden_layers=2)
        other = save_tiny_model(tmp_path / "other", config, tiny_tokenizer)
        named["OTHER"] = pruned(other, tmp_path / "other-artifact") / MASKS
    output = tmp_path / "out" / "tuned"
    given = [named.get(argument, argument) for argument in arguments]
    status, out, err = run("finetune", "--seqlen", 16, *given, "--output", output)
    assert status == 2
    assert not out
    assert said in err.strip().splitlines()[-1]
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_an_existing_output_is_kept(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="--force"):
        finetune(artifact, output=tmp_path / "mine", **TUNING)


@pytest.mark.parametrize(("library", "how"), [("peft", {"lora_rank": 4}), ("accelerate", {})])
def test_a_missing_library_is_named_with_its_command(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, how: dict[str, int]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}.*pip install 'dlp-deploy\[finetune\]'"):
        finetune(artifact, output=tmp_path / "tuned", **TUNING | how)
