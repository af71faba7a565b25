"""A model in training, asked aside: without what is random in it, and without its adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """No dropout, of modules or inside attention, and no NEFTune noise; layers recomputed and quantised as in training.

    It has to last over the backward pass: checkpointing asks the layers once more there.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # layers in 4 bit repack their weights for inference in eval mode; a layer checkpoints in training mode alone
        module.training = isinstance(module, nn.Linear) or bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The weights without the adapter; what is frozen stays frozen (PEFT unfreezes the whole adapter afterwards).

    Args:
        model: a PEFT model, or a transformers model with an adapter added to it.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
