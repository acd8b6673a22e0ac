from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_deploy import allocation as allocations
from dlp_deploy.allocation import ALLOCATIONS, Allocation
from dlp_deploy.artifact import Manifest, check_files, list_files, read_manifest
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.families import decoder_of
from dlp_deploy.masking import METHODS
from dlp_deploy.models import resolve_model
from dlp_deploy.pruning import prune
from dlp_deploy.recipes.masks import open_masks

from .limits import file_size_limit
from .tiny_models import TINY_CONFIGS, save_tiny_model

SMALL: dict[str, Any] = {"calib": "builtin", "nsamples": 5, "seqlen": 48, "sparsity": 0.6}
LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(resolve_model(str(folder)))
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def assert_same_contents(folder: Path, other: Path) -> None:
    """All files but the manifest are the same to the bit."""
    digests = [{file.path: file.sha256 for file in list_files(each)} for each in (folder, other)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_every_family_end_to_end(kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(kind)
    folder = prune(str(source), output=tmp_path / "pruned", method="wanda", **SMALL)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    dense, pruned = weights_of(source), weights_of(folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert {name: model.state_dict()[name].shape for name in pruned} == {n: t.shape for n, t in dense.items()}
    masks = open_masks(folder / "masks.safetensors")
    family = decoder_of(model.config).family
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(masks.names()) == sorted(f"{name}.weight" for name in linears if name != "lm_head")
    for name, weight in pruned.items():
        if name in masks.names():
            assert torch.equal(weight, dense[name].masked_fill(~masks.mask(name), 0))
        else:
            assert torch.equal(weight, dense[name])
    for block in manifest.pruning.blocks:
        names = [f"{family.block(block.index)}.{linear}.weight" for linear in family.linears]
        zeros = sum(int((pruned[name] == 0).sum()) for name in names)
        assert block.weights == sum(pruned[name].numel() for name in names)
        assert block.measured == pytest.approx(zeros / block.weights)
        assert block.measured == pytest.approx(block.asked, abs=len(names) / block.weights)
    assert manifest.pruning.sparsity == pytest.approx(0.6, abs=1e-3)
    assert len({block.asked for block in manifest.pruning.blocks}) == 3
    assert manifest.source.sha256 == open_checkpoint(resolve_model(str(source))).sha256
    assert AutoTokenizer.from_pretrained(folder / "checkpoint")("assert")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def check_against_plain_implementation(source: Path, pruned: Path, sparsity: float, alpha: float) -> None:
    """DLP and Wanda written down plainly, on a whole model in memory and with float32 sums in one go."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = calibration_windows("builtin", tokenizer, SMALL["nsamples"], SMALL["seqlen"], 0).ids
    layers = model.model.layers

    def metrics(index: int) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        linears = {name: layers[index].get_submodule(name) for name in LINEARS}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        norms = {name: inputs.flatten(0, 1).norm(dim=0) for name, inputs in seen.items()}
        return {name: linear.weight.detach().abs() * norms[name] for name, linear in linears.items()}

    pruning = read_manifest(pruned).pruning
    scores = [
        float(torch.cat([metric.flatten() for metric in metrics(index).values()]).median())
        for index in range(len(layers))
    ]
    assert [block.score for block in pruning.blocks] == pytest.approx(scores, rel=1e-4)
    importance = 1 - np.array(scores) / np.sum(scores)
    scaled = (importance - importance.min()) / np.ptp(importance) * 2 * alpha
    kept = scaled - scaled.mean() + 1 - sparsity
    assert [1 - block.asked for block in pruning.blocks] == pytest.approx(kept, abs=1e-5)

    found = open_masks(pruned / "masks.safetensors")
    for index, density in enumerate(kept):
        for name, metric in metrics(index).items():
            mask = found.mask(f"model.layers.{index}.{name}.weight")
            counts = mask.sum(1)
            assert (counts - density * mask.shape[1]).abs().max() <= 1
            ranks = metric.argsort(dim=1, descending=True).argsort(dim=1)
            # Sums in another order may swap two weights that are nearly equal.
            assert int((mask ^ (ranks < counts[:, None])).sum()) <= 2, (index, name)
        with torch.no_grad():
            for name in LINEARS:
                layers[index].get_submodule(name).weight.mul_(
                    found.mask(f"model.layers.{index}.{name}.weight")
                )


def test_agrees_with_a_plain_implementation(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    folder = prune(str(source), output=tmp_path / "pruned", alpha=0.1, method="wanda", **SMALL)
    check_against_plain_implementation(source, folder, 0.6, 0.1)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_methods_by_allocations(
    method: str, allocation: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = prune(
        str(tiny_checkpoint("llama")),
        method=method,
        allocation=allocation,
        alpha=0.2,
        output=tmp_path / "pruned",
        **SMALL,
    )
    pruning = read_manifest(folder).pruning
    assert pruning.sparsity == pytest.approx(0.6, abs=1e-3)
    asked = [block.asked for block in pruning.blocks]
    assert max(asked) - min(asked) == pytest.approx(0 if allocation == "uniform" else 0.4)
    assert pruning.statistic == {"dlp": "median", "owl": "outliers", "uniform": None}[allocation]
    assert pruning.alpha == (None if allocation == "uniform" else 0.2)


def test_sparsegpt_beats_wanda_on_the_calibration_text(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    dense = AutoModelForCausalLM.from_pretrained(source)
    ids = calibration_windows("builtin", AutoTokenizer.from_pretrained(source), 5, 48, 0).ids
    errors = {}
    for method in ("wanda", "sparsegpt"):
        folder = prune(str(source), method=method, output=tmp_path / method, **SMALL)
        model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
        with torch.no_grad():
            errors[method] = float((model(ids).logits - dense(ids).logits).square().mean())
    assert errors["sparsegpt"] < errors["wanda"]


def test_shares_what_both_passes_measure(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Given the sparsities, no first pass is run, and the masks are the same all the same."""
    source = str(tiny_checkpoint("llama"))
    first = prune(source, output=tmp_path / "first", **SMALL)
    again = prune(source, output=tmp_path / "again", recipe=first / "recipe.yaml", **SMALL)
    pruning = read_manifest(again).pruning
    assert (pruning.allocation, pruning.statistic) == ("recipe", None)
    assert (first / "masks.safetensors").read_bytes() == (again / "masks.safetensors").read_bytes()


def test_without_activations_no_text_is_read(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = prune(
        str(tiny_checkpoint("llama")),
        method="magnitude",
        allocation="uniform",
        calib="no such text",
        output=tmp_path / "pruned",
    )
    assert read_manifest(folder).pruning.calibration is None


def test_sparsity_zero_changes_nothing(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama-tied")
    folder = prune(str(source), output=tmp_path / "pruned", **SMALL | {"sparsity": 0.0})
    pruned = weights_of(folder / "checkpoint")
    assert all(torch.equal(pruned[name], weight) for name, weight in weights_of(source).items())


@pytest.mark.parametrize("pattern", ["2:4", "N:8"])
def test_patterns(pattern: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    options = (
        {"allocation": "uniform", "sparsity": 0.5} if pattern == "2:4" else {"alpha": 0.2, "sparsity": 0.5}
    )
    folder = prune(
        str(tiny_checkpoint("llama")), pattern=pattern, output=tmp_path / "pruned", **SMALL | options
    )
    masks, group = open_masks(folder / "masks.safetensors"), int(pattern[2:])
    pruning = read_manifest(folder).pruning
    for block in pruning.blocks:
        for linear in LINEARS:
            keep = masks.mask(f"model.layers.{block.index}.{linear}.weight").reshape(-1, group)
            assert (keep.sum(1) == round((1 - block.asked) * group)).all()
    assert pruning.sparsity == pytest.approx(0.5, abs=0.05)
    assert len({block.asked for block in pruning.blocks}) == 1 if pattern == "2:4" else 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtype_is_kept(dtype: torch.dtype, tiny_tokenizer: Any, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "half", TINY_CONFIGS["llama"](), tiny_tokenizer, dtype)
    folder = prune(str(source), output=tmp_path / "pruned", method="wanda", **SMALL)
    dense, pruned = weights_of(source), weights_of(folder / "checkpoint")
    assert all(weight.dtype == dtype for weight in pruned.values())
    for name, weight in pruned.items():
        assert torch.equal(weight, torch.where(weight == 0, 0, dense[name]))
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype="auto").dtype == dtype


def test_a_new_allocation_needs_no_other_change(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steepest(scores: Any, weights: Any, sparsity: float, alpha: float) -> Any:
        return allocations.balanced(np.linspace(0, 2 * alpha, len(weights)), weights, sparsity)

    monkeypatch.setitem(ALLOCATIONS, "steepest", Allocation(steepest))
    folder = prune(
        str(tiny_checkpoint("llama")), allocation="steepest", alpha=0.1, output=tmp_path / "pruned", **SMALL
    )
    asked = [block.asked for block in read_manifest(folder).pruning.blocks]
    np.testing.assert_allclose(asked, [0.7, 0.6, 0.5])


KILLED_RUNS = """
import os, signal, sys
from dlp_deploy.pruning import prune  # once: the processes that are killed are forked from this one

def run(last_call):
    calls, fsync = 0, os.fsync
    def deadly(descriptor):
        nonlocal calls
        calls += 1
        if calls == last_call:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = deadly
    small = {"calib": "builtin", "nsamples": 5, "seqlen": 48, "sparsity": 0.6}
    prune(sys.argv[1], output=sys.argv[2], method="sparsegpt", resume=True, **small)

for last_call in range(10, 60, 2):
    process = os.fork()
    if not process:
        run(last_call)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(status, os.path.exists(sys.argv[2]))
    if status != -signal.SIGKILL:
        break
"""


def test_killed_again_and_again_it_ends_bit_identical(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Kill the process just before some fsync, so that every kind of step is cut short somewhere."""
    source = str(tiny_checkpoint("llama"))
    whole = prune(source, method="sparsegpt", output=tmp_path / "whole", **SMALL)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUNS, source, str(killed)]
    *deaths, end = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(deaths) >= 4
    assert set(deaths) == {f"{-signal.SIGKILL} False"}
    assert end == "0 True"
    assert_same_contents(killed, whole)
    before, after = read_manifest(whole), read_manifest(killed)
    assert after.pruning.resumed_from_block
    assert after.pruning.model_copy(update={"resumed_from_block": ()}) == before.pruning
    assert after.files == before.files


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run behind that ended, by Ctrl-C, in its second pruned block."""
    from dlp_deploy import passes

    write_masks = passes.write_masks
    with monkeypatch.context() as patch:

        def stop(path: Path, *arguments: Any) -> None:
            if path.name == "masks-00001.safetensors":
                raise KeyboardInterrupt
            write_masks(path, *arguments)

        patch.setattr(passes, "write_masks", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(str(source), output=output, **SMALL)


def test_unfinished_run_is_neither_dropped_nor_mixed_up(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tiny_checkpoint("llama"), tmp_path / "pruned"
    interrupted(source, output, monkeypatch)
    with pytest.raises(UserError, match="holds an unfinished run; add --resume to go on, or --force"):
        prune(str(source), output=output, **SMALL)
    with pytest.raises(UserError, match="was begun with seqlen 48, now it is 32"):
        prune(str(source), output=output, resume=True, **SMALL | {"seqlen": 32})
    first_block = tmp_path / "pruned.partial" / "checkpoint" / "model-00002-of-00005.safetensors"
    written = first_block.stat().st_mtime_ns
    prune(str(source), output=output, resume=True, **SMALL)
    assert (output / "checkpoint" / first_block.name).stat().st_mtime_ns == written
    assert read_manifest(output).pruning.resumed_from_block == (1,)
    assert_same_contents(output, prune(str(source), output=tmp_path / "whole", **SMALL))


def test_unfinished_run_is_dropped_by_force(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny_checkpoint("llama"), tmp_path / "pruned", monkeypatch)
    prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", force=True, **SMALL | {"sparsity": 0.5})
    assert read_manifest(tmp_path / "pruned").pruning.resumed_from_block == ()


def test_stopped_before_the_last_rename(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(tiny_checkpoint("llama"))
    whole = prune(source, output=tmp_path / "pruned", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    whole.rename(tmp_path / "pruned.partial")
    (tmp_path / "pruned.partial" / ".work.dropped").mkdir()
    prune(source, output=tmp_path / "pruned", resume=True, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    assert not (whole / ".work.dropped").exists()


def test_two_runs_do_not_write_to_one_folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "pruned.partial").mkdir()
    with (
        FileLock(tmp_path / "pruned.partial" / ".lock"),
        pytest.raises(UserError, match="another run is writing to"),
    ):
        prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", **SMALL)


def test_output_that_exists_is_kept_without_force(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "precious.txt").write_text("x")
    with pytest.raises(UserError, match=r"exists; give another --output, or --force"):
        prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", **SMALL)
    prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", force=True, **SMALL)
    assert not (tmp_path / "pruned" / "precious.txt").exists()
    assert isinstance(read_manifest(tmp_path / "pruned"), Manifest)


def test_block_that_cannot_be_read_leaves_the_others_finished(llama_folder: Path, tmp_path: Path) -> None:
    path = llama_folder / "model.safetensors"
    intact = load_file(path)
    damaged = {name: tensor.clone() for name, tensor in intact.items()}
    damaged["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(damaged, path, metadata={"format": "pt"})
    options = SMALL | {"allocation": "uniform", "output": tmp_path / "pruned"}
    with pytest.raises(
        UserError, match=r"model\.safetensors: tensor model\.layers\.2\.mlp\.down_proj\.weight"
    ):
        prune(str(llama_folder), **options)
    save_file(intact, path, metadata={"format": "pt"})
    prune(str(llama_folder), resume=True, **options)
    assert read_manifest(tmp_path / "pruned").pruning.resumed_from_block == (2,)


def test_full_disk_is_named_and_what_was_finished_is_used(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = str(tiny_checkpoint("llama")), tmp_path / "pruned"
    options = SMALL | {"method": "wanda"}
    # Hidden states take 61,440 bytes and fit; a shard of one block takes more.
    with file_size_limit(80_000), pytest.raises(UserError, match=r"no room to write .*model-00002-of-00005"):
        prune(source, output=output, **options)
    prune(source, output=output, resume=True, **options)
    assert_same_contents(output, prune(source, output=tmp_path / "whole", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity 1\.0 is impossible; give a share in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity -0.1 is impossible"),
        ({"sparsity": float("nan")}, "sparsity nan is impossible"),
        ({"alpha": 0.6}, "alpha 0.6 cannot be satisfied"),
        ({"method": "random"}, "unknown method"),
        ({"allocation": "random"}, "unknown allocation"),
        ({"statistic": "random"}, "unknown statistic"),
        ({"pattern": "2:4"}, "give --allocation uniform, or --pattern N:4"),
        ({"pattern": "2:4", "allocation": "uniform"}, r"prunes 0\.5; give that as --sparsity"),
        ({"seqlen": 300}, "longer than the 256 positions"),
        ({"calib": "none.txt"}, r"text none\.txt is neither a file nor one of"),
        ({"device": "tpu9"}, "device tpu9 is not there"),
        ({"recipe": "no-such-recipe"}, "no-such-recipe"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    options: dict[str, Any], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", **SMALL | options)
    assert list(tmp_path.iterdir()) == []


def test_text_shorter_than_a_window_leaves_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(UserError, match="less than one window of 48"):
        prune(str(tiny_checkpoint("llama")), output=tmp_path / "pruned", **SMALL | {"calib": str(text)})
    assert list(tmp_path.iterdir()) == [text]


def test_default_output_is_named_after_the_model(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(llama_folder, tmp_path / "My Llama-1B")
    monkeypatch.chdir(tmp_path)
    folder = prune("My Llama-1B", method="magnitude", allocation="uniform", sparsity=0.625)
    assert folder == Path("artifacts/my-llama-1b-uniform-s62.5")
    assert json.loads((folder / "manifest.json").read_text())["source"]["location"] == "My Llama-1B"
