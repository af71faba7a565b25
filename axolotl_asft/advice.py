"""What the settings of a run mean in plain words, and which of them give pause."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.anchor import TEXTS
from axolotl_asft.args import AsftArgs
from axolotl_asft.cost import tokens_asked
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.guard import OUR_NAMES
from axolotl_asft.hub import hub_file, is_commit
from axolotl_asft.penalty import projector_eigenvalues
from axolotl_asft.spec import own_answers_in
from axolotl_asft.strengths import WEIGHTS_ALONE, Strengths

# The lambdas that benchmarks/ has results for, metric by metric; ten times beyond them is worth a word.
MEASURED_LAMBDAS = {"weights": (0.3, 10.0), "activations": (3.0, 30.0), "fisher": (0.1, 100.0)}
FAR = 10
NORMALISE_THE_UPDATE = ("muon", "dion", "sinkgd", "polora")
# Where a config names repositories whose code trust_remote_code runs: the model's, and all.
NAMES_OF_THE_MODEL = ("base_model", "base_model_config")
NAMES_OF_A_REPOSITORY = (*NAMES_OF_THE_MODEL, "tokenizer_config")
MODEL_KWARGS = ("model_kwargs", "overrides_of_model_kwargs")  # axolotl's two names of one key
MODEL_CONFIG = ("model_config", "overrides_of_model_config")
ANY_KERNEL = (
    "the run may execute kernels from any Hub repository that the model names, which is code from outside axolotl"
)
MEASURES = {
    "weights": "how far the weights move, ||(I - C) dW||",
    "activations": "how far the layers' outputs move on prompts that ask for harm",
    "fisher": "how far the aligned model's own refusals move",
}


def in_plain_words(
    block: AsftArgs,
    strength: Strengths,
    penalty: AlignmentPenalty,
    cfg: Any,
    formats: Sequence[str],
    general: Sequence[str],
) -> list[str]:
    """What the block asks for, a sentence each.

    Args:
        formats: in which the anchor asks beside the chat template.
        general: in which it asks besides, whatever the data.
    """
    metric = str(penalty.metric)
    chosen = "" if block.metric else ", since the direction file holds it" if metric != "weights" else ""
    lines = [f"metric {metric}{chosen}: the penalty measures {MEASURES[metric]}"]
    k = max(group.U.shape[2] for group in penalty.groups)
    if k == 0:
        lines.append("rank 0: no direction is free, every change counts")
    else:
        lines.append(f"projector {block.projector}, rank {k}: {_freedom(block.projector, k)}")
    if strength.lambda_reg > 0:
        lines.append(f"lambda_reg {strength.lambda_reg:g}: loss = task loss + {strength.lambda_reg:g} x penalty")
    else:
        lines.append("lambda_reg 0: the penalty is logged but not trained on")
    if strength.max_drift is not None:
        lines.append(
            f"max_drift {strength.max_drift:g}: after every step each layer is brought back to "
            f"{strength.max_drift:g} times what alignment moved it"
        )
    if strength.anchor_weight > 0:
        unasked = ", since the direction file holds the answers" if block.anchor_weight is None else ""
        asked = tokens_asked(own_answers_in(penalty.direction.spec), formats, general)
        most = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.sequence_len
        lines.append(
            f"anchor_weight {strength.anchor_weight:g}{unasked}: at every step {TEXTS} of the aligned model's stored "
            f"answers are scored, and the divergence from them is added to the loss, in nats per token; about {asked} "
            f"more tokens per step, where the task has up to {most:,}"
        )
        for text in formats:
            unasked = "" if block.prompt_formats else ", as the data put theirs"
            lines.append(f"prompt_formats: each answer's request is put as {text!r} too{unasked}")
        if block.prompt_formats is None and not cfg.rl:
            lines.append("prompt_formats: under the system prompts of the data too, which the run reads when it starts")
        if general:
            lines.append(
                f"general_formats true: under general system prompts and in later turns of a conversation too "
                f"({len(general)} forms, by turns with the others)"
            )
    if not block.lora_scaling:
        lines.append("lora_scaling false: dW is B A without PEFT's scaling, as in the authors' code")
    steps = cfg.gradient_accumulation_steps
    accumulated = f"{steps} micro-batch{'es' if steps > 1 else ''}"
    lines.append(f"the constraint acts once per optimizer step, whatever the accumulation ({accumulated} here)")
    return lines


def _freedom(projector: str, k: int) -> str:
    if projector == "subspace":
        return f"movement along the {k} leading aligned directions is free, all else counts"
    if projector == "normalized":
        return f"movement along the first aligned direction is free, along the next {k - 1} the freer the stronger"
    return f"movement along the {k} leading aligned directions counts less, by c = s^2 / ||d||"


def on_settings(block: AsftArgs, strength: Strengths, penalty: AlignmentPenalty, cfg: Any) -> list[str]:
    """Settings that let the run start and may not do what was meant, a line each."""
    found = _on_strength(strength, penalty, cfg)
    direction = penalty.direction
    for key in ("prompt_formats", "general_formats"):
        if getattr(block, key) and strength.anchor_weight == 0:
            found.append(f"{key} has no effect without an anchor_weight")
    held = [name for name in direction.spec.get("metrics", {}) if name != penalty.metric]
    if held and penalty.metric == "weights":
        found.append(f"the direction file holds the metric {held[0]}, which is not used; set metric: {held[0]}")
    stored = max(module.rank for module in direction.modules.values())
    if block.rank is not None and block.rank > stored:
        found.append(
            f"rank is {block.rank}, the direction file holds {stored} directions per layer; all of them are used"
        )
    used = max(group.U.shape[2] for group in penalty.groups)
    if not used and block.projector != "paper":
        rank = "0; give another rank" if block.rank == 0 else f"0, the default under metric {penalty.metric}; give rank"
        other = "" if penalty.metric == "weights" else ", or metric: weights"
        found.append(f"projector {block.projector} has no effect at rank {rank}{other}")
    if used and penalty.metric == "weights" and block.projector != "paper":
        found.append(
            f"projector {block.projector} leaves the way back to the base model free, which cost the safety in our "
            "benchmarks; set rank: 0, which leaves nothing free"
        )
    if used and block.projector == "paper":
        past = sum(_past_two(direction, layer.name) for layer in penalty.layers)
        if past:
            found.append(
                f"projector paper exceeds c = 2 in {past} layers, where an aligned update costs more than an "
                "orthogonal one; set projector: normalized, or rank: 0"
            )
    return found


def _on_strength(strength: Strengths, penalty: AlignmentPenalty, cfg: Any) -> list[str]:
    found = []
    low, high = MEASURED_LAMBDAS[str(penalty.metric)]
    weight = strength.lambda_reg
    if weight == 0 and strength.max_drift is None and strength.anchor_weight == 0:
        found.append(
            "lambda_reg is 0, and neither max_drift nor anchor_weight is set: nothing is constrained, and the numbers "
            "are only logged"
        )
    elif strength.holds_weights_alone(penalty.metric):
        found.append(WEIGHTS_ALONE)
    if weight and not low / FAR <= weight <= high * FAR:
        side = "less than a tenth of the smallest" if weight < low else "more than ten times the largest"
        found.append(
            f"lambda_reg is {weight:g}, {side} that our benchmarks measured for metric {penalty.metric} "
            f"({low:g} to {high:g})"
        )
    if strength.max_drift is not None and strength.max_drift >= 1:
        found.append(
            f"max_drift is {strength.max_drift:g}: the way back to the base model has length 1, and in our benchmarks "
            "a budget of 1 kept none of the safety; set a small fraction of 1"
        )
    optimizer = str(cfg.optimizer).lower()
    if weight and any(name in optimizer for name in NORMALISE_THE_UPDATE):
        found.append(f"optimizer {cfg.optimizer} normalises every update, so lambda_reg loses much of its meaning")
    return found


def on_coverage(block: AsftArgs, left_out: int, uncovered: int) -> list[str]:
    """What trains without the constraint because the block lets it.

    Args:
        left_out: LoRA layers that `modules` leaves out.
        uncovered: trainable weights without a direction, or without LoRA.
    """
    found = []
    if uncovered and block.on_uncovered != "error":
        found.append(
            f"on_uncovered is {block.on_uncovered}: {uncovered} trainable weights are not constrained; training can "
            "leave the alignment direction there"
        )
    if left_out:
        found.append(f"asft.modules leaves {left_out} LoRA layers out, which train without the constraint")
    if not block.verify_model:
        found.append("verify_model is false: a direction of another model with the same shapes would be accepted")
    return found


def on_pin(block: AsftArgs, direction: AlignmentDirection) -> list[str]:
    """A direction on the Hub that can change under its name."""
    wanted = hub_file(block.direction)
    if wanted is None or block.direction_sha256 is not None or is_commit(wanted.revision):
        return []
    return [
        f"direction is read at {wanted.revision or 'main'} of {wanted.repo}, which can change; pin it: "
        f"direction_sha256: {direction.sha256}"
    ]


def on_origin(direction: AlignmentDirection, base_model: str, revision: str | None) -> list[str]:
    """Which model the direction is for, by name and revision, held against the one that is trained."""
    found = []
    aligned, base = direction.spec["aligned"], direction.spec["base"]
    if not _same_name(aligned["id"], base_model):
        whose = "its base model" if _same_name(base["id"], base_model) else "another model"
        found.append(f"the direction is that of {aligned['id']}, and base_model {base_model} reads like {whose}")
    elif revision and aligned.get("revision") and revision != aligned["revision"]:
        found.append(
            f"the direction was made for revision {aligned['revision'][:12]} of {aligned['id']}, and base_model is at "
            f"{revision[:12]}; set revision_of_model, or make the direction again"
        )
    return found


def on_foreign_code(content: dict[str, Any], remote_code: bool) -> list[str]:
    """What of a config, perhaps a stranger's, would run code that is not axolotl's."""
    found = []
    if content.get("trust_remote_code"):
        here = "and this check ran it" if remote_code else "this check did not run it"
        found.append(f"trust_remote_code: {_code_of(content, NAMES_OF_A_REPOSITORY)}; {here}")
    for key in MODEL_KWARGS:
        block = _dict(content.get(key))
        if block.get("trust_remote_code"):  # past the key above: the model is loaded with it all the same
            found.append(f"{key}.trust_remote_code: {_code_of(content, NAMES_OF_THE_MODEL)}; this check did not run it")
        if block.get("allow_all_kernels"):
            found.append(f"{key}.allow_all_kernels: {ANY_KERNEL}")
    plugins = content.get("plugins")
    names = [str(name) for name in (plugins if isinstance(plugins, list) else [])]
    kernels = content.get("use_kernels")
    if kernels is None and any(name.endswith("kernels.KernelsPlugin") for name in names):
        kernels = True  # axolotl's plugin sets it
    if kernels:
        found.append(f"use_kernels: {ANY_KERNEL}")
    others = [name for name in names if name not in OUR_NAMES and not _of_axolotl(name)]
    for key, named in [("plugins", others), *_named_code(content).items()]:
        if named:
            found.append(f"{key}: {', '.join(named)} is code from outside axolotl; check where it comes from")
    return found


def _code_of(content: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Whose code is run: every repository that the config names, in its keys or for the classes of its model."""
    named = [str(content[key]) for key in keys if content.get(key)]
    for block in MODEL_CONFIG:
        classes = _strings(_dict(content.get(block)).get("auto_map"))
        named += [name.partition("--")[0] for name in classes if "--" in name]
    named = list(dict.fromkeys(named))
    return f"the run executes code of the repositor{'y' if len(named) == 1 else 'ies'} {', '.join(named)}"


