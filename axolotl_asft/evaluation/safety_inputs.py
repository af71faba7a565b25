"""What the aligned model's layers are fed when it is asked for harm: prompts in, second moments of inputs out."""

import re
from typing import Any

from torch import nn

from axolotl_asft.activations import DEFAULT_INPUT_RANK, OWN_WORDS, LayerInputs, layer_inputs
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.evaluation.asking import HARMFUL_TASK, Interviewer
from axolotl_asft.evaluation.models import load_model, load_tokenizer


def safety_inputs(
    model: str,
    prompts: str = "harmful",
    rank: int = DEFAULT_INPUT_RANK,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int = 8,
    stage: Stage = silent,
) -> LayerInputs:
    """E[x x^T] of every linear layer over prompts that ask for harm and the first words of the model's own answers.

    Of the shipped prompts the `train` split is used: the held-out ones stay fit for evaluation.

    Args:
        model: folder or Hub id of the aligned chat model.
        prompts: a set as `load_prompts` knows them.
        rank: principal directions kept a layer, at most.

    Raises:
        AsftError: no such model or prompts.
    """
    quieten_libraries()
    loaded, tokenizer = load_model(model, dtype, device=device), load_tokenizer(model)
    advance = stage("ask the aligned model", 1)
    answers = Interviewer(loaded, tokenizer, batch_size, OWN_WORDS).answers(
        HARMFUL_TASK, {"prompts": prompts, "split": "train"}
    )
    advance()
    turns = [(answer.asked, answer.answer) for answer in answers]
    advance = stage("read its layers' inputs", len(turns))
    return layer_inputs(loaded, tokenizer, turns, _linear_layers(loaded), rank, batch_size, advance)


def _linear_layers(model: Any) -> list[str]:
    """The linear layers inside numbered decoder layers, GPT-2's included."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and re.search(r"\.\d+\.", name)
    ]
