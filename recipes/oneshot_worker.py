"""Runs a recipe with the tool that it is written for, in that tool's own environment.

    python oneshot_worker.py TOOL parse RECIPE...                             kinds of modifiers, as JSON
    python oneshot_worker.py TOOL run CHECKPOINT RECIPE WINDOWS.npy OUTPUT    weights after the recipe

TOOL is sparseml or llmcompressor. WINDOWS holds the calibration tokens, int64 [n, length]; OUTPUT becomes
a safetensors file with the float32 weights of the linear layers. Nothing here may import dlp_deploy.
"""

import argparse
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NM_DISABLE_ANALYTICS"] = "1"


class SparseML:
    """SparseML 1.8."""

    def parse(self, path):
        from sparseml.core.framework import Framework
        from sparseml.core.recipe import Recipe

        recipe = Recipe.create_instance(path)
        # Creating the modifiers, too, checks every field.
        return [
            type(modifier).__name__.replace("PyTorch", "")
            for stage in recipe.create_modifier(Framework.pytorch)
            for modifier in stage.modifiers
        ]

    def run(self, model, recipe, windows):
        if "MagnitudePruningModifier" in self.parse(recipe):
            self._train_without_learning(model, recipe)
            return
        from sparseml.transformers import oneshot

        oneshot(
            model=model,
            tokenizer=_tokenizer(model),
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

    def _train_without_learning(self, model, recipe):
        """SparseML prunes by magnitude only in training: one step of it, at a learning rate of zero."""
        import torch
        from sparseml.core import session
        from sparseml.core.framework import Framework

        session.initialize(
            framework=Framework.pytorch,
            recipe=recipe,
            model=model,
            start=0.0,
            steps_per_epoch=1,
            copy_data=False,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        )
        session.callbacks.batch_start(batch_data=torch.zeros(1))
        session.callbacks.loss_calculated(loss=torch.zeros(1))
        session.callbacks.optim_pre_step()
        session.callbacks.optim_post_step()
        session.callbacks.batch_end()
        session.finalize()


class LLMCompressor:
    """llm-compressor 0.14, SparseML's successor."""

    def parse(self, path):
        from llmcompressor.recipe import Recipe

        return [type(modifier).__name__ for modifier in Recipe.create_instance(path).modifiers]

    def run(self, model, recipe, windows):
        from llmcompressor import oneshot

        oneshot(
            model=model,
            tokenizer=_tokenizer(model),
            dataset=_dataset(windows),
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            shuffle_calibration_samples=False,
            batch_size=1,
        )


TOOLS: dict = {"sparseml": SparseML, "llmcompressor": LLMCompressor}


def _dataset(windows):
    import numpy as np
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    )


def _tokenizer(model):
    """The tools insist on a tokenizer, though the windows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def run(tool, checkpoint, recipe, windows_file, output):
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    tool.run(model, recipe, np.load(windows_file))
    weights = {
        f"{name}.weight": module.weight.detach().float().contiguous().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    save_file(weights, output)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("parse").add_argument("recipes", nargs="+")
    run_parser = commands.add_parser("run")
    for name in ("checkpoint", "recipe", "windows", "output"):
        run_parser.add_argument(name)
    options = parser.parse_args()
    tool = TOOLS[options.tool]()
    if options.command == "run":
        run(tool, options.checkpoint, options.recipe, options.windows, options.output)
    else:
        # The tools print on stdout, where the answer must stand alone.
        answer = sys.stdout
        sys.stdout = sys.stderr
        print(json.dumps([tool.parse(recipe) for recipe in options.recipes]), file=answer)


if __name__ == "__main__":
    main()