def _named_code(content: dict[str, Any]) -> dict[str, list[str]]:
    """Key -> names that axolotl imports beside plugins and that are neither axolotl's nor TRL's."""
    functions: dict[str, list[Any]] = {"trainer_cls": [content.get("trainer_cls")]}
    for block, key in (("trl", "reward_funcs"), ("trl", "rollout_func"), ("hatchery", "reward_funcs")):
        functions[f"{block}.{key}"] = _list(_dict(content.get(block)).get(key))
    found = {key: [name for name in names if _is_foreign_function(name)] for key, names in functions.items()}
    alone = bool(content.get("rl"))
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        types = [_dict(entry).get("type") for entry in _list(content.get(key))]
        found[f"{key}[].type"] = [name for name in types if _is_foreign_type(name, alone)]
    blocks = {"": content, **{f"{key}.": _dict(content.get(key)) for key in (*MODEL_KWARGS, *MODEL_CONFIG)}}
    for place, values in blocks.items():
        for key in ("attn_implementation", "_attn_implementation"):
            # with a / it is a kernel, which is compiled code of the Hub
            found[place + key] = [name for name in _strings(values.get(key)) if "/" in name]
    return found


def _is_foreign_function(name: Any) -> bool:
    """Of `module.name`, imported as it stands, in which a module may be called anything; with a / it is a model."""
    if not isinstance(name, str) or "." not in name or "/" in name:
        return False
    return name.partition(".")[0] not in ("axolotl", "trl")


