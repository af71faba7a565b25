"""The way in: a trainer, a direction, and how strong; out comes a `Constraint` in the trainer."""

import inspect
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer

from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.constraint import Constraint
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.engines import engine, refuse_unsupported
from axolotl_asft.errors import AsftError, did_you_mean
from axolotl_asft.general_formats import general_to_ask
from axolotl_asft.packing import never_packed
from axolotl_asft.prompt_formats import asked_in, checked_formats
from axolotl_asft.strengths import WEIGHTS_ALONE, strengths
from axolotl_asft.templates import template_warnings

LOG = logging.getLogger("axolotl.asft")


def attach(
    trainer: Trainer,
    direction: AlignmentDirection,
    lambda_reg: float | None = None,
    max_drift: float | None = None,
    anchor_weight: float | None = None,
    *,
    chat_templates: Sequence[str] = (),
    prompt_formats: Sequence[str] = (),
    general_formats: bool | None = None,
    **options: Any,
) -> Constraint:
    """Train with L = L_task + lambda_reg P + anchor_weight KL from the first step to the last (AsFT, arXiv 2506.08473).

    Args:
        trainer: a transformers or TRL trainer over a PEFT model. To continue training a saved adapter it must use plain
            LoRA initialisation: the starting points of PiSSA and its like are not stored in an adapter's file.
        direction: the alignment direction of the trainer's model.
        lambda_reg: weight of the penalty, 0 or more; at 0 it is measured but not trained on. None: 0.1 for
            metric="fisher" with an anchor, 0 with max_drift, else 1.
        max_drift: budget: after every step ||(I - C) dW|| of each layer is at most this times ||d||; None or 0: none.
        anchor_weight: weight of KL(aligned || current), nats per token, on the aligned model's stored answers, a few of
            which are scored at each step; the direction file has to hold them. 0: no anchor. None: 3 for
            metric="fisher" without max_drift if the file holds them (`axolotl_asft.strengths`), else 0.
        chat_templates: the templates that the data are rendered with, if not the tokenizer's own; a warning is logged
            if a template opens the answer differently from the direction file's requests.
        prompt_formats: texts that the data put around a request in place of a chat template, each with {prompt} in its
            place: the anchor asks in these too, in turn with the chat template. Without an anchor they have no effect.
        general_formats: whether the anchor also asks under general system prompts, and in later turns of a
            conversation, to be answered as the first (`axolotl_asft.general_formats`). None: where the tokenizer's chat
            template is the direction's.
        options: as for `AlignmentPenalty`: projector, rank, metric, lora_scaling, modules, on_uncovered, verify_model.

    The logged loss remains the task's. The penalty counts once per optimizer step, see `Constraint`. Evaluation is not
    affected.

    Raises:
        AsftError: an unsuitable lambda_reg, model, direction or training setup; a second `attach`.
    """
    if not isinstance(trainer, Trainer):
        raise AsftError(f"attach was given a {type(trainer).__name__}; expected a transformers or TRL trainer first")
    if not isinstance(direction, AlignmentDirection):
        raise AsftError(f"direction is a {type(direction).__name__}; expected AlignmentDirection.load(file)")
    known = inspect.signature(AlignmentPenalty).parameters
    if unknown := [name for name in options if name not in known]:
        raise AsftError(f"attach knows no {unknown[0]}; {did_you_mean(unknown[0], known, 'see its docstring')}")
    weights = {"lambda_reg": lambda_reg, "max_drift": max_drift, "anchor_weight": anchor_weight}
    for name, weight in weights.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if weight is not None and not (number and math.isfinite(weight) and weight >= 0):
            raise AsftError(f"{name} is {weight!r}; expected a finite number, 0 or more")
    max_drift = max_drift or None
    formats = checked_formats(prompt_formats)
    attached: Callable[..., Any] = trainer.log
    if isinstance(getattr(attached, "__self__", None), Constraint):
        raise AsftError("the constraint is already attached to this trainer; attach it once")
    refuse_unsupported(trainer, max_drift)
    if trainer.model is None:
        raise AsftError("the trainer has no model; expected a PEFT model")
    if getattr(trainer, "model_init", None) is not None:
        raise AsftError(
            "the trainer creates a new model when training starts (model_init), which the constraint would not cover; "
            "give it the model itself"
        )
    never_packed(trainer.model)
    penalty = AlignmentPenalty(trainer.model, direction, **options)
    frozen = [layer.name for layer in penalty.layers if not layer.B.requires_grad]
    if max_drift is not None and frozen:
        raise AsftError(
            f"max_drift cannot shorten {frozen[0]}, whose B does not train; train it, or use lambda_reg in place of a "
            "budget"
        )
    taken = [layer.name for layer in penalty.layers if layer.was_taken_out]
    given = lambda_reg, max_drift, anchor_weight
    strength = strengths(penalty.metric, direction.spec, *given, taken_out=bool(taken))
    if taken and (refused := refused_of_taken_out(taken[0], max_drift, strength.anchor_weight)):
        raise AsftError(refused[0])
    if strength.holds_weights_alone(penalty.metric):
        LOG.warning("AsFT: %s", WEIGHTS_ALONE)
    for line in frozen_by_budget(penalty, max_drift):
        LOG.warning("AsFT: %s", line)
    if strength.holds_answers(penalty.metric):
        for line in template_warnings(getattr(trainer, "processing_class", None), direction.spec, chat_templates):
            LOG.warning("AsFT: %s", line)
    general: list[str] = []
    if strength.anchor_weight > 0:
        tokenizer = getattr(trainer, "processing_class", None)
        general, lines = general_to_ask(tokenizer, direction.spec, general_formats)
        for line in lines:
            LOG.warning("AsFT: %s", line)
    constraint = Constraint(trainer, penalty, strength.lambda_reg, max_drift, strength.anchor_weight, formats, general)
    LOG.info(
        "AsFT: %d layers constrained, training on %s, lambda_reg %g, %s, anchor_weight %g%s, projector %s, "
        "metric %s, direction of %s (sha256 %s)",
        len(penalty.layers),
        "one device" if (carried := engine(trainer)) == "NO" else carried,
        strength.lambda_reg,
        "no budget" if max_drift is None else f"max_drift {max_drift:g}",
        strength.anchor_weight,
        asked_in(constraint.prompt_formats, constraint.general_formats),
        penalty.projector,
        penalty.metric,
        direction.spec["aligned"]["id"],
        (direction.sha256 or "unsaved")[:12],
    )
    return constraint


