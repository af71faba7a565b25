"""How a checkpoint's tensors are called in the model: transformers renames, and fuses, some of them as it loads."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from axolotl_asft.errors import AsftError, one_line


def model_names(folder: Path, config: dict[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """Stored tensor name -> name in the loaded model, for the tensors that become a parameter of their own.

    Tensors that transformers merges with others as it loads them (the experts of a mixture, mostly), or drops (layers
    that predict several tokens ahead), are left out: no module of the model has their weight. A checkpoint of no model
    type that transformers renames keeps its names; for the others the model is built without weights, by transformers'
    own classes alone (no code of the checkpoint).

    Args:
        folder: the checkpoint.
        config: its config.json, empty where there is none.
        tensors: the names as stored.

    Raises:
        AsftError: config.json names no model type or architecture, or one that transformers cannot build here.
    """
    tensors = list(tensors)
    if not _may_be_renamed(folder, config, tensors):
        return {name: name for name in tensors}
    model = _without_weights(folder, config["architectures"][0])
    if model is None:
        return {name: name for name in tensors}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    names = {}
    for name in tensors:
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if merged is None and renamed in parameters:
            names[name] = renamed
    return names


def model_class(config: Any) -> Any:
    """The class that axolotl loads a model by: of one that reads images too, whole, so that its layers' names agree.

    `AutoModelForCausalLM` refuses such a model, or makes of it the text model alone, of which each layer has another
    name than in the checkpoint, in training and in the adapter.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    reads_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def _without_weights(folder: Path, architecture: str) -> Any:
    """The model on the meta device; None where transformers has no class of that name.

    Raises:
        AsftError: it has one, and cannot build it: a package is missing, or config.json is for another version.
    """
    import torch
    import transformers

    try:
        kind = getattr(transformers, architecture, None)
        if kind is None:
            return None
        if not _builds_models(kind):
            raise TypeError("it is not a model class")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = kind(config)
            if not hasattr(model, model.base_model_prefix):  # saved without its head, and loaded with one
                with contextlib.suppress(ValueError):  # which a kind of model may not have
                    model = model_class(config).from_config(config)
        return model
    except Exception as error:  # whatever it and the packages behind it raise
        raise AsftError(
            f"{folder / 'config.json'} names the model {architecture[:80]!r}, which transformers "
            f"{transformers.__version__} cannot build here ({one_line(error)}), so the names of its weights are not "
            "known; install what is missing or another version of transformers, or download the model again"
        ) from error


def _builds_models(found: Any) -> bool:
    """A class of models, or what stands in for one where a package is missing, and says so when it is called."""
    from transformers import PreTrainedModel

    return isinstance(found, type) and (issubclass(found, PreTrainedModel) or hasattr(found, "_backends"))


def _may_be_renamed(folder: Path, config: dict[str, Any], tensors: list[str]) -> bool:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not model_type or not architectures:
        return False
    if not isinstance(model_type, str) or not _are_texts(architectures):
        raise AsftError(
            f"{folder / 'config.json'} has model_type {shown(model_type)} and architectures {shown(architectures)}; "
            "expected a name and a list of names; download it again"
        )
    if "text_config" in config:  # a language model inside another
        return True
    if not any(name.startswith(("model.", "transformer.", "gpt_neox.")) for name in tensors):
        return True  # saved without the head's prefix
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # some renamings are kept under the name of a class, and no type of model
    return any(get_checkpoint_conversion_mapping(name) is not None for name in (model_type, *architectures))


def _are_texts(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