def _is_foreign_type(name: Any, alone: bool) -> bool:
    """Of `module.module.name`, whose loaders look for a part outside axolotl first, whatever stands before it.

    Args:
        alone: whether they do so for a name of one part, too, as under `rl`.
    """
    if not isinstance(name, str):
        return False
    modules = name.split(".")[:-1] or ([name] if alone else [])
    return not _modules_of_strategies().issuperset(modules)


@functools.cache
def _modules_of_strategies() -> frozenset[str]:
    spec = importlib.util.find_spec("axolotl.prompt_strategies")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    files = [path for folder in folders for path in Path(folder).rglob("*.py")]
    return frozenset({"axolotl", *(path.stem for path in files), *(path.parent.name for path in files)})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _strings(value: Any) -> list[str]:
    """Every text in a value, however deep."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for part in inner for text in _strings(part)]


def _of_axolotl(plugin: str) -> bool:
    """axolotl looks for a plugin among its integrations too: `liger.LigerPlugin`."""
    head = plugin.removeprefix("axolotl.integrations.").partition(".")[0]
    return head.isidentifier() and importlib.util.find_spec(f"axolotl.integrations.{head}") is not None


def _same_name(stored: str, given: str) -> bool:
    """Whether two names of a model, owner/name or a folder's path, are one; a folder has no owner to compare."""
    return stored.rstrip("/").rpartition("/")[2].lower() == given.rstrip("/").rpartition("/")[2].lower()


def _past_two(direction: AlignmentDirection, name: str) -> bool:
    module = direction.modules[name]
    return bool((projector_eigenvalues("paper", module.S, module.norm) > 2).any())
