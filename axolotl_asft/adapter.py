"""The LoRA layers of a PEFT model, matched to directions by whole name, and their penalty."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from axolotl_asft.direction import AlignmentDirection, ModuleDirection, select_modules
from axolotl_asft.errors import AsftError
from axolotl_asft.penalty import (
    PROJECTORS,
    lora_penalty,
    orthogonal_part,
    projector_eigenvalues,
    relative_drift,
    squared_norm,
)
from axolotl_asft.verify import verify_weights

LOG = logging.getLogger("axolotl.asft")

ON_UNCOVERED = ("error", "warn", "ignore")
# Other initialisations change the base weight, or start from an update that is not zero.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class ConstrainedLayer:
    """One LoRA layer and the projector of its alignment direction.

    Attributes:
        name: full module name in the Hugging Face model.
        layer: PEFT's layer; A and B are looked up at every call.
        adapter: name of the adapter that trains.
        U: (out, k), in its stored dtype, on the layer's device.
        c: (k,), eigenvalues of the projector.
    """

    name: str
    layer: LoraLayer
    adapter: str
    U: Tensor
    c: Tensor

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), with U and c brought to their device."""
        A, B = _factors(self.layer, self.adapter)
        if self.U.device != A.device:
            self.U, self.c = self.U.to(A.device), self.c.to(A.device)
        return A, B


@dataclass(frozen=True)
class LayerDrift:
    """Squared norms of one layer's update dW = scaling B A.

    Attributes:
        orthogonal: ||(I - C) dW||_F^2.
        total: ||dW||_F^2.
    """

    name: str
    orthogonal: float
    total: float

    @property
    def drift(self) -> float:
        """||(I - C) dW|| / ||dW||: 0 along the alignment direction, 1 orthogonal to it."""
        return relative_drift(self.orthogonal, self.total)


