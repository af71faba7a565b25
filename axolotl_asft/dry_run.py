"""A run's config looked at before it is run: what would be constrained, what it costs, what is wrong. No weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from axolotl_asft import advice
from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.anchor import own_answers_of
from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.attaching import frozen_by_budget, refused_of_continued, refused_of_taken_out
from axolotl_asft.checkpoint import INDEX_NAME, SINGLE_NAME
from axolotl_asft.cost import Cost, estimate, tokens_asked
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.engines import refuse_optimizer
from axolotl_asft.errors import AsftError
from axolotl_asft.general_formats import general_to_ask
from axolotl_asft.guard import refuse_misspelt_block
from axolotl_asft.hub import cached_folder, commit_of, direction_path, hub_file, hub_model, is_commit
from axolotl_asft.initialisation import takes_out
from axolotl_asft.lora import FoundLayer, trainable_lora_layers
from axolotl_asft.prompt_formats import refuse_other_template
from axolotl_asft.resuming import refuse_other_constraint
from axolotl_asft.run_config import (
    lora_model,
    missed_plugins,
    missed_targets,
    resumed_from,
    run_processor,
    run_tokenizer,
    validated_config,
)
from axolotl_asft.run_data import dataset_templates, missing_templates, run_formats
from axolotl_asft.settings import settings_of
from axolotl_asft.spec import own_answers_in
from axolotl_asft.strengths import strengths
from axolotl_asft.templates import template_warnings, text_tokenizer
from axolotl_asft.verify import verify_checkpoint
from axolotl_asft.yaml_config import read_config

OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
OF_A_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@dataclass
class Check:
    """What `axolotl asft check` found; plain data.

    Attributes:
        config: the file that was checked.
        errors: what would end the run, a line each.
        warnings: what would not, and should be known.
        settings: what the block asks for, in plain words.
        model: base_model, revision, architecture, parameters, LoRA's rank and initialisation.
        direction: where it comes from, its hash, whether it is pinned, whether the model's files agree with it.
        constrained: names of the constrained layers.
        unconstrained: name of a trainable layer or weight -> why it is not constrained.
        unused: how many layers of the direction file LoRA leaves alone.
        cost: estimates; None where no layer is constrained.
    """

    config: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    direction: dict[str, Any] = field(default_factory=dict)
    constrained: list[str] = field(default_factory=list)
    unconstrained: dict[str, str] = field(default_factory=dict)
    unused: int = 0
    cost: Cost | None = None

    @property
    def fine(self) -> bool:
        """Whether the run would start; there may be warnings."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Everything that `axolotl asft check --json` prints."""
        cost = None if self.cost is None else {**asdict(self.cost), "share_of_step": self.cost.share}
        return {"fine": self.fine, **{key: value for key, value in vars(self).items() if key != "cost"}, "cost": cost}


def check_config(path: str | Path, remote_code: bool = False, overrides: Mapping[str, Any] | None = None) -> Check:
    """Look at a config as `axolotl train` would, without its weights, its data or a GPU.

    Args:
        path: an axolotl YAML.
        remote_code: build the model with the code of its repository, where the YAML asks for it.
        overrides: of keys of the block, as the command line of a run gives them.
    """
    check = Check(str(path))
    try:
        _look(check, Path(path), remote_code, overrides or {})
    except AsftError as error:
        check.errors.append(str(error))
    return check


