"""An axolotl config as axolotl reads it, and the LoRA model that it asks for, without any weights."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter import load_adapter
from axolotl.loaders.processor import load_processor
from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.config import normalize_config, prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.freeze import freeze_layers_except, freeze_mm_modules
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from torch import nn

from axolotl_asft.errors import AsftError, did_you_mean, one_line
from axolotl_asft.files import seen_from_here
from axolotl_asft.initialisation import takes_out

FROZEN_BEFORE_PEFT = ("dpo", "ipo", "kto")  # there `unfrozen_parameters` is obeyed before the LoRA layers are made
# The machine that checks need not be the one that trains: what the YAML asks of its card is taken to be there.
CAPABLE = {"bf16": True, "fp8": True, "tf32": True, "compute_capability": "sm_90"}


def validated_config(content: dict[str, Any], remote_code: bool = False) -> DictDefault:
    """The config as `axolotl train` has it: plugins registered, validated, normalised. Reads the model's config.json.

    Args:
        content: the keys of the YAML.
        remote_code: obey `trust_remote_code: true`; else no code of the model's repository is run.

    Raises:
        AsftError: one line for what would end `axolotl train`.
    """
    cfg = DictDefault(content)
    if not cfg.get("base_model"):
        raise AsftError("the config has no base_model; set it to the aligned model of the direction")
    plugins = cfg.get("plugins") or []
    if not isinstance(plugins, list):
        raise AsftError(f"plugins: is {plugins!r}; expected a list, with asft in it")
    PluginManager.get_instance().plugins.clear()  # it outlives a config
    with _in_one_line(f"plugins: {plugins} cannot be loaded, or refuse the config"):
        prepare_plugins(cfg)
    capabilities = {**CAPABLE, "n_gpu": int(os.environ.get("WORLD_SIZE", "1"))}
    versions = {"torch_version": torch.__version__.partition("+")[0]}
    with _in_one_line("axolotl refuses the config"):
        cfg = validate_config(cfg, capabilities=capabilities, env_capabilities=versions)
    cfg.tf32 = False  # it would be set for the whole process
    cfg.trust_remote_code = bool(cfg.trust_remote_code) and remote_code
    with _in_one_line("axolotl refuses the config"):
        try:
            normalize_config(cfg)
        except OSError as error:
            unread = f"base_model {cfg.base_model}: its config.json cannot be read ({one_line(error)})"
            raise AsftError(_no_such_folder(cfg.base_model) or unread) from error
    return cfg


def lora_model(cfg: DictDefault) -> tuple[PeftModel, str | bool]:
    """The model of a validated config with its LoRA layers, all on the meta device; and LoRA's initialisation.

    An initialisation that takes a part out of the weights (PiSSA and its like) cannot be run without them; the layers
    are then made by the plain one.

    Raises:
        AsftError: the model cannot be built from its config.json, or PEFT refuses the LoRA settings.
    """
    model = _model(cfg)
    names = f"; the model's linear layers are called {', '.join(linear_names(model))}"
    with _in_one_line("PEFT refuses the LoRA settings", names):
        if cfg.lora_model_dir:
            lora: Any = PeftConfig.from_pretrained(cfg.lora_model_dir)
            lora.inference_mode = False
        else:
            _, lora = load_adapter(model, cfg, cfg.adapter, config_only=True)
        initialisation = lora.init_lora_weights
        lora.init_lora_weights, lora.loftq_config = True, {}
        adapted = cast(PeftModel, get_peft_model(model, lora, low_cpu_mem_usage=True))
    if not takes_out(initialisation):
        lora.init_lora_weights = initialisation  # the model keeps this object
    if cfg.freeze_mm_modules:
        freeze_mm_modules(adapted)
    if cfg.unfrozen_parameters and cfg.rl not in FROZEN_BEFORE_PEFT:
        freeze_layers_except(adapted, cfg.unfrozen_parameters)
    return adapted, initialisation


def run_tokenizer(cfg: DictDefault) -> Any | None:
    """The run's tokenizer with its chat template; None where it cannot be had without writing files.

    Raises:
        AsftError: axolotl cannot load it, or refuses what the config asks of it.
    """
    if cfg.added_tokens_overrides:
        return None
    with _in_one_line(f"axolotl cannot load the tokenizer of {cfg.tokenizer_config}"):
        return load_tokenizer(cfg)


def run_processor(cfg: DictDefault, tokenizer: Any) -> None:
    """What prepares images, as axolotl loads it for every model that can read them; nothing for another.

    Raises:
        AsftError: axolotl cannot load it.
    """
    if cfg.is_multimodal:
        with _in_one_line(f"axolotl cannot load the processor of {cfg.processor_config}, a model that reads images"):
            load_processor(cfg, tokenizer)


def resumed_from(cfg: DictDefault) -> str | None:
    """The checkpoint that the run would go on from, of its own accord too; None: it begins anew."""
    return determine_last_checkpoint(cfg)


def missed_plugins(cfg: DictDefault) -> list[str]:
    """A line for each plugin of the config that axolotl could not import, and goes on without."""
    loaded = PluginManager.get_instance().plugins
    return [
        f"plugins: {name} cannot be imported: the run goes on without it" for name in cfg.plugins if name not in loaded
    ]


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, as `lora_target_modules` writes them."""
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(found - {"base_layer", "default"})


