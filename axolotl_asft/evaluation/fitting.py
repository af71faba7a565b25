"""Whether an adapter is one of a model: told from its layers, before anything is asked."""

from pathlib import Path
from typing import Any

from torch import nn

from axolotl_asft.errors import AsftError
from axolotl_asft.saved import A_SUFFIX, ADAPTER_WEIGHTS, B_SUFFIX, PREFIX

INSTEAD = "give the model that it was trained on"


def check_layers(model: Any, adapter: Path) -> None:
    """Hold the layers of a LoRA adapter against the model's, by the header of its file.

    Embeddings are left out: they may have got more rows in the training.

    Raises:
        AsftError: the model lacks one, or has it in another shape.
    """
    from safetensors import safe_open

    modules = dict(model.named_modules())
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        keys = set(tensors.keys())
        for key_A in sorted(key for key in keys if key.endswith(A_SUFFIX)):
            key_B = key_A.removesuffix(A_SUFFIX) + B_SUFFIX
            name = key_A.removeprefix(PREFIX).removesuffix(A_SUFFIX)
            module = modules.get(name.replace(".base_layer", ""))  # so PEFT calls a second parameter of one module
            if module is None:
                raise AsftError(f"{adapter} does not fit this model, which has no layer {name}; {INSTEAD}")
            expected = _shape(module)
            if expected is None or module in embeddings or key_B not in keys:
                continue
            found = tensors.get_slice(key_B).get_shape()[0], tensors.get_slice(key_A).get_shape()[-1]
            if found != expected:
                raise AsftError(
                    f"{adapter} does not fit this model: {name} is {found} (out, in) in the adapter and {expected} in "
                    f"the model; {INSTEAD}"
                )


def _shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer, whatever its weight is packed into; None of another."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights as (in, out)
        return module.weight.shape[1], module.weight.shape[0]
    return None


def check_complete(peft_model: Any, adapter: Path) -> None:
    """PEFT only warns where an adapter has layers that the model lacks.

    Raises:
        AsftError: it has.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    loaded = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        saved = {name for name in tensors.keys() if "lora_" in name}  # noqa: SIM118 - not iterable itself
    differing = saved ^ {name for name in loaded if "lora_" in name}
    if differing:
        raise AsftError(
            f"{adapter} does not fit this model: {len(differing)} of its tensors have no counterpart (first "
            f"{min(differing)}); {INSTEAD}"
        )
