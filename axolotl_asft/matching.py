"""The LoRA layers of a model and the layers of a direction file, matched by whole name."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from axolotl_asft.direction import AlignmentDirection, ModuleDirection, select_modules
from axolotl_asft.errors import AsftError
from axolotl_asft.lora import FoundLayer, frozen_lora_layers, other_trainable_parameters, trainable_lora_layers

LOG = logging.getLogger("axolotl.asft")
NO_SUCH_LAYER = "the direction file has no such layer"
TOWERS = ("vision", "visual", "audio", "multi_modal", "embed_vision", "embed_audio")  # axolotl's freeze_mm_modules


@dataclass(frozen=True)
class Match:
    """What of a model the penalty covers, and what it does not.

    Attributes:
        trained: the LoRA layers that train, in the model's order.
        covered: those of them that the penalty measures.
        uncovered: name -> why, of those that it does not measure though they are chosen.
        left_out: names of those that `modules` does not choose.
        frozen: names of chosen LoRA layers that do not train and change the model all the same.
        others: names of the trainable weights that are no LoRA layer.
    """

    trained: list[FoundLayer]
    covered: list[FoundLayer]
    uncovered: dict[str, str]
    left_out: list[str]
    frozen: list[str]
    others: list[str]


def match(model: nn.Module, direction: AlignmentDirection, metric: str, modules: list[str] | None = None) -> Match:
    """Match the layers of a model with those of a direction.

    Args:
        metric: "weights", or one that the direction file has to hold.
        modules: regular expressions of the layers to choose; None: all.

    Raises:
        AsftError: no layer is covered; the direction file does not hold the metric; an expression that chooses nothing.
    """
    trained = trainable_lora_layers(model)
    names = [layer.name for layer in trained]
    frozen = frozen_lora_layers(model, {layer.adapter for layer in trained})
    chosen = set(select_modules([*names, *frozen], modules) if modules else [*names, *frozen])
    unmeasured = {name: _why_not(module, metric) for name, module in direction.modules.items()}
    measured = [name for name, why in unmeasured.items() if not why]
    if not measured:
        raise AsftError(_nothing_measured(direction, metric))
    reasons = {name: unmeasured.get(name, NO_SUCH_LAYER) for name in names if name in chosen}
    found = Match(
        trained=trained,
        covered=[layer for layer in trained if reasons.get(layer.name) == ""],
        uncovered={name: why for name, why in reasons.items() if why},
        left_out=[name for name in names if name not in chosen],
        frozen=[name for name in frozen if name in chosen],
        others=other_trainable_parameters(model, trained),
    )
    if not found.covered:
        raise AsftError(_nothing_covered(found, metric, measured[0], bool(modules)))
    return found


def report_gaps(found: Match, metric: str, on_uncovered: str) -> None:
    """Tell of what changes the model and is not covered, as `on_uncovered` says.

    Raises:
        AsftError: there is such, under "error".
    """
    for text, instead in _gaps(found, metric) if on_uncovered != "ignore" else []:
        if on_uncovered == "error":
            raise AsftError(f"{text}; {instead}, or set asft.on_uncovered: warn")
        LOG.warning(text)


def _gaps(found: Match, metric: str) -> Iterable[tuple[str, str]]:
    """What it is, and what to do about it."""
    what, names = [], [*found.uncovered, *found.others]
    if found.uncovered:
        what.append(f"{len(found.uncovered)} LoRA layers without a direction{_in_the(metric)} (first {names[0]})")
    if found.others:
        what.append(f"{len(found.others)} trainable weights that are not LoRA layers (first {found.others[0]})")
    if what:
        tower = any(part.startswith(TOWERS) for name in names for part in name.split("."))
        hints = ["freeze_mm_modules: true, where a model reads images"] if tower else []
        if found.uncovered:
            hints.append("lora_target_modules may be a regular expression for the layers that have one")
        if any(".lora_" in name for name in found.others):
            hints.append(
                "LoRA is also on what is no linear layer, such as experts in one weight, convolutions or embeddings: "
                "take that out of lora_target_parameters and lora_target_modules"
            )
        how = f" ({'; '.join(hints)})" if hints else ""
        yield (
            f"the penalty does not cover {' and '.join(what)}, so training can leave the alignment direction there",
            f"leave them out of training{how}",
        )
    if found.frozen:
        yield (
            f"{len(found.frozen)} LoRA layers do not train but still change the model (first {found.frozen[0]}), "
            "which no penalty covers",
            "train all of the adapter",
        )


def _why_not(module: ModuleDirection, metric: str) -> str:
    """Why a layer of the direction cannot be measured; "" where it can be. A tower of images has no metric."""
    if metric == "weights":
        return ""
    if metric not in module.metrics:
        return f"the direction file has no metric {metric} for it"
    return "" if module.metrics[metric].sees() else f"the direction file's metric {metric} is empty for it"


def _nothing_measured(direction: AlignmentDirection, metric: str) -> str:
    instead = f"`axolotl asft extract --metric {metric}`, or set metric: weights"
    if any(metric in module.metrics for module in direction.modules.values()):
        return (
            f"the direction's metric {metric} is empty in every layer, so it would hold nothing; make it again "
            f"with {instead}"
        )
    return f"metric is {metric!r}, which the direction file does not hold; make it with {instead}"


def _nothing_covered(found: Match, metric: str, measured: str, is_choice: bool) -> str:
    """The error where every chosen layer lacks a direction, or none of them trains."""
    if not found.uncovered:
        return (
            f"none of the LoRA layers that modules selects is trained (first {found.frozen[0]}); select layers that "
            f"are trained, such as {found.trained[0].name}"
        )
    which = "LoRA layers that modules selects" if is_choice else f"{len(found.uncovered)} LoRA layers"
    instead = ", or select layers that it has" if is_choice else ""
    return (
        f"none of the {which} has a direction{_in_the(metric)}; the first of them is {next(iter(found.uncovered))}, "
        f"the direction file's first {measured}; use the direction of this model{instead}"
    )


def _in_the(metric: str) -> str:
    return "" if metric == "weights" else f" in the metric {metric}"
