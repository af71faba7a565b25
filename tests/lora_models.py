"""PEFT models over small checkpoints, and what the authors' formula says of them."""

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_asft import AlignmentDirection

UP = "model.layers.0.mlp.up_proj"


def lora_model(folder, quantized: str | None = None, random_b: bool = True, **changes):
    """The checkpoint under LoRA on all linear layers, with a random B."""
    options = {}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=quantized == "double",
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    model = get_peft_model(model, LoraConfig(**config))
    if random_b:
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def shake(model):
    """Away from where the adapter starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return model


def literal_formula_of(model, base, aligned, transposed=False):
    """sum_l ||(I - d d^T / ||d||_F) B A||_F^2 as the authors' code has it: dense, and without PEFT's scaling."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.") + ".weight"
            d = aligned[key].double() - base[key].double()
            d = d.T if transposed else d
            C = d @ d.T / torch.linalg.matrix_norm(d)
            update = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            total = total + torch.linalg.matrix_norm(update - C @ update) ** 2
    return total


def untouched(direction, *kinds):
    """The direction of an alignment that left these layers alone."""
    modules = dict(direction.modules)
    for name, module in modules.items():
        if name.endswith(kinds):
            modules[name] = replace(module, S=0 * module.S, norm=0 * module.norm)
    return AlignmentDirection(modules, direction.spec)
