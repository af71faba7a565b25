"""Adapters of a training that added tokens: the model under them needs as many rows in its embeddings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl_asft.saved import ADAPTER_WEIGHTS, PREFIX


def saved_rows(model: Any, adapter: Path) -> int | None:
    """Rows of the embeddings, of the input or the output, that lie with an adapter; None where none do."""
    from safetensors import safe_open

    modules = {id(module): name for name, module in model.named_modules()}
    names = tuple(f"{PREFIX}{modules[id(module)]}." for module in _embeddings(model))
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not iterable itself
            if key.startswith(names) and key.endswith(".weight") and "lora_" not in key:
                return tensors.get_slice(key).get_shape()[0]
    return None


@contextlib.contextmanager
def resized(model: Any, rows: int | None) -> Iterator[None]:
    """The model with so many tokens, the new ones still to be filled; afterwards as it was, bit by bit."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows in (None, before):
        yield
        return
    # the tensors themselves: fewer rows, and more again, would not bring back what they held
    held = [(module, name, p.data) for module in _embeddings(model) for name, p in module.named_parameters()]
    model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        yield
    finally:
        model.resize_token_embeddings(before, mean_resizing=False)
        for module, name, data in held:
            getattr(module, name).data = data


def _embeddings(model: Any) -> list[Any]:
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
