"""A PEFT LoRA adapter as it lies on disk: its factors by the names of the Hugging Face model, without the model."""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from axolotl_asft import fingerprint
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import read_json
from axolotl_asft.hub import cached_folder, named_on_the_hub
from axolotl_asft.initialisation import ADDED_TO_THE_WEIGHT, takes_out
from axolotl_asft.subspace import LowRank

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SCALED_BY = ("lora_alpha", "use_rslora", "alpha_pattern")  # what of the config decides `scaling`, beside the rank
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
                f"{folder} is not a readable PEFT adapter ({one_line(error)}); expected {ADAPTER_WEIGHTS}"
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
        if not _is_number(config.get("lora_alpha")):
            raise AsftError(f"{folder}/{ADAPTER_CONFIG} has no number lora_alpha; expected a PEFT LoRA adapter")
        return cls(folder, config, tensors)

    def layers(self) -> Iterator[SavedLayer]:
        """Every pair of factors, by name; but for convolutions that did not train, in a tower of images say."""
        for key in sorted(name for name in self.tensors if name.endswith(A_SUFFIX)):
            name = key.removeprefix(PREFIX).removesuffix(A_SUFFIX)
            key_B = key.removesuffix(A_SUFFIX) + B_SUFFIX
            A, B = self.tensors[key], self.tensors.get(key_B)
            if B is not None and A.ndim > 2 and not B.any():
                continue
            if B is None or A.ndim != 2 or B.ndim != 2:
                raise AsftError(
                    f"{self.folder}: {name} has no pair of matrices A and B; expected LoRA of a linear layer"
                )
            if not len(A) or len(A) != B.shape[1]:
                raise AsftError(
                    f"{self.folder}: {name} has an A of rank {len(A)} and a B of rank {B.shape[1]}; expected one rank, "
                    "above 0; save the adapter again"
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
    if folder.is_file():
        raise AsftError(f"{folder} is a file; give the folder of the adapter that it is in")
    return read_json(folder / ADAPTER_CONFIG, "expected the folder of a PEFT adapter")


def check_merged(saved: SavedAdapter, aligned: Checkpoint, factors: Mapping[str, LowRank]) -> None:
    """Hold a model against the adapter that is said to be merged into it, where the adapter's base can be read here.

    The base itself, given for the aligned model, would make a direction that passes every check on the base.

    Args:
        factors: d by module, of the adapter's layers.

    Raises:
        AsftError: it is the adapter's base, or another model than the base with the adapter merged in.
    """
    recorded, where = _recorded(saved)
    if recorded and where == (aligned.name if aligned.revision else Path(aligned.location).resolve()):
        raise AsftError(
            f"{aligned.name} is the base of the adapter {saved.folder}, not what it was merged into; give it as --base"
        )
    base = _base_that_is_here(saved, factors)
    if base is None:
        return
    share, within = _share_of(factors, base, aligned)
    if abs(share - 1) > within:
        raise AsftError(
            f"{aligned.name} is not {recorded}, the adapter's base, with the adapter merged in: {share:.0%} of what it "
            "adds is there; give the merged model as --aligned, or the model that it was trained on as --base"
        )


def check_base(saved: SavedAdapter, base: Checkpoint, factors: Mapping[str, LowRank]) -> None:
    """Hold a model against the base that an adapter was trained on, where that can be read here.

    Raises:
        AsftError: it has other weights, so that base plus adapter would be a model that nobody has.
    """
    trained_on = _base_that_is_here(saved, factors)
    if trained_on is None:
        return
    differing = compared = 0
    for _, before, found in _sampled(factors, trained_on, base):
        differing += fingerprint.mismatching_values(before, found)
        compared += len(found)
    if differing > fingerprint.MAX_MISMATCH * compared:
        raise AsftError(
            f"{base.name} is not {_recorded(saved)[0]}, which the adapter {saved.folder} was trained on: "
            f"{differing} of {compared} sampled weights differ; give the model that it was trained on as --base"
        )


def _recorded(saved: SavedAdapter) -> tuple[str, Path | str]:
    """The base that an adapter names, as it is written; and its folder, or its name on the Hub."""
    recorded = str(saved.config.get("base_model_name_or_path") or "")
    wanted = named_on_the_hub(recorded)
    return recorded, Path(recorded).resolve() if wanted is None else wanted.repo


def _base_that_is_here(saved: SavedAdapter, factors: Mapping[str, LowRank]) -> Checkpoint | None:
    """The adapter's base from a local folder or the Hub's cache, with the layers that the adapter changes."""
    recorded, where = _recorded(saved)
    wanted = named_on_the_hub(recorded)
    try:
        folder = where if isinstance(where, Path) else cached_folder(wanted, ["config.json"]) if wanted else None
        base = Checkpoint.open(folder) if recorded and folder is not None and folder.is_dir() else None
    except AsftError:
        return None  # quantised, say
    shapes = base.linear_weights() if base is not None else {}
    return None if any(shapes.get(name) != d.shape for name, d in factors.items()) else base


def _sampled(
    factors: Mapping[str, LowRank], base: Checkpoint, other: Checkpoint
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The fingerprint's block of every layer that an adapter changes: its name, in fp32 of the base, of the other."""
    for name, d in factors.items():
        start = fingerprint.block_start(name, d.shape.numel())
        count = min(fingerprint.BLOCK, d.shape.numel() - start)
        yield name, base.values(name, start, count).float(), other.values(name, start, count)


def _share_of(factors: Mapping[str, LowRank], base: Checkpoint, aligned: Checkpoint) -> tuple[float, float]:
    """<W_aligned - W_base, d> / ||d||^2 over the fingerprint's blocks, and how far from 1 rounding may take it.

    A merge through NF4, as axolotl's of QLoRA, is farther from base + d than the base is; but in no one direction.
    """
    moved, found = [], []
    for name, before, weight in _sampled(factors, base, aligned):
        after = before + fingerprint.block_of_product(name, factors[name].A, factors[name].B, len(before))
        before, after = before.to(weight.dtype).double(), after.to(weight.dtype).double()
        moved.append(after - before)
        found.append(weight.double() - before)
    expected, difference = torch.cat(moved), torch.cat(found)
    if not (size := float(expected.square().sum())):
        return 1.0, 0.0  # an adapter that changes nothing
    error = float(torch.linalg.vector_norm((difference - expected) * expected)) / size
    return float(difference @ expected) / size, 0.1 + 3 * error


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """Of one layer.

    Raises:
        AsftError: `alpha_pattern` holds anything but patterns and numbers.
    """
    alpha, patterns = config["lora_alpha"], config.get("alpha_pattern") or {}
    try:
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            raise TypeError
        if patterns:
            from peft.utils.other import get_pattern_key  # with transformers behind it: seconds

            alpha = patterns.get(get_pattern_key(list(patterns), name), alpha)
    except (TypeError, re.error) as error:
        raise AsftError(
            f"alpha_pattern in {ADAPTER_CONFIG} is {reprlib.repr(patterns)}; expected patterns of layers with a number "
            "each, as PEFT writes it"
        ) from error
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30  # NaN is not