@dataclass
class AlignmentPenalty:
    """P = sum over layers of ||(I - C_l) dW_l||_F^2, a scalar with gradients (AsFT, arXiv 2506.08473).

    Call it to get P, without lambda_reg. See `axolotl_asft.penalty` for its cost.

    Args:
        model: a PEFT model (or a model with PEFT's LoRA layers in it) whose base weights are the aligned model's.
        direction: the alignment direction of that model.
        projector: "paper", "normalized" or "subspace".
        rank: use the leading `rank` stored directions alone.
        lora_scaling: False leaves PEFT's scaling out of dW, as the authors' code does.
        modules: regular expressions of the layers to constrain; default: every LoRA layer.
        on_uncovered: "error", "warn" or "ignore" where a trainable weight is not covered by the penalty.
        verify_model: refuse a direction that was extracted for other weights than the model's.

    Raises:
        AsftError: nothing to constrain, a kind of LoRA whose update is not scaling B A, a direction of another
            shape or for another model, or an uncovered weight under on_uncovered="error".
    """

    model: nn.Module = field(repr=False)
    direction: AlignmentDirection = field(repr=False)
    projector: str = "paper"
    rank: int | None = None
    lora_scaling: bool = True
    modules: list[str] | None = None
    on_uncovered: str = "error"
    verify_model: bool = True
    layers: list[ConstrainedLayer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_choice("projector", self.projector, PROJECTORS)
        _check_choice("on_uncovered", self.on_uncovered, ON_UNCOVERED)
        if self.rank is not None and self.rank < 0:
            raise AsftError(f"rank is {self.rank}; expected 0 or more, or null for all stored directions")
        found = {name: (layer, adapter) for name, layer, adapter in _trainable_lora_layers(self.model)}
        if not found:
            raise AsftError("the model has no trainable LoRA layers; set adapter: qlora or adapter: lora")
        _refuse_variants(found)
        _refuse_initialisation(self.model)
        chosen = select_modules(list(found), self.modules) if self.modules else list(found)
        covered = [name for name in chosen if name in self.direction.modules]
        self._report_uncovered([name for name in chosen if name not in self.direction.modules])
        if not covered:
            raise AsftError(
                f"none of the {len(chosen)} LoRA layers has a direction; the model's first is {chosen[0]}, the "
                f"direction file's {next(iter(self.direction.modules))}; use the direction of this model"
            )
        for name in covered:
            _check_shape(name, found[name][0], self.direction.modules[name])
        if self.verify_model:
            verify_weights(self.direction, ((name, _base_weight(found[name][0])) for name in covered))
        self.layers = [self._constrained(name, *found[name]) for name in covered]

    def __call__(self) -> Tensor:
        """P as an fp32 scalar, differentiable with respect to every A and B; without lambda_reg."""
        total: Tensor | None = None
        for layer in self.layers:
            A, B = layer.factors()
            value = lora_penalty(A, B, layer.U, layer.c, layer.scaling if self.lora_scaling else 1.0)
            total = value if total is None else total + value.to(total.device)
        assert total is not None  # __post_init__ refuses a model without covered layers
        return total

    @torch.no_grad()
    def measure(self) -> list[LayerDrift]:
        """The drift of every layer now, with PEFT's scaling whatever `lora_scaling` says."""
        values = []
        for layer in self.layers:
            A, B = (factor.float() for factor in layer.factors())
            orthogonal = squared_norm(orthogonal_part(B, layer.U.float(), layer.c), A)
            values.append((torch.stack([orthogonal, squared_norm(B, A)]) * layer.scaling**2).cpu())
        return [
            LayerDrift(layer.name, float(orthogonal), float(total))
            for layer, (orthogonal, total) in zip(self.layers, torch.stack(values).tolist(), strict=True)
        ]

    def _constrained(self, name: str, layer: LoraLayer, adapter: str) -> ConstrainedLayer:
        module = self.direction.modules[name]
        k = module.rank if self.rank is None else min(self.rank, module.rank)
        c = projector_eigenvalues(self.projector, module.S, module.norm)[:k]
        device = _factors(layer, adapter)[0].device
        return ConstrainedLayer(name, layer, adapter, module.U[:, :k].contiguous().to(device), c.to(device))

    def _report_uncovered(self, layers: list[str]) -> None:
        others = _other_trainable_parameters(self.model)
        if self.on_uncovered == "ignore" or not (layers or others):
            return
        what = []
        if layers:
            what.append(f"{len(layers)} LoRA layers without a direction (first {layers[0]})")
        if others:
            what.append(f"{len(others)} trainable weights that are no LoRA layer (first {others[0]})")
        text = f"the penalty does not cover {' and '.join(what)}, so training can leave the alignment direction there"
        if self.on_uncovered == "error":
            raise AsftError(f"{text}; leave them out of training, or set asft.on_uncovered: warn")
        LOG.warning(text)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AsftError(f"{key} is {value!r}; expected one of {', '.join(choices)}")


def _plain_name(name: str, model: nn.Module) -> str:
    return name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """(name, layer, adapter) of every LoRA layer whose active adapter trains and whose dW is a matrix B A."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A and getattr(getattr(module.lora_A[adapter], "weight", None), "ndim", 0) == 2:
                yield _plain_name(name, model), module, adapter


def _trainable_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    seen: dict[str, str] = {}
    for name, layer, adapter in _lora_layers(model):
        if not any(factor.requires_grad for factor in _factors(layer, adapter)):
            continue
        if name in seen:
            raise AsftError(f"{name} trains two adapters at once, {seen[name]} and {adapter}; activate one of them")
        seen[name] = adapter
        # experts as one stacked parameter have no base weight of their own shape: left to on_uncovered
        if hasattr(layer, "parameter_name"):
            continue
        yield name, layer, adapter


def _other_trainable_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters that are no A or B of a LoRA layer found here."""
    pairs: set[int] = set()
    for _, layer, adapter in _trainable_lora_layers(model):
        pairs.update(id(factor) for factor in _factors(layer, adapter))
    return [
        _plain_name(name, model)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in pairs
    ]


def _refuse_variants(found: dict[str, tuple[LoraLayer, str]]) -> None:
    for name, (layer, adapter) in found.items():
        variant = layer.lora_variant.get(adapter) if hasattr(layer, "lora_variant") else None
        if variant is not None or layer.use_dora.get(adapter):
            kind = type(variant).__name__ if variant is not None else "DoRA"
            raise AsftError(
                f"{name} uses {kind}, whose update is not scaling B A; use plain LoRA, without peft_use_dora"
            )


def _refuse_initialisation(model: nn.Module) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config, "init_lora_weights", True)
        if kind not in PLAIN_INITIALISATIONS:
            raise AsftError(
                f"adapter {name} is initialised by {kind!r}, which changes the base weights, so that B A is not the "
                "change from the aligned model; leave peft_init_lora_weights out"
            )


def _check_shape(name: str, layer: LoraLayer, module: ModuleDirection) -> None:
    shape = (layer.out_features, layer.in_features)
    if shape != module.shape:
        raise AsftError(
            f"{name} is {shape} (out, in) in the model and {module.shape} in the direction; use the direction of "
            "this model"
        )


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r)."""
    return cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)


def _base_weight(layer: LoraLayer) -> Tensor:
    weight = cast(Tensor, layer.get_base_layer().weight)
    transposed = getattr(layer, "fan_in_fan_out", False) and weight.ndim == 2 and not hasattr(weight, "quant_state")
    return weight.T if transposed else weight
