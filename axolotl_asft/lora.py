"""PEFT's LoRA layers in a model: found, named as the Hugging Face model names them, refused where dW is no product."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from axolotl_asft.errors import AsftError
from axolotl_asft.initialisation import ADDED_TO_THE_WEIGHT, takes_out


@dataclass(frozen=True)
class FoundLayer:
    """One LoRA layer that trains.

    Attributes:
        name: full module name in the Hugging Face model.
        layer: PEFT's layer.
        adapter: name of its adapter that trains.
        initialisation: how PEFT initialised that adapter: one of the two lists of `initialisation`.
    """

    name: str
    layer: LoraLayer
    adapter: str
    initialisation: str | bool = True

    @property
    def A(self) -> Tensor:
        """(r, in)"""
        return cast(Tensor, self.layer.lora_A[self.adapter].weight)

    @property
    def B(self) -> Tensor:
        """(out, r)"""
        return cast(Tensor, self.layer.lora_B[self.adapter].weight)

    @property
    def scaling(self) -> float:
        """alpha / r, alpha / sqrt(r) for rsLoRA, after PEFT's rank and alpha patterns."""
        return float(self.layer.scaling[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return cast(int, self.layer.out_features), cast(int, self.layer.in_features)

    @property
    def base_weight(self) -> Tensor | None:
        """(out, in), plain or of bitsandbytes; None where the layer keeps it otherwise, as GPTQ and AWQ do."""
        weight = cast(Tensor | None, getattr(self.layer.get_base_layer(), "weight", None))
        if weight is None:
            return None
        transposed = getattr(self.layer, "fan_in_fan_out", False) and weight.ndim == 2
        return weight.T if transposed and not hasattr(weight, "quant_state") else weight

    @property
    def was_taken_out(self) -> bool:
        """Whether the initial B A was taken out of the base weight (PiSSA and its like)."""
        return takes_out(self.initialisation)


def trainable_lora_layers(model: nn.Module) -> list[FoundLayer]:
    """The layers whose update dW is a product that trains.

    Raises:
        AsftError: there is none; a layer trains two adapters at once; a kind of LoRA whose update is no scaling B A.
    """
    found: dict[str, FoundLayer] = {}
    for layer in _lora_layers(model):
        if not (layer.A.requires_grad or layer.B.requires_grad):
            continue
        if layer.name in found:
            other = found[layer.name].adapter
            raise AsftError(
                f"{layer.name} trains two adapters at once, {other} and {layer.adapter}; activate one of them"
            )
        found[layer.name] = layer
    if not found:
        raise AsftError(_nothing_trains(model))
    for layer in found.values():
        _refuse_variants(layer)
    return list(found.values())


def other_trainable_parameters(model: nn.Module, layers: list[FoundLayer]) -> list[str]:
    """Names of the trainable parameters that are no A or B of these layers."""
    model = _unwrapped(model)
    pairs = {id(factor) for layer in layers for factor in (layer.A, layer.B)}
    return [
        _plain_name(name, model)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in pairs
    ]


def frozen_lora_layers(model: nn.Module, trained: Collection[str]) -> list[str]:
    """Names of the layers that an adapter which trains elsewhere changes here all the same, by a B A that is frozen.

    Args:
        trained: names of the adapters that train.
    """
    return [
        layer.name
        for layer in _lora_layers(model)
        if layer.adapter in trained and not (layer.A.requires_grad or layer.B.requires_grad) and _is_used(layer.B)
    ]


def _is_used(B: Tensor) -> bool:
    if B.is_meta:
        return False
    B = B.full_tensor() if isinstance(B, DTensor) else B  # of which FSDP2 leaves each process a part
    return bool(B.detach().any())


def plain_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, layer and (out, in) weight of every linear layer that has no LoRA, plain or of bitsandbytes."""
    model = _unwrapped(model)
    under_lora: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            under_lora.update(map(id, cast(nn.Module, module).modules()))
        elif id(module) not in under_lora and isinstance(weight := getattr(module, "weight", None), Tensor):
            yield _plain_name(name, model), module, weight.T if type(module).__name__ == "Conv1D" else weight


def _lora_layers(model: nn.Module) -> Iterator[FoundLayer]:
    """Every layer under LoRA whose active adapter's dW is a matrix B A."""
    model = _unwrapped(model)
    configs = getattr(model, "peft_config", {})
    for name, module in model.named_modules():
        # experts as one stacked parameter have no weight of their own shape: they count as uncovered
        if not isinstance(module, LoraLayer) or hasattr(module, "parameter_name"):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A and getattr(getattr(module.lora_A[adapter], "weight", None), "ndim", 0) == 2:
                initialisation = getattr(configs.get(adapter), "init_lora_weights", True)
                yield FoundLayer(_plain_name(name, model), module, adapter, initialisation)


def _nothing_trains(model: nn.Module) -> str:
    """Why no layer trains by LoRA, and what to do about it."""
    if frozen := [layer.name for layer in _lora_layers(model)]:
        return (
            f"none of the model's {len(frozen)} LoRA layers trains (first {frozen[0]}); leave out unfrozen_parameters, "
            "where the config has it: it freezes every weight that it does not name, LoRA's own too"
        )
    if any(hasattr(module, "parameter_name") for module in model.modules() if isinstance(module, LoraLayer)):
        return (
            "LoRA is on stacked weights alone (lora_target_parameters), which the constraint cannot measure; give "
            "lora_target_modules, of attention or other linear layers"
        )
    return "the model has no trainable LoRA layers; set adapter: qlora or adapter: lora"


def _plain_name(name: str, model: nn.Module) -> str:
    return name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's wrappers."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _refuse_variants(layer: FoundLayer) -> None:
    variant = getattr(layer.layer, "lora_variant", {}).get(layer.adapter)
    if layer.layer.use_dora.get(layer.adapter):
        raise AsftError(
            f"{layer.name} uses DoRA, which also rescales the rows of the aligned weight: its update is "
            "diag(m / ||W + s B A||) (W + s B A) - W, not s B A; use plain LoRA, without peft_use_dora"
        )
    if variant is not None:
        raise AsftError(f"{layer.name} uses {type(variant).__name__}, whose update is not scaling B A; use plain LoRA")
    if layer.initialisation not in ADDED_TO_THE_WEIGHT and not layer.was_taken_out:
        raise AsftError(
            f"adapter {layer.adapter} is initialised by {layer.initialisation!r}, which the constraint does not know; "
            "leave peft_init_lora_weights out"
        )