def refused_of_taken_out(layer: str, max_drift: float | None, anchor_weight: float | None) -> list[str]:
    """What cannot be asked of a layer whose initialisation took a part out of the weight, a line each."""
    taken, plain = f"the initialisation of {layer} removed a part of the weight", "use plain LoRA initialisation"
    found = []
    if max_drift is not None:
        found.append(f"max_drift cannot shorten an update: {taken}; use lambda_reg, or {plain}")
    if (anchor_weight or 0) > 0:
        found.append(f"anchor_weight cannot score the aligned model: {taken}; set anchor_weight: 0, or {plain}")
    return found


def refused_of_continued(adapter: str) -> str:
    """The line for a saved adapter whose start took a part out of the weight: where it started is not in its file."""
    return (
        f"the initialisation of the adapter {adapter} removed a part of the weights, and how far it has moved since is "
        "not known; continue from one with plain LoRA initialisation, or train anew"
    )


def frozen_by_budget(penalty: AlignmentPenalty, max_drift: float | None) -> list[str]:
    """A line for a budget in multiples of what alignment moved, over layers where that is nothing."""
    if max_drift is None or not (names := penalty.unmoved()):
        return []
    nothing = "alignment did not move them"
    if penalty.metric != "weights":
        nothing = f"alignment did not move them in the metric {penalty.metric}"
    return [
        f"max_drift lets {len(names)} of {len(penalty.layers)} layers learn nothing, since {nothing} (first "
        f"{names[0]}); remove them from LoRA's targets, or set lambda_reg in place of max_drift"
    ]
