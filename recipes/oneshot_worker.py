"""Runs recipes with the tool that they are written for, in that tool's own environment.

    python oneshot_worker.py TOOL CHECKPOINT WINDOWS.npy FOLDER RECIPE...

TOOL is sparseml or llmcompressor. WINDOWS holds the calibration tokens, int64 [n, length]. For each recipe
FOLDER gets NAME.json with the kinds of its modifiers and the tool's error, if any, and on success
NAME.safetensors with the float32 weights of the linear layers. Nothing here may import dlp_deploy.
"""

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NM_DISABLE_ANALYTICS"] = "1"


class SparseML:
    """SparseML 1.8."""

    def load(self):
        import sparseml.transformers  # noqa: F401
        from sparseml.core.factory import ModifierFactory

        ModifierFactory.refresh()

    def parse(self, path):
        from sparseml.core.framework import Framework
        from sparseml.core.recipe import Recipe

        # Creating the modifiers checks every field.
        stages = Recipe.create_instance(path).create_modifier(Framework.pytorch)
        modifiers = (modifier for stage in stages for modifier in stage.modifiers)
        return [type(modifier).__name__.replace("PyTorch", "") for modifier in modifiers]

    def oneshot(self, model, recipe, windows):
        from sparseml.transformers import oneshot

        oneshot(
            model=model,
            tokenizer=_tokenizer(),
            dataset=_dataset(windows),
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            pad_to_max_length=False,
            shuffle_calibration_samples=False,
            oneshot_device="cpu",
            save_compressed=False,
            output_dir="oneshot",
        )

    def training_session(self, model, recipe, stage):
        from sparseml.core import session
        from sparseml.core.framework import Framework

        session.initialize(
            framework=Framework.pytorch,
            recipe=recipe,
            recipe_stage=stage.removesuffix("_stage"),
            model=model,
            optimizer=_optimizer(model),
            start=0.0,
            steps_per_epoch=1,
            copy_data=False,
        )
        return session.callbacks, session.finalize


class LLMCompressor:
    """llm-compressor 0.14, SparseML's successor."""

    def load(self):
        import llmcompressor  # noqa: F401
        from llmcompressor.modifiers.factory import ModifierFactory

        ModifierFactory.refresh()

    def parse(self, path):
        from llmcompressor.recipe import Recipe

        return [type(modifier).__name__ for modifier in Recipe.create_instance(path).modifiers]

    def oneshot(self, model, recipe, windows):
        from llmcompressor import oneshot

        oneshot(
            model=model,
            tokenizer=_tokenizer(),
            dataset=_dataset(windows),
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            shuffle_calibration_samples=False,
            batch_size=1,
        )

    def training_session(self, model, recipe, stage):
        from llmcompressor.core import active_session, callbacks

        session = active_session()
        session.initialize(
            recipe=recipe,
            recipe_stage=stage,
            model=model,
            optimizer=_optimizer(model),
            start=0.0,
            steps_per_epoch=1,
            copy_data=False,
        )
        return callbacks, session.finalize


TOOLS: dict = {"sparseml": SparseML, "llmcompressor": LLMCompressor}


def _train_without_learning(tool, model, recipe, stage):
    """Both tools prune by magnitude only while they train: one step, at a learning rate of zero."""
    import torch

    callbacks, finalize = tool.training_session(model, recipe, stage)
    callbacks.batch_start(batch_data=torch.zeros(1))
    callbacks.loss_calculated(loss=torch.zeros(1))
    callbacks.optim_pre_step()
    callbacks.optim_post_step()
    callbacks.batch_end()
    finalize()


def _magnitude_stage(recipe):
    """Name of the stage that prunes by magnitude, or None. It must run before, not beside, fine-tuning."""
    import yaml

    for name, stage in yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).items():
        if name.endswith("_stage") and any("MagnitudePruningModifier" in group for group in stage.values()):
            return name
    return None


def _optimizer(model):
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.0)


def _dataset(windows):
    import numpy as np
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    )


def _tokenizer():
    """The tools insist on a tokenizer, though the windows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def run(tool, checkpoint, recipe, windows, output):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    stage = _magnitude_stage(recipe)
    if stage:
        _train_without_learning(tool, model, recipe, stage)
    else:
        tool.oneshot(model, recipe, windows)
    weights = {
        f"{name}.weight": module.weight.detach().float().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    save_file(weights, output)


def attempt(tool, checkpoint, recipe, windows, folder):
    """Parse and run one recipe, and write down how that went."""
    outcome = {"kinds": [], "error": ""}
    try:
        outcome["kinds"] = tool.parse(recipe)
        run(tool, checkpoint, recipe, windows, folder / f"{Path(recipe).stem}.safetensors")
    except Exception as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"
    (folder / f"{Path(recipe).stem}.json").write_text(json.dumps(outcome), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    for name in ("checkpoint", "windows", "folder"):
        parser.add_argument(name)
    parser.add_argument("recipes", nargs="+")
    options = parser.parse_args()
    import numpy as np

    tool = TOOLS[options.tool]()
    tool.load()
    windows = np.load(options.windows)
    for recipe in options.recipes:
        # In a fork, as the tools never quite leave a session; their long imports are shared.
        arguments = (tool, options.checkpoint, recipe, windows, Path(options.folder))
        child = multiprocessing.get_context("fork").Process(target=attempt, args=arguments)
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{recipe}: the process died with status {child.exitcode}")


if __name__ == "__main__":
    main()
