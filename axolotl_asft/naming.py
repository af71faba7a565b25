"""How a checkpoint's tensors are called in the model: transformers renames, and fuses, some of them as it loads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def model_names(folder: Path, config: dict[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """Stored tensor name -> name in the loaded model, for the tensors that become a parameter of their own.

    Tensors that transformers merges with others as it loads them (the experts of a mixture, mostly) are left out:
    no module of the model has their weight. A checkpoint of no model type that transformers renames keeps its names;
    for the others the model is built without weights, by transformers' own classes alone (no code of the checkpoint).

    Args:
        folder: the checkpoint.
        config: its config.json, empty where there is none.
        tensors: the names as stored.
    """
    tensors = list(tensors)
    if not _may_be_renamed(config, tensors):
        return {name: name for name in tensors}
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    architecture = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if architecture is None:
        return {name: name for name in tensors}
    with torch.device("meta"):
        model = architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    names = {}
    for name in tensors:
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if merged is None:
            names[name] = renamed
    return names


def _may_be_renamed(config: dict, tensors: list[str]) -> bool:
    model_type = config.get("model_type")
    if not model_type or not config.get("architectures"):
        return False
    if "text_config" in config:  # a language model inside another
        return True
    if not any(name.startswith(("model.", "transformer.", "gpt_neox.")) for name in tensors):
        return True  # saved without the head's prefix
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model_type) is not None
