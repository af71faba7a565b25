"""Models by their shapes alone: a PEFT model whose base weights do not exist, and a direction of random numbers.

What a penalty costs depends on shapes, not on values.
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl_asft import AlignmentDirection, AlignmentPenalty
from axolotl_asft.direction import Metric, ModuleDirection
from axolotl_asft.lora import trainable_lora_layers


@dataclass(frozen=True)
class Shape:
    """The linear layers of a Llama."""

    hidden: int
    key_value: int
    mlp: int
    layers: int
    heads: int

    def config(self, layers: int | None = None, vocabulary: int = 64) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads * self.key_value // self.hidden,
            vocab_size=vocabulary,
        )


SHAPES = {
    "SmolLM2-135M": Shape(576, 192, 1536, 30, 9),
    "1B": Shape(2048, 512, 8192, 16, 32),
    "7B": Shape(4096, 4096, 11008, 32, 32),
    "8B": Shape(4096, 1024, 14336, 32, 32),
    "70B": Shape(8192, 1024, 28672, 80, 64),
}


def lora_model(config: LlamaConfig, r: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PeftModel:
    """LoRA on every linear layer: real factors with gradients, on base weights without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    generator = torch.Generator(device).manual_seed(0)
    for layer in trainable_lora_layers(model):
        for factors in (layer.layer.lora_A, layer.layer.lora_B):
            linear = factors[layer.adapter]
            shape = linear.weight.shape
            weight = 0.02 * torch.randn(shape, generator=generator, device=device)
            linear.weight = torch.nn.Parameter(weight.to(dtype))
            linear.weight.grad = torch.zeros_like(linear.weight)
    return model


def random_direction(
    model: PeftModel, k: int, sketch: int = 0, orthonormal: bool = False, device: str = "cpu"
) -> AlignmentDirection:
    """k directions a layer, and with `sketch` a Fisher metric of that many columns on both sides; drawn on `device`."""
    generator = torch.Generator(device).manual_seed(1)

    def columns(rows: int, count: int) -> Tensor:
        matrix = torch.randn(rows, count, generator=generator, device=device)
        return (torch.linalg.qr(matrix).Q if orthonormal else matrix / rows**0.5).bfloat16().cpu()

    modules, entries = {}, {}
    for layer in trainable_lora_layers(model):
        out, wide = layer.shape
        kept = min(k, out, wide)
        S = torch.linspace(2, 1, kept)
        metrics = {}
        if sketch:
            inputs, outputs = columns(wide, min(sketch, wide)), columns(out, min(sketch, out))
            metrics["fisher"] = Metric(inputs, torch.tensor(1.0), outputs)
        modules[layer.name] = ModuleDirection(columns(out, kept), S, S.norm() * 1.1, wide, None, metrics)
        entries[layer.name] = {"shape": [out, wide], "k": kept, "energy": 0.8, "bound": 1.0, "method": "random"}
        if sketch:
            entries[layer.name]["metrics"] = {
                "fisher": {"inputs": min(sketch, wide), "outputs": min(sketch, out), "energy": 0.9}
            }
    spec = {
        "base": {"id": "random", "revision": None, "sha256": "0" * 64, "read_as": "nothing"},
        "aligned": {"id": "random", "revision": None, "sha256": "0" * 64, "read_as": "nothing"},
        "rank": {"rule": "fixed", "k": k},
        "svd": {"seed": 1},
        "modules": entries,
        **({"metrics": {"fisher": {"answers": 1, "scale": 1.0}}} if sketch else {}),
        "tool": "benchmarks",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return AlignmentDirection(modules=modules, spec=spec)


def random_penalty(shape: Shape, layers: int, r: int, k: int, sketch: int = 0, device: str = "cpu") -> AlignmentPenalty:
    """The penalty of a model of this shape with that many decoder layers."""
    model = lora_model(shape.config(layers), r, device=device)
    return AlignmentPenalty(model, random_direction(model, k, sketch, device=device), verify_model=False)


def stored_bytes(penalty: AlignmentPenalty) -> int:
    """What the directions take on the device."""
    kept = [t for group in penalty.groups for t in (group.U, group.c, group.sizes, group.X, group.Y) if t is not None]
    return sum(tensor.nbytes for tensor in kept)