def _look(check: Check, path: Path, remote_code: bool, overrides: Mapping[str, Any]) -> None:
    """Everything in the order of a run, as far as it can be had; raises the error after which nothing can."""
    content = read_config(path) | {f"asft.{key}": value for key, value in overrides.items()}
    check.warnings += advice.on_foreign_code(content, remote_code)
    refuse_misspelt_block(content)
    if content.get("asft") is None and not any(str(key).startswith("asft.") for key in content):
        found = "the asft: block is empty" if "asft" in content else "the config has no asft: block"
        raise AsftError(
            f"{found}, so nothing would be constrained; add plugins: [asft] and asft: with direction: "
            "path/to/file.safetensors"
        )
    cfg = validated_config(content, remote_code)
    block = parse_block(cfg.asft.to_dict())
    _try(check, lambda: refuse_optimizer(str(cfg.optimizer), block.max_drift))
    direction = _try(check, lambda: _direction(check, block))
    if direction is not None:
        _try(check, lambda: _compare_weights(check, block, direction, cfg))
    code_left_out = bool(content.get("trust_remote_code")) and not remote_code
    tokenizer = _loaded(check, cfg, "tokenizer_config", OF_A_TOKENIZER, code_left_out, lambda: run_tokenizer(cfg))
    if tokenizer is not None:
        check.errors += missing_templates(cfg, tokenizer)
        _loaded(check, cfg, "processor_config", OF_A_PROCESSOR, code_left_out, lambda: run_processor(cfg, tokenizer))
    model, initialisation = lora_model(cfg)
    layers = trainable_lora_layers(model)
    check.model = {
        "base_model": cfg.base_model,
        "revision": _revision(cfg),
        "architecture": type(model.get_base_model()).__name__,
        "parameters": sum(weight.numel() for weight in model.get_base_model().parameters())
        - sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "lora_layers": len(layers),
        "lora_r": sorted({layer.A.shape[0] for layer in layers}),
        "initialisation": initialisation,
    }
    check.warnings += [*missed_plugins(cfg), *missed_targets(cfg, model)]
    if direction is None:
        return
    if (block.anchor_weight or 0) > 0:
        _try(check, lambda: own_answers_of(direction.spec))
    _refuse_initialisation(check, block, layers, initialisation, cfg)
    penalty = _match(check, block, direction, model)
    if penalty is None:
        return
    given = block.lambda_reg, block.max_drift, block.anchor_weight
    strength = strengths(penalty.metric, direction.spec, *given, taken_out=takes_out(initialisation))
    formats = run_formats(cfg, tokenizer, block.prompt_formats, direction.spec)
    asked = formats.asked if strength.anchor_weight > 0 else ()
    general: list[str] = []
    if strength.anchor_weight > 0:
        found = _try(check, lambda: general_to_ask(tokenizer, direction.spec, block.general_formats))
        general, lines = found or ([], [])
        check.warnings += lines
    check.cost = estimate(
        penalty.groups,
        check.model["parameters"],
        cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.sequence_len,
        checkpointing=bool(cfg.gradient_checkpointing),
        gradient=strength.lambda_reg > 0,
        budget=block.max_drift is not None,
        log_every=max(1, int(cfg.logging_steps or 500)),
        taken_out=takes_out(initialisation),
        anchor_tokens=tokens_asked(own_answers_in(direction.spec), asked, general) if strength.anchor_weight > 0 else 0,
    )
    _try(check, lambda: _refuse_output(cfg))
    if (checkpoint := resumed_from(cfg)) is not None:
        settings = settings_of(
            penalty, strength.lambda_reg, strength.max_drift, strength.anchor_weight, asked, bool(general)
        )
        if not formats.given:
            del settings["prompt_formats"]  # the data may bring more
        if tokenizer is None:
            del settings["general_formats"]  # nobody can tell
        _try(check, lambda: _refuse_checkpoint(Path(checkpoint), settings))
    check.settings = advice.in_plain_words(block, strength, penalty, cfg, asked, general)
    check.warnings += advice.on_settings(block, strength, penalty, cfg)
    check.warnings += frozen_by_budget(penalty, strength.max_drift)
    check.warnings += advice.on_pin(block, direction)
    if strength.holds_answers(penalty.metric):
        if strength.anchor_weight > 0:
            _try(check, lambda: refuse_other_template(text_tokenizer(tokenizer), direction.spec, asked))
        check.warnings += template_warnings(tokenizer, direction.spec, dataset_templates(cfg, tokenizer))
        check.warnings += formats.unheld(asked)
    if check.direction["weights"] != "agree":
        check.warnings += advice.on_origin(direction, check.model["base_model"], check.model["revision"])


def _try(check: Check, step: Any) -> Any:
    """A step after whose error the others can still be taken."""
    try:
        return step()
    except AsftError as error:
        check.errors.append(str(error))
        return None


def _loaded(check: Check, cfg: Any, key: str, files: tuple[str, ...], code_left_out: bool, load: Any) -> Any:
    """What axolotl loads beside the model; None where it cannot be, which is an error where all of it lies here.

    A Python package that is missing is a warning: the machine that trains may have it.

    Args:
        key: of the config, that says where it lies.
        files: which hold it; where the Hub's cache has none of them, there is nothing to say.
        code_left_out: the run has code of the repository that this check does without.
    """
    try:
        return load()
    except AsftError as error:
        if isinstance(error.__cause__, ImportError):
            check.warnings.append(f"{error}; install what it names here too, and check again: the run needs it")
        elif Path(cfg[key]).is_dir():
            hint = "; if it needs code from its repository, give --trust-remote-code" if code_left_out else ""
            (check.warnings if code_left_out else check.errors).append(f"{error}{hint}")
        elif _cached(cfg[key], cfg.revision_of_model, files):
            check.warnings.append(f"{error}; the run may find what is missing on this machine")
        return None


def _cached(location: str, revision: str | None, files: tuple[str, ...]) -> bool:
    """Whether the Hub's cache holds one of these files."""
    wanted = hub_model(location)
    return wanted is None or any(cached_folder(replace(wanted, revision=revision), [name]) for name in files)


