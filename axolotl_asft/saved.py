"""A PEFT LoRA adapter as it lies on disk: its factors by the names of the Hugging Face model, without the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import read_json
from axolotl_asft.initialisation import ADDED_TO_THE_WEIGHT, takes_out

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class SavedLayer:
    """One layer's factors, dW = scaling B A.

    Attributes:
        name: full module name in the Hugging Face model.
        A: (r, in), B: (out, r), in their stored dtype.
        scaling: PEFT's alpha / r, alpha / sqrt(r) for rsLoRA.
        key_B: name of B's tensor in the file.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    key_B: str


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder, read.

    Attributes:
        folder: where it lies.
        config: adapter_config.json.
        tensors: all of adapter_model.safetensors.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> "SavedAdapter":
        """Read a folder that PEFT saved.

        Raises:
            AsftError: no LoRA adapter there, or one whose B A is not known to be the change from the original weight.
        """
        folder = Path(folder)
        config = adapter_config(folder)
        try:
            tensors = load_file(str(folder / ADAPTER_WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise AsftError(
                f"{folder} is no readable PEFT adapter ({one_line(error)}); expected {ADAPTER_WEIGHTS}"
            ) from error
        if str(config.get("peft_type", "LORA")).upper() != "LORA":
            raise AsftError(f"{folder} is an adapter of type {config['peft_type']}; expected LORA")
        initialisation = config.get("init_lora_weights", True)
        if initialisation not in ADDED_TO_THE_WEIGHT:
            logged = "read its drift in the training log, or " if takes_out(initialisation) else ""
            raise AsftError(
                f"{folder} was initialised by {initialisation!r}, so that B A need not be the change from the original "
                f"weight; {logged}convert it to a plain LoRA with PEFT first"
            )
        if config.get("use_dora"):
            raise AsftError(f"{folder} uses DoRA, whose update is not scaling B A; train a plain LoRA")
        if not isinstance(config.get("lora_alpha"), int | float):
            raise AsftError(f"{folder}/{ADAPTER_CONFIG} has no number lora_alpha; expected a PEFT LoRA adapter")
        return cls(folder, config, tensors)

    def layers(self) -> Iterator[SavedLayer]:
        """Every pair of factors, by name."""
        for key in sorted(name for name in self.tensors if name.endswith(A_SUFFIX)):
            name = key.removeprefix(PREFIX).removesuffix(A_SUFFIX)
            key_B = key.removesuffix(A_SUFFIX) + B_SUFFIX
            A, B = self.tensors[key], self.tensors.get(key_B)
            if B is None or A.ndim != 2 or B.ndim != 2:
                raise AsftError(
                    f"{self.folder}: {name} has no pair of matrices A and B; expected LoRA of a linear layer"
                )
            yield SavedLayer(name, A, B, _scaling(self.config, name, A.shape[0]), key_B)

    def others(self) -> list[str]:
        """Names of the tensors that are no factor of any of `layers`: modules_to_save, embeddings, trained biases."""
        pairs = {key.removesuffix(A_SUFFIX) + end for key in self.tensors for end in (A_SUFFIX, B_SUFFIX)}
        return [name.removeprefix(PREFIX) for name in sorted(set(self.tensors) - pairs)]


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT adapter.

    Raises:
        AsftError: there is none, or it is damaged.
    """
    return read_json(folder / ADAPTER_CONFIG, "expected the folder of a PEFT adapter")


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    if patterns := config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key  # with transformers behind it: seconds

        alpha = patterns.get(get_pattern_key(list(patterns), name), alpha)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