def missed_targets(cfg: DictDefault, model: nn.Module) -> list[str]:
    """A line for each of `lora_target_modules` that no layer answers to; PEFT passes over it where another is found."""
    targets = cfg.lora_target_modules
    if not isinstance(targets, list) or cfg.lora_model_dir:
        return []
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    parts = sorted({part for name in names for part in name.split(".")} - {"base_layer", "default"})
    lines = []
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = did_you_mean(str(target), parts)
            line = f"lora_target_modules: {target!r} is not a layer of the model, and is ignored"
            lines.append(f"{line}; {hint}" if hint else line)
    return lines


def _no_such_folder(base_model: str) -> str | None:
    """What to say of a base_model that is written like a path and is no folder; None of any other."""
    if Path(base_model).is_dir() or not (base_model.startswith((".", "/", "~")) or base_model.count("/") > 1):
        return None
    hint = seen_from_here()
    if base_model.startswith("~"):
        hint = "axolotl takes ~ as it stands; write the path out"
    return f"base_model: there is no folder {base_model} ({hint})"


def _model(cfg: DictDefault) -> Any:
    """As axolotl's loader picks its class, in no memory."""
    config = load_model_config(cfg)
    kind = cfg.type_of_model
    if kind and kind != "AutoModelForCausalLM" and not cfg.trust_remote_code:
        model_class = getattr(transformers, kind, None)
        if model_class is None:
            raise AsftError(f"type_of_model is {kind!r}, which transformers does not have; leave it out")
    else:
        multimodal = transformers.AutoModelForImageTextToText
        model_class = multimodal if cfg.is_multimodal else transformers.AutoModelForCausalLM
    hint = "" if cfg.trust_remote_code else "; if it needs code from its repository, give --trust-remote-code"
    with _in_one_line(f"base_model {cfg.base_model} cannot be built from its config.json", hint), torch.device("meta"):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(config, trust_remote_code=cfg.trust_remote_code)
        return model_class(config)


@contextlib.contextmanager
def _in_one_line(what: str, hint: str = "") -> Iterator[None]:
    """Whatever the libraries make of a config that they cannot work with, as one line."""
    try:
        yield
    except AsftError:
        raise
    except ValidationError as error:
        raise AsftError(_first_mistake(error)) from error
    except Exception as error:
        raise AsftError(f"{what} ({one_line(error)}){hint}") from error


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"axolotl refuses the config: {f'{key}: ' if key else ''}{one_line(Exception(first['msg']))}{more}"