def _refuse_checkpoint(checkpoint: Path, asked: dict[str, Any]) -> None:
    if not checkpoint.is_dir():
        raise AsftError(
            f"resume_from_checkpoint: there is no folder {checkpoint} (seen from {Path.cwd()}); give one that a run of "
            "this config saved"
        )
    refuse_other_constraint(checkpoint, asked)


def _direction(check: Check, block: AsftArgs) -> AlignmentDirection:
    wanted, file = hub_file(block.direction), direction_path(block.direction)
    direction = AlignmentDirection.load(file, block.direction_sha256)
    spec = direction.spec
    check.direction = {
        "direction": block.direction,
        "bytes": file.stat().st_size,
        "sha256": direction.sha256,
        "pinned": block.direction_sha256 is not None or (wanted is not None and is_commit(wanted.revision)),
        "modules": len(direction.modules),
        "metrics": ["weights", *spec.get("metrics", {})],
        "tool": spec["tool"],
        "created": spec["created"],
        "weights": "not here" if block.verify_model else "not asked",
        **{
            side: {key: spec[side].get(key) for key in ("id", "revision", "sha256", "read_as")}
            for side in ("base", "aligned")
        },
    }
    return direction


def _compare_weights(check: Check, block: AsftArgs, direction: AlignmentDirection, cfg: Any) -> None:
    if not block.verify_model:
        return
    folder = _folder(cfg)
    if folder is not None:
        check.direction["weights"] = "differ"  # if this is the last that is heard of it
        check.direction["weights"] = "agree" if verify_checkpoint(direction, str(folder)) else "not here"


def _refuse_output(cfg: Any) -> None:
    """One line for an output_dir that is no folder, which axolotl would find out after loading the model."""
    if cfg.output_dir and (path := Path(cfg.output_dir).expanduser()).exists() and not path.is_dir():
        raise AsftError(f"output_dir is {cfg.output_dir}, which is a file; give another name")


def _folder(cfg: Any) -> Path | None:
    """Where the weights of the base model lie on this machine, if they do."""
    wanted = hub_model(cfg.base_model)
    if wanted is None:
        path = Path(cfg.base_model).expanduser()
        return path if path.is_dir() else None
    wanted = replace(wanted, revision=cfg.revision_of_model)
    found = (cached_folder(wanted, ["config.json", name]) for name in (INDEX_NAME, SINGLE_NAME))
    return next((folder for folder in found if folder is not None), None)


def _revision(cfg: Any) -> str | None:
    """The commit of a base model on the Hub; its config.json is in the cache by now."""
    wanted = hub_model(cfg.base_model)
    if wanted is None:
        return None
    folder = cached_folder(replace(wanted, revision=cfg.revision_of_model), ["config.json"])
    return cfg.revision_of_model if folder is None else commit_of(folder / "config.json")


def _refuse_initialisation(
    check: Check, block: AsftArgs, layers: list[FoundLayer], initialisation: str | bool, cfg: Any
) -> None:
    """What a run finds out about an initialisation that takes a part out of the weights, which was not run here."""
    if not takes_out(initialisation):
        return
    if cfg.lora_model_dir:
        check.errors.append(refused_of_continued(cfg.lora_model_dir))
    check.errors += refused_of_taken_out(layers[0].name, block.max_drift, block.anchor_weight)
    local = Path(cfg.base_model).expanduser().is_dir()
    if initialisation == "loftq" and block.verify_model and not (local and check.direction["weights"] == "agree"):
        check.errors.append(
            "LoftQ replaces the weights with rounded ones, so the run can identify the model only by its files; give "
            "base_model as a local folder, or set verify_model: false"
        )


def _match(check: Check, block: AsftArgs, direction: AlignmentDirection, model: PeftModel) -> AlignmentPenalty | None:
    """The run's own matching of layers and directions, by whole name and shape."""
    others = {"direction", "direction_sha256", "lambda_reg", "max_drift", "anchor_weight"}
    others |= {"prompt_formats", "general_formats"}
    options = block.model_dump(exclude=others) | {"verify_model": False}  # there are no weights to look at
    penalty = _try(check, lambda: AlignmentPenalty(model, direction, **options))
    if penalty is None:  # was it for the uncovered ones?
        try:
            penalty = AlignmentPenalty(model, direction, **{**options, "on_uncovered": "ignore"})
        except AsftError:
            return None
    found = penalty.match
    check.constrained = [layer.name for layer in found.covered]
    check.unconstrained = {
        **found.uncovered,
        **dict.fromkeys(found.left_out, "asft.modules leaves it out"),
        **dict.fromkeys(found.others, "trained in full, not through LoRA"),
    }
    check.warnings += advice.on_coverage(block, len(found.left_out), len(found.uncovered) + len(found.others))
    check.unused = len(set(direction.modules) - {layer.name for layer in found.trained})
    return penalty
